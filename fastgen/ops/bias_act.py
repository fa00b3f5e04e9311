"""A bias, an activation, a gain and a clamp, in one pass: what stands behind every layer of StyleGAN.

    z = x + b_c;   y = g(z) = clamp(gain · act(z), -clamp, clamp)
    dx = dy · g'(z);   db_c = Σ dx

as Karras et al. 2021, "Alias-free generative adversarial networks", have it in their code, with the same names and
defaults. R1 and path length penalties differentiate twice: for the gradient ddx of dx and ddb of db, and with t = ddx +
ddb_c, the gradient of dy is t · g'(z) and that of x is t · dy · g''(z). Each of the three is a kernel that reads each
tensor once. Legend: C the length of b, c an element's index in dimension ``dim``. On an H200 (4.8 TB/s) a map of 64 MiB
takes 28 µs forward and 42 µs backward: two and three passes over memory and some ten operations an element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops.registration import FusedOp, dense, empty_like, layout, vjp, wide

# Name: code (csrc/common/bias_act.h, kernels/bias_act.py), act(z, alpha), default alpha, default gain.
FUNCTIONS: dict[str, tuple[int, Callable[[Tensor, float], Tensor], float, float]] = {
    "linear": (0, lambda z, alpha: z, 0.0, 1.0),
    "relu": (1, lambda z, alpha: F.relu(z), 0.0, math.sqrt(2)),
    "lrelu": (2, F.leaky_relu, 0.2, math.sqrt(2)),
    "tanh": (3, lambda z, alpha: torch.tanh(z), 0.0, 1.0),
    "sigmoid": (4, lambda z, alpha: torch.sigmoid(z), 0.0, 1.0),
    "elu": (5, lambda z, alpha: F.elu(z), 0.0, 1.0),
    "selu": (6, lambda z, alpha: F.selu(z), 0.0, 1.0),
    "softplus": (7, lambda z, alpha: F.softplus(z), 0.0, 1.0),
    "swish": (8, lambda z, alpha: F.silu(z), 0.0, math.sqrt(2)),
}
STRAIGHT = ("linear", "relu", "lrelu")  # g'' is 0


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """clamp(gain · act(x + b), -clamp, clamp) in x's shape, dtype and layout.

    x: any shape; b: [C], C the size of x's dimension ``dim`` (which means nothing without b), of any
    floating dtype. act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish. alpha: the
    slope of lrelu below 0 (by default 0.2); the others have none. gain: by default √2 for relu, lrelu
    and swish, else 1. clamp: a number of at least 0, or None for no limit. Computed in fp32 (fp64 for
    fp64). Differentiable in x and b to any order, the first two by kernels of their own. Raises
    ValueError that names the argument at fault.
    """
    _check(x, b, dim, act, alpha, gain, clamp)
    return _FORWARD(x, b, dim, act, alpha, gain, clamp, backend)


def _check(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: Any, gain: Any, clamp: Any) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor, not {x.dtype}")
    if act not in FUNCTIONS:
        raise ValueError(f"act must be one of {', '.join(FUNCTIONS)}, not {act!r}")
    for name, value in (("alpha", alpha), ("gain", gain), ("clamp", clamp)):
        if value is not None and (not isinstance(value, int | float) or value != value):
            raise ValueError(f"{name} must be a number or None, not {value!r}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp must be at least 0, or None for no limit, not {clamp}")
    if b is None:
        return
    if not 0 <= dim < x.ndim:
        raise ValueError(f"dim must be a dimension of x {list(x.shape)}, counted from 0, not {dim}")
    if b.shape != x.shape[dim : dim + 1] or not b.is_floating_point():
        raise ValueError(f"b must be a floating tensor [{x.shape[dim]}], not {b.dtype} {list(b.shape)}")
    if b.device != x.device:
        raise ValueError(f"b is on {b.device}, x on {x.device}; move one of them")


def bias_act_reference(
    x: Tensor, b: Tensor | None = None, dim: int = 1, act: str = "linear", alpha: float | None = None,
    gain: float | None = None, clamp: float | None = None,
) -> Tensor:  # fmt: skip
    """The equation in plain PyTorch, in at least fp32. Same arguments as `bias_act`."""
    _, function, default_alpha, default_gain = FUNCTIONS[act]
    z = x.to(wide(x.dtype))
    if b is not None:
        z = z + b.to(z.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    y = function(z, default_alpha if alpha is None else alpha) * (default_gain if gain is None else gain)
    return (y if clamp is None else y.clamp(-clamp, clamp)).to(x.dtype)


# What follows takes the arguments of the schema, in its order; ``how`` are those from dim to clamp.


def _numbers(x: Tensor, b: Tensor | None, how: tuple) -> tuple:
    """For launchers: in memory (x is dense) element o has index o // step % C in b; the code, and numbers."""
    dim, act, alpha, gain, clamp = how
    code, _, default_alpha, default_gain = FUNCTIONS[act]
    step = x.numel() if b is None or len(b) == 1 else x.stride(dim)
    alpha, gain = default_alpha if alpha is None else alpha, default_gain if gain is None else gain
    return step, code, float(alpha), float(gain), math.inf if clamp is None else float(clamp)


def _wide(b: Tensor | None, x: Tensor) -> Tensor | None:
    return None if b is None else b.to(wide(x.dtype)).contiguous()


def _kernels(x: Tensor, backend: str | None) -> str | None:
    """The backend whose kernels run, or None for plain PyTorch."""
    backend = backends.resolve("bias_act", x.device, backend)
    return None if backend == "reference" or x.numel() == 0 else backend


def _forward(x: Tensor, b: Any, *how: Any) -> Tensor:
    *how, backend = how
    x, backend = dense(x), _kernels(x, backend)
    if backend is None:
        return bias_act_reference(x, b, *how).contiguous(memory_format=layout(x))
    y = torch.empty_like(x)
    backends.kernel("bias_act", "bias_act_fwd", backend)(x, _wide(b, x), *_numbers(x, b, how), y)
    return y


def _fake(x: Tensor, *_: Any) -> Tensor:
    return empty_like(x)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, b, *ctx.how, backend = inputs
    ctx.save_for_backward(x, b)
    ctx.backend = backends.resolve("bias_act", x.device, backend)


def _backward(ctx: Any, dy: Tensor | None) -> tuple:
    if dy is None:
        return (None,) * 8
    x, b = ctx.saved_tensors
    dx, db = _BACKWARD(dy, x, b, *ctx.how, ctx.backend)
    return dx, None if b is None else db.to(b.dtype), *[None] * 6


def _backward_reference(dy: Tensor, x: Tensor, b: Any, *how: Any) -> tuple[Tensor, Tensor | None]:
    """(dx, db) in plain PyTorch, differentiable again; db in the dtype of `wide`."""
    b = None if b is None else b.to(wide(x.dtype))
    dx, db = vjp(lambda x, b: bias_act_reference(x, b, *how), (x, b), (dy,))
    return dx, db


def _backward_op(dy: Tensor, x: Tensor, b: Any, *how: Any) -> tuple[Tensor, Tensor]:
    *how, backend = how
    x, backend = dense(x), _kernels(x, backend)
    dy = dense(dy, like=x)
    if backend is None:
        with torch.no_grad():
            dx, db = _backward_reference(dy, x, b, *how)
        return dense(dx, like=x), x.new_empty(0, dtype=wide(x.dtype)) if db is None else db
    dx, db = _backward_fake(dy, x, b)
    given = None if b is None else db
    backends.kernel("bias_act", "bias_act_bwd", backend)(dy, x, _wide(b, x), *_numbers(x, b, how), dx, given)
    return dx, db


def _backward_fake(dy: Any, x: Tensor, b: Any, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(x), x.new_empty(0 if b is None else b.shape, dtype=wide(x.dtype))


def _backward_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.how, ctx.backend = *inputs[:3], inputs[3:-1], inputs[-1]
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, ddx: Tensor | None, ddb: Tensor | None) -> tuple:
    dy, x, b = ctx.saved_tensors
    if b is None or ddb is None:
        ddb = None
    if ddx is None and ddb is None:
        return (None,) * 9
    ddx = torch.zeros_like(x) if ddx is None else ddx
    d_dy, d_x, d_b = _SECOND(ddx, ddb, dy, x, b, *ctx.how, ctx.backend)
    if ctx.how[1] in STRAIGHT:
        return d_dy, *[None] * 8
    return d_dy, d_x, None if b is None else d_b.to(b.dtype), *[None] * 6


def _second_reference(ddx: Tensor, ddb: Any, dy: Tensor, x: Tensor, b: Any, *how: Any) -> tuple[Tensor | None, ...]:
    """The gradients of dy, x and b in plain PyTorch, differentiable again."""
    return tuple(vjp(lambda *t: _backward_reference(*t, *how), (dy, x, b), (ddx, ddb)))


def _second_op(ddx: Tensor, ddb: Any, dy: Tensor, x: Tensor, b: Any, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    *how, backend = how
    x, backend = dense(x), _kernels(x, backend)
    ddx, dy = dense(ddx, like=x), dense(dy, like=x)
    outputs = _second_fake(ddx, ddb, dy, x, b, *how)
    d_dy, d_x, d_b = outputs
    if backend is None:
        with torch.no_grad():
            found = _second_reference(ddx, ddb, dy, x, b, *how)
        for out, value in zip(outputs, found, strict=True):
            if out.numel():
                out.zero_() if value is None else out.copy_(value)
        return outputs
    given = (None, None) if how[1] in STRAIGHT else (d_x, None if b is None else d_b)
    launch = backends.kernel("bias_act", "bias_act_bwd_bwd", backend)
    launch(ddx, _wide(ddb, x), dy, x, _wide(b, x), *_numbers(x, b, how), d_dy, *given)
    return outputs


def _second_fake(
    ddx: Any, ddb: Any, dy: Any, x: Tensor, b: Any, dim: Any, act: str, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Without g'' only the gradient of dy is there."""
    straight = act in STRAIGHT
    d_b = x.new_empty(0 if straight or b is None else b.shape, dtype=wide(x.dtype))
    return empty_like(x), x.new_empty(0) if straight else empty_like(x), d_b


def _second_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.how = *inputs[:5], inputs[5:-1]
    ctx.save_for_backward(*tensors)


def _third(ctx: Any, *grads: Tensor | None) -> tuple:
    ddy, dx, db = grads
    straight, unbiased = ctx.how[1] in STRAIGHT, ctx.saved_tensors[4] is None
    given = (ddy, None if straight else dx, None if straight or unbiased else db)
    with torch.enable_grad():
        return *vjp(lambda *t: _second_reference(*t, *ctx.how), ctx.saved_tensors, given), *[None] * 6


_HOW = "int dim, str act, float? alpha, float? gain, float? clamp, str? backend"
_SECOND = FusedOp(
    f"bias_act_bwd_bwd(Tensor ddx, Tensor? ddb, Tensor dy, Tensor x, Tensor? b, {_HOW}) -> (Tensor, Tensor, Tensor)",
    _second_op, _second_fake, _second_setup, _third,
)  # fmt: skip
_BACKWARD = FusedOp(
    f"bias_act_bwd(Tensor dy, Tensor x, Tensor? b, {_HOW}) -> (Tensor, Tensor)",
    _backward_op, _backward_fake, _backward_setup, _double_backward,
)  # fmt: skip
_FORWARD = FusedOp(
    f"bias_act(Tensor x, Tensor? b, {_HOW}) -> Tensor", _forward, _fake, _setup, _backward,
)  # fmt: skip
