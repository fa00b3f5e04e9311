"""conv2d with what stands before and after it, and its gradients, as implicit matrix products (NHWC).

    h = in_act(a [x, skip] + d),  a = rstd w (1 + scale),  d = b (1 + scale) + shift - mean a,  per image and channel
    y = act(conv(up(h)) gain + bias + residual)
    dh = the transposed convolution of dy (also conv_transpose2d's forward);   dW = sum over pixels of dy h

Rows of the product are pixels, columns output channels; depth is channels times taps, and h is made anew from x for
every tap. Of a stride's transposed convolution each remainder of the output pixel modulo the stride is a convolution of
its own, with the taps that meet it. dW is summed over stretches of pixels, each in a slot of its own, then over the
slots in their order. Equations: fastgen/ops/conv2d.py, the gradients': Dumoulin & Visin 2016.

Cost: a 3×3 convolution of [N, C, H, W] to K channels takes 18 N H W C K operations and moves N H W (C + K) and 9 C K
elements. C = K = 128, H = W = 32, bf16, batch 64: 19 GFLOP and 34 MB, so 25 µs and 7 µs on an H200 (790 TFLOP/s,
4.8 TB/s). With a norm before it, SiLU is computed for each of the 9 taps: 75 million exponentials and as many
divisions, another 40 µs of the special function units where K is one tile wide, and the larger part of the time.

Legend: N images, C = C1 + C2 channels of x and skip, K outputs, H W input, H' W' output, G groups of the norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import FUSED, image_size, index_type, on_device_of, wide_type
from ._conv2d_tiles import add_products, finish, first_tap, images_per_tile, load_pixels, tile_pixels, units
from ._group_norm_tiles import affine
from ._tuning import configuration

STAGES = {"sm_80": 3, "sm_90": 4, "sm_100": 4}  # of loads under way, as many as shared memory has room for; else 2
ENOUGH = 128  # programs that keep a GPU busy


def blocks(target: str, dtype: torch.dtype, rows: int, columns: int, depth: int, task: str) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages for a product of [rows, depth] and [depth, columns].

    target: as `_common.architecture` says. task: "conv" (also the data gradient) and "norm_act_conv", where depth
    counts the channels of one tap, or "weight_bwd", where it counts pixels. Which bits an image gets must not depend
    on ``rows``, so BLOCK_K does not.
    """
    few = {"num_warps": 4, "num_stages": STAGES.get(target, 2)}
    block_n = min(128, max(16, triton.next_power_of_2(columns)))
    if not target:  # Triton's interpreter, whose time is the number of operations, of whatever size
        return {"BLOCK_M": 128, "BLOCK_N": min(64, block_n), "BLOCK_K": 128 if task == "weight_bwd" else 32, **few}
    if dtype == torch.float64:
        return {"BLOCK_M": 32, "BLOCK_N": min(32, block_n), "BLOCK_K": 16, **few, "num_stages": 2}
    if dtype == torch.float32:
        if task == "weight_bwd":
            return {"BLOCK_M": 32, "BLOCK_N": min(32, block_n), "BLOCK_K": 16, **few, "num_stages": 1}
        return {"BLOCK_M": 64, "BLOCK_N": min(32, block_n), "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    steps = {"conv": (64, 32, 16), "norm_act_conv": (32, 16), "weight_bwd": (64,)}[task]
    block_k = min(steps, key=lambda b: (triton.cdiv(depth, b) * b, -b))
    block_m = 128 if rows > 64 else 64
    if task != "weight_bwd":
        while block_m * block_n > 64 * 64 and triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) < ENOUGH:
            block_m, block_n = (64, block_n) if block_m > 64 else (64, block_n // 2)
    warps = 8 if block_m * block_n > 64 * 128 else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, **few, "num_warps": warps}


def _configuration(task: str, x: Tensor, rows: int, columns: int, depth: int, like: Tensor) -> dict[str, int]:
    """The configuration of `blocks`, or one near it that `fastgen.tune` found faster for x and ``like``."""
    first = blocks(_common.architecture(x), x.dtype, rows, columns, depth, task)
    options = [first]
    if x.dtype in (torch.float16, torch.bfloat16):
        changes = [{"num_stages": 2}]
        if task != "weight_bwd":  # which spills with other tiles
            changes += [{"BLOCK_M": 64}, {"BLOCK_N": 64}, {"BLOCK_M": 64, "BLOCK_N": 64}]
        options += [first | {k: min(v, first[k]) for k, v in change.items()} for change in changes]
    return configuration(f"conv2d {task}", [c for i, c in enumerate(options) if c not in options[:i]], x, like)


def conv2d_fwd(
    x: Tensor, skip: Tensor | None, packed: Tensor, mean: Tensor | None, rstd: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, in_act: int,
    gain: Tensor | None, bias: Tensor | None, residual: Tensor | None, act: int, kh: int, kw: int, sh: int, sw: int,
    pt: int, pl: int, dh: int, dw: int, gh: int, gw: int, phases: int, algorithm: int, y: Tensor,
) -> bool:  # fmt: skip
    """Fills y [N, K, H', W']; True: NaN and infinity are where the sums have them.

    x: [N, C1, H, W]; skip: [N, C2, H, W]; residual: as y; all channels last. packed: the weights as they are,
    [K, C / groups, kh, kw] of any strides. mean, rstd: [N, G]; norm_weight, norm_bias: [C]; scale, shift: [N, C];
    gain: [K]; bias: [K] or [N, K]; contiguous. pt, pl: padding above and to the left; gh, gw: H', W'. phases: 4 where
    the input is upsampled twofold. There is one algorithm.
    """
    maps = _affine(x, skip, mean, rstd, norm_weight, norm_bias, scale, shift)
    where = {"SH": sh, "SW": sw, "pt": pt, "pl": pl, "DH": dh, "DW": dw, "UPSAMPLE": 2 if phases == 4 else 1}
    _convolve(x, skip, packed, maps, in_act, gain, bias, residual, act, where, False, y)
    return True


def conv2d_data_bwd(
    dy: Tensor, weight: Tensor, gain: Tensor | None, bias: Tensor | None, residual: Tensor | None, act: int, sh: int,
    sw: int, pt: int, pl: int, dh: int, dw: int, dx: Tensor,
) -> None:  # fmt: skip
    """Fills dx [N, C, H, W] with act(conv_transpose2d(dy, weight) gain + bias + residual).

    dy: [N, K, H', W'], residual: as dx, channels last; weight: [K, C / groups, kh, kw] of any strides. The stride
    (sh, sw) or the dilation (dh, dw) is 1 in each direction. The rest as in `conv2d_fwd`.
    """
    where = {"SH": sh, "SW": sw, "pt": pt, "pl": pl, "DH": dh, "DW": dw, "UPSAMPLE": 1}
    _convolve(dy, None, weight, (None, None), 0, gain, bias, residual, act, where, True, dx)


def conv2d_weight_bwd(
    dy: Tensor, x: Tensor, skip: Tensor | None, mean: Tensor | None, rstd: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, in_act: int, pt: int, pl: int,
    algorithm: int, dweight: Tensor,
) -> bool:  # fmt: skip
    """Fills dweight [K, C, kh, kw], contiguous, fp32 (fp64 for fp64), for stride and dilation 1; True, as `conv2d_fwd`.

    dy: [N, K, H', W'], channels last; the rest as in `conv2d_fwd`.
    """
    n, outputs, gh, gw = dy.shape
    channels, kh, kw = dweight.shape[1:]
    with on_device_of(x):
        maps = _affine(x, skip, mean, rstd, norm_weight, norm_bias, scale, shift)
        sizes = _configuration("weight_bwd", x, outputs, channels, n * gh * gw, dy)
        count = units(n, gh * gw, sizes["BLOCK_K"])
        rows = triton.cdiv(outputs, sizes["BLOCK_M"]) * kh * kw
        splits = min(count, triton.cdiv(4 * ENOUGH, rows * triton.cdiv(channels, sizes["BLOCK_N"])))
        chunk = triton.cdiv(count, splits)
        splits = triton.cdiv(count, chunk)
        partial = dweight.new_empty(splits, outputs, kh * kw, channels)
        for source, first in ((x, 0), (skip, x.shape[1])):
            if source is None:
                continue
            grid = rows * triton.cdiv(source.shape[1], sizes["BLOCK_N"]) * splits
            conv2d_weight_bwd_kernel[(grid,)](
                dy, source, *maps, partial, n, chunk, count, splits, source.shape[1], channels, first, outputs,
                *source.shape[2:], gh * gw, gw, pt, pl, KH=kh, KW=kw, ACT=in_act, WIDE=wide_type(x),
                INDEX=index_type(max(image_size(source), image_size(dy))),
                **images_per_tile(gh * gw, sizes["BLOCK_K"]), **sizes, **FUSED,
            )  # fmt: skip
        block = 256
        conv2d_weight_sum_kernel[(triton.cdiv(dweight.numel(), block),)](
            partial, dweight, dweight.numel(), splits, channels, TAPS=kh * kw, WIDE=wide_type(x), BLOCK=block, **FUSED
        )
    return True


def _affine(
    x: Tensor, skip: Tensor | None, mean: Tensor | None, rstd: Tensor | None, *parameters: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """a and d [N, C], or None where there is no norm."""
    if mean is None:
        return None, None
    n, channels, block = len(x), x.shape[1] + (0 if skip is None else skip.shape[1]), 128
    a, d = mean.new_empty(2, n, channels)
    with on_device_of(x):
        conv2d_affine_kernel[(n * triton.cdiv(channels, block),)](
            mean, rstd, *parameters, a, d, channels, mean.shape[1], WIDE=wide_type(mean), BLOCK=block, **FUSED
        )
    return a, d


def _convolve(
    x: Tensor, skip: Tensor | None, weight: Tensor, maps: tuple, in_act: int, gain: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, act: int, where: dict[str, int], transposed: bool, y: Tensor,
) -> None:  # fmt: skip
    """Launches the product for y [N, K, H', W'], which may be a convolution or a transposed one."""
    n, outputs, yh, yw = y.shape
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    along = 0 if transposed else 1  # the dimension of weight that is summed over
    groups = (outputs if transposed else channels) // weight.shape[1]
    sh, sw = (where["SH"], where["SW"]) if transposed else (1, 1)
    gh, gw = triton.cdiv(yh, sh), triton.cdiv(yw, sw)
    columns, task = outputs // groups, "conv" if maps[0] is None else "norm_act_conv"
    sizes = _configuration(task, x, n * yh * yw, columns, channels // groups, y)
    columns_tiles = triton.cdiv(columns, sizes["BLOCK_N"])
    strides = weight.stride()
    with on_device_of(x):
        conv2d_kernel[(units(n, gh * gw, sizes["BLOCK_M"]) * sh * sw * groups * columns_tiles,)](
            x, skip, weight, *maps, gain, bias, residual, y, n, x.shape[1], channels, *x.shape[2:], outputs, yh, yw,
            gh * gw, gw, strides[along], strides[1 - along], *strides[2:], weight.shape[0] // groups * strides[0],
            columns_tiles, **where, KH=weight.shape[2], KW=weight.shape[3], GROUPS=groups, TRANSPOSED=transposed,
            EACH=bias is not None and bias.ndim == 2, IN_ACT=in_act, ACT=act, WIDE=wide_type(x),
            INDEX=index_type(max(map(image_size, (x, y, x if skip is None else skip)))),
            **images_per_tile(gh * gw, sizes["BLOCK_M"]), **sizes, **FUSED,
        )  # fmt: skip


@triton.jit
def conv2d_affine_kernel(
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [N, C] or None
    shift_ptr,  # [N, C] or None
    a_ptr,  # [N, C]
    d_ptr,  # [N, C]
    channels, groups, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The norm as one multiplication and one addition for each image and channel."""
    parts = tl.cdiv(channels, BLOCK)
    n = tl.program_id(0).to(tl.int64) // parts
    c = tl.program_id(0).to(tl.int64) % parts * BLOCK + tl.arange(0, BLOCK)
    exists = c < channels
    group = n * groups + c // (channels // groups)
    a, d = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, exists, channels, WIDE)
    a *= tl.load(rstd_ptr + group, mask=exists, other=0.0)
    d -= tl.load(mean_ptr + group, mask=exists, other=0.0) * a
    tl.store(a_ptr + n * channels + c, a, mask=exists)
    tl.store(d_ptr + n * channels + c, d, mask=exists)


@triton.jit
def conv2d_kernel(
    x_ptr,  # [N, H, W, C1]
    skip_ptr,  # [N, H, W, C2] or None
    weight_ptr,  # [K, C / GROUPS, KH, KW] by the strides w_out, w_in, w_y, w_x; transposed [C / GROUPS, K, KH, KW]
    a_ptr,  # [N, C] or None
    d_ptr,  # [N, C] or None
    gain_ptr,  # [K] or None
    bias_ptr,  # [K], or [N, K] if EACH, or None
    residual_ptr,  # [N, H', W', K] or None
    y_ptr,  # [N, H', W', K]
    images, x_channels, channels, height, width, outputs, y_height, y_width, positions, grid_width,
    w_in, w_out, w_y, w_x, w_group, columns, pt, pl, tiles,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, UPSAMPLE: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, GROUPS: tl.constexpr, TRANSPOSED: tl.constexpr, EACH: tl.constexpr, IN_ACT: tl.constexpr,
    ACT: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr, IMAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y: BLOCK_M pixels (if TRANSPOSED, of one remainder modulo the stride) and BLOCK_N outputs."""
    program = tl.program_id(0).to(INDEX)
    group = program // columns % GROUPS
    unit = program // columns // GROUPS
    k = program % columns * BLOCK_N + tl.arange(0, BLOCK_N)  # within the group
    group_begin = group * (channels // GROUPS)
    if TRANSPOSED:
        phase_y, phase_x = unit // SW % SH, unit % SW
        tap_y, taps_y, ahead_y = first_tap(phase_y, pt, SH, KH)
        tap_x, taps_x, ahead_x = first_tap(phase_x, pl, SW, KW)
        unit = unit // (SH * SW)
        n, v, u, exists = tile_pixels(unit, tiles, images, positions, grid_width, IMAGES, BLOCK_M, INDEX)
        y, x = v + ahead_y, u + ahead_x
        v, u = v * SH + phase_y, u * SW + phase_x
        exists = exists & (v < y_height) & (u < y_width)
    else:
        tap_y, tap_x, taps_y, taps_x = 0, 0, KH, KW
        n, v, u, exists = tile_pixels(unit, tiles, images, positions, grid_width, IMAGES, BLOCK_M, INDEX)
        y, x = v * SH - pt, u * SW - pl
    weight_ptr += group * w_group
    acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    for source in tl.static_range(2):
        if source == 0 or skip_ptr is not None:
            first = 0 if source == 0 else x_channels
            here = x_channels if source == 0 else channels - x_channels
            begin, end = 0, here
            if GROUPS > 1:
                begin = tl.minimum(tl.maximum(group_begin - first, 0), here)
                end = tl.minimum(tl.maximum(group_begin + channels // GROUPS - first, 0), here)
            acc = add_products(
                acc, x_ptr if source == 0 else skip_ptr, a_ptr, d_ptr, weight_ptr, n, y, x, exists, k,
                outputs // GROUPS, begin, end, first, group_begin, tap_y, tap_x, taps_y, taps_x, height, width, here,
                channels, w_in, w_out, w_y, w_x, -DH if TRANSPOSED else DH, -DW if TRANSPOSED else DW,
                SH if TRANSPOSED else 1, SW if TRANSPOSED else 1, UPSAMPLE, IN_ACT, WIDE, IMAGES, BLOCK_K,
            )  # fmt: skip
    mask = exists[:, None] & (k < outputs // GROUPS)[None, :]
    k += group * (outputs // GROUPS)
    row = n * y_height * y_width * outputs + (v * y_width + u) * outputs
    offsets = row[:, None] + k[None, :]
    z = finish(acc, gain_ptr, bias_ptr, residual_ptr, n, k, offsets, mask, outputs, EACH, ACT, WIDE, IMAGES)
    tl.store(y_ptr + offsets, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv2d_weight_bwd_kernel(
    dy_ptr,  # [N, H', W', K]
    x_ptr,  # [N, H, W, C1], one of the two sources
    a_ptr,  # [N, C] or None
    d_ptr,  # [N, C] or None
    partial_ptr,  # [splits, K, KH KW, C]
    images, chunk, count, splits, x_channels, channels, first, outputs, height, width, positions, grid_width, pt, pl,
    tiles, KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    IMAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The products of one tap, BLOCK_M outputs and BLOCK_N channels over one stretch of tiles."""
    program = tl.program_id(0).to(INDEX)
    split = program % splits
    tap = program // splits % (KH * KW)
    columns = tl.cdiv(x_channels, BLOCK_N)
    c = program // splits // (KH * KW) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.cdiv(outputs, BLOCK_M)
    k = program // splits // (KH * KW) // columns % rows * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], WIDE)
    for unit in range(split * chunk, tl.minimum(split * chunk + chunk, count)):
        n, v, u, exists = tile_pixels(unit, tiles, images, positions, grid_width, IMAGES, BLOCK_K, INDEX)
        h = load_pixels(
            x_ptr + n * height * width * x_channels, a_ptr, d_ptr, n, v - pt + tap // KW, u - pl + tap % KW, exists, c,
            first, x_channels, height, width, x_channels, channels, 1, ACT, WIDE, IMAGES,
        )  # fmt: skip
        dy = load_pixels(
            dy_ptr + n * positions * outputs, None, None, n, v, u, exists, k, 0, outputs, positions // grid_width,
            grid_width, outputs, outputs, 1, 0, WIDE, IMAGES,
        )  # fmt: skip
        acc = tl.dot(tl.trans(dy), h.to(dy.dtype), acc, input_precision="ieee", out_dtype=WIDE)
    at = ((split * outputs + k[:, None]) * (KH * KW) + tap) * channels + first + c[None, :]
    tl.store(partial_ptr + at, acc, mask=(k < outputs)[:, None] & (c < x_channels)[None, :])


@triton.jit
def conv2d_weight_sum_kernel(
    partial_ptr,  # [splits, K, TAPS, C]
    dweight_ptr,  # [K, C, TAPS]
    size, splits, channels, TAPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the slots in their order."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    total = tl.zeros([BLOCK], WIDE)
    for split in range(0, splits):
        total += tl.load(partial_ptr + split * size + e, mask=inside, other=0.0)
    k, tap, c = e // (TAPS * channels), e // channels % TAPS, e % channels
    tl.store(dweight_ptr + (k * channels + c) * TAPS + tap, total, mask=inside)
