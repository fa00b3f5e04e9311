"""The CUDA kernels' own sources, compiled as C++ and run on a CPU: see cuda_on_cpu/.

Here "cuda" is a backend for CPU tensors. Every launch runs twice, the second time with threads and blocks in the
opposite order, and must give the same bits.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import CSRC, build_script, compile_cached
from suite import DTYPES, VIEWS, OpSuite, Place, assert_same, errors, flat, misaligned
from torch import Tensor

from fastgen import backends, ops, testing

STAND_IN = Path(__file__).parent / "cuda_on_cpu"
HERE = Place("cuda", "cpu")
pytestmark = pytest.mark.timeout(1800)  # the compiler's, on a busy machine


STEMS = sorted(f.stem for f in (CSRC / "cuda").glob("*.cu"))
# The suites of every op that has a CUDA kernel.
SUITES = [
    c
    for stem in STEMS
    for c in vars(importlib.import_module(f"test_{stem}")).values()
    if isinstance(c, type) and issubclass(c, OpSuite) and backends.STEMS.get(c.op) == stem
]


@functools.cache  # a library is loaded once, though test_cuda_on_cpu_norm.py has the fixture too
def load(folder: Path) -> Any:
    build = build_script()
    compiler, version = build.find_compiler()
    if compiler is None or "clang" in version:
        pytest.skip(f"needs g++: {version}")
    torch_folder, torch_version = build.find_torch()
    flags = [f for f in build.CXX_FLAGS if f != "-O3"] + ["-O1", "-Wno-unknown-pragmas", "-fsanitize=alignment"]
    command = [*compiler, "-x", "c++", *flags, f"-I{STAND_IN}", f"-I{CSRC}", "-isystem", torch_folder / "include"]
    sources = [*(CSRC / "cuda").glob("*.cu"), *STAND_IN.glob("*.cu"), STAND_IN / "runtime.cpp"]
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *STAND_IN.rglob("*.h"), *STAND_IN.rglob("*.cuh")]
    objects = compile_cached(command, sources, headers, folder, f"{version} {torch_version}")
    library = folder / f"libcuda_on_cpu-{os.getpid()}.so"
    link = [*compiler, "-shared", *(o for o, _ in objects.values()), "-L", torch_folder / "lib"]
    done = subprocess.run(
        [*map(str, link), "-ltorch_cpu", "-ltorch", "-lc10", "-Wl,-z,defs", "-o", str(library)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)
    library.unlink()
    return torch.ops.fastgen_cuda_on_cpu


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> Any:
    """torch.ops.fastgen_cuda_on_cpu: the launchers of csrc/cuda/*.cu for CPU tensors."""
    return load(Path(request.config.cache.mkdir("cuda_on_cpu")))


def both_orders(kernels: Any, launcher: Any) -> Callable[..., None]:
    """The launcher, run twice; what it writes must not depend on the order of threads and blocks."""
    written = [i for i, a in enumerate(launcher._schema.arguments) if a.alias_info is not None]

    def run(*args: Any) -> None:
        outputs = [args[i] for i in written if args[i] is not None]
        assert all(o.is_floating_point() or o.dtype in (torch.uint8, torch.int64) for o in outputs)
        launcher(*args)
        first = [o.clone() for o in outputs]
        for o in outputs:
            o.fill_(7)
        kernels.run_descending(True)
        try:
            launcher(*args)
        finally:
            kernels.run_descending(False)
        for a, b in zip(first, outputs):
            assert torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30)), f"{launcher} depends on the order of threads"

    return run


@pytest.fixture(autouse=True)
def cuda_for_cpu_tensors(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    why_not, kernel = backends.why_not, backends.kernel

    def answer(op: str, backend: str, device: str) -> str | None:
        here = (backend, device) == ("cuda", "cpu") and backends.STEMS[op] in STEMS
        return None if here else why_not(op, backend, device)

    def launcher(op: str, function: str, backend: str) -> Callable[..., None]:
        if backend != "cuda":
            return kernel(op, function, backend)
        return both_orders(kernels, getattr(kernels, function).default)

    monkeypatch.setattr(backends, "why_not", answer)
    monkeypatch.setattr(backends, "kernel", launcher)


# The suite, as for any backend


def layouts(case: testing.OpCase) -> tuple[bool, ...]:
    four = any(isinstance(v, Tensor) and v.ndim == 4 for k, v in case.inputs().items() if k in case.images)
    return (False, True) if four else (False,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("suite", SUITES, ids=lambda s: s.op)
def test_parity(suite: type[OpSuite], dtype: torch.dtype) -> None:
    """Outputs and gradients within the tolerance rule; noise and bytes to the bit."""
    for case in [*suite.cases(), suite.at_size]:
        for last in layouts(case):
            assert not errors(case, HERE, dtype, last), f"{case}{' channels last' if last else ''}"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("suite", SUITES, ids=lambda s: s.op)
def test_views(suite: type[OpSuite], view: str) -> None:
    for case in suite.few_cases():
        suite().test_views(HERE, case, view)


CHECKS = ("test_output_layout", "test_mixed_layouts", "test_repeats", "test_batch_invariance", "test_gradcheck")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("suite", SUITES, ids=lambda s: s.op)
def test_suite(suite: type[OpSuite], check: str) -> None:
    for case in suite.few_cases():
        getattr(suite(), check)(HERE, case)


# The same bits as the C++ kernels, wherever a kernel draws noise or adds and multiplies alone

# N, C, H, W: by rows, with and without a rest; where channels are innermost by tiles of 3 and of 4 channels, by single
# channels, and where four positions straddle two of them; one position; more than a block of threads.
SHAPES = (
    (2, 3, 5, 7), (3, 3, 4, 4), (2, 4, 2, 6), (2, 4, 3, 3), (2, 5, 4, 6), (2, 16, 3, 5), (3, 6, 1, 1), (1, 1, 9, 1),
    (2, 3, 40, 36), (2, 8, 20, 24), (1, 1, 33, 131),
)  # fmt: skip


def images(count: int, shape: tuple[int, ...], dtype: torch.dtype, last: bool, shifted: bool) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    for _ in range(count):
        x = torch.randn(shape, generator=g).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        yield x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x) if shifted else x


def same(op: Callable, *args: Any, **kwargs: Any) -> None:
    """The CUDA kernels give what the C++ kernels give, bit for bit."""
    actual, expected = (flat(op(*args, **kwargs, backend=b)) for b in ("cuda", "cpp"))
    assert_same(actual, expected)
    assert [a.stride() for a in actual] == [e.stride() for e in expected]


@pytest.mark.parametrize("shifted", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(dtype: torch.dtype, last: bool, shifted: bool) -> None:
    for shape in SHAPES:
        n = shape[0]
        g = torch.Generator().manual_seed(n)
        table, coefficients, guidance = (torch.randn(s, generator=g) for s in ((5, 2), (4, 9), (n,)))
        x, history, noise = images(3, shape, dtype, last, shifted)
        t, step = torch.arange(n) * 2 % 5, torch.tensor(2)
        same(ops.to_uint8, x)
        for source in ({"noise": noise}, {"seeds": torch.arange(n) * 0x123456789ABCDEF - 5}):
            same(ops.q_sample, x, t, table, **source)
            for model in DTYPES if shape == SHAPES[1] else (dtype, torch.float32):
                (m,) = images(1, (2 * n, *shape[1:]), model, last, shifted)
                same(ops.diffusion_step, x, m[:n], coefficients, step, **source)
                more = {"guidance": guidance, "clip": 0.75, "history": history, "keep": "eps"}
                same(ops.diffusion_step, x, m, coefficients, step, **more, **source)


def test_philox() -> None:
    seeds = torch.tensor([0, -1, 2**62, 77])
    for n in (0, 1, 3, 4, 8, 1030):
        for step, stream in ((0, 0), (2**32 - 1, 4), (17, 2**32 - 1)):
            same(ops.philox_bits, seeds, n, step, stream)
            for dtype in DTYPES:
                same(ops.philox_normal, seeds, (n,), step, stream, dtype)


def test_images_beyond_the_first_counters() -> None:
    """Noise that begins anywhere in a batch is that image's own, from its first element on."""
    seeds = torch.arange(600)
    same(ops.philox_normal, seeds, (3,))
    same(ops.philox_normal, seeds[:2], (70_001,))


# The divergence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergence_of_images_of_many_blocks(dtype: torch.dtype) -> None:
    """Two stages of sums: right, and the same whatever the batch, the alignment and the source of the noise."""
    g = torch.Generator().manual_seed(3)
    mu, logvar = (torch.randn(2, 3, 64, 92, generator=g).to(dtype) for _ in range(2))
    seeds = torch.tensor([4, 5])
    for memory in (torch.contiguous_format, torch.channels_last):
        m, v = mu.contiguous(memory_format=memory), logvar.contiguous(memory_format=memory)
        z, kl = ops.reparameterize(m, v, seeds=seeds, backend="cuda")
        exact = ops.reparameterize_reference(m.double(), v.double(), seeds=seeds)[1]
        torch.testing.assert_close(kl.double(), exact, rtol=1e-12 if dtype == torch.float64 else 3e-7, atol=0)
        noise = ops.philox_normal(seeds, mu.shape[1:], 0, ops.Stream.REPARAMETERIZE)
        again, same_kl = ops.reparameterize(m, v, noise.to(torch.promote_types(dtype, torch.float32)), backend="cuda")
        assert torch.equal(kl, same_kl) and (dtype.itemsize < 4 or torch.equal(z, again))
        assert torch.equal(ops.reparameterize(m[1:], v[1:], seeds=seeds[1:], backend="cuda")[1], kl[1:])
        if memory == torch.contiguous_format:
            shifted = ops.reparameterize(misaligned(m), misaligned(v), seeds=seeds, backend="cuda")
            assert torch.equal(shifted[0], z) and torch.equal(shifted[1], kl)


def test_latents_without_elements() -> None:
    z, kl = ops.reparameterize(torch.zeros(3, 0), torch.zeros(3, 0), seeds=torch.arange(3), backend="cuda")
    assert z.shape == (3, 0) and torch.equal(kl, torch.zeros(3))


# Offsets, and the stand-in itself

ROWS, TILES3, TILES4, SCATTERED = range(4)


@pytest.mark.parametrize(
    "walk, channels, positions",
    [
        (ROWS, 1, 2**33 + 5), (TILES3, 3, 2**32 + 8), (TILES4, 4, 2**32 + 4), (SCATTERED, 5, 2**32 + 4),
        (SCATTERED, 3, 2**31 + 1), (SCATTERED, 7, 1), (SCATTERED, 2, 3), (ROWS, 1, 9), (SCATTERED, 8, 64),
    ],
)  # fmt: skip
def test_offsets(kernels: Any, walk: int, channels: int, positions: int) -> None:
    """Every item finds its elements, in images of more than 2^31 elements and beyond 2^40 into the batch too."""
    size, each = channels * positions, {ROWS: 8, TILES3: 12, TILES4: 16, SCATTERED: 4}[walk]
    items = -(-size // each)
    for image in (0, 1, 77, 2**20 - 1):
        for item in {0, items // 3, max(0, items - 2), items - 1}:
            out = torch.zeros(20, dtype=torch.int64)
            kernels.places(walk, channels, positions, items, image * items + item, out)
            found, first, count, kept, *places = out.tolist()
            assert (found, kept) == (image, each)
            if walk in (TILES3, TILES4):
                expected = [item * each + j for j in range(each)]
                assert first == item * each // channels
            else:
                if walk == SCATTERED and positions % each == 0:
                    assert first == item % channels * positions + item // channels * each
                else:
                    assert first == item * each
                elements = [first + j for j in range(count)]
                expected = [e % positions * channels + e // positions for e in elements]
            assert count == min(each, size - item * each)
            assert places[:count] == [image * size + e for e in expected]


def test_every_element_has_one_item(kernels: Any) -> None:
    for walk, channels, positions in (
        (ROWS, 1, 37),
        (TILES3, 3, 8),
        (TILES4, 4, 12),
        (SCATTERED, 5, 8),
        (SCATTERED, 5, 7),
    ):
        each = {ROWS: 8, TILES3: 12, TILES4: 16, SCATTERED: 4}[walk]
        items, seen = -(-channels * positions // each), []
        for item in range(items):
            out = torch.zeros(20, dtype=torch.int64)
            kernels.places(walk, channels, positions, items, item, out)
            seen += out[4 : 4 + int(out[2])].tolist()
        assert sorted(seen) == list(range(channels * positions))


def test_quotient(kernels: Any) -> None:
    out = torch.zeros((), dtype=torch.int64)
    numbers = [0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 10**15 + 7, 2**62 + 1, 2**63 - 1]
    for a in numbers:
        for b in (n for n in numbers if 0 < n <= 2**62):
            kernels.quotients(a, b, out)
            assert out == a // b, (a, b)


@pytest.mark.parametrize("what, message", [(0, "never come"), (1, "never come"), (2, "misaligned")])
def test_stand_in_is_strict(kernels: Any, what: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels.wrong(what, torch.zeros(64))
    x = torch.zeros(64)
    kernels.wrong(4, x)  # and goes on
    assert torch.equal(x, torch.full((64,), 2016.0))


def test_stand_in_finds_dependence_on_the_order(kernels: Any) -> None:
    with pytest.raises(AssertionError, match="order of threads"):
        both_orders(kernels, kernels.wrong.default)(3, torch.zeros(64))
    both_orders(kernels, kernels.wrong.default)(4, torch.zeros(64))
