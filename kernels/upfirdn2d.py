"""Upsampling by zeros, a filter, downsampling. Equations: fastgen/ops/upfirdn2d.py.

A program computes a block of one image's outputs, in the order of memory, and visits for each only the taps that meet
a pixel. A separable filter takes two launches, along rows and along columns, with fp32 (fp64) in between. Legend: N
images, C channels, H W input, OH OW output size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FUSED, channels_last, image_size, index_type, on_device_of, wide_type


def upfirdn2d_fwd(
    x: Tensor, f: Tensor, up_x: int, up_y: int, down_x: int, down_y: int, pad_x: int, pad_y: int, flip: bool,
    gain: float, y: Tensor,
) -> None:  # fmt: skip
    """Fills y [N, C, OH, OW] from x [N, C, H, W], both contiguous or both channels last.

    f: [fh, fw], or [taps] of a separable filter, contiguous in fp32 (fp64 for fp64). pad_x, pad_y: zeros
    left of and above the upsampled image, or pixels cropped.
    """
    if y.numel() == 0:
        return
    last = x.shape[1] > 1 and (channels_last(x) or channels_last(y))
    if f.ndim == 2:
        return _launch(x, f, y, (up_x, up_y, down_x, down_y, pad_x, pad_y), f.shape, flip, gain, last)
    layout = torch.channels_last if last else torch.contiguous_format
    between = torch.empty(*x.shape[:3], y.shape[3], dtype=f.dtype, device=x.device, memory_format=layout)
    _launch(x, f, between, (up_x, 1, down_x, 1, pad_x, 0), (1, len(f)), flip, 1.0, last)
    _launch(between, f, y, (1, up_y, 1, down_y, 0, pad_y), (len(f), 1), flip, gain, last)


def _launch(
    x: Tensor, f: Tensor, y: Tensor, numbers: tuple[int, ...], taps: tuple[int, int], flip: bool, gain: float,
    last: bool,
) -> None:  # fmt: skip
    """numbers: up_x to pad_y; taps: height and width of the filter."""
    size, block = image_size(y), 512
    blocks = triton.cdiv(size, block)
    up_x, up_y, down_x, down_y, pad_x, pad_y = numbers
    with on_device_of(x):
        upfirdn2d_fwd_kernel[(len(x) * blocks,)](
            x, f, y, size, image_size(x), blocks, x.shape[1], *x.shape[2:], *y.shape[2:], pad_x, pad_y,
            UP_X=up_x, UP_Y=up_y, DOWN_X=down_x, DOWN_Y=down_y, TAPS_X=taps[1], TAPS_Y=taps[0], FLIP=flip, GAIN=gain,
            CHANNELS_LAST=last, WIDE=wide_type(f), INDEX=index_type(max(size, image_size(x))), BLOCK=block, **FUSED,
        )  # fmt: skip


@triton.jit
def first_tap(o, pad, UP: tl.constexpr, DOWN: tl.constexpr):
    """The first tap that meets a pixel for output o, and that pixel."""
    start = o * DOWN - pad
    tap = (UP - start % UP) % UP  # a remainder may be negative
    return tap, (start + tap) // UP


@triton.jit
def upfirdn2d_fwd_kernel(
    x_ptr,  # [N, C, H, W]
    f_ptr,  # [TAPS_Y, TAPS_X]
    y_ptr,  # [N, C, OH, OW]
    size, size_in, blocks, channels, h, w, oh, ow, pad_x, pad_y,
    UP_X: tl.constexpr, UP_Y: tl.constexpr, DOWN_X: tl.constexpr, DOWN_Y: tl.constexpr, TAPS_X: tl.constexpr,
    TAPS_Y: tl.constexpr, FLIP: tl.constexpr, GAIN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of y."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    exists = i < size
    if CHANNELS_LAST:
        c, ox, oy = i % channels, i // channels % ow, i // channels // ow
        row, column, plane = w * channels, channels, c
    else:
        c, ox, oy = i // ow // oh, i % ow, i // ow % oh
        row, column, plane = w, 1, c * h * w
    tap_x, ix = first_tap(ox, pad_x, UP_X, DOWN_X)
    tap_y, iy = first_tap(oy, pad_y, UP_Y, DOWN_Y)
    total = tl.zeros([BLOCK], WIDE)
    for my in range((TAPS_Y + UP_Y - 1) // UP_Y):
        ky, y = tap_y + my * UP_Y, iy + my
        in_row = exists & (ky < TAPS_Y) & (y >= 0) & (y < h)
        for mx in range((TAPS_X + UP_X - 1) // UP_X):
            kx, x = tap_x + mx * UP_X, ix + mx
            inside = in_row & (kx < TAPS_X) & (x >= 0) & (x < w)
            k = ky * TAPS_X + kx
            k = k if FLIP else TAPS_Y * TAPS_X - 1 - k
            factor = tl.load(f_ptr + k, mask=inside, other=0.0)
            value = tl.load(x_ptr + n * size_in + plane + y * row + x * column, mask=inside, other=0.0).to(WIDE)
            total += factor * value
    y_value = total * GAIN
    tl.store(y_ptr + n * size + i, y_value.to(y_ptr.dtype.element_ty), mask=exists)
