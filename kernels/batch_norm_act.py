"""act(BatchNorm(x) + residual), and its gradients. Equations: fastgen/ops/batch_norm_act.py.

    xhat = (x - mean) rstd;   z = xhat w + b + residual;   y = act(z)
    dz = dy act'(z);   dresidual = dz;   dw = sum dz xhat;   db = sum dz
    dx = rstd w (dz - (db + xhat dw) / M) in training, rstd w dz else

In training: results of every channel over chunks of each image's positions, their combination in every
channel, and the pass that writes. Every sum has a fixed order, without atomics. Statistics are centred:
each tile about its own mean, then merged (Chan, Golub & LeVeque 1979).

Legend: N images, C channels, S positions, M = N S.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._activations import activate, activate_grad
from ._common import FUSED, channels_last, image_size, index_type, on_device_of, wide_type
from ._group_norm_tiles import (
    affine,
    block_channels,
    load_tile,
    reciprocal_std,
    sizes,
    split_blocks,
    store_tile,
)
from .group_norm_act import group_norm_act_fwd_partial_kernel


def batch_norm_act_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool, eps: float,
    act: int, y: Tensor, mean: Tensor, var: Tensor,
) -> None:  # fmt: skip
    """Fills y [N, C, *] and, in training, mean and var [C], which are given otherwise.

    x, residual: [N, C, *] in one dense layout; weight, bias: [C]; parameters and statistics contiguous in
    fp32 (fp64 for fp64).
    """
    if x.numel() == 0:
        return
    n, shape = len(x), _sizes(x)
    blocks, chunk, splits = split_blocks("batch_norm_act_fwd", x)
    columns = triton.cdiv(x.shape[1], blocks["BLOCK_C"])
    with on_device_of(x):
        if training:
            partial = mean.new_empty(2, n, x.shape[1], splits)
            group_norm_act_fwd_partial_kernel[(n * columns * splits,)](
                x, None, *partial, chunk, splits, **sizes(x, x, x.shape[1]), **blocks, **FUSED
            )
            batch_norm_act_fwd_combine_kernel[(x.shape[1],)](
                *partial, mean, var, n, chunk, splits, shape["channels"], shape["positions"], WIDE=shape["WIDE"],
                BLOCK=1024, **FUSED,
            )  # fmt: skip
        rows = triton.cdiv(shape["positions"], blocks["BLOCK_S"])
        batch_norm_act_fwd_apply_kernel[(n * columns * rows,)](
            x, residual, weight, bias, y, mean, var, rows, **shape, EPS=eps, ACT=act, **blocks, **FUSED
        )


def batch_norm_act_bwd(
    dy: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    var: Tensor, training: bool, eps: float, act: int, dx: Tensor, dresidual: Tensor | None, dweight: Tensor,
    dbias: Tensor,
) -> None:  # fmt: skip
    """Fills dx and, if given, dresidual [N, C, *], and dweight and dbias [C]; the rest as in `batch_norm_act_fwd`."""
    if x.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        return
    n, shape, given = len(x), _sizes(x), (dy, x, residual, weight, bias, mean, var)
    blocks, chunk, splits = split_blocks("batch_norm_act_bwd", x)
    columns = triton.cdiv(x.shape[1], blocks["BLOCK_C"])
    with on_device_of(x):
        partial = mean.new_empty(2, n, x.shape[1], splits)
        batch_norm_act_bwd_partial_kernel[(n * columns * splits,)](
            *given, *partial, chunk, splits, **shape, EPS=eps, ACT=act, **blocks, **FUSED
        )
        batch_norm_act_bwd_combine_kernel[(x.shape[1],)](
            *partial, dbias, dweight, n, splits, shape["channels"], WIDE=shape["WIDE"], BLOCK=1024, **FUSED
        )
        rows = triton.cdiv(shape["positions"], blocks["BLOCK_S"])
        batch_norm_act_bwd_apply_kernel[(n * columns * rows,)](
            *given, dweight, dbias, dx, dresidual, n, rows, **shape, EPS=eps, ACT=act, TRAINING=training, **blocks,
            **FUSED,
        )  # fmt: skip


def _sizes(x: Tensor) -> dict[str, Any]:
    size = image_size(x)
    return {
        "channels": x.shape[1], "positions": size // x.shape[1], "CHANNELS_LAST": channels_last(x),
        "WIDE": wide_type(x), "INDEX": index_type(size),
    }  # fmt: skip


@triton.jit
def partial_offsets(e, c, splits, channels):
    """Where the e-th partial result of channel c lies in [N, C, splits]."""
    return ((e // splits).to(tl.int64) * channels + c) * splits + e % splits


@triton.jit
def batch_norm_act_fwd_combine_kernel(
    partial_mean_ptr,  # [N, C, splits]
    partial_deviation_ptr,  # [N, C, splits]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    images, chunk, splits, channels, positions,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and variance of a channel."""
    c = tl.program_id(0).to(tl.int64)
    mean = tl.zeros([], WIDE)
    variance = tl.zeros([], WIDE)
    for first in range(0, images * splits, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < images * splits
        weight = tl.minimum(chunk, positions - e % splits * chunk).to(WIDE) / positions / images
        offsets = partial_offsets(e, c, splits, channels)
        mean += tl.sum(tl.load(partial_mean_ptr + offsets, mask=inside, other=0.0) * weight, 0)
    for first in range(0, images * splits, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < images * splits
        weight = tl.minimum(chunk, positions - e % splits * chunk).to(WIDE) / positions / images
        offsets = partial_offsets(e, c, splits, channels)
        delta = tl.load(partial_mean_ptr + offsets, mask=inside, other=0.0) - mean
        deviation = tl.load(partial_deviation_ptr + offsets, mask=inside, other=0.0) / positions / images
        variance += tl.sum(tl.where(inside, deviation + delta * delta * weight, 0.0), 0)
    tl.store(mean_ptr + c, mean)
    tl.store(var_ptr + c, variance)


@triton.jit
def batch_norm_act_fwd_apply_kernel(
    x_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    y_ptr,  # [N, C, S]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    rows, channels, positions,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    n, c, row = block_channels(tl.program_id(0), rows, channels, INDEX, BLOCK_C)
    s = row * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = c < channels
    inside = exists[:, None] & (s < positions)[None, :]
    _, _, z = normalised_tile(
        x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, n, c, s, exists, inside, channels, positions,
        CHANNELS_LAST, WIDE, EPS,
    )  # fmt: skip
    store_tile(activate(z, ACT), y_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST)


@triton.jit
def normalised_tile(
    x_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    mean_ptr,  # [C]
    var_ptr,  # [C]
    n, c, s, exists, inside, channels, positions, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """rstd w [BC], and xhat and z [BC, BS]."""
    mean = tl.load(mean_ptr + c, mask=exists, other=0.0)
    rstd = reciprocal_std(tl.load(var_ptr + c, mask=exists, other=1.0), EPS, WIDE)
    a, d = affine(weight_ptr, bias_ptr, None, None, n, c, exists, channels, WIDE)
    x = load_tile(x_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
    xhat = (x - mean[:, None]) * rstd[:, None]
    z = xhat * a[:, None] + d[:, None]
    if residual_ptr is not None:
        z += load_tile(residual_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
    return rstd * a, xhat, z


@triton.jit
def batch_norm_act_bwd_partial_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    mean_ptr,  # [C]
    var_ptr,  # [C]
    partial_dz_ptr,  # [N, C, splits]
    partial_dz_xhat_ptr,  # [N, C, splits]
    chunk, splits, channels, positions,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The sums of dz and dz xhat of every channel over each chunk of an image's positions."""
    n, c, part = block_channels(tl.program_id(0), splits, channels, INDEX, BLOCK_C)
    exists = c < channels
    end = tl.minimum(part * chunk + chunk, positions)
    sum_dz = tl.zeros(c.shape, WIDE)
    sum_dz_xhat = tl.zeros(c.shape, WIDE)
    for first in range(part * chunk, end, BLOCK_S):
        s = tl.arange(0, BLOCK_S).to(INDEX) + first
        inside = exists[:, None] & (s < end)[None, :]
        _, xhat, z = normalised_tile(
            x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, n, c, s, exists, inside, channels, positions,
            CHANNELS_LAST, WIDE, EPS,
        )  # fmt: skip
        dy = load_tile(dy_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
        dz = dy * activate_grad(z, ACT)  # dy = 0 outside, and so is dz
        sum_dz += tl.sum(dz, 1)
        sum_dz_xhat += tl.sum(dz * xhat, 1)
    offsets = (n * channels + c) * splits + part
    tl.store(partial_dz_ptr + offsets, sum_dz, mask=exists)
    tl.store(partial_dz_xhat_ptr + offsets, sum_dz_xhat, mask=exists)


@triton.jit
def batch_norm_act_bwd_combine_kernel(
    partial_dz_ptr,  # [N, C, splits]
    partial_dz_xhat_ptr,  # [N, C, splits]
    dbias_ptr,  # [C]
    dweight_ptr,  # [C]
    images, splits, channels,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a channel."""
    c = tl.program_id(0).to(tl.int64)
    dbias = tl.zeros([], WIDE)
    dweight = tl.zeros([], WIDE)
    for first in range(0, images * splits, BLOCK):
        e = first + tl.arange(0, BLOCK)
        offsets = partial_offsets(e, c, splits, channels)
        dbias += tl.sum(tl.load(partial_dz_ptr + offsets, mask=e < images * splits, other=0.0), 0)
        dweight += tl.sum(tl.load(partial_dz_xhat_ptr + offsets, mask=e < images * splits, other=0.0), 0)
    tl.store(dbias_ptr + c, dbias)
    tl.store(dweight_ptr + c, dweight)


@triton.jit
def batch_norm_act_bwd_apply_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    residual_ptr,  # [N, C, S] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    mean_ptr,  # [C]
    var_ptr,  # [C]
    dweight_ptr,  # [C]
    dbias_ptr,  # [C]
    dx_ptr,  # [N, C, S]
    dresidual_ptr,  # [N, C, S] or None
    images, rows, channels, positions,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    TRAINING: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One tile of dx and dresidual."""
    n, c, row = block_channels(tl.program_id(0), rows, channels, INDEX, BLOCK_C)
    s = row * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = c < channels
    inside = exists[:, None] & (s < positions)[None, :]
    a, xhat, z = normalised_tile(
        x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, n, c, s, exists, inside, channels, positions,
        CHANNELS_LAST, WIDE, EPS,
    )  # fmt: skip
    dy = load_tile(dy_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
    dz = dy * activate_grad(z, ACT)
    if dresidual_ptr is not None:
        store_tile(dz, dresidual_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST)
    if TRAINING:
        p = tl.load(dbias_ptr + c, mask=exists, other=0.0) / positions / images
        q = tl.load(dweight_ptr + c, mask=exists, other=0.0) / positions / images
        dz -= p[:, None] + xhat * q[:, None]
    dx = a[:, None] * dz
    store_tile(dx, dx_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST)
