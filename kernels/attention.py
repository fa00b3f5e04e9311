"""softmax(q kᵀ scale) v and its gradient. Equations: fastgen/ops/attention.py.

    s = q kᵀ scale log2(e);   m, l = max and sum over keys of s and 2^(s - m);   out = 2^(s - m) v / l
    p = 2^(s - m) / l;   dp = dout vᵀ;   ds = p (dp - sum over keys of p dp)
    dq = scale ds k,   dk = scale dsᵀ q,   dv = pᵀ dout

Forward: a program takes a block of queries and meets one block of keys after the other, so no L x S
matrix is stored (Dao et al. 2022, "FlashAttention", with the division at the end). Backward makes p
again from m and l. One kernel for dq, which also leaves the sum over keys, then one for dk and dv, each
program the only writer of its rows: no atomics. That sum is over the very p and dp that it is taken
from, as in eager: where one key has all the weight, nothing is left. (dout out, which is as much and
would save two products, has roundings of its own.) Nothing is contracted, so a row's largest s - m is 0.

Work, of N h L S scores: forward 4 D operations and an exponential each; backward 14 D, or 18 D where the keys take
more than one block, of which 10 D are the least, and two or three exponentials; D rounded up to a power of two from
16 on. On an H200 (790 TFLOP/s, 4·10¹² exponentials a second) forward of [4, 4, 1024, 64] in bf16 takes 5.4 µs for
the products, 4.2 for the exponentials and 1.7 for its bytes; [4, 32, 256, 8] takes 0.7, 2.1 and 0.5: up to D = 48
or so it is the exponentials that count. fp32 runs without tensor cores (67 TFLOP/s).

Legend: N batch, h heads, L queries, S keys, D head dim. Strides come in units of UNIT elements.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import EXACT, index_type, on_device_of, wide_type
from ._tuning import configuration

LOG2E = tl.constexpr(math.log2(math.e))
LARGEST_HEAD = 256


def blocks(kernel: str, architecture: str, dtype: torch.dtype, d: int, length: int, keys: int) -> list[dict[str, int]]:
    """The configurations of a kernel ("fwd", "dq" or "dkv") for `configuration` to choose from, best guess first.

    BLOCK_M queries, BLOCK_N keys, num_warps, num_stages. Neither the batch nor the heads decide, so an
    image gives the same bits in any batch.
    """
    width = max(16, triton.next_power_of_2(d))
    if not architecture:  # the interpreter: small, and more queries than keys or fewer
        found = [(64, 32, 4, 1)] if kernel == "fwd" else [(32, 64, 4, 1)]
    elif dtype not in (torch.float16, torch.bfloat16):
        size = 16 if width > 64 or dtype == torch.float64 else 32
        found = [(size, size, 8, 1)]
    elif architecture.startswith("gfx"):  # more registers with fewer warps
        m, n = (128, 64) if kernel == "fwd" else (64, 64)
        found = [(min(m, m * 64 // width), min(n, n * 128 // width), 4, 1)]
    elif width > 128:
        found = {"fwd": [(64, 32, 8, 1)], "dq": [(32, 32, 8, 1)], "dkv": [(32, 32, 8, 1)]}[kernel]
    elif width > 64:
        found = {"fwd": [(128, 64, 8, 2)], "dq": [(64, 64, 8, 2)], "dkv": [(64, 64, 8, 2)]}[kernel]
    elif architecture.startswith("sm_90"):
        found = {
            "fwd": [(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
            "dq": [(128, 64, 8, 3), (64, 64, 8, 2)],
            "dkv": [(64, 128, 8, 2), (64, 64, 8, 2)],
        }[kernel]
    else:
        found = {
            "fwd": [(128, 128, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)],
            "dq": [(64, 64, 8, 2)] if architecture.startswith("sm_10") else [(128, 64, 8, 3), (64, 64, 8, 2)],
            "dkv": [(32, 128, 8, 2), (32, 64, 4, 2)],
        }[kernel]
    fitting, most = [], [max(16, triton.next_power_of_2(x)) for x in (length, keys)]
    for m, n, warps, stages in found:
        if m > most[0] or n > most[1]:
            m, n = min(m, most[0]), min(n, most[1])
            warps = min(warps, 1 << ((m * n + max(m, n) * width) // 512).bit_length() - 1)
        fitting.append({"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages})
    return [c for i, c in enumerate(fitting) if c not in fitting[:i]]


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, out: Tensor, sums: Tensor) -> None:
    """Fills out [N, h, L, D] and sums [2, N, h, L]: m and l, in fp32 (fp64 for fp64), dense.

    q: [N, h, L, D]; k, v: [N, h, S, D]; of any strides with the last dimension dense.
    Raises ValueError where D is more than 256.
    """
    config = _configuration("fwd", q, k)
    tensors, common = _prepare((q, k, v, out), q, k, scale, causal)
    grid = (q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], config["BLOCK_M"]),)
    with on_device_of(q):
        attention_fwd_kernel[grid](*tensors, *sums, **common, MASKED=_masked(k, causal, config), **config, **EXACT)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, scale: float, causal: bool, dq: Tensor, dk: Tensor,
    dv: Tensor,
) -> None:  # fmt: skip
    """Fills dq, which lies as q may, and dk and dv, as k may. dout: [N, h, L, D]; sums: what the forward left.

    The rest as in `attention_fwd`.
    """
    heads, (delta, mass) = q.shape[0] * q.shape[1], torch.empty_like(sums)
    with on_device_of(q):
        config = _configuration("dq", q, k)
        tensors, common = _prepare((dout, q, k, v, dq), q, k, scale, causal)
        attention_bwd_dq_kernel[(heads * triton.cdiv(q.shape[2], config["BLOCK_M"]),)](
            *tensors, sums[0], delta, mass, **common, MASKED=_masked(k, causal, config),
            ONCE=k.shape[2] <= config["BLOCK_N"], **config, **EXACT,
        )  # fmt: skip
        config = _configuration("dkv", q, k)
        tensors, common = _prepare((dout, q, k, v, dk, dv), q, k, scale, causal)
        attention_bwd_dkv_kernel[(heads * triton.cdiv(k.shape[2], config["BLOCK_N"]),)](
            *tensors, sums[0], mass, delta, **common, **config, **EXACT
        )
    if k.shape[2] == 1:  # p is 1 whatever its score, which is rounded in three kernels: 0, or NaN
        dq.mul_(0)
        dk.mul_(0)


def _configuration(kernel: str, q: Tensor, k: Tensor) -> dict[str, int]:
    options = blocks(kernel, _common.architecture(q), q.dtype, q.shape[3], q.shape[2], k.shape[2])
    return configuration(f"attention_{kernel}", options, q, k)


def _masked(k: Tensor, causal: bool, config: dict[str, int]) -> bool:
    """Whether some query does not see all of some block of keys."""
    return causal or k.shape[2] % config["BLOCK_N"] != 0


def _prepare(
    tensors: tuple[Tensor, ...], q: Tensor, k: Tensor, scale: float, causal: bool
) -> tuple[list[Any], dict[str, Any]]:
    """The tensors, each followed by its strides, and what every kernel here is told besides."""
    d = q.shape[3]
    if d > LARGEST_HEAD:
        raise ValueError(f"q has a head dim of {d}; Triton's kernels take up to {LARGEST_HEAD}: use another backend")
    unit = math.gcd(16, *(s for x in tensors for s in x.stride()[:3]))
    extent = max((x.shape[2] + 256) * x.stride(2) for x in tensors)  # a block may reach beyond the last row
    mantissa, exponent = math.frexp(scale)  # a float argument reaches a kernel in fp32, which fp64's are two of
    high = math.ldexp(round(mantissa * 2**24), exponent - 24)
    return [a for x in tensors for a in (x, *(s // unit for s in x.stride()[:3]))], {
        "heads": q.shape[1], "length": q.shape[2], "keys": k.shape[2], "scale_high": high, "scale_low": scale - high,
        "D": d, "UNIT": unit, "CAUSAL": causal, "WIDE": wide_type(q), "INDEX": index_type(extent),
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
    }  # fmt: skip


@triton.jit
def head_of(x_ptr, head, heads, stride_n, stride_h, UNIT: tl.constexpr):
    """Where a head, of all images' heads, begins."""
    n = (head // heads).to(tl.int64)
    return x_ptr + (n * stride_n + (head % heads).to(tl.int64) * stride_h) * UNIT


@triton.jit
def block_of_queries(program, length, INDEX: tl.constexpr, BLOCK_M: tl.constexpr):
    """A program's head and the first and all of its rows; where attention is causal, the longest come first."""
    queries = tl.cdiv(length, BLOCK_M)
    first = (queries - 1 - program % queries).to(INDEX) * BLOCK_M
    return program // queries, first, first + tl.arange(0, BLOCK_M).to(INDEX)


@triton.jit
def row_offsets(rows, stride, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [rows, BLOCK_D] within a head, and which columns exist."""
    d = tl.arange(0, BLOCK_D)
    return (rows * stride * UNIT)[:, None] + d[None, :], (d < D)[None, :]


@triton.jit
def load_rows(
    x_ptr, rows, limit, stride, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of a head, in its own dtype; 0 beyond D and, where MASKED, from row ``limit`` on."""
    offsets, inside = row_offsets(rows, stride, D, UNIT, BLOCK_D)
    if MASKED:
        return tl.load(x_ptr + offsets, mask=(rows < limit)[:, None] & inside, other=0.0)
    elif D == BLOCK_D:
        return tl.load(x_ptr + offsets)
    else:
        return tl.load(x_ptr + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(values, x_ptr, rows, limit, stride, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes rows of a head, narrowed."""
    offsets, inside = row_offsets(rows, stride, D, UNIT, BLOCK_D)
    tl.store(x_ptr + offsets, values.to(x_ptr.dtype.element_ty), mask=(rows < limit)[:, None] & inside)


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a bᵀ, summed in fp32 (fp64 for fp64)."""
    return tl.dot(a, tl.trans(b), out_dtype=WIDE, input_precision="ieee")


@triton.jit
def add_product(acc, weights, x, WIDE: tl.constexpr):
    """acc + weights x, the weights in x's dtype."""
    return tl.dot(weights.to(x.dtype), x, acc, out_dtype=WIDE, input_precision="ieee")


@triton.jit
def scores(q, k, factor, rows, columns, keys, CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr):
    """In units of ln 2, [rows, columns]; -inf for keys that do not exist or are not to be seen."""
    s = product(q, k, WIDE) * factor
    if MASKED:
        inside = (columns < keys)[None, :]
        if CAUSAL:
            inside &= columns[None, :] <= rows[:, None]
        s = tl.where(inside, s, float("-inf"))
    return s


@triton.jit
def attention_fwd_kernel(
    q_ptr,  # [N, h, L, D]
    q_stride_n, q_stride_h, q_stride,
    k_ptr,  # [N, h, S, D]
    k_stride_n, k_stride_h, k_stride,
    v_ptr,  # [N, h, S, D]
    v_stride_n, v_stride_h, v_stride,
    out_ptr,  # [N, h, L, D]
    out_stride_n, out_stride_h, out_stride,
    shift_ptr,  # [N, h, L]
    total_ptr,  # [N, h, L]
    heads, length, keys, scale_high, scale_low,
    D: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    head, first, rows = block_of_queries(tl.program_id(0), length, INDEX, BLOCK_M)
    factor = (tl.cast(scale_high, WIDE) + tl.cast(scale_low, WIDE)) * LOG2E
    q = load_rows(
        head_of(q_ptr, head, heads, q_stride_n, q_stride_h, UNIT), rows, length, q_stride, D, UNIT, BLOCK_D, True
    )
    k_ptr = head_of(k_ptr, head, heads, k_stride_n, k_stride_h, UNIT)
    v_ptr = head_of(v_ptr, head, heads, v_stride_n, v_stride_h, UNIT)
    acc = tl.zeros([BLOCK_M, BLOCK_D], WIDE)
    shift = tl.full([BLOCK_M], float("-inf"), WIDE)
    total = tl.zeros([BLOCK_M], WIDE)
    end = tl.minimum(first + BLOCK_M, keys) if CAUSAL else keys
    for start in tl.range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N).to(INDEX)
        k = load_rows(k_ptr, columns, keys, k_stride, D, UNIT, BLOCK_D, MASKED)
        s = scores(q, k, factor, rows, columns, keys, CAUSAL, MASKED, WIDE)
        raised = tl.maximum(shift, tl.max(s, 1))
        safe = tl.where(raised == float("-inf"), 0.0, raised)  # nothing seen but -inf so far
        p = tl.exp2(s - safe[:, None])
        before = tl.exp2(shift - safe)
        total = total * before + tl.sum(p, 1)
        v = load_rows(v_ptr, columns, keys, v_stride, D, UNIT, BLOCK_D, MASKED)
        acc = add_product(acc * before[:, None], p, v, WIDE)
        shift = raised
    acc *= (1.0 / total)[:, None]
    out_ptr = head_of(out_ptr, head, heads, out_stride_n, out_stride_h, UNIT)
    store_rows(acc, out_ptr, rows, length, out_stride, D, UNIT, BLOCK_D)
    offsets = head.to(tl.int64) * length + rows
    tl.store(shift_ptr + offsets, shift, mask=rows < length)
    tl.store(total_ptr + offsets, total, mask=rows < length)


@triton.jit
def probabilities(
    q, dout, k_ptr, v_ptr, k_stride, v_stride, factor, shift, rows, start, keys,
    D: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """p's numerators and dp [rows, BLOCK_N] of a block of keys, and the keys."""
    columns = start + tl.arange(0, BLOCK_N).to(INDEX)
    k = load_rows(k_ptr, columns, keys, k_stride, D, UNIT, BLOCK_D, MASKED)
    v = load_rows(v_ptr, columns, keys, v_stride, D, UNIT, BLOCK_D, MASKED)
    s = scores(q, k, factor, rows, columns, keys, CAUSAL, MASKED, WIDE)
    return tl.exp2(s - shift[:, None]), product(dout, v, WIDE), k


@triton.jit
def attention_bwd_dq_kernel(
    dout_ptr,  # [N, h, L, D]
    dout_stride_n, dout_stride_h, dout_stride,
    q_ptr,  # [N, h, L, D]
    q_stride_n, q_stride_h, q_stride,
    k_ptr,  # [N, h, S, D]
    k_stride_n, k_stride_h, k_stride,
    v_ptr,  # [N, h, S, D]
    v_stride_n, v_stride_h, v_stride,
    dq_ptr,  # [N, h, L, D]
    dq_stride_n, dq_stride_h, dq_stride,
    shift_ptr,  # [N, h, L]
    delta_ptr,  # [N, h, L]
    mass_ptr,  # [N, h, L]
    heads, length, keys, scale_high, scale_low,
    D: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    INDEX: tl.constexpr, ONCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head, and the sums over keys of p dp and of p's numerators. ONCE: all keys are
    one block. p is divided by a sum made here: where a score of hundreds is rounded otherwise than in the forward, p
    by the forward's sum would not come to 1, and dp - delta would be that error times dp in place of 0."""
    head, first, rows = block_of_queries(tl.program_id(0), length, INDEX, BLOCK_M)
    inside = rows < length
    scale = tl.cast(scale_high, WIDE) + tl.cast(scale_low, WIDE)
    factor = scale * LOG2E
    q_ptr = head_of(q_ptr, head, heads, q_stride_n, q_stride_h, UNIT)
    q = load_rows(q_ptr, rows, length, q_stride, D, UNIT, BLOCK_D, True)
    dout_ptr = head_of(dout_ptr, head, heads, dout_stride_n, dout_stride_h, UNIT)
    dout = load_rows(dout_ptr, rows, length, dout_stride, D, UNIT, BLOCK_D, True)
    k_ptr = head_of(k_ptr, head, heads, k_stride_n, k_stride_h, UNIT)
    v_ptr = head_of(v_ptr, head, heads, v_stride_n, v_stride_h, UNIT)
    offsets = head.to(tl.int64) * length + rows
    shift = tl.load(shift_ptr + offsets, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], WIDE)
    delta = tl.zeros([BLOCK_M], WIDE)
    mass = tl.zeros([BLOCK_M], WIDE)
    end = tl.minimum(first + BLOCK_M, keys) if CAUSAL else keys
    if not ONCE:
        for start in tl.range(0, end, BLOCK_N):
            p, dp, k = probabilities(
                q, dout, k_ptr, v_ptr, k_stride, v_stride, factor, shift, rows, start, keys,
                D, UNIT, CAUSAL, MASKED, WIDE, INDEX, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            delta += tl.sum(p * dp, 1)
            mass += tl.sum(p, 1)
        delta /= mass
    for start in tl.range(0, end, BLOCK_N):
        p, dp, k = probabilities(
            q, dout, k_ptr, v_ptr, k_stride, v_stride, factor, shift, rows, start, keys,
            D, UNIT, CAUSAL, MASKED, WIDE, INDEX, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if ONCE:
            mass = tl.sum(p, 1)
            delta = tl.sum(p * dp, 1) / mass
        dq = add_product(dq, p * (1.0 / mass)[:, None] * (dp - delta[:, None]), k, WIDE)
    tl.store(delta_ptr + offsets, delta, mask=inside)
    tl.store(mass_ptr + offsets, mass, mask=inside)
    dq_ptr = head_of(dq_ptr, head, heads, dq_stride_n, dq_stride_h, UNIT)
    store_rows(dq * scale, dq_ptr, rows, length, dq_stride, D, UNIT, BLOCK_D)


@triton.jit
def attention_bwd_dkv_kernel(
    dout_ptr,  # [N, h, L, D]
    dout_stride_n, dout_stride_h, dout_stride,
    q_ptr,  # [N, h, L, D]
    q_stride_n, q_stride_h, q_stride,
    k_ptr,  # [N, h, S, D]
    k_stride_n, k_stride_h, k_stride,
    v_ptr,  # [N, h, S, D]
    v_stride_n, v_stride_h, v_stride,
    dk_ptr,  # [N, h, S, D]
    dk_stride_n, dk_stride_h, dk_stride,
    dv_ptr,  # [N, h, S, D]
    dv_stride_n, dv_stride_h, dv_stride,
    shift_ptr,  # [N, h, L]
    total_ptr,  # [N, h, L]
    delta_ptr,  # [N, h, L]
    heads, length, keys, scale_high, scale_low,
    D: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one head."""
    parts = tl.cdiv(keys, BLOCK_N)
    head = tl.program_id(0) // parts
    first = (tl.program_id(0) % parts).to(INDEX) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N).to(INDEX)
    scale = tl.cast(scale_high, WIDE) + tl.cast(scale_low, WIDE)
    factor = scale * LOG2E
    q_ptr = head_of(q_ptr, head, heads, q_stride_n, q_stride_h, UNIT)
    dout_ptr = head_of(dout_ptr, head, heads, dout_stride_n, dout_stride_h, UNIT)
    k_ptr = head_of(k_ptr, head, heads, k_stride_n, k_stride_h, UNIT)
    k = load_rows(k_ptr, columns, keys, k_stride, D, UNIT, BLOCK_D, True)
    v_ptr = head_of(v_ptr, head, heads, v_stride_n, v_stride_h, UNIT)
    v = load_rows(v_ptr, columns, keys, v_stride, D, UNIT, BLOCK_D, True)
    shift_ptr += head.to(tl.int64) * length
    total_ptr += head.to(tl.int64) * length
    delta_ptr += head.to(tl.int64) * length
    dk = tl.zeros([BLOCK_N, BLOCK_D], WIDE)
    dv = tl.zeros([BLOCK_N, BLOCK_D], WIDE)
    begin = first // BLOCK_M * BLOCK_M if CAUSAL else 0
    for start in tl.range(begin, length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(INDEX)
        inside = rows < length
        # A query that does not exist is the last one, with no weight: 0 times an infinite key would be NaN.
        q = load_rows(q_ptr, tl.minimum(rows, length - 1), length, q_stride, D, UNIT, BLOCK_D, False)
        dout = load_rows(dout_ptr, rows, length, dout_stride, D, UNIT, BLOCK_D, True)
        shift = tl.load(shift_ptr + rows, mask=inside, other=float("inf"))
        inverse = 1.0 / tl.load(total_ptr + rows, mask=inside, other=1.0)
        delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
        p = tl.exp2(product(k, q, WIDE) * factor - shift[None, :]) * inverse[None, :]
        if CAUSAL:
            p = tl.where(columns[:, None] <= rows[None, :], p, 0.0)
        dv = add_product(dv, p, dout, WIDE)
        dk = add_product(dk, p * (product(v, dout, WIDE) - delta[None, :]), q, WIDE)
    dk_ptr = head_of(dk_ptr, head, heads, dk_stride_n, dk_stride_h, UNIT)
    store_rows(dk * scale, dk_ptr, columns, keys, dk_stride, D, UNIT, BLOCK_D)
    dv_ptr = head_of(dv_ptr, head, heads, dv_stride_n, dv_stride_h, UNIT)
    store_rows(dv, dv_ptr, columns, keys, dv_stride, D, UNIT, BLOCK_D)
