"""act(GroupNorm(cat(x, skip))) with its affine maps, and its gradient. Equations: fastgen/ops/group_norm_act.py.

    xhat = (cat(x, skip) - mean) rstd;   z = xhat a + d;   y = act(z)
    a = w (1 + scale),   d = b (1 + scale) + shift
    dz = dy act'(z);   dx = rstd (a dz - P - xhat Q),   P, Q = means over the group of a dz and a dz xhat

Where an image's groups are small, one kernel does it all, a program for a few groups. Where they
are large, three do: results of every channel over chunks of positions, their combination in every
group, and the pass that writes. The shape of one image decides, and every sum has a fixed order:
an image gives the same bits in any batch. Statistics are centred: each tile about its own mean,
then merged (Chan, Golub & LeVeque 1979).

Legend: N images, C = C1 + C2 channels of x and skip, G groups, S positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FUSED, channels_last, on_device_of
from ._group_norm_tiles import (
    affine,
    block_channels,
    bundle_channels,
    channel_statistics,
    channel_sums,
    fused_blocks,
    gradient_tile,
    group_sum,
    load_tile,
    normalise_tile,
    reciprocal_std,
    sizes,
    split_blocks,
    store_tile,
)


def group_norm_act_fwd(
    x: Tensor, skip: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, num_groups: int, eps: float, act: int, y: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """Fills y [N, C, *], mean and rstd [N, G].

    x: [N, C1, *], skip: [N, C2, *] or None, in one dense layout; weight, bias: [C]; scale, shift: [N, C];
    parameters and statistics contiguous in fp32 (fp64 for fp64).
    """
    _forward(x, skip, (weight, bias, scale, shift), num_groups, eps, act, y, y, mean, rstd)


def group_norm_act_statistics(
    x: Tensor, skip: Tensor | None, num_groups: int, eps: float, mean: Tensor, rstd: Tensor
) -> None:
    """Fills mean and rstd [N, G] of x [N, C1, H, W] and skip [N, C2, H, W] or None, in one dense layout."""
    both = x
    if skip is not None:
        layout = torch.channels_last if channels_last(x) else torch.contiguous_format
        shape = (len(x), x.shape[1] + skip.shape[1], *x.shape[2:])
        both = torch.empty(shape, dtype=x.dtype, device="meta", memory_format=layout)
    _forward(x, skip, (None,) * 4, num_groups, eps, 0, both, None, mean, rstd)


def _forward(
    x: Tensor, skip: Tensor | None, parameters: tuple, num_groups: int, eps: float, act: int, both: Tensor,
    y: Tensor | None, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """y None: the statistics alone. both: a tensor like x and skip together."""
    if both.numel() == 0:
        mean.zero_()
        rstd.fill_(float("nan"))
        return
    n, shape = len(both), sizes(x, both, num_groups)
    with on_device_of(x):
        fused = fused_blocks("group_norm_act_fwd", both, num_groups)
        if fused:
            group_norm_act_fwd_kernel[(n * triton.cdiv(num_groups, fused["BUNDLE"]),)](
                x, skip, *parameters, y, mean, rstd, **shape, EPS=eps, ACT=act, **fused, **FUSED
            )
            return
        blocks, chunk, splits = split_blocks("group_norm_act_fwd", both)
        columns = triton.cdiv(both.shape[1], blocks["BLOCK_C"])
        partial = mean.new_empty(2, n, both.shape[1], splits)
        group_norm_act_fwd_partial_kernel[(n * columns * splits,)](
            x, skip, *partial, chunk, splits, **shape, **blocks, **FUSED
        )
        group_norm_act_fwd_combine_kernel[(n * num_groups,)](
            *partial, mean, rstd, chunk, splits, **shape, EPS=eps, BLOCK=1024, **FUSED
        )
        if y is None:
            return
        rows = triton.cdiv(shape["positions"], blocks["BLOCK_S"])
        group_norm_act_fwd_apply_kernel[(n * columns * rows,)](
            x, skip, *parameters, y, mean, rstd, rows, **shape, ACT=act, **blocks, **FUSED
        )


def group_norm_act_bwd(
    dy: Tensor, x: Tensor, skip: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int, act: int, dx: Tensor, dskip: Tensor | None,
    sum_dz: Tensor, sum_dz_xhat: Tensor,
) -> None:  # fmt: skip
    """Fills dx [N, C1, *], dskip [N, C2, *] if given, and the sums over positions of dz and dz xhat, [N, C] each.

    dy: [N, C, *]; the rest as in `group_norm_act_fwd`, which made mean and rstd.
    """
    if dy.numel() == 0:
        sum_dz.zero_()
        sum_dz_xhat.zero_()
        return
    n, parameters, shape = len(dy), (weight, bias, scale, shift, mean, rstd), sizes(x, dy, num_groups)
    with on_device_of(dy):
        fused = fused_blocks("group_norm_act_bwd", dy, num_groups)
        if fused:
            group_norm_act_bwd_kernel[(n * triton.cdiv(num_groups, fused["BUNDLE"]),)](
                dy, x, skip, *parameters, dx, dskip, sum_dz, sum_dz_xhat, **shape, ACT=act, **fused, **FUSED
            )
            return
        blocks, chunk, splits = split_blocks("group_norm_act_bwd", dy)
        columns = triton.cdiv(dy.shape[1], blocks["BLOCK_C"])
        partial, group_means = mean.new_empty(2, n, dy.shape[1], splits), mean.new_empty(2, n, num_groups)
        group_norm_act_bwd_partial_kernel[(n * columns * splits,)](
            dy, x, skip, *parameters, *partial, chunk, splits, **shape, ACT=act, **blocks, **FUSED
        )
        group_norm_act_bwd_combine_kernel[(n * num_groups,)](
            *partial, weight, scale, sum_dz, sum_dz_xhat, *group_means, splits, **shape,
            BLOCK_C=8, BLOCK_SPLITS=triton.next_power_of_2(splits), **FUSED,
        )  # fmt: skip
        rows = triton.cdiv(shape["positions"], blocks["BLOCK_S"])
        group_norm_act_bwd_apply_kernel[(n * columns * rows,)](
            dy, x, skip, *parameters, *group_means, dx, dskip, rows, **shape, ACT=act, **blocks, **FUSED
        )


@triton.jit
def group_norm_act_fwd_kernel(
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [N, C] or None
    shift_ptr,  # [N, C] or None
    y_ptr,  # [N, C, S], or None for the statistics alone
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    x_channels, channels, positions, groups,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    EPS: tl.constexpr, ACT: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Small groups, all at once."""
    n, group, c, exists = bundle_channels(tl.program_id(0), groups, GROUP_CHANNELS, INDEX, BUNDLE, BLOCK_K)
    channel_mean, deviation = channel_statistics(
        x_ptr, skip_ptr, n, c, exists, 0, positions, x_channels, channels, positions,
        CHANNELS_LAST, WIDE, INDEX, BLOCK_S,
    )  # fmt: skip
    mean = group_sum(channel_mean, BUNDLE, BLOCK_K) / GROUP_CHANNELS  # 0 where no channel exists
    delta = tl.where(exists, channel_mean - mean, 0.0)
    variance = group_sum(deviation / positions + delta * delta, BUNDLE, BLOCK_K) / GROUP_CHANNELS
    rstd = reciprocal_std(variance, EPS, WIDE)
    leader = exists & (c == group * GROUP_CHANNELS)
    tl.store(mean_ptr + n * groups + group, mean, mask=leader)
    tl.store(rstd_ptr + n * groups + group, rstd, mask=leader)
    if y_ptr is not None:
        a, d = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, exists, channels, WIDE)
        for first in range(0, positions, BLOCK_S):
            s = tl.arange(0, BLOCK_S).to(INDEX) + first
            inside = exists[:, None] & (s < positions)[None, :]
            x = load_tile(x_ptr, skip_ptr, n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST, WIDE)
            y = normalise_tile(x, mean, rstd, a, d, ACT)
            store_tile(y, y_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST)


@triton.jit
def group_norm_act_bwd_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [N, C] or None
    shift_ptr,  # [N, C] or None
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    dx_ptr,  # [N, C1, S]
    dskip_ptr,  # [N, C2, S] or None
    sum_dz_ptr,  # [N, C]
    sum_dz_xhat_ptr,  # [N, C]
    x_channels, channels, positions, groups,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    ACT: tl.constexpr, BUNDLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Small groups, all at once."""
    n, group, c, exists = bundle_channels(tl.program_id(0), groups, GROUP_CHANNELS, INDEX, BUNDLE, BLOCK_K)
    mean = tl.load(mean_ptr + n * groups + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + n * groups + group, mask=exists, other=0.0)
    a, d = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, exists, channels, WIDE)
    sum_dz, sum_dz_xhat = channel_sums(
        dy_ptr, x_ptr, skip_ptr, mean, rstd, a, d, n, c, exists, 0, positions, x_channels, channels, positions,
        ACT, CHANNELS_LAST, WIDE, INDEX, BLOCK_S,
    )  # fmt: skip
    tl.store(sum_dz_ptr + n * channels + c, sum_dz, mask=exists)
    tl.store(sum_dz_xhat_ptr + n * channels + c, sum_dz_xhat, mask=exists)
    p = group_sum(a * sum_dz / positions, BUNDLE, BLOCK_K) / GROUP_CHANNELS
    q = group_sum(a * sum_dz_xhat / positions, BUNDLE, BLOCK_K) / GROUP_CHANNELS
    for first in range(0, positions, BLOCK_S):
        s = tl.arange(0, BLOCK_S).to(INDEX) + first
        inside = exists[:, None] & (s < positions)[None, :]
        x = load_tile(x_ptr, skip_ptr, n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST, WIDE)
        dy = load_tile(dy_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
        xhat, dz = gradient_tile(x, dy, mean, rstd, a, d, ACT)
        dx = rstd[:, None] * (a[:, None] * dz - p[:, None] - xhat * q[:, None])
        store_tile(dx, dx_ptr, dskip_ptr, n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST)


@triton.jit
def group_norm_act_fwd_partial_kernel(
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    partial_mean_ptr,  # [N, C, splits]
    partial_deviation_ptr,  # [N, C, splits]
    chunk, splits, x_channels, channels, positions, groups,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviation of every channel over each chunk of positions."""
    n, c, part = block_channels(tl.program_id(0), splits, channels, INDEX, BLOCK_C)
    exists = c < channels
    mean, deviation = channel_statistics(
        x_ptr, skip_ptr, n, c, exists, part * chunk, tl.minimum(part * chunk + chunk, positions),
        x_channels, channels, positions, CHANNELS_LAST, WIDE, INDEX, BLOCK_S,
    )  # fmt: skip
    offsets = (n * channels + c) * splits + part
    tl.store(partial_mean_ptr + offsets, mean, mask=exists)
    tl.store(partial_deviation_ptr + offsets, deviation, mask=exists)


@triton.jit
def group_norm_act_fwd_combine_kernel(
    partial_mean_ptr,  # [N, C, splits]
    partial_deviation_ptr,  # [N, C, splits]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    chunk, splits, x_channels, channels, positions, groups,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of a group, whose partial results lie side by side."""
    base = tl.program_id(0).to(tl.int64) * GROUP_CHANNELS * splits
    mean = tl.zeros([], WIDE)
    variance = tl.zeros([], WIDE)
    for first in range(0, GROUP_CHANNELS * splits, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < GROUP_CHANNELS * splits
        weight = tl.minimum(chunk, positions - e % splits * chunk).to(WIDE) / positions / GROUP_CHANNELS
        mean += tl.sum(tl.load(partial_mean_ptr + base + e, mask=inside, other=0.0) * weight, 0)
    for first in range(0, GROUP_CHANNELS * splits, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < GROUP_CHANNELS * splits
        weight = tl.minimum(chunk, positions - e % splits * chunk).to(WIDE) / positions / GROUP_CHANNELS
        delta = tl.load(partial_mean_ptr + base + e, mask=inside, other=0.0) - mean
        deviation = tl.load(partial_deviation_ptr + base + e, mask=inside, other=0.0) / positions / GROUP_CHANNELS
        variance += tl.sum(tl.where(inside, deviation + delta * delta * weight, 0.0), 0)
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), reciprocal_std(variance, EPS, WIDE))


@triton.jit
def group_norm_act_fwd_apply_kernel(
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [N, C] or None
    shift_ptr,  # [N, C] or None
    y_ptr,  # [N, C, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    rows, x_channels, channels, positions, groups,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    n, c, row = block_channels(tl.program_id(0), rows, channels, INDEX, BLOCK_C)
    s = row * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = c < channels
    inside = exists[:, None] & (s < positions)[None, :]
    mean = tl.load(mean_ptr + n * groups + c // GROUP_CHANNELS, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + n * groups + c // GROUP_CHANNELS, mask=exists, other=0.0)
    a, d = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, exists, channels, WIDE)
    x = load_tile(x_ptr, skip_ptr, n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST, WIDE)
    y = normalise_tile(x, mean, rstd, a, d, ACT)
    store_tile(y, y_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST)


@triton.jit
def group_norm_act_bwd_partial_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [N, C] or None
    shift_ptr,  # [N, C] or None
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    partial_dz_ptr,  # [N, C, splits]
    partial_dz_xhat_ptr,  # [N, C, splits]
    chunk, splits, x_channels, channels, positions, groups,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The sums of dz and dz xhat of every channel over each chunk of positions."""
    n, c, part = block_channels(tl.program_id(0), splits, channels, INDEX, BLOCK_C)
    exists = c < channels
    mean = tl.load(mean_ptr + n * groups + c // GROUP_CHANNELS, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + n * groups + c // GROUP_CHANNELS, mask=exists, other=0.0)
    a, d = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, exists, channels, WIDE)
    sum_dz, sum_dz_xhat = channel_sums(
        dy_ptr, x_ptr, skip_ptr, mean, rstd, a, d, n, c, exists, part * chunk,
        tl.minimum(part * chunk + chunk, positions), x_channels, channels, positions,
        ACT, CHANNELS_LAST, WIDE, INDEX, BLOCK_S,
    )  # fmt: skip
    offsets = (n * channels + c) * splits + part
    tl.store(partial_dz_ptr + offsets, sum_dz, mask=exists)
    tl.store(partial_dz_xhat_ptr + offsets, sum_dz_xhat, mask=exists)


@triton.jit
def group_norm_act_bwd_combine_kernel(
    partial_dz_ptr,  # [N, C, splits]
    partial_dz_xhat_ptr,  # [N, C, splits]
    weight_ptr,  # [C] or None
    scale_ptr,  # [N, C] or None
    sum_dz_ptr,  # [N, C]
    sum_dz_xhat_ptr,  # [N, C]
    p_ptr,  # [N, G]
    q_ptr,  # [N, G]
    splits, x_channels, channels, positions, groups,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """The sums of a group's channels, and P and Q of the group."""
    n = (tl.program_id(0) // groups).to(tl.int64)
    part = tl.arange(0, BLOCK_SPLITS)
    p = tl.zeros([BLOCK_C], WIDE)
    q = tl.zeros([BLOCK_C], WIDE)
    for first in range(0, GROUP_CHANNELS, BLOCK_C):
        k = first + tl.arange(0, BLOCK_C)
        c = (tl.program_id(0) % groups).to(INDEX) * GROUP_CHANNELS + k
        exists = k < GROUP_CHANNELS
        inside = exists[:, None] & (part < splits)[None, :]
        offsets = (n * channels + c[:, None]) * splits + part[None, :]
        sum_dz = tl.sum(tl.load(partial_dz_ptr + offsets, mask=inside, other=0.0), 1)
        sum_dz_xhat = tl.sum(tl.load(partial_dz_xhat_ptr + offsets, mask=inside, other=0.0), 1)
        tl.store(sum_dz_ptr + n * channels + c, sum_dz, mask=exists)
        tl.store(sum_dz_xhat_ptr + n * channels + c, sum_dz_xhat, mask=exists)
        a, _ = affine(weight_ptr, None, scale_ptr, None, n, c, exists, channels, WIDE)
        p += a * sum_dz
        q += a * sum_dz_xhat
    tl.store(p_ptr + tl.program_id(0), tl.sum(p, 0) / positions / GROUP_CHANNELS)
    tl.store(q_ptr + tl.program_id(0), tl.sum(q, 0) / positions / GROUP_CHANNELS)


@triton.jit
def group_norm_act_bwd_apply_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C1, S]
    skip_ptr,  # [N, C2, S] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [N, C] or None
    shift_ptr,  # [N, C] or None
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    p_ptr,  # [N, G]
    q_ptr,  # [N, G]
    dx_ptr,  # [N, C1, S]
    dskip_ptr,  # [N, C2, S] or None
    rows, x_channels, channels, positions, groups,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One tile of dx and dskip."""
    n, c, row = block_channels(tl.program_id(0), rows, channels, INDEX, BLOCK_C)
    s = row * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = c < channels
    inside = exists[:, None] & (s < positions)[None, :]
    group = n * groups + c // GROUP_CHANNELS
    mean = tl.load(mean_ptr + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)
    p = tl.load(p_ptr + group, mask=exists, other=0.0)
    q = tl.load(q_ptr + group, mask=exists, other=0.0)
    a, d = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, exists, channels, WIDE)
    x = load_tile(x_ptr, skip_ptr, n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST, WIDE)
    dy = load_tile(dy_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
    xhat, dz = gradient_tile(x, dy, mean, rstd, a, d, ACT)
    dx = rstd[:, None] * (a[:, None] * dz - p[:, None] - xhat * q[:, None])
    store_tile(dx, dx_ptr, dskip_ptr, n, c, s, inside, x_channels, channels, positions, CHANNELS_LAST)
