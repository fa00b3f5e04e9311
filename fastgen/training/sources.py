"""Where training images come from: held in memory (small sets), or decoded one by one (folders, shards, large sets)."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import UnidentifiedImageError
from torch import Tensor

from fastgen.errors import UsageError
from fastgen.training.decoding import decode
from fastgen.training.folder_index import classes_of, index_folder
from fastgen.training.index_cache import Index
from fastgen.training.shard_index import NO_LABEL, index_shards

MOST_DAMAGED = 10_000  # one after another, before a source counts as one without images


class Pictures(NamedTuple):
    """images: uint8 [N, C, S, S]; labels: int64 [N]; damaged: path and reason of what was met and replaced."""

    images: np.ndarray
    labels: np.ndarray
    damaged: list[tuple[str, str]]


class Source(Protocol):
    """Images by number, from 0, as a network takes them.

    classes: their names, None where there are none. damaged: path -> reason, of the images that a `Loader` met so far;
    each was replaced by the next good one. A strict source raises at the first instead.
    """

    name: str
    classes: tuple[str, ...] | None
    damaged: dict[str, str]
    in_memory: bool

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Pictures:
        """The images of these numbers [N], each in 0..len-1. Raises UsageError where none is left that decodes, and, if
        strict, where one does not."""
        ...


class Held:
    """A source in memory: images uint8 [N, C, H, W], resized to what the network takes, and labels int64 [N]."""

    in_memory = True

    def __init__(self, name: str, images: Tensor, labels: Tensor, classes: tuple[str, ...], image_size: int) -> None:
        if images.shape[-1] != image_size:
            resized = [
                F.interpolate(
                    some.float(), size=(image_size,) * 2, mode="bilinear", antialias=True, align_corners=False
                )
                .round_()
                .clamp_(0, 255)
                .byte()
                for some in images.split(1024)
            ]
            images = torch.cat(resized)
        self.name, self.classes, self.damaged = name, classes, dict[str, str]()
        self.images, self.labels = images.contiguous(), labels

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> Pictures:
        return Pictures(self.images.numpy()[indices], self.labels.numpy()[indices], [])


class Decoded:
    """A source of which each image is decoded when it is asked for.

    In the place of an image that does not decode comes the next one that does, by number, after the last the first;
    where MOST_DAMAGED in a row do not, that is an error.
    """

    in_memory = False

    def __init__(
        self, name: str, classes: tuple[str, ...] | None, channels: int, image_size: int, strict: bool
    ) -> None:
        self.name, self.classes, self.strict, self.damaged = name, classes, strict, dict[str, str]()
        self.channels, self.image_size = channels, image_size
        self._bad: dict[int, str] = {}  # met in this process

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, i: int) -> np.ndarray:
        """Image i, uint8 [C, S, S]; raises anything where it is damaged."""
        raise NotImplementedError

    def label(self, i: int) -> int:
        raise NotImplementedError

    def place(self, i: int) -> str:
        """How a person finds image i."""
        raise NotImplementedError

    def take(self, indices: np.ndarray) -> Pictures:
        """The images of these numbers; see `Source`."""
        images = np.empty((len(indices), self.channels, self.image_size, self.image_size), np.uint8)
        labels, damaged = np.zeros(len(indices), np.int64), dict[str, str]()
        for row, i in enumerate(indices.tolist()):
            for _ in range(min(len(self), MOST_DAMAGED)):
                if self._read(i, images[row]):
                    break
                place, why = self.place(i), self._bad[i]
                damaged[place] = why
                if self.strict:
                    raise UsageError(f"data: {place} is damaged ({why}); mend or remove it, or leave out --strict")
                i = (i + 1) % len(self)
            else:
                many = "none" if len(self) <= MOST_DAMAGED else f"none of {MOST_DAMAGED:,} in a row"
                raise UsageError(
                    f"data: of the {len(self):,} images of {self.name} {many} can be read ({place}: {why})"
                )
            labels[row] = self.label(i)
        return Pictures(images, labels, list(damaged.items()))

    def _read(self, i: int, out: np.ndarray) -> bool:
        if i not in self._bad:
            try:
                out[:] = self.read(i)
            except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over
                self._bad[i] = reason(error)
        return i not in self._bad


def reason(error: Exception) -> str:
    """Why an image was not read, in a line without what differs from one time to the next."""
    if isinstance(error, UnidentifiedImageError):
        return "empty, or no picture that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class _Indexed(Decoded):
    """What folders and shards share: an index, and of it the entries of one split."""

    def __init__(
        self, name: str, index: Index, classes: tuple[str, ...] | None, split: str, holdout: float, *kind: Any
    ) -> None:
        super().__init__(name, classes, *kind)
        self.index, self.chosen = index, chosen(index, split, holdout)
        if not len(self):
            raise UsageError(
                f"holdout: {holdout:g} leaves none of the {len(index)} images of {name} to the {split} split; try 0.1"
            )

    def __len__(self) -> int:
        return len(self.index) if self.chosen is None else len(self.chosen)

    def entry(self, i: int) -> int:
        return i if self.chosen is None else int(self.chosen[i])


def chosen(index: Index, split: str, holdout: float) -> np.ndarray | None:
    """The entries of a split, int64 [N]; None for all. Each is held out, or not, by a hash of its name alone, so that
    what comes and goes moves no other."""
    if not 0 <= holdout < 1:
        raise UsageError(f"holdout: must be a share from 0 to below 1, not {holdout}")
    if split == "train" and holdout == 0:
        return None
    held_out = index.columns["hash"] < np.uint64(holdout * 2**32)
    return np.flatnonzero(held_out if split == "test" else ~held_out)


class Folder(_Indexed):
    """The images below a folder; the classes are the folders directly in it, where every image lies in one."""

    def __init__(self, root: Path, split: str, holdout: float, *kind: Any) -> None:
        self.root, index = root.resolve(), index_folder(root)
        classes, self.class_of = classes_of(index)
        super().__init__(str(root), index, classes, split, holdout, *kind)

    def place(self, i: int) -> str:
        i = self.entry(i)
        return os.path.join(self.root, self.index.groups[self.index.group(i)], self.index.name(i))

    def label(self, i: int) -> int:
        return int(self.class_of[self.index.group(self.entry(i))])

    def read(self, i: int) -> np.ndarray:
        return decode(self.place(i), self.channels, self.image_size)


class Shards(_Indexed):
    """The images in tar shards, each read from its place in the file; the classes are the labels' numbers."""

    def __init__(self, pattern: str, split: str, holdout: float, *kind: Any) -> None:
        index = index_shards(pattern)
        self.labels = index.columns["label"]
        most = int(self.labels.max())
        classes = None if most == NO_LABEL else tuple(str(i) for i in range(most + 1))
        super().__init__(pattern, index, classes, split, holdout, *kind)

    def place(self, i: int) -> str:
        i = self.entry(i)
        return f"{self.index.groups[self.index.group(i)]}: {self.index.name(i)}"

    def label(self, i: int) -> int:
        return max(0, int(self.labels[self.entry(i)]))

    def read(self, i: int) -> np.ndarray:
        i = self.entry(i)
        file, size = self.index.groups[self.index.group(i)], int(self.index.columns["size"][i])
        with open(file, "rb", buffering=0) as f:
            f.seek(int(self.index.columns["offset"][i]))
            return decode(io.BytesIO(f.read(size)), self.channels, self.image_size)
