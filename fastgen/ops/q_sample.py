"""The forward diffusion: an image and the noise that hides it, in one pass.

Ho et al. 2020, eq. 4:  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

Legend: N images, * their shape, T steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops.philox import Stream, philox_normal_reference
from fastgen.ops.registration import FusedOp, dense, empty_like, layout, wide
from fastgen.ops.reparameterize import check_noise


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (x_t, noise), both [N, *] in x0's dtype and layout.

    x0: [N, *], floating; t: int64 [N] in 0 … T-1 (not checked: that would wait for the GPU);
    table: fp32 [T, 2] of (sqrt(abar), sqrt(1 - abar)), see `diffusion.schedules.forward_table`.
    Give either ``noise`` [N, *], which is returned as it is, or ``seeds`` int64 [N], from which it is
    made in the kernel (step t of the image's Q_SAMPLE stream). Differentiable in x0 and noise.
    """
    if t.shape != x0.shape[:1] or t.dtype != torch.int64:
        raise ValueError(f"t must be an int64 tensor [{x0.shape[0]}], not {t.dtype} {list(t.shape)}")
    if table.ndim != 2 or table.shape[1] != 2 or table.dtype != torch.float32:
        raise ValueError(f"table must be an fp32 tensor [T, 2], not {table.dtype} {list(table.shape)}")
    check_noise(x0, noise, seeds)
    x_t, made = _FORWARD(x0, t, table, noise, seeds, backend)
    return x_t, made if noise is None else noise


def q_sample_reference(
    x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | None = None, seeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The equation in plain PyTorch, in at least fp32. Same arguments as `q_sample`."""
    if noise is None:
        noise = philox_normal_reference(seeds, x0.shape[1:], t, Stream.Q_SAMPLE)
    a, b = _rows(table, t, x0)
    return (a * x0.to(a.dtype) + b * noise.to(a.dtype)).to(x0.dtype), noise.to(x0.dtype)


def _rows(table: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two coefficients of each image, shaped to go with x [N, *]."""
    a, b = table[t].to(wide(x.dtype)).reshape(t.shape[0], 2, *[1] * (x.ndim - 1)).unbind(1)
    return a, b


def _forward(
    x0: Tensor, t: Tensor, table: Tensor, noise: Any, seeds: Any, backend: str | None
) -> tuple[Tensor, Tensor]:
    """-> x_t [N, *] and the noise it made [N, *], or [0] where noise was given (an op may not return its input)."""
    backend = backends.resolve("q_sample", x0.device, backend, like=(x0,))
    if backend == "reference":
        x_t, made = (y.contiguous(memory_format=layout(x0)) for y in q_sample_reference(x0, t, table, noise, seeds))
        return x_t, made if noise is None else x0.new_empty(0)
    x0 = dense(x0)
    x_t, made = _fake(x0, t, table, noise, seeds)
    noise = dense(noise, like=x0)
    launch = backends.kernel("q_sample", "q_sample_fwd", backend)
    launch(x0, dense(t), dense(table), noise, dense(seeds), x_t, made if noise is None else None)
    return x_t, made


def _fake(x0: Tensor, t: Any, table: Any, noise: Any, seeds: Any, backend: Any = None) -> tuple[Tensor, Tensor]:
    return empty_like(x0), empty_like(x0) if noise is None else x0.new_empty(0)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x0, t, table, noise, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(t, table)
    ctx.dtypes = x0.dtype, None if noise is None else noise.dtype


def _backward(ctx: Any, dx_t: Tensor | None, _: Any) -> tuple:
    """dx0 = sqrt(abar) dx_t, dnoise = sqrt(1 - abar) dx_t: one multiplication each, as fused as it gets."""
    t, table = ctx.saved_tensors
    if dx_t is None:
        return None, None, None, None, None, None
    a, b = _rows(table, t, dx_t)
    dx0 = (a * dx_t).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    dnoise = (b * dx_t).to(ctx.dtypes[1]) if ctx.dtypes[1] is not None and ctx.needs_input_grad[3] else None
    return dx0, None, None, dnoise, None, None


_FORWARD = FusedOp(
    "q_sample(Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? seeds, str? backend) -> (Tensor, Tensor)",
    _forward, _fake, _setup, _backward,
)  # fmt: skip
