"""Pieces of the convolution kernels: which pixels a tile has, and the sums of a tile over taps and channels.

A tile is BLOCK pixels of the output's grid: of one image, or of IMAGES small ones, each padded to BLOCK / IMAGES.
Legend: n the image (int64; a scalar where IMAGES is 1, else [BLOCK]), y x [BLOCK] a pixel of the grid, all images
[N, H, W, C] with channels innermost.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._activations import activate


def images_per_tile(positions: int, block: int) -> dict[str, int]:
    """IMAGES that a tile of ``block`` pixels takes, for images of ``positions`` each, and tiles an image."""
    images = max(1, block // triton.next_power_of_2(positions))
    return {"IMAGES": images, "tiles": triton.cdiv(positions, block)}


def units(n: int, positions: int, block: int) -> int:
    """How many tiles n images take."""
    shape: dict[str, Any] = images_per_tile(positions, block)
    return triton.cdiv(n, shape["IMAGES"]) * shape["tiles"]


@triton.jit
def tile_pixels(unit, tiles, images, positions, width, IMAGES: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """n, y, x of the pixels of tile ``unit``, and which of them exist."""
    j = tl.arange(0, BLOCK)
    if IMAGES == 1:
        n = tl.cast(unit // tiles, tl.int64)
        p = tl.cast(unit % tiles, INDEX) * BLOCK + j
        exists = p < positions
    else:
        n = tl.cast(unit, tl.int64) * IMAGES + j // (BLOCK // IMAGES)
        p = (j % (BLOCK // IMAGES)).to(INDEX)
        exists = (p < positions) & (n < images)
    return n, p // width, p % width, exists


@triton.jit
def first_tap(phase, padding, STRIDE: tl.constexpr, TAPS: tl.constexpr):
    """What meets the pixels u STRIDE + phase of a transposed convolution's output: taps first, first + STRIDE, …, how
    many, and the input's pixel under the first of them, as far ahead of u."""
    first = (phase + padding) % STRIDE
    return first, (TAPS - first + STRIDE - 1) // STRIDE, (phase + padding) // STRIDE


@triton.jit
def load_pixels(
    x_ptr,  # [H, W, C1] of image n: a scalar or [BLOCK] as n is
    a_ptr,  # [N, C] or None
    d_ptr,  # [N, C] or None
    n, y, x, exists, c, first, end, height, width, x_channels, channels,
    UPSAMPLE: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BC]: act(a x + d) of channels c < end at the pixels (y, x) of the upsampled image; 0 outside of it.

    first: where in the C channels of both sources those of this one begin.
    """
    inside = exists & (y >= 0) & (x >= 0)
    if UPSAMPLE > 1:
        y, x = y // UPSAMPLE, x // UPSAMPLE
    inside &= (y < height) & (x < width)
    at = x_ptr + (y * width + x) * x_channels
    v = tl.load(at[:, None] + c[None, :], mask=inside[:, None] & (c < end)[None, :], other=0.0)
    if a_ptr is not None:
        if IMAGES == 1:
            at = (n * channels + first + c)[None, :]
            mask = (c < end)[None, :]
        else:
            at = (n * channels + first)[:, None] + c[None, :]
            mask = exists[:, None] & (c < end)[None, :]
        a = tl.load(a_ptr + at, mask=mask, other=0.0)
        d = tl.load(d_ptr + at, mask=mask, other=0.0)
        z = activate(v.to(WIDE) * a + d, ACT)
        v = tl.where(inside[:, None], z, 0.0).to(v.dtype)  # padding is 0 behind the activation
    return v


@triton.jit
def add_products(
    acc,
    x_ptr,  # [N, H, W, C1]
    a_ptr,  # [N, C] or None
    d_ptr,  # [N, C] or None
    weight_ptr,  # [taps, in, out] of this program's group, by the strides given
    n, y, x, exists, k, k_end, begin, end, first, group_begin, tap_y, tap_x, taps_y, taps_x, height, width,
    x_channels, channels, w_in, w_out, w_y, w_x,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, TAP_STEP_Y: tl.constexpr, TAP_STEP_X: tl.constexpr,
    UPSAMPLE: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr, IMAGES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + the products of channels begin … end - 1 of one source, for all taps.

    Tap (i, j) reads pixel (y + i STEP_Y, x + j STEP_X) and weight (tap_y + i TAP_STEP_Y, tap_x + j TAP_STEP_X). All
    taps of a block of channels come before the next block, so that what they read in common is still near.
    """
    taps = taps_y * taps_x
    x_ptr += n * height * width * x_channels
    weight_ptr += (first - group_begin) * w_in + tap_y * w_y + tap_x * w_x
    columns = (k * w_out)[None, :]
    exist = (k < k_end)[None, :]
    for step in range(0, tl.cdiv(end - begin, BLOCK_K) * taps):
        tap = step % taps
        i = tap // taps_x
        j = tap % taps_x
        c = begin + step // taps * BLOCK_K + tl.arange(0, BLOCK_K)
        v = load_pixels(
            x_ptr, a_ptr, d_ptr, n, y + i * STEP_Y, x + j * STEP_X, exists, c, first, end, height, width, x_channels,
            channels, UPSAMPLE, ACT, WIDE, IMAGES,
        )  # fmt: skip
        at = (c * w_in + (i * TAP_STEP_Y * w_y + j * TAP_STEP_X * w_x))[:, None] + columns
        w = tl.load(weight_ptr + at, mask=(c < end)[:, None] & exist, other=0.0)
        acc = tl.dot(v, w.to(v.dtype), acc, input_precision="ieee", out_dtype=WIDE)
    return acc


@triton.jit
def finish(
    z,
    gain_ptr,  # [K] or None
    bias_ptr,  # [K], or [N, K] if EACH, or None
    residual_ptr,  # [N, H', W', K] or None
    n, k, offsets, mask, outputs,
    EACH: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """act(z gain + bias + residual), [BM, BN]; k [BN]; offsets, mask [BM, BN] of the output."""
    if gain_ptr is not None:
        z *= tl.load(gain_ptr + k, mask=k < outputs, other=0.0).to(WIDE)[None, :]
    if bias_ptr is not None:
        if not EACH:
            z += tl.load(bias_ptr + k, mask=k < outputs, other=0.0).to(WIDE)[None, :]
        elif IMAGES == 1:
            z += tl.load(bias_ptr + n * outputs + k, mask=k < outputs, other=0.0).to(WIDE)[None, :]
        else:
            z += tl.load(bias_ptr + (n * outputs)[:, None] + k[None, :], mask=mask, other=0.0).to(WIDE)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(WIDE)
    return activate(z, ACT)
