"""The index of a folder of images: every image below it, without opening one.

A folder that was read before is read again only where the time of a directory changed; a million files take seconds
the first time and then milliseconds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from fastgen.errors import UsageError
from fastgen.training import index_cache
from fastgen.training.decoding import SUFFIXES
from fastgen.training.index_cache import Index, Part


def index_folder(root: Path) -> Index:
    """The images below ``root``: groups are the directories relative to it ("" is itself), names the files in them.

    By suffix; what begins with a dot is left out. Directories in order, each before those in it, names in the order of
    their bytes. Links to directories are followed; a directory that is reached twice counts where it is met first.
    Raises UsageError where there are no images, or a directory cannot be read.
    """
    root = root.resolve()
    old = index_cache.load("folder", str(root))
    index = _Walk(root, old).index()
    if not len(index):
        raise UsageError(f"data: {root} holds no images: no files ending in {', '.join(f'.{s}' for s in SUFFIXES)}")
    if index is not old:
        index_cache.store("folder", str(root), index)
    return index


KNOWN = frozenset(f".{s}" for s in SUFFIXES)


class _Walk:
    """One walk over all directories, which takes from ``old`` what did not change."""

    def __init__(self, root: Path, old: Index | None) -> None:
        self.root, self.old = str(root), old
        self.known = {} if old is None else {name: g for g, name in enumerate(old.groups)}
        self.below: dict[str, list[str]] = {}
        for name in self.known:
            if name:
                self.below.setdefault(name.rpartition("/")[0], []).append(name)
        self.groups: list[str] = []
        self.stamps: list[list[int]] = []
        self.parts: list[Part | int] = []  # a number: that group of the old index
        self.seen: set[tuple[int, int]] = set()

    def index(self) -> Index:
        left = [""]
        while left:
            left += reversed(self._visit(left.pop()))
        if self.old is not None and self.parts == list(range(len(self.old.groups))):
            return self.old
        parts = (self.old.part(p) if isinstance(p, int) else p for p in self.parts)
        return index_cache.join(self.groups, self.stamps, parts)

    def _visit(self, name: str) -> list[str]:
        """Notes the images of one directory; returns the directories in it, in order."""
        now = time.time_ns()
        try:
            status = os.stat(f"{self.root}/{name}")
            stamp, g = index_cache.stamp(status, now), self.known.get(name)
            if (status.st_dev, status.st_ino) in self.seen:
                part, below, stamp = index_cache.entries([]), [], index_cache.NEVER
            elif g is not None and self.old.stamps[g] == stamp != index_cache.NEVER:
                part, below = g, self.below.get(name, [])
            else:
                part, below = self._read(name)
        except FileNotFoundError:  # gone since its parent was read
            return []
        except OSError as error:
            raise UsageError(
                f"data: {self.root}/{name} cannot be read ({error.strerror}); make it readable, or move it away"
            ) from None
        self.seen.add((status.st_dev, status.st_ino))
        self.groups.append(name)
        self.stamps.append(stamp)
        self.parts.append(part)
        return below

    def _read(self, name: str) -> tuple[Part, list[str]]:
        prefix = f"{name}/" if name else ""
        images, below = [], []
        with os.scandir(f"{self.root}/{name}") as found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    below.append(entry.name)
                elif entry.name[entry.name.rfind(".") :].lower() in KNOWN and (entry.is_file() or entry.is_symlink()):
                    images.append(os.fsencode(entry.name))  # a link that leads nowhere is a damaged image
        part = index_cache.entries(sorted(images), os.fsencode(prefix))
        return part, [prefix + n for n in sorted(below, key=os.fsencode)]


def classes_of(index: Index) -> tuple[tuple[str, ...] | None, np.ndarray]:
    """The classes, which are the folders directly below the root, by name, and int64 [G]: the class of each directory.
    None, and zeros, where an image lies in none of them."""
    holding = np.diff(index.starts) > 0
    first = [name.partition("/")[0] for name in index.groups]
    classes = sorted({name for name, some in zip(first, holding, strict=True) if some})
    if "" in classes:
        return None, np.zeros(len(first), np.int64)
    number = {name: i for i, name in enumerate(classes)}
    return tuple(classes), np.array([number.get(name, 0) for name in first], np.int64)
