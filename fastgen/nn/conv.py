"""A convolution, batch normalisation and an activation: the layer of DCGAN, ResNets and plain autoencoders.

Legend: N batch, C input, K output channels, H W input, H' W' output size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgen import ops
from fastgen.errors import UsageError
from fastgen.nn.group_norm import Pair, check_padding
from fastgen.ops.activations import check_act


class _ConvNormAct(nn.Module):
    """What both have: the convolution is made by the subclass, its norm here."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, act: str, **norm: Any) -> None:
        super().__init__()
        check_act(act)
        check_padding(conv.padding)
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels, **norm)
        self.act = act

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        self.norm.reset_parameters()

    def _statistics(self) -> dict[str, Any]:
        """The op's arguments about the norm, as nn.BatchNorm2d's forward has them, which also counts the batches."""
        norm = self.norm
        if isinstance(norm, nn.SyncBatchNorm):
            raise UsageError("norm: SyncBatchNorm is not fused; where statistics cross processes keep the plain layers")
        momentum = norm.momentum
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        return {
            "running_mean": norm.running_mean, "running_var": norm.running_var, "norm_weight": norm.weight,
            "norm_bias": norm.bias, "training": norm.training or norm.running_mean is None, "eps": norm.eps,
            "momentum": momentum, "act": self.act,
        }  # fmt: skip

    def extra_repr(self) -> str:
        return f"act={self.act}"


class ConvNormAct2d(_ConvNormAct):
    """act(BatchNorm2d(Conv2d(x)) + residual), in evaluation one kernel (`ops.conv2d_norm_act`).

    The arguments of nn.Conv2d, without dilation, groups and padding_mode and with padding in numbers; eps,
    momentum (None: a cumulative average), affine and track_running_stats of nn.BatchNorm2d; act: one of
    `ops.ACTIVATIONS`, whose leaky_relu has the slope 0.01. Submodules conv (nn.Conv2d) and norm
    (nn.BatchNorm2d), so the keys are theirs: conv.weight, conv.bias, norm.weight, norm.bias,
    norm.running_mean, norm.running_var, norm.num_batches_tracked. Training and evaluation mean what they
    mean for nn.BatchNorm2d. The submodules' own forward and hooks are not run.

    forward(x [N, C, H, W], residual [N, K, H', W'] or None) -> [N, K, H', W'] in x's dtype and layout.
    Raises ValueError that names the argument at fault.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0,
        bias: bool = True, *, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, act: str = "relu", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        made = {"device": device, "dtype": dtype}
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias, **made)
        norm = {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track_running_stats}
        super().__init__(conv, act, **norm, **made)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.conv
        where = (conv.stride, conv.padding)
        return ops.conv2d_norm_act(x, conv.weight, conv.bias, *where, **self._statistics(), residual=residual)


class ConvTransposeNormAct2d(_ConvNormAct):
    """act(BatchNorm2d(ConvTranspose2d(x)) + residual), in evaluation one kernel (`ops.conv_transpose2d_norm_act`).

    As `ConvNormAct2d`, with the arguments of nn.ConvTranspose2d: output_padding stands before bias, as there.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0,
        output_padding: Pair = 0, bias: bool = True, *, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True, act: str = "relu", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        made = {"device": device, "dtype": dtype}
        where = (kernel_size, stride, padding, output_padding)
        conv = nn.ConvTranspose2d(in_channels, out_channels, *where, bias=bias, **made)
        norm = {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track_running_stats}
        super().__init__(conv, act, **norm, **made)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.conv
        where = (conv.stride, conv.padding, conv.output_padding)
        return ops.conv_transpose2d_norm_act(x, conv.weight, conv.bias, *where, **self._statistics(), residual=residual)
