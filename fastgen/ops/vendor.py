"""Convolutions and norms as PyTorch's own operators, in the tensors' own dtype: y = act(conv(act(norm(x))) + bias + …).

What a GPU runs where no kernel of ours is known to be faster (`backends.left_to_vendor`): cuDNN's convolution behind
our group norm, all of it visible to autograd, autocast and torch.compile. The references, which are for proof,
compute in at least fp32 and would cost several times as much in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops.activations import ACTIVATIONS
from fastgen.ops.group_norm_act import group_norm_act
from fastgen.ops.registration import layout


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, upsample: int, skip: Tensor | None, residual: Tensor | None, act: str,
    num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, in_act: str,
    scale: Tensor | None, shift: Tensor | None,
) -> Tensor:  # fmt: skip
    """conv2d, and with num_groups norm_act_conv2d; the arguments of their schemas, in that order."""
    if num_groups:
        h = group_norm_act(x, num_groups, norm_weight, norm_bias, eps, in_act, scale, shift, skip)
    else:
        h = x if skip is None else torch.cat([x, skip.to(x.dtype)], dim=1)
    if upsample > 1:
        h = F.interpolate(h, scale_factor=float(upsample), mode="nearest")
    left, right, top, bottom = padding
    if (left, top) != (right, bottom):
        h, left, top = F.pad(h, tuple(padding)), 0, 0
    one_for_all = bias if bias is not None and bias.ndim == 1 else None
    parameters = (None if p is None else p.to(h.dtype) for p in (weight, one_for_all))
    y = F.conv2d(h, *parameters, tuple(stride), (top, left), tuple(dilation), groups)
    if bias is not None and one_for_all is None:
        y = y + bias[:, :, None, None].to(y.dtype)
    return _finish(y, residual, act).contiguous(memory_format=layout(x))


def batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float | None, eps: float, act: str, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """batch_norm_act, with its arguments; moves the running statistics."""
    parameters = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    y = F.batch_norm(x, running_mean, running_var, *parameters, training, momentum or 0.0, eps)
    return _finish(y, residual, act)


def batch_norm_takes(x: Tensor, running_mean: Tensor | None) -> bool:
    """Whether F.batch_norm takes them: it wants values, and statistics in x's dtype or fp32."""
    return x.numel() > 0 and (running_mean is None or running_mean.dtype in (x.dtype, torch.float32))


def _finish(y: Tensor, residual: Tensor | None, act: str) -> Tensor:
    return ACTIVATIONS[act][1](y if residual is None else y + residual.to(y.dtype))
