"""Augmentation: what a recipe does to a batch of training images, on the device they are on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_affine(
    x: Tensor, *, degrees: float = 6.0, scale: float = 0.06, pixels: float = 1.0, p: float = 0.5
) -> Tensor:
    """A light augmentation: x [N,C,H,W] in [-1,1], each image with probability p rotated by up to
    ±degrees, scaled by up to ±scale and shifted by up to ±pixels; bicubic, the outside is -1."""
    N, _, H, W = x.shape
    r = torch.rand(4, N, device=x.device) * 2 - 1
    keep = (torch.rand(N, device=x.device) < p).to(x.dtype)
    angle, zoom = r[0] * keep * degrees * torch.pi / 180, 1 + r[1] * keep * scale
    theta = torch.zeros(N, 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom, angle.cos() * zoom
    theta[:, 0, 2], theta[:, 1, 2] = r[2] * keep * 2 * pixels / W, r[3] * keep * 2 * pixels / H
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, mode="bicubic", align_corners=False) - 1
    return torch.where(keep.bool()[:, None, None, None], moved.clamp(-1, 1), x)


def random_flip(x: Tensor) -> Tensor:
    """x [N,C,H,W], each image with probability 1/2 mirrored, left to right."""
    flipped = torch.rand(len(x), device=x.device) < 0.5
    return torch.where(flipped[:, None, None, None], x.flip(3), x)
