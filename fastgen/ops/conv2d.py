"""Two-dimensional convolution with what stands around it: norm and activation before, bias and residual after.

    conv2d(x)          = act(conv(up([x, skip])) + bias + residual)
    norm_act_conv2d(x) = act(conv(up(h)) + bias + residual),
                         h = in_act((GroupNorm([x, skip]) · norm_weight + norm_bias) · (1 + scale) + shift)

where conv is F.conv2d, up a nearest upsampling (none by default), [x, skip] the two concatenated on channels, GroupNorm
as in `group_norm_act`. On the CPU 3×3 kernels run by Winograd's algorithm F(4×4, 3×3) (Lavin & Gray 2016), so sums
are regrouped: the result differs from F.conv2d's by 1e-6 of its norm. None of h, [x, skip] and up(...) is ever in
memory. Legend: N batch, C channels of x, C2 of skip, G groups, K output channels, H W input, H' W' output size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops import convolution, convolution_gpu, vendor
from fastgen.ops.activations import ACTIVATIONS
from fastgen.ops.batch_norm_act import batch_norm_act
from fastgen.ops.conv2d_arguments import Pair, arguments, four, pair
from fastgen.ops.convolution import Geometry, Prologue
from fastgen.ops.group_norm_act import group_norm_act_reference, input_gradients
from fastgen.ops.registration import FusedOp, dense, layout, vjp, wide

ENGINES = {"cpp": convolution, "triton": convolution_gpu}


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    upsample: int = 1,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    act: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(F.conv2d(upsampled [x, skip], weight) + bias + residual), [N, K, H', W'] in x's dtype and layout.

    x: [N, C, H, W]; skip: [N, C2, H, W] or None, a second source behind x's channels, not copied; weight:
    [K, (C + C2) / groups, kh, kw]; bias: [K], or [N, K], one for each image (a time embedding); residual:
    [N, K, H', W']. padding: an int, a pair (height, width), or four numbers left, right, top, bottom as
    F.pad has them. upsample: 2 repeats each pixel 2×2 first. act: one of `ACTIVATIONS`, None for none.
    Sums are in fp32 (fp64 for fp64); NaN and infinity spread as F.conv2d spreads them.
    Differentiable in every tensor, twice too. Raises ValueError that names the argument at fault.
    """
    given = arguments(
        x, weight, bias, stride, padding, dilation, groups, upsample=upsample, skip=skip, residual=residual, act=act,
        backend=backend,
    )  # fmt: skip
    if backends.left_to_vendor("conv2d", x, backend, _like(*given)):
        return vendor.convolution(*given[:18])
    geometry = Geometry(pair(stride), four(padding), pair(dilation), groups, upsample)
    fused = skip is not None or residual is not None or given[10] != "none"
    fused = fused or (not given[18] and convolution.strided(x, weight, geometry))  # whose gradient is worth it
    # Nothing to fuse and no better algorithm: PyTorch's is at the FLOP limit.
    if not fused and convolution.plain(x, weight, bias, geometry) and backends.left_to_pytorch("conv2d", x, backend):
        left, _, top, _ = geometry.padding
        y = F.conv2d(x, weight, bias, geometry.stride, (top, left), geometry.dilation, groups)
        return y.contiguous(memory_format=layout(x))
    return _CONV2D(*given)[0]


def norm_act_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    num_groups: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    in_act: str = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    upsample: int = 1,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    act: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`conv2d` of in_act(GroupNorm([x, skip])), the normalised tensor never in memory: [N, K, H', W'].

    num_groups: of [x, skip]'s C + C2 channels; norm_weight, norm_bias: [C + C2]; scale, shift:
    [N, C + C2] or None; in_act: one of `ACTIVATIONS`, as in `group_norm_act`. The rest as in `conv2d`.
    Differentiable in every tensor, twice too. Raises ValueError that names the argument at fault.
    """
    given = arguments(
        x, weight, bias, stride, padding, dilation, groups, upsample=upsample, skip=skip, residual=residual, act=act,
        num_groups=num_groups, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, in_act=in_act, scale=scale,
        shift=shift, backend=backend,
    )  # fmt: skip
    if backends.left_to_vendor("norm_act_conv2d", x, backend, _like(*given)):
        return vendor.convolution(*given[:18])
    return _NORM_ACT_CONV2D(*given)[0]


def conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1,
    groups: int = 1, *, upsample: int = 1, skip: Tensor | None = None, residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:  # fmt: skip
    """The equation in plain PyTorch, in at least fp32. Same arguments as `conv2d`."""
    dtype = wide(x.dtype)
    weight, bias, residual = (None if p is None else p.to(dtype) for p in (weight, bias, residual))
    h = (x if skip is None else torch.cat([x, skip.to(x.dtype)], dim=1)).to(dtype)
    h = h.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3) if upsample > 1 else h
    y = F.conv2d(F.pad(h, four(padding)), weight, None, pair(stride), 0, pair(dilation), groups)
    if bias is not None:
        y = y + bias.reshape(-1, weight.shape[0], 1, 1)
    return ACTIVATIONS[act or "none"][1](y if residual is None else y + residual).to(x.dtype)


def norm_act_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1,
    groups: int = 1, *, num_groups: int, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
    eps: float = 1e-5, in_act: str = "silu", scale: Tensor | None = None, shift: Tensor | None = None,
    upsample: int = 1, skip: Tensor | None = None, residual: Tensor | None = None, act: str | None = None,
) -> Tensor:  # fmt: skip
    """The equations in plain PyTorch, in at least fp32. Same arguments as `norm_act_conv2d`."""
    given, dtype = x.dtype, wide(x.dtype)
    x, skip, residual = (p if p is None else p.to(given).to(dtype) for p in (x, skip, residual))
    h = group_norm_act_reference(x, num_groups, norm_weight, norm_bias, eps, in_act, scale, shift, skip)
    y = conv2d_reference(
        h, weight, bias, stride, padding, dilation, groups, upsample=upsample, residual=residual, act=act
    )
    return y.to(given)


# Forward. What follows takes the arguments of the schema, in its order.


def _as_reference(x, weight, bias, stride, padding, dilation, groups, upsample, skip, residual, act, num_groups,
                  norm_weight, norm_bias, eps, in_act, scale, shift) -> Tensor:  # fmt: skip
    given = {"upsample": upsample, "skip": skip, "residual": residual, "act": act}
    if num_groups == 0:
        return conv2d_reference(x, weight, bias, stride, padding, dilation, groups, **given)
    norm = {"num_groups": num_groups, "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
    norm |= {"in_act": in_act, "scale": scale, "shift": shift}
    return norm_act_conv2d_reference(x, weight, bias, stride, padding, dilation, groups, **norm, **given)


def _like(*args: Any) -> tuple[Any, ...]:
    """What `backends.resolve` is told: x, and all of the schema's arguments that decide which kernel is the fastest."""
    x, weight, _, stride, _, _, groups, upsample, *_ = args
    return (x, tuple(weight.shape), tuple(stride), groups, upsample, args[11])


def _statistics(x: Tensor, skip: Any, num_groups: int, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """mean, rstd [N, G] where there is a norm and a kernel that will want them again, else [0]."""
    if num_groups == 0 or backend == "reference" or x.numel() == 0:
        return x.new_empty(0, dtype=wide(x.dtype)), x.new_empty(0, dtype=wide(x.dtype))
    x = dense(x)
    return ENGINES[backend].statistics(x, dense(skip, like=x), num_groups, eps)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """-> y [N, K, H', W'], mean [N, G], rstd [N, G]."""
    x, weight, bias, stride, padding, dilation, groups, upsample, skip, residual, act, num_groups = args[:12]
    norm_weight, norm_bias, eps, in_act, scale, shift, kept, backend = args[12:]
    backend = backends.resolve("conv2d", x.device, backend, like=_like(*args))
    mean, rstd = _statistics(x, skip, num_groups, eps, backend)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups, upsample)
    if backend == "reference" or x.numel() == 0:
        y = _as_reference(*args[:18])
    else:
        skip, residual = (None if t is None else t.to(x.dtype) for t in (skip, residual))
        prologue = Prologue(mean, rstd, norm_weight, norm_bias, scale, shift, in_act) if num_groups else None
        engine = ENGINES[backend]
        y = engine.forward(x, weight, bias, geometry, skip, residual, act, prologue, num_groups, eps, kept)
    return y.contiguous(memory_format=layout(x)), mean, rstd


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _, stride, padding, dilation, groups, upsample, *_ = args
    num_groups, backend = args[11], args[19]
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups, upsample)
    size = (x.shape[0], weight.shape[0], *geometry.output(*x.shape[2:], *weight.shape[2:]))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x))
    kept = num_groups and backends.resolve("conv2d", x.device, backend, like=_like(*args)) != "reference" and x.numel()
    mean = x.new_empty((x.shape[0], num_groups) if kept else 0, dtype=wide(x.dtype))
    return y, mean, torch.empty_like(mean)


_TENSORS = (0, 1, 2, 8, 9, 12, 13, 16, 17)  # x, weight, bias, skip, residual, norm_weight, norm_bias, scale, shift


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*(inputs[i] for i in _TENSORS), mean, rstd)
    ctx.rest = [None if i in _TENSORS else v for i, v in enumerate(inputs)]
    ctx.rest[-1] = backends.resolve("conv2d", inputs[0].device, inputs[-1], like=_like(*inputs))


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
    if dy is None:
        return (None,) * 20
    args, (*tensors, mean, rstd) = list(ctx.rest), ctx.saved_tensors
    for i, t in zip(_TENSORS, tensors, strict=True):
        args[i] = t
    needs = [ctx.needs_input_grad[i] for i in _TENSORS]
    found = _BACKWARD(dy, *args[:18], mean, rstd, needs, args[19])
    out: list[Tensor | None] = [None] * 20
    for i, t, wanted, g in zip(_TENSORS, tensors, needs, found, strict=True):
        out[i] = g if wanted and t is not None else None
    return tuple(out)


# Backward: the gradients of _TENSORS, empty where there is no tensor or none is needed.


def _backward_reference(dy: Tensor, *args: Any) -> list[Tensor | None]:
    def forward(*tensors: Tensor | None) -> Tensor:
        given = list(args)
        for i, t in zip(_TENSORS, tensors, strict=True):
            given[i] = t
        return _as_reference(*given)

    return vjp(forward, [args[i] for i in _TENSORS], (dy,))


def _backward_op(dy: Tensor, *args: Any) -> list[Tensor]:
    *args, mean, rstd, needs, backend = args
    given = dy
    x, weight, bias, stride, padding, dilation, groups, upsample, skip, residual, act, num_groups = args[:12]
    norm_weight, norm_bias, eps, in_act, scale, shift = args[12:]
    backend = backends.resolve("conv2d", x.device, backend, like=_like(*args))
    if backend == "reference" or x.numel() == 0:
        with torch.no_grad():
            found = _backward_reference(dy, *args)
    else:
        geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups, upsample)
        prologue = Prologue(mean, rstd, norm_weight, norm_bias, scale, shift, in_act) if num_groups else None
        second = None if skip is None else skip.to(x.dtype)
        with torch.no_grad():
            dy = dense(dy, like=x)  # first of all: PyTorch rounds otherwise where strides are mixed
            if act != "none":
                more = None if residual is None else residual.to(x.dtype)
                z = ENGINES[backend].forward(x, weight, bias, geometry, second, more, "none", prologue, num_groups, eps)
                dy = _act_gradient(dy, z, act, backend)
            rest = (geometry, second, prologue, num_groups, eps, needs)
            dh, dweight = ENGINES[backend].gradients(dy, x, weight, *rest)
            dbias = None
            if bias is not None and needs[2]:
                dbias = dy.sum((2, 3) if bias.ndim == 2 else (0, 2, 3), dtype=wide(dy.dtype))
            dx, dskip, *norm = [None] * 6
            if dh is not None and prologue is not None:
                dx, dskip, *norm = input_gradients(dh, x, num_groups, eps, second, prologue, backend)
            elif dh is not None:
                dx, dskip = dh[:, : x.shape[1]], dh[:, x.shape[1] :]
            found = [dx, dweight, dbias, dskip, dy, *norm]
    out = [
        g.to(args[i].dtype).contiguous(memory_format=layout(x) if _image(i) else torch.contiguous_format)
        if args[i] is not None and needed
        else x.new_empty(0)
        for i, g, needed in zip(_TENSORS, found, needs, strict=True)
    ]
    return _apart(given, out)


def _act_gradient(dy: Tensor, z: Tensor, act: str, backend: str) -> Tensor:
    """dy · act'(z), by a norm that changes nothing: PyTorch's own rounds as threads happen to cut the work."""
    zero = z.new_zeros(z.shape[1], dtype=wide(z.dtype))

    def same(z: Tensor) -> Tensor:
        return batch_norm_act(z, zero, zero + 1, eps=0.0, act=act, backend=backend)

    return vjp(same, (z,), (dy,))[0]


def _apart(dy: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """The gradients, copied where they share memory with dy or with one another: an op's outputs must not."""
    taken, out = {dy.untyped_storage().data_ptr()}, []
    for g in gradients:
        at = g.untyped_storage().data_ptr()
        out.append(g.clone() if at in taken else g)
        taken.add(at)
    return out


def _backward_fake(dy: Tensor, *args: Any) -> list[Tensor]:
    x, needs = args[0], args[20]
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=layout(x) if _image(i) else None)
        if (t := args[i]) is not None and needed
        else x.new_empty(0)
        for i, needed in zip(_TENSORS, needs, strict=True)
    ]


def _image(i: int) -> bool:
    return i in (0, 8, 9)  # x, skip, residual


def _backward_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[0], *(inputs[1 + i] for i in _TENSORS))
    ctx.rest = [None if i in _TENSORS else v for i, v in enumerate(inputs[1:19])]
    ctx.needs = inputs[21]


def _double_backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    """The mean and rstd that the forward kept are functions of x, so x's gradient here goes through them too."""
    dy, *tensors = ctx.saved_tensors

    def backward(dy: Tensor, *tensors: Tensor | None) -> tuple:
        args = list(ctx.rest)
        for i, t in zip(_TENSORS, tensors, strict=True):
            args[i] = t
        return tuple(_backward_reference(dy, *args))

    given = [g if n and t is not None else None for g, n, t in zip(grads, ctx.needs, tensors, strict=True)]
    with torch.enable_grad():
        ddy, *found = vjp(backward, (dy, *tensors), given)
    out: list[Tensor | None] = [None] * 23
    out[0] = ddy
    for i, g in zip(_TENSORS, found, strict=True):
        out[1 + i] = g
    return tuple(out)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, int upsample, "
    "Tensor? skip, Tensor? residual, str act, int num_groups, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "str in_act, Tensor? scale, Tensor? shift"
)
_BACKWARD = FusedOp(
    f"conv2d_bwd(Tensor dy, {_ARGUMENTS}, Tensor mean, Tensor rstd, bool[] needs, str? backend) -> Tensor[]",
    _backward_op, _backward_fake, _backward_setup, _double_backward,
)  # fmt: skip
_CONV2D, _NORM_ACT_CONV2D = (
    FusedOp(
        f"{name}({_ARGUMENTS}, bool kept, str? backend) -> (Tensor, Tensor, Tensor)",
        _forward, _fake, _setup, _backward,
    )
    for name in ("conv2d", "norm_act_conv2d")
)  # fmt: skip
