"""The forward diffusion x_t = table[t, 0] x0 + table[t, 1] noise. Equations: fastgen/ops/q_sample.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import by_blocks, element_offset, on_device_of
from ._philox import philox_normals

STREAM = tl.constexpr(2)  # fastgen.ops.philox.Stream.Q_SAMPLE


def q_sample_fwd(
    x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | None, seeds: Tensor | None, x_t: Tensor,
    noise_out: Tensor | None,
) -> None:  # fmt: skip
    """Fills x_t [N, *], and noise_out [N, *] if given, from x0 [N, *], t int64 [N], table fp32 [T, 2].

    All images in one dense layout; noise [N, *] or seeds int64 [N] is None.
    """
    if x0.numel() == 0:
        return
    grid, common = by_blocks("q_sample", x0, seeds is not None)
    with on_device_of(x0):
        q_sample_fwd_kernel[grid](x0, t, table, noise, seeds, x_t, noise_out, **common)


@triton.jit
def q_sample_fwd_kernel(
    x0_ptr,  # [N, size]
    t_ptr,  # [N] int64
    table_ptr,  # [T, 2] fp32
    noise_ptr,  # [N, size] or None
    seeds_ptr,  # [N] int64, or None
    x_t_ptr,  # [N, size]
    noise_out_ptr,  # [N, size] or None
    size,
    blocks,  # programs per image
    channels,
    positions,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(INDEX) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < size
    offset = n * size + element_offset(i, channels, positions, CHANNELS_LAST)
    t = tl.load(t_ptr + n)
    signal = tl.load(table_ptr + t * 2).to(WIDE)
    sigma = tl.load(table_ptr + t * 2 + 1).to(WIDE)
    x0 = tl.load(x0_ptr + offset, mask=inside, other=0.0).to(WIDE)
    if seeds_ptr is None:
        noise = tl.load(noise_ptr + offset, mask=inside, other=0.0).to(WIDE)
    else:
        noise = philox_normals(tl.load(seeds_ptr + n), first, t, STREAM, BLOCK).to(WIDE)
    x_t = signal * x0 + sigma * noise
    tl.store(x_t_ptr + offset, x_t.to(x_t_ptr.dtype.element_ty), mask=inside)
    if noise_out_ptr is not None:
        tl.store(noise_out_ptr + offset, noise.to(noise_out_ptr.dtype.element_ty), mask=inside)
