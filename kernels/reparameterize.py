"""z = mu + exp(logvar / 2) noise and its KL divergence, in one pass. Equations: fastgen/ops/reparameterize.py.

How a kernel file reads: launchers, which fill the outputs they are given; then the kernels. A
program takes one block of one image. It loads, widens at once, computes in fp32 (fp64 for fp64),
and narrows at the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import by_blocks, element_offset, on_device_of
from ._philox import philox_normals

STREAM = tl.constexpr(3)  # fastgen.ops.philox.Stream.REPARAMETERIZE


def reparameterize_fwd(
    mu: Tensor, logvar: Tensor, noise: Tensor | None, seeds: Tensor | None, z: Tensor, kl: Tensor
) -> None:
    """Fills z [N, *] and kl [N] (fp32, fp64 for fp64). All images in one dense layout; noise or seeds is None."""
    if mu.numel() == 0:
        kl.zero_()
        return
    grid, common = by_blocks("reparameterize_fwd", mu, seeds is not None)
    # Each block's share of kl has its own place, so that the sum has one order: no atomics.
    shares = kl[:, None] if common["blocks"] == 1 else kl.new_empty(len(mu), common["blocks"])
    with on_device_of(mu):
        reparameterize_fwd_kernel[grid](mu, logvar, noise, seeds, z, shares, **common)
        if common["blocks"] > 1:
            torch.sum(shares, 1, out=kl)


def reparameterize_bwd(
    dz: Tensor | None, dkl: Tensor | None, mu: Tensor, logvar: Tensor, noise: Tensor | None, seeds: Tensor | None,
    dmu: Tensor, dlogvar: Tensor,
) -> None:  # fmt: skip
    """Fills dmu and dlogvar [N, *] from dz [N, *] and dkl [N], either of which may be None, for zero."""
    if mu.numel() == 0:
        return
    grid, common = by_blocks("reparameterize_bwd", mu, seeds is not None)
    with on_device_of(mu):
        reparameterize_bwd_kernel[grid](dz, dkl, mu, logvar, noise, seeds, dmu, dlogvar, **common)


@triton.jit
def reparameterize_fwd_kernel(
    mu_ptr,  # [N, size]
    logvar_ptr,  # [N, size]
    noise_ptr,  # [N, size] or None
    seeds_ptr,  # [N] int64, or None
    z_ptr,  # [N, size]
    kl_ptr,  # [N, blocks], the share of each block
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
    mu = tl.load(mu_ptr + offset, mask=inside, other=0.0).to(WIDE)
    logvar = tl.load(logvar_ptr + offset, mask=inside, other=0.0).to(WIDE)
    if seeds_ptr is None:
        noise = tl.load(noise_ptr + offset, mask=inside, other=0.0).to(WIDE)
    else:
        noise = philox_normals(tl.load(seeds_ptr + n), first, 0, STREAM, BLOCK).to(WIDE)
    z = mu + tl.exp(logvar * 0.5) * noise
    tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=inside)
    kl = tl.exp(logvar) + mu * mu - 1.0 - logvar  # 0 outside, where mu = logvar = 0
    tl.store(kl_ptr + tl.program_id(0), tl.sum(kl, 0) * 0.5)


@triton.jit
def reparameterize_bwd_kernel(
    dz_ptr,  # [N, size] or None
    dkl_ptr,  # [N] or None
    mu_ptr,  # [N, size]
    logvar_ptr,  # [N, size]
    noise_ptr,  # [N, size] or None
    seeds_ptr,  # [N] int64, or None
    dmu_ptr,  # [N, size]
    dlogvar_ptr,  # [N, size]
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
    logvar = tl.load(logvar_ptr + offset, mask=inside, other=0.0).to(WIDE)
    dmu = tl.zeros([BLOCK], WIDE)
    dlogvar = tl.zeros([BLOCK], WIDE)
    if dz_ptr is not None:
        if seeds_ptr is None:
            noise = tl.load(noise_ptr + offset, mask=inside, other=0.0).to(WIDE)
        else:
            noise = philox_normals(tl.load(seeds_ptr + n), first, 0, STREAM, BLOCK).to(WIDE)
        dz = tl.load(dz_ptr + offset, mask=inside, other=0.0).to(WIDE)
        dmu += dz
        dlogvar += dz * noise * tl.exp(logvar * 0.5) * 0.5
    if dkl_ptr is not None:
        mu = tl.load(mu_ptr + offset, mask=inside, other=0.0).to(WIDE)
        dkl = tl.load(dkl_ptr + n).to(WIDE)
        dmu += dkl * mu
        dlogvar += dkl * (tl.exp(logvar) - 1.0) * 0.5
    tl.store(dmu_ptr + offset, dmu.to(dmu_ptr.dtype.element_ty), mask=inside)
    tl.store(dlogvar_ptr + offset, dlogvar.to(dlogvar_ptr.dtype.element_ty), mask=inside)
