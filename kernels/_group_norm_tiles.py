"""Pieces of the group norm kernels: block sizes; tiles [channels, positions] of one image; statistics of tiles.

Legend: c [BC] channel numbers in cat(x, skip), s [BS] positions, ``inside`` [BC, BS] what exists of
the tile, n the image (int64). x_channels = C1, channels = C = C1 + C2, positions = S.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activations import activate, activate_grad
from ._common import channels_last, image_size, index_type, wide_type
from ._tuning import configuration

FUSED_SHARE = 16384  # elements up to which one program takes whole groups
SPLITS = 256  # chunks of positions at most


def sizes(x: Tensor, y: Tensor, num_groups: int) -> dict[str, Any]:
    """What every kernel here is told about x [N, C1, *] and y [N, C, *]."""
    channels, size = y.shape[1], image_size(y)
    return {
        "x_channels": x.shape[1], "channels": channels, "positions": size // channels, "groups": num_groups,
        "GROUP_CHANNELS": channels // num_groups, "CHANNELS_LAST": channels_last(y), "WIDE": wide_type(y),
        "INDEX": index_type(size),
    }  # fmt: skip


def tile_size(kernel: str, y: Tensor) -> tuple[int, int]:
    """Elements of a tile, which a program holds in registers, and its warps."""
    found = ((2048, 4), (4096, 8), (1024, 4), (2048, 8)) if y.dtype != torch.float64 else ((512, 4),)
    config = configuration(kernel, [{"TILE": tile, "num_warps": warps} for tile, warps in found], y)
    return config["TILE"], config["num_warps"]


def fused_blocks(kernel: str, y: Tensor, num_groups: int) -> dict[str, int] | None:
    """Block sizes of the one-kernel way for y [N, C, *], or None where its groups are too large for it.

    A program takes BUNDLE groups: enough for some work, or for 16 channels side by side in channels_last.
    """
    channels, positions = y.shape[1] // num_groups, image_size(y) // y.shape[1]
    work, enough = (channels, 16) if channels_last(y) else (channels * positions, 1024)
    bundle = min(triton.next_power_of_2(triton.cdiv(enough, work)), triton.next_power_of_2(num_groups))
    block_k = triton.next_power_of_2(channels)
    if block_k > 256 or bundle * channels * positions > FUSED_SHARE:
        return None
    tile, warps = tile_size(kernel, y)
    block_s = min(triton.next_power_of_2(positions), max(1, tile // (bundle * block_k)))
    return {"BUNDLE": bundle, "BLOCK_K": block_k, "BLOCK_S": block_s, "num_warps": warps}


def split_blocks(kernel: str, y: Tensor) -> tuple[dict[str, int], int, int]:
    """Block sizes of the three-kernel way for y [N, C, *], positions per chunk, number of chunks."""
    channels, positions = y.shape[1], image_size(y) // y.shape[1]
    most_c, most_s = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    tile, warps = tile_size(kernel, y)
    if channels_last(y):
        block_c = min(most_c, max(32, tile // most_s))
    else:
        block_c = min(most_c, tile // min(512, most_s))
    block_s = min(most_s, tile // block_c)
    chunk = max(4, triton.cdiv(positions, SPLITS * block_s)) * block_s
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps}, chunk, triton.cdiv(positions, chunk)


@triton.jit
def bundle_channels(
    program, groups, GROUP_CHANNELS: tl.constexpr, INDEX: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Image, groups and channels of a program that takes BUNDLE groups, each padded to BLOCK_K channels."""
    bundles = tl.cdiv(groups, BUNDLE)
    n = (program // bundles).to(tl.int64)
    j = tl.arange(0, BUNDLE * BLOCK_K)
    group = program % bundles * BUNDLE + j // BLOCK_K
    if GROUP_CHANNELS == BLOCK_K:
        c = program % bundles * BUNDLE * GROUP_CHANNELS + j
    else:
        c = group * GROUP_CHANNELS + j % BLOCK_K
    return n, group, c.to(INDEX), (group < groups) & (j % BLOCK_K < GROUP_CHANNELS)


@triton.jit
def group_sum(v, BUNDLE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums [BUNDLE * BLOCK_K] over each group; every channel gets its group's sum."""
    total = tl.sum(tl.reshape(v, [BUNDLE, BLOCK_K]), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], [BUNDLE, BLOCK_K]), [BUNDLE * BLOCK_K])


@triton.jit
def block_channels(program, parts, channels, INDEX: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, channels and part (chunk or block of positions) of a program of the three-kernel way."""
    columns = tl.cdiv(channels, BLOCK_C)
    n = (program // parts // columns).to(tl.int64)
    c = (program // parts % columns).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    return n, c, (program % parts).to(INDEX)


@triton.jit
def tile_offsets(c, s, channels, positions, CHANNELS_LAST: tl.constexpr):
    """[BC, BS] offsets within an image of ``channels`` channels."""
    if CHANNELS_LAST:
        return s[None, :] * channels + c[:, None]
    return c[:, None] * positions + s[None, :]


@triton.jit
def load_tile(
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The tile of cat(x, skip), widened; 0 outside."""
    early = inside & (c < x_channels)[:, None]
    offsets = tile_offsets(c, s, x_channels, positions, CHANNELS_LAST)
    x = tl.load(x_ptr + n * x_channels * positions + offsets, mask=early, other=0.0).to(WIDE)
    if skip_ptr is not None:
        late = inside & (c >= x_channels)[:, None]
        offsets = tile_offsets(c - x_channels, s, channels - x_channels, positions, CHANNELS_LAST)
        x += tl.load(skip_ptr + n * (channels - x_channels) * positions + offsets, mask=late, other=0.0).to(WIDE)
    return x


@triton.jit
def store_tile(
    values,
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Writes a tile of cat(x, skip), narrowed."""
    early = inside & (c < x_channels)[:, None]
    offsets = tile_offsets(c, s, x_channels, positions, CHANNELS_LAST)
    tl.store(x_ptr + n * x_channels * positions + offsets, values.to(x_ptr.dtype.element_ty), mask=early)
    if skip_ptr is not None:
        late = inside & (c >= x_channels)[:, None]
        offsets = tile_offsets(c - x_channels, s, channels - x_channels, positions, CHANNELS_LAST)
        skip_ptr += n * (channels - x_channels) * positions
        tl.store(skip_ptr + offsets, values.to(skip_ptr.dtype.element_ty), mask=late)


@triton.jit
def affine(
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [N, C] or None
    shift_ptr,  # [N, C] or None
    n, c, exists, channels, WIDE: tl.constexpr,
):  # fmt: skip
    """a = w (1 + scale) and d = b (1 + scale) + shift, [BC] each; 1 and 0 where there is no parameter."""
    a = tl.full(c.shape, 1.0, WIDE)
    d = tl.zeros(c.shape, WIDE)
    if weight_ptr is not None:
        a = tl.load(weight_ptr + c, mask=exists, other=0.0).to(WIDE)
    if bias_ptr is not None:
        d = tl.load(bias_ptr + c, mask=exists, other=0.0).to(WIDE)
    if scale_ptr is not None:
        factor = tl.load(scale_ptr + n * channels + c, mask=exists, other=0.0).to(WIDE) + 1.0
        a *= factor
        d *= factor
    if shift_ptr is not None:
        d += tl.load(shift_ptr + n * channels + c, mask=exists, other=0.0).to(WIDE)
    return a, d


@triton.jit
def channel_statistics(
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    n, c, exists, begin, end, x_channels, channels, positions,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over positions begin … end - 1: [BC] twice."""
    mean = tl.zeros(c.shape, WIDE)
    deviation = tl.zeros(c.shape, WIDE)
    for first in range(begin, end, BLOCK_S):
        s = tl.arange(0, BLOCK_S).to(INDEX) + first
        inside = exists[:, None] & (s < end)[None, :]
        x = load_tile(x_ptr, skip_ptr, n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST, WIDE)
        before = tl.cast(first - begin, WIDE)
        count = tl.cast(tl.minimum(end - first, BLOCK_S), WIDE)
        tile_mean = tl.sum(x, 1) / count
        centred = tl.where(inside, x - tile_mean[:, None], 0.0)
        share = count / (before + count)
        delta = tile_mean - mean
        deviation += tl.sum(centred * centred, 1) + delta * delta * before * share
        mean += delta * share
    return mean, deviation


@triton.jit
def reciprocal_std(variance, EPS: tl.constexpr, WIDE: tl.constexpr):
    """1 / sqrt(variance + EPS), each step rounded once."""
    if WIDE == tl.float64:
        return 1.0 / tl.sqrt(variance + EPS)  # fp64's plain operations are correctly rounded
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))


@triton.jit
def normalise_tile(x, mean, rstd, a, d, ACT: tl.constexpr):
    """act(xhat a + d); mean, rstd, a, d: [BC]."""
    return activate((x - mean[:, None]) * rstd[:, None] * a[:, None] + d[:, None], ACT)


@triton.jit
def gradient_tile(x, dy, mean, rstd, a, d, ACT: tl.constexpr):
    """xhat and dz = dy act'(xhat a + d)."""
    xhat = (x - mean[:, None]) * rstd[:, None]
    return xhat, dy * activate_grad(xhat * a[:, None] + d[:, None], ACT)


@triton.jit
def channel_sums(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    mean, rstd, a, d, n, c, exists, begin, end, x_channels, channels, positions,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The sums of dz and of dz xhat of each channel over positions begin … end - 1: [BC] twice."""
    sum_dz = tl.zeros(c.shape, WIDE)
    sum_dz_xhat = tl.zeros(c.shape, WIDE)
    for first in range(begin, end, BLOCK_S):
        s = tl.arange(0, BLOCK_S).to(INDEX) + first
        inside = exists[:, None] & (s < end)[None, :]
        x = load_tile(x_ptr, skip_ptr, n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST, WIDE)
        dy = load_tile(dy_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
        xhat, dz = gradient_tile(x, dy, mean, rstd, a, d, ACT)  # dy = 0 outside, and so is dz
        sum_dz += tl.sum(dz, 1)
        sum_dz_xhat += tl.sum(dz * xhat, 1)
    return sum_dz, sum_dz_xhat
