"""Noise into memory: normals and raw words of every image's own stream. Equations: fastgen/ops/philox.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import EXACT, block_size, image_size, index_type, on_device_of
from ._philox import interleave4, philox_normals, philox_words


def philox_normal_fwd(seeds: Tensor, step: int, stream: int, out: Tensor) -> None:
    """Fills ``out`` [N, *], contiguous, any floating dtype, from seeds int64 [N]."""
    _launch(philox_normal_fwd_kernel, seeds, step, stream, out)


def philox_bits_fwd(seeds: Tensor, step: int, stream: int, out: Tensor) -> None:
    """Fills ``out`` int64 [N, n] with 32-bit words, from seeds int64 [N]."""
    _launch(philox_bits_fwd_kernel, seeds, step, stream, out)


def _launch(kernel: triton.JITFunction, seeds: Tensor, step: int, stream: int, out: Tensor) -> None:
    if out.numel() == 0:
        return
    size = image_size(out)
    config = block_size("philox", out)
    blocks = triton.cdiv(size, config["BLOCK"])
    with on_device_of(out):
        kernel[(len(out) * blocks,)](
            seeds, out, step, size, blocks, STREAM=stream, INDEX=index_type(size), **config, **EXACT
        )


@triton.jit(do_not_specialize=["step"])
def philox_normal_fwd_kernel(
    seeds_ptr,  # [N] int64
    out_ptr,  # [N, size]
    step,
    size,
    blocks,  # programs per image
    STREAM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(INDEX) * BLOCK
    i = first + tl.arange(0, BLOCK)
    z = philox_normals(tl.load(seeds_ptr + n), first, step, STREAM, BLOCK)
    tl.store(out_ptr + n * size + i, z.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["step"])
def philox_bits_fwd_kernel(
    seeds_ptr,  # [N] int64
    out_ptr,  # [N, size] int64
    step,
    size,
    blocks,  # programs per image
    STREAM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(INDEX) * BLOCK
    i = first + tl.arange(0, BLOCK)
    a, b, c, d = philox_words(tl.load(seeds_ptr + n), first, step, STREAM, BLOCK)
    words = interleave4(a, b, c, d)
    tl.store(out_ptr + n * size + i, words.to(tl.int64), mask=i < size)
