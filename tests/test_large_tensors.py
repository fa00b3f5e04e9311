"""Tensors of more than 2^31 elements: the last image of such a batch comes out as it does alone.

Here in Triton's interpreter, on memory whose pages exist only once they are written, and of all programs only those
of the last image; on a GPU (mark `gpu`) whole ops, on every backend.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from suite import DEVICES, places
from torch import Tensor

from fastgen import backends, ops
from fastgen.ops.activations import ACTIVATIONS

LIMIT = 2**31


def lazy(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros whose pages take no memory until they are written."""
    count = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype, count=count).view(shape)


class Batch:
    """Makes tensors of `n` images that are the same wherever the last image is looked at; `n` = 1: it alone."""

    def __init__(self, n: int, channels_last: bool) -> None:
        self.n, self.channels_last = n, channels_last

    def given(self, *image: int, dtype: torch.dtype = torch.float16) -> Tensor:
        x = self.empty(*image, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        x[-1] = torch.randn(image, generator=generator).to(dtype)
        return x

    def empty(self, *image: int, dtype: torch.dtype = torch.float16) -> Tensor:
        if self.channels_last and len(image) == 3:
            c, h, w = image
            return lazy(self.n, h, w, c, dtype=dtype).permute(0, 3, 1, 2)
        return lazy(self.n, *image, dtype=dtype)

    def ids(self) -> Tensor:
        """int64 [n]; the last is 7."""
        return torch.arange(self.n) + 8 - self.n


Launch = Callable[[Batch], list[Tensor]]
PROBES: dict[str, tuple[int, Launch]] = {}  # name -> elements of an image, what is launched


def probe(elements: int) -> Callable[[Launch], Launch]:
    def register(launch: Launch) -> Launch:
        PROBES[launch.__name__] = elements, launch
        return launch

    return register


@probe(2 * 5 * 200)
def philox_normal(b: Batch) -> list[Tensor]:
    from fastgen.kernels.philox import philox_normal_fwd

    out = b.empty(2, 5, 200)
    philox_normal_fwd(b.ids(), 3, 0, out)
    return [out]


@probe(2 * 5 * 200)
def to_uint8(b: Batch) -> list[Tensor]:
    from fastgen.kernels.to_uint8 import to_uint8_fwd

    out = b.empty(5, 200, 2, dtype=torch.uint8) if not b.channels_last else lazy(b.n, 5, 200, 2, dtype=torch.uint8)
    to_uint8_fwd(b.given(2, 5, 200), out)
    return [out]


@probe(2 * 5 * 200)
def q_sample(b: Batch) -> list[Tensor]:
    from fastgen.kernels.q_sample import q_sample_fwd

    x, noise = b.empty(2, 5, 200), b.empty(2, 5, 200)
    q_sample_fwd(b.given(2, 5, 200), torch.full((b.n,), 3), torch.full((9, 2), 0.5), None, b.ids(), x, noise)
    return [x, noise]


@probe(2 * 5 * 200)
def diffusion_step(b: Batch) -> list[Tensor]:
    from fastgen.kernels.diffusion_step import diffusion_step_fwd

    x, out, kept = b.given(2, 5, 200), b.empty(2, 5, 200), b.empty(2, 5, 200)
    rows = torch.full((4, 9), 0.5)
    diffusion_step_fwd(x, x, rows, torch.tensor(2), None, 1.0, x, 1, None, b.ids(), out, kept)
    return [out, kept]


@probe(2 * 5 * 200)
def reparameterize(b: Batch) -> list[Tensor]:
    from fastgen.kernels.reparameterize import reparameterize_bwd, reparameterize_fwd

    x, z, dmu, dlogvar = b.given(2, 5, 200), b.empty(2, 5, 200), b.empty(2, 5, 200), b.empty(2, 5, 200)
    kl = torch.zeros(b.n)
    reparameterize_fwd(x, x, None, b.ids(), z, kl)
    reparameterize_bwd(x, kl, x, x, None, b.ids(), dmu, dlogvar)
    return [z, kl, dmu, dlogvar]


def _group_norm(b: Batch, channels: int, height: int, width: int) -> list[Tensor]:
    from fastgen.kernels.group_norm_act import group_norm_act_bwd, group_norm_act_fwd

    c1, groups, act = channels - 2, 2, ACTIVATIONS["silu"][0]
    x, skip, y = b.given(c1, height, width), b.given(2, height, width), b.empty(channels, height, width)
    dy, dx, dskip = b.given(channels, height, width), b.empty(c1, height, width), b.empty(2, height, width)
    scale, shift = (torch.full((b.n, channels), v) for v in (0.5, 0.25))
    mean, rstd = torch.zeros(b.n, groups), torch.ones(b.n, groups)
    sums = torch.zeros(2, b.n, channels)
    group_norm_act_fwd(x, skip, None, None, scale, shift, groups, 1e-5, act, y, mean, rstd)
    group_norm_act_bwd(dy, x, skip, None, None, scale, shift, mean, rstd, groups, act, dx, dskip, *sums)
    return [y, mean, rstd, dx, dskip, sums.transpose(0, 1)]


@probe(8 * 10 * 25)
def group_norm_act(b: Batch) -> list[Tensor]:
    return _group_norm(b, 8, 10, 25)


@probe(8 * 100 * 50)
def group_norm_act_split(b: Batch) -> list[Tensor]:
    return _group_norm(b, 8, 100, 50)


@probe(8 * 10 * 25)
def batch_norm_act(b: Batch) -> list[Tensor]:
    from fastgen.kernels.batch_norm_act import batch_norm_act_fwd

    x, residual, y = b.given(8, 10, 25), b.given(8, 10, 25), b.empty(8, 10, 25)
    batch_norm_act_fwd(x, residual, None, None, False, 1e-5, 1, y, torch.zeros(8), torch.ones(8))
    return [y]


@probe(2 * 10 * 128)
def attention(b: Batch) -> list[Tensor]:
    """Heads one after the other in memory, or side by side within a token."""
    from fastgen.kernels.attention import attention_bwd, attention_fwd

    def empty() -> Tensor:
        tokens = (10, 2) if b.channels_last else (2, 10)
        x = lazy(b.n, *tokens, 128, dtype=torch.float16)
        return x.transpose(1, 2) if b.channels_last else x

    q, out, dq, dk, dv = (empty() for _ in range(5))
    q[-1] = torch.randn(2, 10, 128, generator=torch.Generator().manual_seed(0))
    sums = lazy(2, b.n, 2, 10, dtype=torch.float32)
    attention_fwd(q, q, q, 0.1, False, out, sums)
    attention_bwd(q, q, q, q, sums, 0.1, False, dq, dk, dv)
    return [out, sums.transpose(0, 1), dq, dk, dv]


@pytest.fixture
def of_last_image(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A call with n makes the interpreter run, of every grid of n images, the programs of the last one only."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, images = interpreter.interpreter_builder, [1]
    set_index = builder.set_grid_idx

    class LastImage(interpreter.GridExecutor):
        def __init__(self, fn: Any, names: Any, grid: tuple[int, ...], *rest: Any) -> None:
            assert grid[0] % images[0] == 0 and set(grid[1:]) <= {1}, f"no programs of one image in a grid of {grid}"
            self.programs = grid[0] // images[0]
            self.first = grid[0] - self.programs
            super().__init__(fn, names, (self.programs,), *rest)

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            def shifted(x: int, y: int, z: int) -> None:
                set_index(x, y, z)
                builder.grid_idx = (x + self.first, y, z)

            builder.set_grid_idx = shifted
            super().__call__(*args, **kwargs)

        def _restore_args_dev(self, *args: Any) -> None:
            """Nothing to copy back, for it was in host memory; copying would write every page."""

    monkeypatch.setattr(interpreter, "GridExecutor", LastImage)
    monkeypatch.setattr(builder, "set_grid_idx", set_index)
    return lambda n: images.__setitem__(0, n)


@pytest.mark.skipif(DEVICES != ("cpu",), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", PROBES)
def test_last_of_many_images(name: str, channels_last: bool, of_last_image: Callable[[int], None]) -> None:
    elements, launch = PROBES[name]
    n = LIMIT // elements + 3
    alone = launch(Batch(1, channels_last))
    of_last_image(n)
    batch = launch(Batch(n, channels_last))
    for one, many in zip(alone, batch, strict=True):
        assert one.isfinite().all() and one.any()
        assert torch.equal(many[-1], one[0])
        assert not many[:5].any() or many.ndim <= 2, "an image was written that no program should have reached"


# The ops of a whole batch with one image more than 2^31 elements hold.
HUGE: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "to_uint8": lambda x: {"x": x},
    "q_sample": lambda x: {"x0": x, "t": torch.full((len(x),), 3), "table": torch.full((9, 2), 0.5), "noise": x},
    "group_norm_act": lambda x: {"x": x, "num_groups": 2},
}


@pytest.mark.gpu
@pytest.mark.parametrize("op", HUGE)
def test_large_batches_on_a_gpu(op: str) -> None:
    """The last image of 2^31 elements and more is what it is alone, bit for bit, on every backend of ours."""
    found = [p.backend for p in places(op) if p.device == "cuda" and p.backend != "reference"]
    assert found, f"no kernel of {op} runs here: {backends.why_not(op, 'triton', 'cuda')}"
    image = (4, 256, 256)
    n = LIMIT // math.prod(image) + 3
    x = torch.randn((1, *image), device="cuda", dtype=torch.float16).expand(n, *image).contiguous()
    with torch.device("cuda"):
        many, one = HUGE[op](x), HUGE[op](x[:1].clone())
    for backend in found:
        results = [getattr(ops, op)(**inputs, backend=backend) for inputs in (many, one)]
        y, alone = (r[0] if isinstance(r, tuple) else r for r in results)
        assert torch.equal(y[-1], alone[0]) and torch.equal(y[n // 2], alone[0]), backend
