"""The arguments of conv2d and norm_act_conv2d: checked, and in the order of the ops' schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.ops.activations import check_act
from fastgen.ops.convolution import Geometry
from fastgen.ops.group_norm_act import check_norm

Pair = int | Sequence[int]


def pair(value: Pair) -> tuple[int, int]:
    """height, width."""
    return (value, value) if isinstance(value, int) else tuple(value)


def four(padding: Pair) -> tuple[int, int, int, int]:
    """left, right, top, bottom."""
    if not isinstance(padding, int) and len(padding) == 4:
        return tuple(padding)
    h, w = pair(padding)
    return w, w, h, h


def arguments(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1,
    groups: int = 1, *, upsample: int = 1, skip: Any = None, residual: Any = None, act: str | None = None,
    num_groups: int | None = None, norm_weight: Any = None, norm_bias: Any = None, eps: float = 1e-5,
    in_act: str = "silu", scale: Any = None, shift: Any = None, backend: str | None = None,
) -> tuple:  # fmt: skip
    """The op's arguments in the order of its schema, checked; num_groups None: no norm.

    Raises ValueError that names the one at fault.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [N, C, H, W], not {x.dtype} {list(x.shape)}")
    check_act(act or "none")
    check_act(in_act, "in_act")
    if upsample not in (1, 2):
        raise ValueError(f"upsample must be 1 or 2, not {upsample}")
    for name, value, sizes in (("stride", stride, (2,)), ("padding", padding, (2, 4)), ("dilation", dilation, (2,))):
        entries = () if isinstance(value, str) else (value,) * 2 if isinstance(value, int) else tuple(value)
        if len(entries) not in sizes:
            raise ValueError(f"{name} must be an int or have {' or '.join(map(str, sizes))} entries, not {value!r}")
        if min(entries) < (0 if name == "padding" else 1):
            raise ValueError(f"{name} must be {'0 or more' if name == 'padding' else 'positive'}, not {value}")
    geometry = Geometry(pair(stride), four(padding), pair(dilation), groups, upsample)
    _check(x, weight, bias, geometry, skip, residual)
    if num_groups is not None:
        check_norm(x, num_groups, norm_weight, norm_bias, scale, shift, skip, "norm_")
    tensors = (x, weight, bias, skip, residual, norm_weight, norm_bias, scale, shift)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return (
        x, weight, bias, list(geometry.stride), list(geometry.padding), list(geometry.dilation), groups, upsample, skip,
        residual, act or "none", num_groups or 0, norm_weight, norm_bias, eps, in_act, scale, shift, not recorded,
        backend,
    )  # fmt: skip


def _check(x: Tensor, weight: Tensor, bias: Any, geometry: Geometry, skip: Any, residual: Any) -> None:
    n, c = x.shape[:2]
    if skip is not None:
        if skip.ndim != 4 or skip.shape[0] != n or skip.shape[2:] != x.shape[2:]:
            raise ValueError(f"skip must differ from x {list(x.shape)} in its channels only, not {list(skip.shape)}")
        c = c + skip.shape[1]
    groups = geometry.groups
    if groups < 1 or c % groups:
        raise ValueError(f"groups must divide the {c} channels, and {groups} does not")
    if weight.ndim != 4 or weight.shape[1] * groups != c or weight.shape[0] % groups or 0 in weight.shape:
        raise ValueError(f"weight must be [K, {c // groups}, kh, kw] for {c} channels, not {list(weight.shape)}")
    k, kh, kw = weight.shape[0], *weight.shape[2:]
    if bias is not None and tuple(bias.shape) not in ((k,), (n, k)):
        raise ValueError(f"bias must be [{k}] or [{n}, {k}], not {list(bias.shape)}")
    h, w = geometry.output(*x.shape[2:], kh, kw)
    if h < 1 or w < 1:
        raise ValueError(f"x {list(x.shape)} is smaller than the kernel {kh}×{kw}; give more padding")
    if residual is not None and tuple(residual.shape) != (n, k, h, w):
        raise ValueError(f"residual must be {[n, k, h, w]}, as the output, not {list(residual.shape)}")
    for name, t in (("weight", weight), ("bias", bias), ("skip", skip), ("residual", residual)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}; move one of them")
        if t is not None and not t.is_floating_point():
            raise ValueError(f"{name} must be floating, not {t.dtype}")
