"""How a convolution runs on a GPU's own kernels (Triton): the sums themselves, on plain weights; and its gradients.

What `convolution` is for the CPU, with the same functions. Nothing here waits for the GPU: NaN and infinity are where
the sums have them, and no weight is transformed, so none is kept. Images are channels last inside, and so are weights;
those that are not are copied.

Legend: N batch, C input channels (both sources), K output channels, H W input, H' W' output size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops import convolution
from fastgen.ops.activations import ACTIVATIONS
from fastgen.ops.convolution import CHANNELS_LAST, DIRECT, FORWARD, GRADIENT, Geometry, Prologue
from fastgen.ops.registration import wide


def run(
    x: Tensor, weight: Tensor, geometry: Geometry, way: int, size: tuple[int, int], *, skip: Tensor | None = None,
    prologue: Prologue | None = None, gain: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, act: str = "none", kept: bool = False,
) -> Tensor:  # fmt: skip
    """act(conv(prologue([x, skip])) · gain + bias + residual), [N, K, *size], channels last.

    ``way``: FORWARD, or GRADIENT for the transposed convolution, of any stride or dilation, not both. The rest as in
    `convolution.run`.
    """
    x, skip, residual = (None if t is None else t.contiguous(memory_format=CHANNELS_LAST) for t in (x, skip, residual))
    weight = weight.to(x.dtype).contiguous(memory_format=CHANNELS_LAST)
    k = weight.shape[0] if way == FORWARD else weight.shape[1] * geometry.groups
    y = torch.empty((x.shape[0], k, *size), dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    gain, bias = (None if p is None else p.contiguous() for p in (gain, bias))
    code, kernel = ACTIVATIONS[act][0], tuple(weight.shape[2:])
    left, _, top, _ = geometry.padding
    where = (*geometry.stride, top, left, *geometry.dilation)
    if way == FORWARD:
        launch = backends.kernel("conv2d", "conv2d_fwd", "triton")
        rest = (gain, bias, residual, code, *kernel, *where, *size, geometry.upsample**2, DIRECT, y)
        launch(x, skip, weight, *_norm(prologue), *rest)
    else:
        launch = backends.kernel("conv2d", "conv2d_data_bwd", "triton")
        launch(x, weight, gain, bias, residual, code, *where, y)
    return y


def _norm(prologue: Prologue | None) -> tuple[Any, ...]:
    """mean, rstd, weight, bias, scale, shift and the activation as launchers take them."""
    if prologue is None:
        return (None,) * 6 + (0,)
    return (*(None if p is None else p.contiguous() for p in prologue[:6]), ACTIVATIONS[prologue.act][0])


def statistics(x: Tensor, skip: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1/sqrt(var + eps) of each group of [x, skip], [N, G]; x and skip are dense in one layout."""
    return convolution.statistics(x, skip, num_groups, eps, "triton")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, skip: Tensor | None, residual: Tensor | None,
    act: str, prologue: Prologue | None, num_groups: int, eps: float, kept: bool = False,
) -> Tensor:  # fmt: skip
    """act(conv(prologue([x, skip])) + bias + residual), [N, K, H', W']."""
    size = geometry.output(*x.shape[2:], *weight.shape[2:])
    given = {"skip": skip, "prologue": prologue, "bias": bias, "residual": residual, "act": act}
    return run(x, weight, geometry, FORWARD, size, **given)


def data_gradient(dy: Tensor, weight: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor | None:
    """The gradient of the (normalised) input, [N, C, *size], channels last; None where PyTorch's is to be used."""
    both = any(s > 1 and d > 1 for s, d in zip(geometry.stride, geometry.dilation, strict=True))
    return None if both or geometry.upsample > 1 else run(dy, weight, geometry, GRADIENT, size)


def weight_gradient(
    dy: Tensor, x: Tensor, skip: Tensor | None, weight: Tensor, geometry: Geometry, prologue: Prologue | None
) -> Tensor | None:
    """The gradient of weight; None where PyTorch's is to be used."""
    if geometry._replace(padding=(0, 0, 0, 0)) != Geometry():
        return None
    x, skip, dy = (None if t is None else t.contiguous(memory_format=CHANNELS_LAST) for t in (x, skip, dy))
    dweight = torch.empty(weight.shape, dtype=wide(x.dtype), device=x.device)
    left, _, top, _ = geometry.padding
    launch = backends.kernel("conv2d", "conv2d_weight_bwd", "triton")
    launch(dy, x, skip, *_norm(prologue), top, left, DIRECT, dweight)
    return dweight.to(weight.dtype)


def gradients(*args: Any) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of the normalised [x, skip], of weight), as in `convolution.gradients`."""
    return convolution.gradients(*args, own=(data_gradient, weight_gradient))
