"""The weight gradient of a convolution as a product of matrices: for strided ones, on the CPU.

PyTorch's takes two to three times as long as the forward there. The product of the output's gradient with the patches
of the input that each output saw (im2col, Chellapilla et al. 2006) takes about as long as the forward. Legend: N batch,
C input, K output channels, H W input, H' W' output size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BYTES = 1 << 23  # of patches at a time: what a cache holds beside the products
FEW = 16  # with fewer channels the products are too thin


def worthwhile(x: Tensor, channels: int, stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether the product is the faster way to the weight gradient of a convolution of x to ``channels``."""
    usual = tuple(dilation) == (1, 1) and groups == 1 and x.device.type == "cpu"
    return usual and tuple(stride) != (1, 1) and min(x.shape[1], channels) >= FEW and (
        x.dtype in (torch.float32, torch.float64)
    )  # fmt: skip


def weight_gradient(
    dy: Tensor, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int, int, int]
) -> Tensor:
    """dweight[k, c, r, s] = Σ dy[n, k, i, j] · x[n, c, stride·i + r - top, stride·j + s - left], [K, C, *kernel].

    dy: [N, K, H', W']; x: [N, C, H, W]; padding: left, right, top, bottom. Differentiable in dy and x.
    """
    (k, h, w), c = dy.shape[1:], x.shape[1]
    if dy.numel() == 0:
        return x.new_zeros((k, c, *kernel))
    padded = F.pad(x, padding).permute(0, 2, 3, 1)
    views = padded.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    views = views[:, :h, :w].permute(0, 1, 2, 4, 5, 3)  # [N, H', W', kh, kw, C]
    images = max(1, BYTES // (h * w * kernel[0] * kernel[1] * c * x.element_size()))
    total = None
    for patches, rows in zip(views.split(images), dy.permute(0, 2, 3, 1).split(images), strict=True):
        a, b = rows.reshape(-1, k).t(), patches.reshape(-1, kernel[0] * kernel[1] * c)
        total = a @ b if total is None else torch.addmm(total, a, b)
    return total.view(k, *kernel, c).permute(0, 3, 1, 2)
