"""A convolution, batch normalisation, a residual and an activation: the order of DCGAN, ResNets and VAE decoders.

    y = act((conv(x) + bias - mean_c) / sqrt(var_c + eps) · norm_weight + norm_bias + residual)

where conv is F.conv2d or F.conv_transpose2d and mean_c, var_c are the batch's in training, else the running ones
(Ioffe & Szegedy 2015, as in `batch_norm_act`). Where they are the running ones and no gradient is recorded, all that
follows the sums is one number to multiply and one to add for each channel, and happens before they are stored. A
transposed 4×4 convolution of stride 2 and padding 1 is four 2×2 convolutions, one for each sub-pixel (Shi et al. 2016),
by Winograd's algorithm F(3×3, 2×2). Legend: N batch, C input, K output channels, H W input, H' W' output size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops import convolution, transposed
from fastgen.ops.activations import ACTIVATIONS, check_act
from fastgen.ops.batch_norm_act import batch_norm_act, batch_norm_act_reference
from fastgen.ops.conv2d import ENGINES, conv2d, conv2d_reference
from fastgen.ops.conv2d_arguments import Pair, four, pair
from fastgen.ops.convolution import Geometry
from fastgen.ops.registration import FusedOp, layout, wide

# With so few output channels, 4 of them for each sub-pixel, all four fit one panel of the matrix product.
NARROW = 16


def conv2d_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0, *,
    running_mean: Tensor | None = None, running_var: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, training: bool = False, momentum: float | None = 0.1, eps: float = 1e-5,
    act: str = "relu", residual: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """act(BatchNorm(conv2d(x, weight) + bias) + residual), [N, K, H', W'] in x's dtype and layout.

    x: [N, C, H, W]; weight: [K, C, kh, kw]; bias, running_mean, running_var, norm_weight, norm_bias: [K];
    residual: [N, K, H', W']; act: one of `ACTIVATIONS`. stride and padding as in `conv2d`; training,
    momentum and the running statistics as in `batch_norm_act`, which are updated in place in training.
    Differentiable in x, weight, bias, norm_weight, norm_bias and residual, twice too. Raises ValueError
    that names the argument at fault.
    """
    geometry = Geometry(pair(stride), four(padding))
    norm = (running_mean, running_var, norm_weight, norm_bias)
    _check(x, weight, bias, geometry, norm, training, act, residual)
    apart = training or backends.left_to_vendor("conv2d_norm_act", x, backend)
    if apart or _recorded(x, weight, bias, *norm, residual):
        h = conv2d(x, weight, bias, stride, padding, backend=backend)
        return batch_norm_act(h, *norm, training, momentum, eps, act, residual, backend)
    folded = _fold(x, bias, norm, eps)
    return _CONV(x, weight, *folded, list(geometry.stride), list(geometry.padding), residual, act, backend)


def conv_transpose2d_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0,
    output_padding: Pair = 0, *, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, training: bool = False,
    momentum: float | None = 0.1, eps: float = 1e-5, act: str = "relu", residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """act(BatchNorm(conv_transpose2d(x, weight) + bias) + residual), [N, K, H', W'] in x's dtype and layout.

    weight: [C, K, kh, kw], as F.conv_transpose2d has it; stride, padding, output_padding: an int or a
    pair (height, width). The rest as in `conv2d_norm_act`.
    """
    geometry = Geometry(pair(stride), four(padding), transposed=True, output_padding=pair(output_padding))
    norm = (running_mean, running_var, norm_weight, norm_bias)
    _check(x, weight, bias, geometry, norm, training, act, residual)
    apart = training or backends.left_to_vendor("conv_transpose2d_norm_act", x, backend)
    if apart or _recorded(x, weight, bias, *norm, residual):
        ours = not backends.left_to_vendor("conv_transpose2d_norm_act", x, backend)
        h = transposed.conv_transpose2d if ours and transposed.takes(x, weight, geometry) else None
        h = _transposed(x, weight, bias, geometry) if h is None else h(x, weight, bias, backend)
        return batch_norm_act(h, *norm, training, momentum, eps, act, residual, backend)
    folded, where = _fold(x, bias, norm, eps), (stride, padding, output_padding)
    return _CONV_TRANSPOSE(x, weight, *folded, *(list(pair(w)) for w in where), residual, act, backend)


def conv2d_norm_act_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0, *,
    running_mean: Tensor | None = None, running_var: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, training: bool = False, momentum: float | None = 0.1, eps: float = 1e-5,
    act: str = "relu", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The equation in plain PyTorch, in at least fp32. Same arguments as `conv2d_norm_act`."""
    h = conv2d_reference(x.to(wide(x.dtype)), weight, bias, stride, padding)
    norm = (running_mean, running_var, norm_weight, norm_bias)
    return batch_norm_act_reference(h, *norm, training, momentum, eps, act, residual).to(x.dtype)


def conv_transpose2d_norm_act_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0,
    output_padding: Pair = 0, *, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, training: bool = False,
    momentum: float | None = 0.1, eps: float = 1e-5, act: str = "relu", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The equation in plain PyTorch, in at least fp32. Same arguments as `conv_transpose2d_norm_act`."""
    geometry = Geometry(pair(stride), four(padding), transposed=True, output_padding=pair(output_padding))
    h = _transposed(x.to(wide(x.dtype)), weight, bias, geometry)
    norm = (running_mean, running_var, norm_weight, norm_bias)
    return batch_norm_act_reference(h, *norm, training, momentum, eps, act, residual).to(x.dtype)


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    left, _, top, _ = geometry.padding
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.conv_transpose2d(x, weight, bias, geometry.stride, (top, left), geometry.output_padding)


def _recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check(x: Tensor, weight: Tensor, bias: Any, geometry: Geometry, norm: tuple, training: bool, act: str,
           residual: Any) -> None:  # fmt: skip
    check_act(act)
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [N, C, H, W], not {x.dtype} {list(x.shape)}")
    c, shape = x.shape[1], "[C, K, kh, kw]" if geometry.transposed else "[K, C, kh, kw]"
    if weight.ndim != 4 or weight.shape[0 if geometry.transposed else 1] != c or 0 in weight.shape:
        raise ValueError(f"weight must be {shape} for {c} channels, not {list(weight.shape)}")
    if min(geometry.stride) < 1 or min(geometry.padding) < 0:
        raise ValueError(f"stride must be positive, padding 0 or more, not {geometry.stride} and {geometry.padding}")
    more = geometry.output_padding
    if geometry.transposed and not all(0 <= o < s for o, s in zip(more, geometry.stride, strict=True)):
        raise ValueError(f"output_padding must be less than stride {geometry.stride}, not {more}")
    k, size = weight.shape[1 if geometry.transposed else 0], geometry.output(*x.shape[2:], *weight.shape[2:])
    if min(size) < 1:
        raise ValueError(f"x {list(x.shape)} is too small for the kernel {list(weight.shape[2:])} and the padding")
    names = ("bias", "running_mean", "running_var", "norm_weight", "norm_bias")
    for name, p in zip(names, (bias, *norm), strict=True):
        if p is not None and (tuple(p.shape) != (k,) or not p.is_floating_point()):
            raise ValueError(f"{name} must be a floating tensor [{k}], not {p.dtype} {list(p.shape)}")
    if residual is not None and tuple(residual.shape) != (x.shape[0], k, *size):
        raise ValueError(f"residual must be {[x.shape[0], k, *size]}, as the output, not {list(residual.shape)}")
    for name, p in zip((*names, "weight", "residual"), (bias, *norm, weight, residual), strict=True):
        if p is not None and p.device != x.device:
            raise ValueError(f"{name} is on {p.device}, x on {x.device}; move one of them")
    for name, p in zip(names[1:3], norm[:2], strict=True):
        if p is None and not training:
            raise ValueError(f"{name} must be given where training is False")


def _fold(x: Tensor, bias: Tensor | None, norm: tuple, eps: float) -> tuple[Tensor, Tensor]:
    """gain, offset [K] of conv · gain + offset, in at least fp32."""
    mean, var, weight, shift = (None if p is None else p.detach().to(wide(x.dtype)) for p in norm)
    gain = (var + eps).rsqrt()
    gain = gain if weight is None else gain * weight
    offset = -mean * gain if bias is None else (bias.detach().to(gain.dtype) - mean) * gain
    return gain, offset if shift is None else offset + shift


# The folded ops: inference only, so without a gradient.


def _finish(h: Tensor, gain: Tensor, offset: Tensor, residual: Tensor | None, act: str) -> Tensor:
    h = h.to(gain.dtype) * gain[:, None, None] + offset[:, None, None]
    return ACTIVATIONS[act][1](h if residual is None else h + residual.to(h.dtype))


def _conv(x: Tensor, weight: Tensor, gain: Tensor, offset: Tensor, stride: Any, padding: Any, residual: Any, act: str,
          backend: Any) -> Tensor:  # fmt: skip
    backend = backends.resolve("conv2d_norm_act", x.device, backend)
    geometry = Geometry(tuple(stride), tuple(padding))
    size = geometry.output(*x.shape[2:], *weight.shape[2:])
    if backend == "reference" or x.numel() == 0:
        y = _finish(
            conv2d_reference(x.to(gain.dtype), weight, None, tuple(stride), padding), gain, offset, residual, act
        )
    else:
        more = None if residual is None else residual.to(x.dtype)
        given = {"gain": gain, "bias": offset, "residual": more, "act": act, "kept": True}
        y = ENGINES[backend].run(x, weight, geometry, convolution.FORWARD, size, **given)
    return y.to(x.dtype).contiguous(memory_format=layout(x))


def _conv_transpose(x: Tensor, weight: Tensor, gain: Tensor, offset: Tensor, stride: Any, padding: Any,
                    output_padding: Any, residual: Any, act: str, backend: Any) -> Tensor:  # fmt: skip
    backend = backends.resolve("conv_transpose2d_norm_act", x.device, backend)
    geometry = Geometry(tuple(stride), four(padding), transposed=True, output_padding=tuple(output_padding))
    size, kernels = geometry.output(*x.shape[2:], *weight.shape[2:]), backend != "reference" and x.numel() > 0
    more = None if residual is None else residual.to(x.dtype)
    if kernels and x.shape[2:] == (1, 1) and not any([*padding, *output_padding]):
        # One pixel in: every output is a product with one row of the weights.
        h = (x.reshape(len(x), -1) @ weight.to(x.dtype).reshape(len(weight), -1)).view(-1, *weight.shape[1:])
        y = _finish(h, gain, offset, residual, act)
    elif kernels and backend == "triton":
        given = {"gain": gain, "bias": offset, "residual": more, "act": act}
        y = ENGINES[backend].run(x, weight, geometry, convolution.GRADIENT, size, **given)
    elif kernels and geometry.subpixels(weight) and (residual is None or 4 * weight.shape[1] > NARROW):
        y = convolution.subpixel(x, weight, geometry, size, gain, offset, more, act, NARROW)
    else:
        h = _transposed(x.to(gain.dtype) if backend == "reference" else x, weight, None, geometry)
        y = _finish(h, gain, offset, residual, act)
    return y.to(x.dtype).contiguous(memory_format=layout(x))


def _fake(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    k = weight.shape[1 if geometry.transposed else 0]
    size = (x.shape[0], k, *geometry.output(*x.shape[2:], *weight.shape[2:]))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x))


def _conv_fake(x: Any, weight: Any, gain: Any, offset: Any, stride: Any, padding: Any, *_: Any) -> Tensor:
    return _fake(x, weight, Geometry(tuple(stride), tuple(padding)))


def _conv_transpose_fake(
    x: Any, weight: Any, gain: Any, offset: Any, stride: Any, padding: Any, output_padding: Any, *_: Any
) -> Tensor:
    given = {"transposed": True, "output_padding": tuple(output_padding)}
    return _fake(x, weight, Geometry(tuple(stride), four(padding), **given))


_CONV = FusedOp(
    "conv2d_norm_act(Tensor x, Tensor weight, Tensor gain, Tensor offset, int[] stride, int[] padding, "
    "Tensor? residual, str act, str? backend) -> Tensor",
    _conv, _conv_fake,
)  # fmt: skip
_CONV_TRANSPOSE = FusedOp(
    "conv_transpose2d_norm_act(Tensor x, Tensor weight, Tensor gain, Tensor offset, int[] stride, int[] padding, "
    "int[] output_padding, Tensor? residual, str act, str? backend) -> Tensor",
    _conv_transpose, _conv_transpose_fake,
)  # fmt: skip
