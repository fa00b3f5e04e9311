"""Images in [-1, 1] to bytes: clamp, scale, round and layout in one pass. Equations: fastgen/ops/to_uint8.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import EXACT, block_size, channels_last, image_size, index_type, on_device_of, wide_type


def to_uint8_fwd(x: Tensor, out: Tensor) -> None:
    """Fills out uint8 [N, H, W, C], contiguous, from x [N, C, H, W], contiguous or channels_last; NaN becomes 0."""
    if x.numel() == 0:
        return
    size = image_size(x)
    config = block_size("to_uint8", x)
    blocks = triton.cdiv(size, config["BLOCK"])
    channels = 1 if channels_last(x) else x.shape[1]  # channels_last is the order of ``out`` already
    with on_device_of(x):
        to_uint8_fwd_kernel[(len(x) * blocks,)](
            x, out, size, blocks, size // channels, CHANNELS=channels,
            WIDE=wide_type(x), INDEX=index_type(size), **config, **EXACT,
        )  # fmt: skip


@triton.jit
def to_uint8_fwd_kernel(
    x_ptr,  # [N, CHANNELS, positions]
    out_ptr,  # [N, positions, CHANNELS] uint8
    size,
    blocks,  # programs per image
    positions,
    CHANNELS: tl.constexpr,  # fixed at compile time, so that dividing by it is cheap
    WIDE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)  # in the order of out
    inside = i < size
    source = n * size + (i % CHANNELS) * positions + i // CHANNELS
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(WIDE)
    x = tl.where(x == x, x, -1.0)  # NaN -> 0
    x = tl.minimum(tl.maximum(x, -1.0), 1.0) * 127.5 + 127.5
    # Half to even: adding 1.5 * 2^23 (2^52) leaves no bits for a fraction, and rounds accordingly.
    magic = 6755399441055744.0 if WIDE == tl.float64 else 12582912.0
    x = (x + magic) - magic
    tl.store(out_ptr + n * size + i, x.to(tl.int32).to(tl.uint8), mask=inside)
