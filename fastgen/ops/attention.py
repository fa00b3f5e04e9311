"""Scaled dot-product attention: softmax(q·kᵀ·scale)·v (Vaswani et al. 2017, eq. 1).

Legend: N batch, h heads, L queries, S keys, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops.registration import FusedOp, vjp, wide

_LOG2E = math.log2(math.e)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scale)·v, [N, h, L, D] in q's dtype.

    q: [N, h, L, D]; k, v: [N, h, S, D]; all of one floating dtype, with any strides: heads that are
    views of [N, L, h, D] are read where they lie, and the result then lies in memory as q does.
    ``scale`` defaults to 1/sqrt(D); ``causal`` lets query i see keys 0 … i only. Computed in fp32
    (fp64 for fp64). Differentiable in q, k and v, twice too. The backend "reference" is PyTorch's
    scaled_dot_product_attention. Raises ValueError that names the argument at fault.
    """
    _check(q, k, v)
    return _FORWARD(q, k, v, scale, causal, backend)[0]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q must be a floating tensor [N, h, L, D], not {q.dtype} {list(q.shape)}")
    n, h, _, d = q.shape
    if d == 0:
        raise ValueError(f"q must have a head dim of at least 1, and its shape is {list(q.shape)}")
    if k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != d:
        raise ValueError(f"k must be [{n}, {h}, S, {d}] to go with q {list(q.shape)}, not {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}, not {list(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, q {q.dtype}; cast one of them")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; move one of them")


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    """The equation, written out, with the softmax in at least fp32. Same arguments as `attention`."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q.to(wide(q.dtype)) @ k.to(wide(q.dtype)).transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v.to(scores.dtype)).to(q.dtype)


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension dense; a copy only if it is not."""
    return x if x.stride(3) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape that lies as x does: [N, L, h, D] in memory, or else contiguous."""
    n, h, length, d = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((n, length, h, d)).transpose(1, 2)
    return x.new_empty((n, h, length, d))


def _scale(scale: float | None, q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[3]) if scale is None else scale


def _resolve(q: Tensor, k: Tensor, backend: str | None) -> str:
    """Measured under AVX2, the C++ kernel is faster than PyTorch in fp16 and bf16 (several times in training), and in
    fp32 up to D = 64 as long as a head's keys stay in the cache. Beyond, both wait for the same matrix products, and
    PyTorch's are by a few percent the better; in fp64 the kernel's exponential is slow."""
    small = q.shape[3] <= 64 and k.shape[2] * k.shape[3] <= 2**15
    wins = q.dtype in (torch.float16, torch.bfloat16) or (q.dtype == torch.float32 and small)
    return backends.resolve("attention", q.device, backend, wins, (q, k.shape[2]))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: Any, causal: bool, backend: Any) -> tuple[Tensor, Tensor]:
    """-> out [N, h, L, D] and sums [2, N, h, L] in at least fp32: m, and the sum over S of 2^(score·log2(e) - m), by
    which backward makes exactly the same probabilities again."""
    backend = _resolve(q, k, backend)
    out, sums = _fake(q, k, v)
    if q.numel() == 0 or k.numel() == 0:
        return out.copy_(attention_reference(q, k, v, scale, causal)), sums.zero_()
    rows = [_rows(x) for x in (q, k, v)]
    if backend == "reference":
        return _sdpa_with_sums(*rows, scale, causal, out, sums)
    backends.kernel("attention", "attention_fwd", backend)(*rows, _scale(scale, q), causal, out, sums)
    return out, sums


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def _sdpa_with_sums(
    q: Tensor, k: Tensor, v: Tensor, scale: Any, causal: bool, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """On the CPU PyTorch's attention tells the logarithm of the sum, for a compiled backward may be another backend's
    than its forward. Elsewhere it does not, and such a backward makes NaN, which shows."""
    if q.device.type != "cpu":
        return _lay(_sdpa(q, k, v, scale, causal), out), sums.fill_(math.nan)
    made, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    sums[0], sums[1] = logs * _LOG2E, 1
    return _lay(made, out), sums


def _lay(x: Tensor, target: Tensor) -> Tensor:
    """x in the strides of an empty target, copied only if it has others."""
    return x if x.stride() == target.stride() else target.copy_(x)


def _fake_sums(q: Tensor) -> Tensor:
    return q.new_empty((2, *q.shape[:3]), dtype=wide(q.dtype))


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), _fake_sums(q)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.scale, ctx.causal, backend = inputs
    out, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(q, k, v, out, sums)
    ctx.backend = _resolve(q, k, backend)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple:
    if dout is None:
        return (None,) * 6
    q, k, v, out, sums = ctx.saved_tensors
    grads = _BACKWARD(dout, q, k, v, out.detach(), sums, ctx.scale, ctx.causal, ctx.backend)
    return *grads, None, None, None


def _backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: Any, causal: bool, backend: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv. The probabilities are made again from the scores and sums; out is for the
    reference."""
    backend = _resolve(q, k, backend)
    grads = _backward_fake(dout, q, k, v)
    empty = q.numel() == 0 or k.numel() == 0
    rows = [_rows(x) for x in (dout, q, k, v, out)]
    if empty or (backend == "reference" and q.device.type != "cpu"):
        fn = attention_reference if empty else _sdpa
        with torch.no_grad():
            found = vjp(lambda *qkv: fn(*qkv, scale, causal), rows[1:4], (dout,))
    elif backend == "reference":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = backward(*rows, sums[0] / _LOG2E + sums[1].log(), 0.0, causal, scale=scale)
    else:
        launch = backends.kernel("attention", "attention_bwd", backend)
        launch(*rows[:4], sums, _scale(scale, q), causal, *grads)
        return grads
    return tuple(_lay(x, g) for x, g in zip(found, grads, strict=True))


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    dout, q, k, v, _, _, ctx.scale, ctx.causal, _ = inputs
    ctx.save_for_backward(dout, q, k, v)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple:
    """out and sums are functions of q, k and v, whose gradients here go through them too."""

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(vjp(lambda *qkv: attention_reference(*qkv, ctx.scale, ctx.causal), (q, k, v), (dout,)))

    with torch.enable_grad():
        return *vjp(backward, ctx.saved_tensors, grads), None, None, None, None, None


_BACKWARD = FusedOp(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, float? scale, bool causal, "
    "str? backend) -> (Tensor, Tensor, Tensor)",
    _backward_op,
    _backward_fake,
    _backward_setup,
    _double_backward,
)
_FORWARD = FusedOp(
    "attention(Tensor q, Tensor k, Tensor v, float? scale, bool causal, str? backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _setup,
    _backward,
)
