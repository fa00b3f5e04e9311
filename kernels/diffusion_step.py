"""One sampling step, from guidance to noise, in one pass. Equations: fastgen/ops/diffusion_step.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import by_blocks, element_offset, on_device_of
from ._philox import philox_normals

STREAM = tl.constexpr(1)  # fastgen.ops.philox.Stream.STEP
COLUMNS = tl.constexpr(9)  # p0 p1 p2 p3 q0 q1 q2 q3 q4


def diffusion_step_fwd(
    x_t: Tensor, model_out: Tensor, coefficients: Tensor, step: Tensor, guidance: Tensor | None, clip: float | None,
    history: Tensor | None, keep: int, noise: Tensor | None, seeds: Tensor | None, x_next: Tensor,
    history_out: Tensor | None,
) -> None:  # fmt: skip
    """Fills x_next [N, *], and history_out [N, *] with x0 (keep = 1) or eps (keep = 2).

    x_t, history, noise: [N, *]; model_out: [N, *], with guidance (fp32 [] or [N]) [2 N, *],
    unconditional half first; coefficients: fp32 [S, 9]; step: int64 [], on the device, read there.
    All images in one dense layout; history, noise and seeds int64 [N] may be None, for zero.
    """
    if x_t.numel() == 0:
        return
    grid, common = by_blocks("diffusion_step", x_t, seeds is not None)
    with on_device_of(x_t):
        diffusion_step_fwd_kernel[grid](
            x_t, model_out, coefficients, step, guidance, history, noise, seeds, x_next,
            history_out if keep else None, len(x_t), **common,
            GUIDANCE_PER_IMAGE=guidance is not None and guidance.ndim == 1, CLIP=clip, KEEP=keep,
        )  # fmt: skip


@triton.jit
def diffusion_step_fwd_kernel(
    x_t_ptr,  # [N, size]
    model_out_ptr,  # [N, size], with guidance [2 N, size]
    coefficients_ptr,  # [S, 9] fp32
    step_ptr,  # [] int64
    guidance_ptr,  # [] or [N] fp32, or None
    history_ptr,  # [N, size] or None
    noise_ptr,  # [N, size] or None
    seeds_ptr,  # [N] int64, or None
    x_next_ptr,  # [N, size]
    history_out_ptr,  # [N, size] or None
    images,  # N
    size,
    blocks,  # programs per image
    channels,
    positions,
    CHANNELS_LAST: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    CLIP: tl.constexpr,  # float or None
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(INDEX) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < size
    offset = n * size + element_offset(i, channels, positions, CHANNELS_LAST)
    step = tl.load(step_ptr)
    row = coefficients_ptr + step * COLUMNS
    x = tl.load(x_t_ptr + offset, mask=inside, other=0.0).to(WIDE)
    m = tl.load(model_out_ptr + offset, mask=inside, other=0.0).to(WIDE)
    if guidance_ptr is not None:
        conditional = offset + images.to(tl.int64) * size
        g = tl.load(guidance_ptr + (n if GUIDANCE_PER_IMAGE else 0)).to(WIDE)
        m += g * (tl.load(model_out_ptr + conditional, mask=inside, other=0.0).to(WIDE) - m)
    x0 = tl.load(row).to(WIDE) * x + tl.load(row + 1).to(WIDE) * m
    eps = tl.load(row + 2).to(WIDE) * x + tl.load(row + 3).to(WIDE) * m
    if CLIP is not None:  # comparisons and not min/max: a NaN stays a NaN
        x0 = tl.where(x0 > CLIP, CLIP, tl.where(x0 < -CLIP, -CLIP, x0))
    x_next = tl.load(row + 4).to(WIDE) * x + tl.load(row + 5).to(WIDE) * x0 + tl.load(row + 6).to(WIDE) * eps
    if history_ptr is not None:
        x_next += tl.load(row + 7).to(WIDE) * tl.load(history_ptr + offset, mask=inside, other=0.0).to(WIDE)
    if seeds_ptr is not None:
        noise = philox_normals(tl.load(seeds_ptr + n), first, step, STREAM, BLOCK)
        x_next += tl.load(row + 8).to(WIDE) * noise.to(WIDE)
    elif noise_ptr is not None:
        x_next += tl.load(row + 8).to(WIDE) * tl.load(noise_ptr + offset, mask=inside, other=0.0).to(WIDE)
    tl.store(x_next_ptr + offset, x_next.to(x_next_ptr.dtype.element_ty), mask=inside)
    if KEEP != 0:
        kept = x0 if KEEP == 1 else eps
        tl.store(history_out_ptr + offset, kept.to(history_out_ptr.dtype.element_ty), mask=inside)
