"""Group normalisation, an optional scale and shift per image, and an activation, in one pass.

Wu & He 2018, "Group normalization", eq. 1-2; scale and shift per image as in adaGN (Dhariwal &
Nichol 2021, section 4.3) and AdaIN (Huang & Belongie 2017, eq. 8):

    xhat = (x - mean_g) / sqrt(var_g + eps)
    y    = act((xhat · weight + bias) · (1 + scale) + shift)

Instance norm is num_groups = C. Legend: N batch, C channels, C2 of the skip source, G groups,
* the spatial sizes, S their product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops.activations import ACTIVATIONS, check_act
from fastgen.ops.registration import FusedOp, dense, layout, vjp, wide


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(GroupNorm(x) · weight + bias, then · (1 + scale) + shift), [N, C + C2, *] in x's dtype and layout.

    x: [N, C, *]; skip: [N, C2, *] or None, a second source that stands behind x's channels as
    if concatenated, without being copied (a group may straddle the two). weight, bias: [C + C2];
    scale, shift: [N, C + C2]. act: one of `ACTIVATIONS`. Statistics are in fp32 (fp64 for fp64).
    Differentiable in every tensor, twice too. Raises ValueError that names the argument at fault.
    """
    check_act(act)
    check_norm(x, num_groups, weight, bias, scale, shift, skip)
    return _FORWARD(x, num_groups, weight, bias, eps, act, scale, shift, skip, backend)[0]


def check_norm(
    x: Tensor, num_groups: int, weight: Any, bias: Any, scale: Any, shift: Any, skip: Any, prefix: str = ""
) -> None:
    """Raises ValueError that names the argument at fault; weight and bias are called ``prefix`` + that."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [N, C, *], not {x.dtype} {list(x.shape)}")
    channels = x.shape[1]
    if skip is not None:
        if skip.ndim != x.ndim or skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
            raise ValueError(f"skip must differ from x {list(x.shape)} in its channels only, not {list(skip.shape)}")
        channels = channels + skip.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, and {num_groups} does not")
    for name, p, shape in (
        (f"{prefix}weight", weight, (channels,)), (f"{prefix}bias", bias, (channels,)),
        ("scale", scale, (x.shape[0], channels)), ("shift", shift, (x.shape[0], channels)),
    ):  # fmt: skip
        if p is not None and tuple(p.shape) != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, not {list(p.shape)}")
    for name, p in (
        (f"{prefix}weight", weight),
        (f"{prefix}bias", bias),
        ("scale", scale),
        ("shift", shift),
        ("skip", skip),
    ):
        if p is not None and p.device != x.device:
            raise ValueError(f"{name} is on {p.device}, x on {x.device}; move one of them")


def group_norm_act_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The equations in plain PyTorch, in at least fp32. Same arguments as `group_norm_act`."""
    h = (x if skip is None else torch.cat([x, skip.to(x.dtype)], dim=1)).to(wide(x.dtype))
    weight, bias, scale, shift = (None if p is None else p.to(h.dtype) for p in (weight, bias, scale, shift))
    z = F.group_norm(h, num_groups, weight, bias, eps)
    if scale is not None:
        z = z * (1 + _per_channel(scale, z))
    if shift is not None:
        z = z + _per_channel(shift, z)
    return ACTIVATIONS[act][1](z).to(x.dtype)


def _per_channel(p: Tensor, x: Tensor) -> Tensor:
    """p [N, C] -> [N, C, 1, …] to go with x [N, C, *]."""
    return p.reshape(*p.shape, *[1] * (x.ndim - 2))


def _statistics(x: Tensor, skip: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1/sqrt(var + eps) of each group, [N, G], in at least fp32."""
    h = (x if skip is None else torch.cat([x, skip.to(x.dtype)], dim=1)).to(wide(x.dtype))
    var, mean = torch.var_mean(h.reshape(len(h), num_groups, math.prod(h.shape[1:]) // num_groups), dim=2, correction=0)
    return mean, (var + eps).rsqrt()


def _forward(
    x: Tensor,
    num_groups: int,
    weight: Any,
    bias: Any,
    eps: float,
    act: str,
    scale: Any,
    shift: Any,
    skip: Any,
    backend: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y [N, C + C2, *], mean [N, G], rstd [N, G]."""
    backend = backends.resolve("group_norm_act", x.device, backend, like=(x, num_groups))
    if backend == "reference" or x.numel() == 0:
        y = group_norm_act_reference(x, num_groups, weight, bias, eps, act, scale, shift, skip)
        y = y.contiguous(memory_format=layout(x))
        return y, *_statistics(x, skip, num_groups, eps)
    x = dense(x)
    skip = dense(skip, like=x)
    y, mean, rstd = _fake(x, num_groups, None, None, eps, act, None, None, skip)
    parameters = [_parameter(p, x) for p in (weight, bias, scale, shift)]
    launch = backends.kernel("group_norm_act", "group_norm_act_fwd", backend)
    launch(x, skip, *parameters, num_groups, eps, ACTIVATIONS[act][0], y, mean, rstd)
    return y, mean, rstd


def _parameter(p: Tensor | None, x: Tensor) -> Tensor | None:
    """Kernels read parameters densely, in the dtype of the statistics."""
    return None if p is None else p.to(wide(x.dtype)).contiguous()


def _fake(
    x: Tensor,
    num_groups: int,
    weight: Any,
    bias: Any,
    eps: float,
    act: str,
    scale: Any,
    shift: Any,
    skip: Any,
    backend: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    shape = (x.shape[0], channels, *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    mean = x.new_empty((x.shape[0], num_groups), dtype=wide(x.dtype))
    return y, mean, torch.empty_like(mean)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, num_groups, weight, bias, eps, act, scale, shift, skip, backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, scale, shift, skip, mean, rstd)
    ctx.num_groups, ctx.eps, ctx.act = num_groups, eps, act
    ctx.backend = backends.resolve("group_norm_act", x.device, backend, like=(x, num_groups))


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
    """With u = 1 + scale: dbias = Σ_n S1·u, dweight = Σ_n S2·u, dshift = S1, dscale = S2·weight + S1·bias,
    where S1 = Σ_s dz and S2 = Σ_s dz·xhat, both [N, C], come out of the fused pass that makes dx."""
    if dy is None:
        return (None,) * 10
    x, weight, bias, scale, shift, skip, mean, rstd = ctx.saved_tensors
    dx, dskip, s1, s2 = _BACKWARD(
        dy, x, ctx.num_groups, weight, bias, ctx.eps, ctx.act, scale, shift, skip, mean, rstd, ctx.backend
    )
    needs = ctx.needs_input_grad
    wanted = [p if n else None for p, n in zip((weight, bias, scale, shift), (*needs[2:4], *needs[6:8]), strict=True)]
    dweight, dbias, dscale, dshift = _parameter_gradients(s1, s2, weight, bias, scale, wanted)
    return dx, None, dweight, dbias, None, None, dscale, dshift, None if skip is None else dskip.to(skip.dtype), None


def _parameter_gradients(
    s1: Tensor, s2: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, wanted: list
) -> list[Tensor | None]:
    """Of weight, bias, scale, shift, as far as they are ``wanted``, each in its dtype."""

    def found(i: int) -> Tensor:
        if i < 2:
            s = (s2, s1)[i]
            return (s if scale is None else s * (1 + scale)).sum(0)
        if i == 3:
            return s1
        dscale = s2 if weight is None else s2 * weight
        return dscale if bias is None else dscale + s1 * bias

    return [None if p is None else found(i).to(p.dtype) for i, p in enumerate(wanted)]


def input_gradients(dy: Tensor, x: Tensor, num_groups: int, eps: float, skip: Any, norm: Any, backend: str) -> tuple:
    """The gradients of x, skip, and norm's weight, bias, scale, shift for dy, that of the op's output.

    norm has the fields mean, rstd, weight, bias, scale, shift, act: for ops that normalise on their way.
    """
    given = (norm.weight, norm.bias, norm.scale, norm.shift)
    dx, dskip, s1, s2 = _backward_op(
        dy, x, num_groups, *given[:2], eps, norm.act, *given[2:], skip, norm.mean, norm.rstd, backend
    )
    return dx, dskip, *_parameter_gradients(s1, s2, *given[:3], given)


def _backward_reference(
    dy: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Any,
    bias: Any,
    eps: float,
    act: str,
    scale: Any,
    shift: Any,
    skip: Any,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(dx, dskip, S1 [N, C], S2 [N, C]) in plain PyTorch, differentiable again."""
    n, channels = x.shape[0], x.shape[1] + (0 if skip is None else skip.shape[1])
    ones = torch.ones((n, channels), dtype=wide(x.dtype), device=x.device)

    def forward(x, skip, weight, bias, scale, shift, gain, offset):
        """The op as act(xhat · (a + gain) + (b + offset)): at gain = offset = 0 their gradients are S2 and S1."""
        one = ones if scale is None else 1 + scale.to(ones.dtype)
        a = one if weight is None else one * weight.to(ones.dtype)
        b = torch.zeros_like(ones) if bias is None else one * bias.to(ones.dtype)
        b = b if shift is None else b + shift.to(ones.dtype)
        return group_norm_act_reference(x, num_groups, None, None, eps, act, a + gain - 1, b + offset, skip)

    zeros = torch.zeros_like(ones)
    dx, dskip, *_, s2, s1 = vjp(forward, (x, skip, weight, bias, scale, shift, zeros, zeros), (dy,))
    return dx, dskip, s1, s2


def _backward_op(
    dy: Tensor, x: Tensor, num_groups: int, weight: Any, bias: Any, eps: float, act: str,
    scale: Any, shift: Any, skip: Any, mean: Tensor, rstd: Tensor, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    backend = backends.resolve("group_norm_act", x.device, backend, like=(x, num_groups))
    none = x.new_empty(0)
    if backend == "reference" or x.numel() == 0:
        with torch.no_grad():
            dx, dskip, s1, s2 = _backward_reference(dy, x, num_groups, weight, bias, eps, act, scale, shift, skip)
        dskip = none if dskip is None else dskip.contiguous(memory_format=layout(x))
        return dx.contiguous(memory_format=layout(x)), dskip, s1, s2
    x = dense(x)
    skip, dy = dense(skip, like=x), dense(dy, like=x)
    dx, dskip, s1, s2 = _backward_fake(dy, x, num_groups, None, None, eps, act, None, None, skip, mean, rstd)
    parameters = [_parameter(p, x) for p in (weight, bias, scale, shift)]
    launch = backends.kernel("group_norm_act", "group_norm_act_bwd", backend)
    given = None if skip is None else dskip
    launch(dy, x, skip, *parameters, mean, rstd, num_groups, ACTIVATIONS[act][0], dx, given, s1, s2)
    return dx, dskip, s1, s2


def _backward_fake(
    dy: Any, x: Tensor, num_groups: int, weight: Any, bias: Any, eps: Any, act: Any,
    scale: Any, shift: Any, skip: Any, mean: Any, rstd: Any, backend: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    sums = x.new_empty((x.shape[0], channels), dtype=wide(x.dtype))
    dskip = x.new_empty(0)
    if skip is not None:
        dskip = torch.empty(skip.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    return dx, dskip, sums, torch.empty_like(sums)


def _backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    dy, x, num_groups, weight, bias, eps, act, scale, shift, skip, *_ = inputs
    ctx.save_for_backward(dy, x, weight, bias, scale, shift, skip)
    ctx.num_groups, ctx.eps, ctx.act = num_groups, eps, act


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple:
    """The mean and rstd that the forward kept are functions of x, so x's gradient here goes through them too."""

    def backward(dy, x, weight, bias, scale, shift, skip):
        return _backward_reference(dy, x, ctx.num_groups, weight, bias, ctx.eps, ctx.act, scale, shift, skip)

    ddx, ddskip, ds1, ds2 = grads
    given = (ddx, None if ctx.saved_tensors[6] is None else ddskip, ds1, ds2)
    with torch.enable_grad():
        dy, x, weight, bias, scale, shift, skip = vjp(backward, ctx.saved_tensors, given)
    return dy, x, None, weight, bias, None, None, scale, shift, skip, None, None, None


_BACKWARD = FusedOp(
    "group_norm_act_bwd(Tensor dy, Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, str act, "
    "Tensor? scale, Tensor? shift, Tensor? skip, Tensor mean, Tensor rstd, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_op, _backward_fake, _backward_setup, _double_backward,
)  # fmt: skip
_FORWARD = FusedOp(
    "group_norm_act(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, str act, Tensor? scale, "
    "Tensor? shift, Tensor? skip, str? backend) -> (Tensor, Tensor, Tensor)",
    _forward, _fake, _setup, _backward,
)  # fmt: skip
