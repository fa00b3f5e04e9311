"""group_norm_act, bias_act and upfirdn2d in CUDA C++, beyond what test_cuda_on_cpu.py asks of every kernel: the ways
that large tensors take, on small ones; 16-byte accesses in each layout; which elements a thread has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from suite import Place, errors
from test_cuda_on_cpu import cuda_for_cpu_tensors, kernels  # noqa: F401 - fixtures

from fastgen import ops
from fastgen.testing import OpCase, _bias_act, _group_norm_act, _upfirdn2d

HERE = Place("cuda", "cpu")
pytestmark = pytest.mark.timeout(1800)  # the compiler's, on a busy machine
# What the GPU has: clusters of 8 blocks (9.0 on); none (8.0); too little shared memory for any group.
WAYS = {"clusters": ("232448", "8"), "alone": ("166912", "1"), "split": ("1", "1")}
# A second source behind which a group straddles; parts of unequal size; channels that no group fills evenly with 16
# bytes; a part of a cluster that has nothing.
NORMS = (
    _group_norm_act(2, 16, 8, 8, groups=4, scale_shift=True, skip=8),
    _group_norm_act(1, 8, 40, 41, groups=1, skip=8),
    _group_norm_act(2, 32, 4, 6, groups=32, act="gelu"),
    _group_norm_act(1, 256, 6, 6, groups=1),
)
OTHERS = (
    _bias_act(2, 16, 8, 8, act="swish", clamp=1.0), _bias_act(9, 136, act="elu"), _bias_act(1, 8, 48, 40),
    _upfirdn2d(2, 16, 9, 8, taps=(4, 4), up=(2, 2), padding=(2, 1, 2, 1)),
    _upfirdn2d(1, 3, 21, 70, taps=(4, 4), up=(2, 2), padding=(2, 1, 2, 1)),
    _upfirdn2d(1, 2, 37, 70, taps=(12,), down=(2, 2), padding=(5, 5, 5, 5)),
    _upfirdn2d(1, 8, 10, 33, taps=(12,), up=(2, 2), padding=(6, 5, 6, 5)),
    _upfirdn2d(3, 40, 4, 4, taps=(4, 4), padding=(2, 1, 2, 1), flip=True),
    _upfirdn2d(1, 2, 9, 70, taps=(3,), padding=(1, 1, 1, 1)),
    _upfirdn2d(1, 1, 20, 20, taps=(60, 60), padding=(30, 30, 30, 30)),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("CUDA_ON_CPU_SHARED", "CUDA_ON_CPU_CLUSTER"), WAYS[way], strict=True):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_every_way_of_group_norm_act(
    case: OpCase, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(way, monkeypatch)
    for last in (False, True):
        assert not errors(case, HERE, dtype, last)


@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_the_same_in_any_batch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(way, monkeypatch)
    x = torch.randn(3, 8, 24, 32, dtype=torch.bfloat16, requires_grad=True)
    y = ops.group_norm_act(x, 2, backend="cuda")
    (dx,) = torch.autograd.grad(y, x, torch.cos(y.detach()))
    one = x[1:2].detach().requires_grad_()
    alone = ops.group_norm_act(one, 2, backend="cuda")
    assert torch.equal(alone[0], y[1])
    assert torch.equal(torch.autograd.grad(alone, one, torch.cos(alone.detach()))[0][0], dx[1])


@pytest.mark.parametrize("way", WAYS)
def test_alignment_changes_no_bit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that allow 16-byte accesses, at an address that does not."""
    take(way, monkeypatch)
    for last in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 16, 8, 40).to(torch.bfloat16).contiguous(memory_format=last)
        shifted = x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)
        found = []
        for given in (x, shifted):
            given = given.detach().requires_grad_()
            y = ops.group_norm_act(given, 4, backend="cuda")
            y = y + ops.bias_act(given, x[0, :, 0, 0], act="swish", backend="cuda")
            found.append((y, *torch.autograd.grad(y, given, torch.cos(y.detach()))))
        for a, e in zip(*found, strict=True):
            assert torch.equal(a, e)


def test_statistics_far_from_zero() -> None:
    """Centred sums: a mean of 4096 deviations takes nothing from the variance."""
    x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)) + 4096
    for last in (torch.contiguous_format, torch.channels_last):
        y = ops.group_norm_act(x.contiguous(memory_format=last), 2, act="none", backend="cuda")
        expected = ops.group_norm_act_reference(x.double(), 2, act="none")
        assert (y - expected).abs().max() < 2e-3  # x itself is rounded to 2.4e-4


@pytest.mark.parametrize("case", OTHERS, ids=lambda c: f"{c.op}-{c}")
def test_vectors_and_tiles(case: OpCase) -> None:
    for dtype in DTYPES:
        for last in (False, True) if case.inputs()["x"].ndim == 4 else (False,):
            assert not errors(case, HERE, dtype, last), f"{dtype}{' channels last' if last else ''}"


def test_second_derivatives_of_bias_act() -> None:
    """Its own kernel: sums over the channel, and over many blocks of one."""
    x = torch.randn(2, 6, 40, 21, dtype=torch.float64, requires_grad=True)
    b, dy = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn_like(x).requires_grad_()
    found = []
    for backend in ("cuda", "reference"):
        y = ops.bias_act(x, b, act="swish", clamp=1.5, backend=backend)
        dx, db = torch.autograd.grad(y, (x, b), dy, create_graph=True)
        found.append((dx, db, *torch.autograd.grad((dx.sin().sum() + db.square().sum()), (x, b, dy))))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def places(kernels: Any, shape: tuple, block: int, thread: int) -> list[int]:  # noqa: F811
    result = torch.zeros(9, dtype=torch.int64)
    kernels.lines(*shape, block, thread, result)
    return result.tolist()


def elements(shape: tuple, found: list[int]) -> list[tuple[int, int]]:
    """(source, offset) of all elements that a thread has."""
    _, _, first, end, lanes, start, step, _, each = found
    items = (start + i * step + j for i in range(first, end, lanes) for j in range(each))
    return [(1, e - 2**60) if e >= 2**60 else (0, e) for e in items]


@pytest.mark.parametrize(
    "shape",
    [
        (6, 6, 35, False, False), (6, 4, 35, False, False), (10, 4, 9, True, False), (24, 16, 16, False, True),
        (24, 16, 50, True, True), (600, 600, 8, False, True), (2600, 8, 3, True, True), (3, 3, 40000, False, True),
    ],
)  # fmt: skip
def test_every_element_has_one_thread(kernels: Any, shape: tuple) -> None:  # noqa: F811
    channels, early, positions, *_ = shape
    images, blocks = 2, places(kernels, shape, 0, 0)[7]
    threads = [(block, thread) for block in range(images * blocks) for thread in range(256)]
    seen = [e for where in threads for e in elements(shape, places(kernels, shape, *where))]
    sizes = (images * early * positions, images * (channels - early) * positions)
    assert sorted(seen) == [(source, e) for source in (0, 1) for e in range(sizes[source])]


@pytest.mark.parametrize(
    "shape",
    [
        (6, 4, 2**31 + 7, False, False), (8, 8, 2**33, False, True), (24, 16, 2**30, True, True),
        (7, 5, 2**31 + 1, True, False),
    ],
)  # fmt: skip
def test_offsets_beyond_32_bits(kernels: Any, shape: tuple) -> None:  # noqa: F811
    channels, early, positions, columns, _ = shape
    blocks = places(kernels, shape, 0, 0)[7]
    for block in (0, blocks // 2, blocks - 1, min(3 * blocks, 2**31) - 1):
        image, channel, first, end, _, start, step, _, each = places(kernels, shape, block, 5)
        assert image == block // blocks and 0 <= channel < channels and 0 <= first <= end
        own, c = (early, channel) if channel < early else (channels - early, channel - early)
        base = 2**60 * (channel >= early) + image * own * positions
        assert (start, step) == ((base + c, own) if columns else (base + c * positions, each))
        assert end <= positions if columns else end * each <= positions
