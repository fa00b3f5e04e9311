"""torchvision's MNIST, CIFAR-10, CIFAR-100, CelebA and LSUN, from the folder they lie in: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import UsageError
from fastgen.training.decoding import fit
from fastgen.training.sources import Decoded, Held, Source

# What must lie in the root, as torchvision unpacks it.
HOLDS = {
    "mnist": "MNIST/raw with its idx files",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "celeba": "celeba with img_align_celeba and its lists",
    "lsun": "folders such as church_outdoor_train_lmdb",
}
KINDS = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "celeba": "CelebA", "lsun": "LSUN"}


def open_torchvision(
    name: str, root: str | Path | None, split: str, channels: int, image_size: int, strict: bool
) -> Source:
    """The source ``name`` of HOLDS. Raises ImportError without torchvision, UsageError where its files are not in root.

    MNIST and CIFAR are held in memory. CelebA has no classes; LSUN's are those of its scenes that lie in ``root``, and
    its own "val" is the test split, since its "test" has no scenes.
    """
    if root is None or not os.path.isdir(root):
        given = "" if root is None else f"{root} is no folder; "
        raise UsageError(f"data_root: {given}{name} needs the folder that holds {HOLDS[name]} (nothing is downloaded)")
    if name == "celeba":
        arguments: dict[str, Any] = {"split": split, "target_type": [], "download": False}
    elif name == "lsun":
        ending = "_train" if split == "train" else "_val"
        arguments = {"classes": sorted(p.name[: -len("_lmdb")] for p in Path(root).glob(f"*{ending}_lmdb"))}
        if not arguments["classes"]:
            raise _not_there(name, root, f"none of them ends in {ending}_lmdb")
    else:
        arguments = {"train": split == "train", "download": False}
    if name in ("celeba", "lsun"):
        classes = tuple(c.rpartition("_")[0] for c in arguments["classes"]) if name == "lsun" else None
        return Photos(name, classes, partial(_make, name, str(root), arguments), channels, image_size, strict)
    dataset = _make(name, str(root), arguments)
    labels = torch.as_tensor(dataset.targets, dtype=torch.int64)
    return Held(name, _pixels(name, dataset.data, channels), labels, tuple(dataset.classes), image_size)


def _make(name: str, root: str, arguments: dict[str, Any]) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"{name} is read by torchvision: pip install torchvision") from error
    try:
        return getattr(datasets, KINDS[name])(root, **arguments)
    except (RuntimeError, OSError) as error:
        raise _not_there(name, root, " ".join(str(error).split())) from None


def _not_there(name: str, root: str | Path, why: str) -> UsageError:
    return UsageError(f"data_root: {root} must hold {HOLDS[name]} for {name} ({why}); nothing is downloaded")


def _pixels(name: str, data: Tensor | np.ndarray, channels: int) -> Tensor:
    """uint8 [N, C, H, W] of what torchvision holds: [N, H, W], or [N, H, W, 3]. Grey is made as Pillow makes it."""
    images = torch.as_tensor(data)
    if images.ndim == 3:
        if channels != 1:
            raise UsageError(f"preset: takes {channels} channels, {name} has 1; choose another preset")
        return images[:, None]
    if channels == 1:
        weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32)
        return ((images.int() * weights).sum(-1).add(0x8000) >> 16).byte()[:, None]
    return images.permute(0, 3, 1, 2)


class Photos(Decoded):
    """CelebA or LSUN, which ``make`` opens: here at once, LSUN again in each worker, since processes cannot share its
    data base."""

    def __init__(self, name: str, classes: tuple[str, ...] | None, make: Callable[[], Any], *kind: Any) -> None:
        super().__init__(name, classes, *kind)
        self.make, self.opened = make, (os.getpid(), make())
        self.length = len(self.opened[1])
        self.ends = np.array(self.opened[1].indices if classes else [self.length])  # of the classes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": (-1, None)}

    def __len__(self) -> int:
        return self.length

    def place(self, i: int) -> str:
        return f"{self.name}, image {i}"

    def label(self, i: int) -> int:
        return int(np.searchsorted(self.ends, i, side="right"))

    def read(self, i: int) -> np.ndarray:
        process, dataset = self.opened
        if dataset is None or (process != os.getpid() and self.name == "lsun"):
            dataset = self.make()
            self.opened = os.getpid(), dataset
        with dataset[i][0] as image:
            image.draft(None, (2 * self.image_size, 2 * self.image_size))
            return fit(image, self.channels, self.image_size)
