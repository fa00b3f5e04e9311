"""Group normalisation with the activation behind it, and with the convolution behind that.

Legend: N batch, C channels of x, C2 of a skip source, K output channels, * the spatial sizes, H W input, H' W' output
size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgen import ops
from fastgen.errors import UsageError
from fastgen.ops.activations import check_act

Pair = int | tuple[int, int]


class GroupNormAct(nn.GroupNorm):
    """act(GroupNorm(x)), nn.GroupNorm and an activation in one pass over memory (`ops.group_norm_act`).

        y = act((xhat · weight + bias) · (1 + scale) + shift)

    The arguments and parameters (weight, bias [C]) of nn.GroupNorm, and act: one of `ops.ACTIVATIONS`.
    forward(x [N, C, *], scale, shift, skip) -> [N, C, *] in x's dtype and layout. scale, shift: [N, C], one
    for each image and channel (adaptive group norm), or None; skip: [N, C2, *], channels that stand behind
    x's as if concatenated: num_channels counts them too. Raises ValueError for an unknown act and for
    shapes that disagree.
    """

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, act: str = "silu",
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        check_act(act)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.act = act

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        _check_channels(self.num_channels, x, skip, "num_channels")
        return ops.group_norm_act(x, self.num_groups, self.weight, self.bias, self.eps, self.act, scale, shift, skip)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class NormActConv2d(nn.Module):
    """conv(in_act(GroupNorm(x))), whose normalised tensor is never in memory (`ops.norm_act_conv2d`).

        y = act(conv(up(in_act((xhat · weight + bias) · (1 + scale) + shift))) + bias + residual)

    The arguments of nn.Conv2d, without padding_mode and with padding in numbers; num_groups, eps and affine
    of nn.GroupNorm over in_channels; in_act, act: of `ops.ACTIVATIONS`, act None for none; upsample: 2
    repeats each pixel 2×2 before the convolution. Submodules norm (nn.GroupNorm) and conv (nn.Conv2d), so
    the keys are norm.weight, norm.bias, conv.weight, conv.bias; they hold parameters only: their own
    forward and hooks are not run.

    forward(x [N, C, H, W], scale, shift, skip, residual) -> [N, K, H', W'] in x's dtype and layout. scale,
    shift: [N, in_channels]; skip: [N, C2, H, W], channels that stand behind x's, C + C2 = in_channels;
    residual: [N, K, H', W']. Raises ValueError that names the argument at fault.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0,
        dilation: Pair = 1, groups: int = 1, bias: bool = True, *, num_groups: int, eps: float = 1e-5,
        affine: bool = True, in_act: str = "silu", act: str | None = None, upsample: int = 1, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_act(in_act, "in_act")
        check_act(act or "none")
        check_padding(padding)
        made = {"device": device, "dtype": dtype}
        self.norm = nn.GroupNorm(num_groups, in_channels, eps, affine, **made)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **made)
        self.in_act, self.act, self.upsample = in_act, act, upsample

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        self.conv.reset_parameters()

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, skip: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        norm, conv = self.norm, self.conv
        _check_channels(norm.num_channels, x, skip, "in_channels")
        return ops.norm_act_conv2d(
            x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
            num_groups=norm.num_groups, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, in_act=self.in_act,
            scale=scale, shift=shift, upsample=self.upsample, skip=skip, residual=residual, act=self.act,
        )  # fmt: skip

    def extra_repr(self) -> str:
        more = "" if self.upsample == 1 else f", upsample={self.upsample}"
        return f"in_act={self.in_act}, act={self.act}{more}"


def check_padding(padding: Any) -> None:
    """Raises UsageError for nn.Conv2d's paddings in words, which the ops do not take."""
    if isinstance(padding, str):
        raise UsageError(f"padding: {padding!r} is not taken; give the pixels, for an odd kernel's 'same' half of it")


def _check_channels(expected: int, x: Tensor, skip: Tensor | None, name: str) -> None:
    """Raises UsageError unless x and skip together have the channels of the layer. Without affine parameters the op
    could not know."""
    found = (x.shape[1] if x.ndim > 1 else 0) + (0 if skip is None or skip.ndim < 2 else skip.shape[1])
    if found != expected:
        both = "x" if skip is None else "x and skip together"
        raise UsageError(f"x: {both} must have the layer's {expected} channels ({name}), not {list(x.shape)}")
