"""The transposed 4×4 convolution of stride 2 and padding 1 with gradients, on the CPU: that of DCGAN's generator.

Forward by Winograd's algorithm, a convolution for each sub-pixel (`convolution.subpixel`); its data gradient is the
strided convolution, its weight gradient a product of matrices. Legend: N batch, C input, K output channels, H W size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops import patches
from fastgen.ops.convolution import SUBPIXELS, Geometry, run
from fastgen.ops.registration import FusedOp, layout

GEOMETRY = Geometry((2, 2), (1, 1, 1, 1), transposed=True)


def takes(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether `conv_transpose2d` is for these arguments, and faster than PyTorch's."""
    return (
        geometry.subpixels(weight) and x.dtype == weight.dtype and x.numel() > 0
        and patches.worthwhile(x, weight.shape[1], (2, 2), (1, 1), 1)
    )  # fmt: skip


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None = None) -> Tensor:
    """F.conv_transpose2d(x, weight, bias, stride=2, padding=1), [N, K, 2H, 2W] in x's dtype and layout.

    x: [N, C, H, W]; weight: [C, K, 4, 4]; bias: [K]. Differentiable in all three, twice too.
    """
    y = _OP(x, weight, backend)
    return y if bias is None else y + bias[:, None, None]


def _forward(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    if backends.resolve("conv_transpose2d_norm_act", x.device, backend) == "cpp":
        y = run(x, weight, GEOMETRY, SUBPIXELS, GEOMETRY.output(*x.shape[2:], 4, 4))
    else:
        y = F.conv_transpose2d(x, weight, None, 2, 1)
    return y.contiguous(memory_format=layout(x))


def _fake(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    size = (x.shape[0], weight.shape[1], *GEOMETRY.output(*x.shape[2:], 4, 4))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x))


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dy: Tensor | None) -> tuple:
    """In PyTorch's own functions, so differentiable again."""
    if dy is None:
        return None, None, None
    x, weight = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx = F.conv2d(dy, weight, None, 2, 1).contiguous(memory_format=layout(x)) if ctx.needs_input_grad[0] else None
    # Of a transposed convolution the image and the gradient change places.
    dweight = patches.weight_gradient(x, dy, (4, 4), (2, 2), (1, 1, 1, 1)) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


_OP = FusedOp("conv_transpose2d(Tensor x, Tensor weight, str? backend) -> Tensor", _forward, _fake, _setup, _backward)
