"""clamp(gain act(x + b), -clamp, clamp), its gradient and that one's gradient. Equations: fastgen/ops/bias_act.py.

Memory is read as [N, C, S], or as [1, S, C] where neighbours in memory have neighbouring numbers in b. A program takes
a tile of channels by positions and reads and writes each tensor once; its sums over a channel go to a slot of their
own, and slots are added up afterwards. Legend: N outer indices, C the length of b, S positions; of the index o in
memory, o // step % C is the number in b.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activations import SIGMOID as SIGMOID_ACT
from ._activations import SILU as SILU_ACT
from ._activations import TANH as TANH_ACT
from ._activations import activate_grad, sigmoid, sigmoid_pair, tanh
from ._common import FUSED, index_type, on_device_of, wide_type
from ._group_norm_tiles import block_channels, load_tile, store_tile

RELU = tl.constexpr(1)
LRELU = tl.constexpr(2)
TANH = tl.constexpr(3)
SIGMOID = tl.constexpr(4)
ELU = tl.constexpr(5)
SELU = tl.constexpr(6)
SOFTPLUS = tl.constexpr(7)
SWISH = tl.constexpr(8)

SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)
SELU_ALPHA = tl.constexpr(1.6732632423543772848170429916717)
SOFTPLUS_LINEAR = tl.constexpr(20.0)  # from there on PyTorch's softplus is the identity


def bias_act_fwd(
    x: Tensor, b: Tensor | None, step: int, act: int, alpha: float, gain: float, clamp: float, y: Tensor
) -> None:
    """Fills y from x, dense and of one layout, and b [C] in fp32 (fp64 for fp64). clamp: infinity for none."""
    if x.numel() == 0:
        return
    _, grid, common = _tiles(x, b, step)
    with on_device_of(x):
        bias_act_fwd_kernel[grid](x, b, y, **common, **_numbers(act, alpha, gain, clamp), **FUSED)


def bias_act_bwd(
    dy: Tensor, x: Tensor, b: Tensor | None, step: int, act: int, alpha: float, gain: float, clamp: float,
    dx: Tensor, db: Tensor | None,
) -> None:  # fmt: skip
    """Fills dx and, if given, db [C]; the rest as in `bias_act_fwd`."""
    slots, grid, common = _tiles(x, b, step)
    partial = None if db is None else db.new_empty(slots, len(db))
    with on_device_of(x):
        bias_act_bwd_kernel[grid](dy, x, b, dx, partial, **common, **_numbers(act, alpha, gain, clamp), **FUSED)
        if db is not None:
            torch.sum(partial, 0, out=db)


def bias_act_bwd_bwd(
    ddx: Tensor, ddb: Tensor | None, dy: Tensor, x: Tensor, b: Tensor | None, step: int, act: int, alpha: float,
    gain: float, clamp: float, d_dy: Tensor, d_x: Tensor | None, d_b: Tensor | None,
) -> None:  # fmt: skip
    """Fills d_dy and, if given, d_x and d_b [C]; ddb: [C] or None; the rest as in `bias_act_fwd`."""
    slots, grid, common = _tiles(x, b, step)
    partial = None if d_b is None else d_b.new_empty(slots, len(d_b))
    given = (ddx, ddb, dy, x, b, d_dy, d_x, partial)
    with on_device_of(x):
        bias_act_bwd_bwd_kernel[grid](*given, **common, **_numbers(act, alpha, gain, clamp), **FUSED)
        if d_b is not None:
            torch.sum(partial, 0, out=d_b)


def _tiles(x: Tensor, b: Tensor | None, step: int) -> tuple[int, tuple[int], dict[str, Any]]:
    """Slots for partial sums, the grid, and what kernels are told of x's memory."""
    channels, size = 1 if b is None else len(b), 512 if x.dtype == torch.float64 else 1024
    last = step == 1 and channels > 1
    positions = x.numel() // channels if last else step
    images = x.numel() // (channels * positions)
    most_c, most_s = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    block_c = min(most_c, max(128, size // most_s)) if last else min(most_c, max(1, size // most_s))
    block_s = min(most_s, size // block_c)
    rows = triton.cdiv(positions, block_s)
    return images * rows, (images * triton.cdiv(channels, block_c) * rows,), {
        "rows": rows, "channels": channels, "positions": positions, "CHANNELS_LAST": last, "WIDE": wide_type(x),
        "INDEX": index_type(channels * positions), "BLOCK_C": block_c, "BLOCK_S": block_s,
    }  # fmt: skip


def _numbers(act: int, alpha: float, gain: float, clamp: float) -> dict[str, Any]:
    """Constants of the kernels: as arguments they would be fp32, for fp64 tensors too."""
    return {"ACT": act, "ALPHA": alpha, "GAIN": gain, "CLAMP": None if clamp == math.inf else clamp}


@triton.jit
def expm1(z):
    """exp(z) - 1 for z <= 0; near 0 by its series, since the difference would cancel."""
    if z.dtype == tl.float64:
        return tl.exp(z) - 1.0
    else:
        p = 1.0 + z * 0.125
        p = 1.0 + z * 0.14285714285714285 * p
        p = 1.0 + z * 0.16666666666666666 * p
        p = 1.0 + z * 0.2 * p
        p = 1.0 + z * 0.25 * p
        p = 1.0 + z * 0.3333333333333333 * p
        p = 1.0 + z * 0.5 * p
        return tl.where(z > -0.5, z * p, tl.exp(z) - 1.0)


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1]: 2 atanh(w), w = e / (2 + e), by its series."""
    if e.dtype == tl.float64:
        return tl.log(1.0 + e)
    else:
        w = e / (2.0 + e)
        w2 = w * w
        p = 0.07692307692307693 + w2 * 0.06666666666666667
        p = 0.09090909090909091 + w2 * p
        p = 0.1111111111111111 + w2 * p
        p = 0.14285714285714285 + w2 * p
        p = 0.2 + w2 * p
        p = 0.3333333333333333 + w2 * p
        return 2.0 * (w + w * w2 * p)


@triton.jit
def value(z, ACT: tl.constexpr, ALPHA: tl.constexpr):
    """act(z); ALPHA: the slope of lrelu below 0."""
    if ACT == RELU:
        return tl.where(z <= 0, 0.0, z)  # a NaN stays a NaN
    elif ACT == LRELU:
        return tl.where(z > 0, z, z * ALPHA)
    elif ACT == TANH:
        return tanh(z)
    elif ACT == SIGMOID:
        return sigmoid(z)
    elif ACT == ELU:
        return tl.where(z > 0, z, expm1(tl.where(z > 0, 0.0, z)))
    elif ACT == SELU:
        return tl.where(z > 0, z, expm1(tl.where(z > 0, 0.0, z)) * SELU_ALPHA) * SELU_SCALE
    elif ACT == SOFTPLUS:
        return tl.where(z > SOFTPLUS_LINEAR, z, tl.where(z < 0, 0.0, z) + log1p(tl.exp(-tl.abs(z))))
    elif ACT == SWISH:
        return z * sigmoid(z)
    else:
        return z


@triton.jit
def first(z, ACT: tl.constexpr, ALPHA: tl.constexpr):
    """act'(z)."""
    one = tl.full(z.shape, 1.0, z.dtype)
    if ACT == RELU:
        return tl.where(z > 0, one, 0.0)
    elif ACT == LRELU:
        return tl.where(z > 0, one, one * ALPHA)
    elif ACT == TANH:
        return activate_grad(z, TANH_ACT)
    elif ACT == SIGMOID:
        return activate_grad(z, SIGMOID_ACT)
    elif ACT == ELU:
        return tl.where(z > 0, one, tl.exp(z))
    elif ACT == SELU:
        return tl.where(z > 0, one, tl.exp(z) * SELU_ALPHA) * SELU_SCALE
    elif ACT == SOFTPLUS:
        return tl.where(z > SOFTPLUS_LINEAR, one, sigmoid(z))
    elif ACT == SWISH:
        return activate_grad(z, SILU_ACT)
    else:
        return one


@triton.jit
def second(z, ACT: tl.constexpr):
    """act''(z)."""
    if ACT == TANH:
        return tanh(z) * activate_grad(z, TANH_ACT) * -2.0
    elif ACT == ELU:
        return tl.where(z < 0, tl.exp(z), 0.0)
    elif ACT == SELU:
        return tl.where(z < 0, tl.exp(z) * SELU_SCALE * SELU_ALPHA, 0.0)
    elif ACT == SIGMOID:
        s, rest = sigmoid_pair(z)
        return s * rest * (rest - s)
    elif ACT == SOFTPLUS:
        s, rest = sigmoid_pair(z)
        return tl.where(z > SOFTPLUS_LINEAR, 0.0, s * rest)
    elif ACT == SWISH:
        s, rest = sigmoid_pair(z)
        return s * rest * (2.0 + z * (rest - s))
    else:
        return tl.zeros(z.shape, z.dtype)


@triton.jit
def slope(z, ACT: tl.constexpr, ALPHA: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr):
    """GAIN, or 0 where CLAMP cuts GAIN act(z) off: what act' and act'' are multiplied by."""
    gain = tl.full(z.shape, 1.0, z.dtype) * GAIN
    if CLAMP is None:
        return gain
    return tl.where(tl.abs(gain * value(z, ACT, ALPHA)) > CLAMP, 0.0, gain)


@triton.jit
def tile_of(program, rows, channels, positions, INDEX: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Outer index, channels, positions, row of blocks, which channels exist, and which elements of the tile."""
    n, c, row = block_channels(program, rows, channels, INDEX, BLOCK_C)
    s = row * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = c < channels
    return n, c, s, row, exists, exists[:, None] & (s < positions)[None, :]


@triton.jit
def biased(
    x_ptr,  # [N, C, S]
    b_ptr,  # [C] or None
    n, c, s, exists, inside, channels, positions, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of x + b."""
    z = load_tile(x_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
    if b_ptr is not None:
        z += tl.load(b_ptr + c, mask=exists, other=0.0).to(WIDE)[:, None]
    return z


@triton.jit
def bias_act_fwd_kernel(
    x_ptr,  # [N, C, S]
    b_ptr,  # [C] or None
    y_ptr,  # [N, C, S]
    rows, channels, positions, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    n, c, s, _, exists, inside = tile_of(tl.program_id(0), rows, channels, positions, INDEX, BLOCK_C, BLOCK_S)
    z = biased(x_ptr, b_ptr, n, c, s, exists, inside, channels, positions, CHANNELS_LAST, WIDE)
    y = value(z, ACT, ALPHA) * GAIN
    if CLAMP is not None:
        y = tl.where(y > CLAMP, CLAMP, tl.where(y < -CLAMP, -CLAMP, y))
    store_tile(y, y_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST)


@triton.jit
def bias_act_bwd_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    b_ptr,  # [C] or None
    dx_ptr,  # [N, C, S]
    partial_ptr,  # [N * rows, C] or None
    rows, channels, positions, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
):  # fmt: skip
    """One tile of dx, and its sums over positions."""
    n, c, s, row, exists, inside = tile_of(tl.program_id(0), rows, channels, positions, INDEX, BLOCK_C, BLOCK_S)
    z = biased(x_ptr, b_ptr, n, c, s, exists, inside, channels, positions, CHANNELS_LAST, WIDE)
    dy = load_tile(dy_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
    dx = dy * first(z, ACT, ALPHA) * slope(z, ACT, ALPHA, GAIN, CLAMP)
    store_tile(dx, dx_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST)
    if partial_ptr is not None:
        tl.store(partial_ptr + (n * rows + row) * channels + c, tl.sum(tl.where(inside, dx, 0.0), 1), mask=exists)


@triton.jit
def bias_act_bwd_bwd_kernel(
    ddx_ptr,  # [N, C, S]
    ddb_ptr,  # [C] or None
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    b_ptr,  # [C] or None
    d_dy_ptr,  # [N, C, S]
    d_x_ptr,  # [N, C, S] or None
    partial_ptr,  # [N * rows, C] or None
    rows, channels, positions, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
):  # fmt: skip
    """One tile of d_dy, and of d_x with its sums over positions."""
    n, c, s, row, exists, inside = tile_of(tl.program_id(0), rows, channels, positions, INDEX, BLOCK_C, BLOCK_S)
    z = biased(x_ptr, b_ptr, n, c, s, exists, inside, channels, positions, CHANNELS_LAST, WIDE)
    t = biased(ddx_ptr, ddb_ptr, n, c, s, exists, inside, channels, positions, CHANNELS_LAST, WIDE)
    t *= slope(z, ACT, ALPHA, GAIN, CLAMP)
    d_dy = t * first(z, ACT, ALPHA)
    store_tile(d_dy, d_dy_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST)
    if d_x_ptr is not None:
        dy = load_tile(dy_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST, WIDE)
        d_x = t * dy * second(z, ACT)
        store_tile(d_x, d_x_ptr, None, n, c, s, inside, channels, channels, positions, CHANNELS_LAST)
        if partial_ptr is not None:
            tl.store(partial_ptr + (n * rows + row) * channels + c, tl.sum(tl.where(inside, d_x, 0.0), 1), mask=exists)
