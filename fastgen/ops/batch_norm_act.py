"""Batch normalisation, a residual and an activation, in one pass.

Ioffe & Szegedy 2015, "Batch normalization", algorithm 1, with the residual added before the
activation as in He et al. 2016, "Deep residual learning":

    xhat = (x - mean_c) / sqrt(var_c + eps)
    y    = act(xhat · weight + bias + residual)

In training mean_c and var_c are those of the batch (var_c the biased variance, divided by M), and

    running_mean ← running_mean + momentum · (mean_c - running_mean)
    running_var  ← running_var + momentum · (var_c · M / (M - 1) - running_var)

Otherwise they are the running statistics. Legend: N batch, C channels, * the spatial sizes, S their
product, M = N · S.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops import vendor
from fastgen.ops.activations import ACTIVATIONS, check_act
from fastgen.ops.registration import FusedOp, dense, empty_like, layout, vjp, wide


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(BatchNorm(x) · weight + bias + residual), [N, C, *] in x's dtype and layout.

    x, residual: [N, C, *]; running_mean, running_var, weight, bias: [C], of any floating dtype. act: one
    of `ACTIVATIONS`. training: x is normalised by its own statistics, in fp32 (fp64 for fp64), and the
    running ones, if given, are updated in place, as `F.batch_norm` does; an empty batch leaves them as
    they are. Otherwise they are what x is normalised by. Differentiable in x, weight, bias and residual,
    twice too. momentum None (a cumulative average) needs the count of batches, which only the caller
    has: then pass 1 / num_batches_tracked. Raises ValueError that names the argument at fault: a shape,
    dtype or device that does not go with x, running statistics that are missing where training is
    False, momentum None where they are to be updated, one value a channel in training.
    """
    check_act(act)
    _check(x, running_mean, running_var, weight, bias, training, momentum, residual)
    fits = vendor.batch_norm_takes(x, running_mean)
    if fits and backends.left_to_vendor("batch_norm_act", x, backend, like=(x,)):
        return vendor.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps, act, residual
        ).contiguous(memory_format=layout(x))
    y, mean, var = _FORWARD(x, running_mean, running_var, weight, bias, training, eps, act, residual, backend)
    if training and running_mean is not None:
        _update(running_mean, running_var, mean, var, _count(x), momentum)
    return y


def _count(x: Tensor) -> int:
    """M, the values of a channel."""
    return x.shape[0] * math.prod(x.shape[2:])


def _check(
    x: Tensor, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: bool, momentum: Any, residual: Any
) -> None:
    if x.ndim < 2 or not x.is_floating_point() or x.shape[1] == 0:
        raise ValueError(f"x must be a floating tensor [N, C, *] with C > 0, not {x.dtype} {list(x.shape)}")
    for name, p, shape in (
        ("running_mean", running_mean, x.shape[1:2]), ("running_var", running_var, x.shape[1:2]),
        ("weight", weight, x.shape[1:2]), ("bias", bias, x.shape[1:2]), ("residual", residual, x.shape),
    ):  # fmt: skip
        if p is None:
            continue
        if p.shape != shape or not p.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor {list(shape)}, not {p.dtype} {list(p.shape)}")
        if p.device != x.device:
            raise ValueError(f"{name} is on {p.device}, x on {x.device}; move one of them")
    missing = "running_mean" if running_mean is None else "running_var" if running_var is None else None
    if missing is not None and not training:
        raise ValueError(f"{missing} must be given where training is False")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{missing} must be given if the other running statistic is")
    if training and _count(x) == 1:
        raise ValueError(f"x must have more than one value a channel where training is True, not {list(x.shape)}")
    if training and running_mean is not None and momentum is None:
        raise ValueError("momentum must be a number where running statistics are updated: 1 / num_batches_tracked")


def _update(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float) -> None:
    """Moves the running statistics towards those of a batch, the variance in its unbiased form."""
    if count == 0:
        return
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


def batch_norm_act_reference(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """The equations in plain PyTorch, in at least fp32. Same arguments as `batch_norm_act`."""
    mean, var = _statistics(x, running_mean, running_var, training)
    if training and running_mean is not None:
        _update(running_mean, running_var, mean, var, _count(x), momentum)
    return _normalise(x, *((None, None) if training else (mean, var)), weight, bias, eps, act, residual)


def _statistics(x: Tensor, running_mean: Any, running_var: Any, training: bool) -> tuple[Tensor, Tensor]:
    """The mean and variance [C] that x is normalised by, in at least fp32; of an empty batch they are 0."""
    dtype = wide(x.dtype)
    if not training:
        return running_mean.detach().to(dtype, copy=True), running_var.detach().to(dtype, copy=True)
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
    var, mean = torch.var_mean(x.to(dtype), dim=(0, *range(2, x.ndim)), correction=0)
    return mean, var


def _normalise(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Any, bias: Any, eps: float, act: str, residual: Any
) -> Tensor:
    """The equation, by the statistics that are given, or in training (None) by x's own.

    Contiguous, since PyTorch's sums over channels last are in plain fp32.
    """
    h, weight, bias = (_wide(p, x) for p in (x, weight, bias))
    z = F.batch_norm(h, mean, var, weight, bias, mean is None, 0.0, eps)
    z = z if residual is None else z + residual.to(x.dtype)
    return ACTIVATIONS[act][1](z).to(x.dtype)


def _wide(p: Tensor | None, x: Tensor) -> Tensor | None:
    """Densely, in the dtype of the statistics, as kernels read parameters."""
    return None if p is None else p.to(wide(x.dtype)).contiguous()


def _forward(
    x: Tensor, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: bool, eps: float, act: str,
    residual: Any, backend: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y [N, C, *], mean [C], var [C]: the statistics that x was normalised by."""
    backend = backends.resolve("batch_norm_act", x.device, backend, like=(x,))
    x = dense(x)
    residual = dense(residual, like=x)
    if backend == "reference" or x.numel() == 0:
        mean, var = _statistics(x, running_mean, running_var, training)
        y = _normalise(x, *((None, None) if training else (mean, var)), weight, bias, eps, act, residual)
        return y.contiguous(memory_format=layout(x)), mean, var
    y, mean, var = _fake(x, *[None] * 9)
    if not training:
        mean.copy_(running_mean), var.copy_(running_var)
    launch = backends.kernel("batch_norm_act", "batch_norm_act_fwd", backend)
    parameters = [_wide(p, x) for p in (weight, bias)]
    launch(x, residual, *parameters, training, eps, ACTIVATIONS[act][0], y, mean, var)
    return y, mean, var


def _fake(
    x: Tensor, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any, eps: Any, act: Any,
    residual: Any, backend: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean = x.new_empty(x.shape[1], dtype=wide(x.dtype))
    return empty_like(x), mean, torch.empty_like(mean)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Backward takes the statistics from here: the running ones may have moved by then."""
    x, _, _, weight, bias, training, eps, act, residual, backend = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, residual, mean, var)
    ctx.training, ctx.eps, ctx.act = training, eps, act
    ctx.backend = backends.resolve("batch_norm_act", x.device, backend, like=(x,))


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
    if dy is None:
        return (None,) * 10
    x, weight, bias, residual, mean, var = ctx.saved_tensors
    dx, dresidual, dweight, dbias = _BACKWARD(
        dy, x, weight, bias, residual, mean, var, ctx.training, ctx.eps, ctx.act, ctx.backend
    )
    dweight = None if weight is None else dweight.to(weight.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    dresidual = None if residual is None else dresidual.to(residual.dtype)
    return dx, None, None, dweight, dbias, None, None, None, dresidual, None


def _backward_reference(
    dy: Tensor, x: Tensor, weight: Any, bias: Any, residual: Any, mean: Tensor, var: Tensor, training: bool,
    eps: float, act: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dweight [C], dbias [C]) in plain PyTorch, differentiable again."""

    def forward(x, weight, bias, residual):
        return _normalise(x, *((None, None) if training else (mean, var)), weight, bias, eps, act, residual)

    weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    bias = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    dx, dweight, dbias, dresidual = vjp(forward, (x, weight, bias, residual), (dy,))
    return dx, dresidual, dweight, dbias


def _backward_op(
    dy: Tensor, x: Tensor, weight: Any, bias: Any, residual: Any, mean: Tensor, var: Tensor, training: bool,
    eps: float, act: str, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    backend = backends.resolve("batch_norm_act", x.device, backend, like=(x,))
    x = dense(x)
    residual, dy = dense(residual, like=x), dense(dy, like=x)
    if backend == "reference" or x.numel() == 0:
        with torch.no_grad():
            dx, dresidual, *sums = _backward_reference(dy, x, weight, bias, residual, mean, var, training, eps, act)
        dresidual = x.new_empty(0) if dresidual is None else dense(dresidual, like=x)
        return dx.contiguous(memory_format=layout(x)), dresidual, *sums
    outputs = _backward_fake(dy, x, None, None, residual, mean, *[None] * 5)
    dx, dresidual, dweight, dbias = outputs
    launch = backends.kernel("batch_norm_act", "batch_norm_act_bwd", backend)
    parameters = [_wide(p, x) for p in (weight, bias)]
    given = None if residual is None else dresidual
    code = ACTIVATIONS[act][0]
    launch(dy, x, residual, *parameters, mean, var, training, eps, code, dx, given, dweight, dbias)
    return outputs


def _backward_fake(
    dy: Any, x: Tensor, weight: Any, bias: Any, residual: Any, mean: Tensor, var: Any, training: Any, eps: Any,
    act: Any, backend: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dresidual = x.new_empty(0) if residual is None else empty_like(x)
    return empty_like(x), dresidual, torch.empty_like(mean), torch.empty_like(mean)


def _backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, training, eps, act, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.training, ctx.eps, ctx.act = training, eps, act


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple:
    """In training the mean and variance that the forward kept are functions of x: x's gradient goes through them."""
    *tensors, mean, var = ctx.saved_tensors

    def backward(dy, x, weight, bias, residual):
        return _backward_reference(dy, x, weight, bias, residual, mean, var, ctx.training, ctx.eps, ctx.act)

    ddx, ddresidual, ddweight, ddbias = grads
    given = (ddx, None if tensors[4] is None else ddresidual, ddweight, ddbias)
    with torch.enable_grad():
        return *vjp(backward, tensors, given), *[None] * 6


_BACKWARD = FusedOp(
    "batch_norm_act_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor var, "
    "bool training, float eps, str act, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_op, _backward_fake, _backward_setup, _double_backward,
)  # fmt: skip
_FORWARD = FusedOp(
    "batch_norm_act(Tensor x, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, bool training, "
    "float eps, str act, Tensor? residual, str? backend) -> (Tensor, Tensor, Tensor)",
    _forward, _fake, _setup, _backward,
)  # fmt: skip
