"""What a captured graph calls in the place of what it said: the operations of `fastgen.ops`, on channels last.

Each takes tensors as they stood in the graph, so that a place is one node. ``dtype`` is what the result had there:
under autocast PyTorch's convolutions cast what they are given, and ours keep what comes in.
Legend: N batch, C input channels, K output channels, H W sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import ops

CHANNELS_LAST = torch.channels_last
Order = tuple[int, ...]


def _per_image(p: Tensor | None) -> Tensor | None:
    """[N, C, 1, 1] -> [N, C]."""
    return None if p is None else p.reshape(p.shape[:2])


def _bias(bias: Tensor | None, per_image: Tensor | None) -> Tensor | None:
    """[K] and [N, K, 1, 1] -> their sum [N, K]."""
    if per_image is None:
        return bias
    rows = per_image.reshape(per_image.shape[-4:-2] if per_image.ndim == 4 and per_image.shape[0] != 1 else (-1,))
    return rows if bias is None else rows + bias.to(rows.dtype)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, per_image: Tensor | None,
    residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, *, dtype: torch.dtype, num_groups: int | None = None, eps: float = 1e-5,
    in_act: str = "none", stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, upsample: int = 1,
    act: str | None = None,
) -> Tensor:  # fmt: skip
    """act(conv(up(in_act(GroupNorm([x, skip]) · (1 + scale) + shift))) + bias + per_image + residual)."""
    if num_groups is None:
        x = x.to(dtype)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    where = (stride, padding, dilation, groups)
    more = {"upsample": upsample, "skip": skip, "residual": residual, "act": act}
    if num_groups is None:
        return ops.conv2d(x, weight, _bias(bias, per_image), *where, **more)
    norm = {"num_groups": num_groups, "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "in_act": in_act}
    norm |= {"scale": _per_image(scale), "shift": _per_image(shift)}
    return ops.norm_act_conv2d(x, weight, _bias(bias, per_image), *where, **norm, **more).to(dtype)


def convolution_batch_norm(
    running_mean: Tensor | None, running_var: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, residual: Tensor | None, *, dtype: torch.dtype,
    transposed: bool, training: bool, momentum: float, eps: float, act: str, stride: Any, padding: Any,
    output_padding: Any = 0,
) -> Tensor:  # fmt: skip
    """act(BatchNorm(conv(x)) + residual)."""
    x = x.to(dtype).contiguous(memory_format=CHANNELS_LAST)
    norm = {"running_mean": running_mean, "running_var": running_var, "norm_weight": norm_weight}
    norm |= {"norm_bias": norm_bias, "training": training, "momentum": momentum, "eps": eps}
    norm |= {"act": act, "residual": residual}
    if transposed:
        return ops.conv_transpose2d_norm_act(x, weight, bias, stride, padding, output_padding, **norm)
    return ops.conv2d_norm_act(x, weight, bias, stride, padding, **norm)


def transposed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, act: str, stride: Any, padding: Any,
    output_padding: Any,
) -> Tensor:  # fmt: skip
    """act(conv_transpose2d(x)), where no gradient is recorded: as one with a norm that changes nothing."""
    x = x.to(dtype).contiguous(memory_format=CHANNELS_LAST)
    zero = x.new_zeros(weight.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    norm = {"running_mean": zero, "running_var": zero + 1, "eps": 0.0, "act": act}
    return ops.conv_transpose2d_norm_act(x, weight, bias, stride, padding, output_padding, **norm)


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, *,
    dtype: torch.dtype, num_groups: int | None, eps: float, act: str,
) -> Tensor:  # fmt: skip
    """act(GroupNorm(x) · (1 + scale) + shift); num_groups None: instance norm.

    x [N, C, L], the pixels of an image in a row, is read where it lies, channels last too.
    """
    image = x.unsqueeze(-1) if x.ndim == 3 else x
    groups = x.shape[1] if num_groups is None else num_groups
    y = ops.group_norm_act(image, groups, weight, bias, eps, act, _per_image(scale), _per_image(shift))
    return (y.squeeze(-1) if x.ndim == 3 else y).to(dtype)


def batch_norm(
    running_mean: Tensor | None, running_var: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, *, training: bool, momentum: float, eps: float, act: str,
) -> Tensor:  # fmt: skip
    """act(BatchNorm(x) + residual)."""
    return ops.batch_norm_act(x, running_mean, running_var, weight, bias, training, momentum, eps, act, residual)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool, dtype: torch.dtype) -> Tensor:
    """softmax(q·kᵀ·scale)·v, [N, h, L, D]."""
    return ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), scale, causal)


def written_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, dtype: torch.dtype, q_order: Order, k_order: Order,
    v_order: Order, order: Order,
) -> Tensor:  # fmt: skip
    """softmax(q·kᵀ·scale)·v of tensors that, permuted by their orders, are [N, h, L, D] or [N, L, D]; ``order`` is
    the result's."""
    rows = [x.to(dtype).permute(o) for x, o in zip((q, k, v), (q_order, k_order, v_order), strict=True)]
    if len(order) == 3:
        rows = [x.unsqueeze(1) for x in rows]
    y = ops.attention(*rows, scale, False)
    return (y if len(order) == 4 else y.squeeze(1)).permute(order)


def reparameterize(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """mu + exp(logvar / 2) · noise."""
    return ops.reparameterize(mu, logvar, noise)[0]


def same_layout(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x, dense, its dimensions in memory in ``order`` from the outermost."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)
