"""The index of tar shards, in the layout of WebDataset: where in which shard each image lies, and its label.

Files that follow one another and have one name up to the first dot are one sample: `cat/0017.jpg`, `cat/0017.cls`. The
image is the one file with an image's suffix alone; the label a whole number, in `.cls` as text, or "label" in `.json`.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator

import numpy as np

from fastgen.errors import UsageError
from fastgen.training import index_cache
from fastgen.training.decoding import SUFFIXES
from fastgen.training.index_cache import Index, Part

NO_LABEL = -1


def shard_paths(pattern: str) -> list[str]:
    """The shards that a pattern names, as absolute paths: braces, {a,b} or {000..031}, then *, ? and [] as in a shell,
    sorted. Raises UsageError where one is missing, or compressed."""
    found: list[str] = []
    for name in expand(pattern):
        paths = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        missing = [p for p in paths if not os.path.isfile(p)] if paths else [name]
        if missing:
            raise UsageError(f"data: the shard {missing[0]} does not exist; give a pattern that names shards there are")
        found += paths
    return list(dict.fromkeys(os.path.abspath(p) for p in found))


def expand(pattern: str) -> list[str]:
    """What braces stand for, as in a shell: "{a,b}" and "{08..11}" (zeros in front are kept)."""
    match = re.search(r"\{([^{}]*(?:,[^{}]*)+|\d+\.\.\d+)\}", pattern)
    if not match:
        return [pattern]
    first, dots, last = match[1].partition("..")
    if dots and "," not in match[1]:
        numbers = range(int(first), int(last) + 1)
        choices = [str(n).zfill(len(first) if first.startswith("0") else 0) for n in numbers]
    else:
        choices = match[1].split(",")
    return list(
        dict.fromkeys(p for c in choices for p in expand(pattern[: match.start()] + c + pattern[match.end() :]))
    )


def index_shards(pattern: str) -> Index:
    """The images in shards: groups are their paths, names the keys of samples; columns beside "hash": "offset" and
    "size" in bytes, "label" (NO_LABEL where there is none), all int64. Shards are read again only where they changed.
    Raises UsageError where a shard is missing, damaged or without images, or only some of the samples have labels."""
    paths = shard_paths(pattern)
    key = "\n".join(paths)
    old = index_cache.load("shards", key)
    stamps = [index_cache.stamp(os.stat(p), time.time_ns()) for p in paths]
    if old is not None and old.stamps == stamps and index_cache.NEVER not in stamps:
        return old
    parts = []
    for g, (path, stamp) in enumerate(zip(paths, stamps, strict=True)):
        kept = old is not None and old.stamps[g] == stamp != index_cache.NEVER
        parts.append(old.part(g) if kept else _read(path))
    index = index_cache.join(paths, stamps, parts)
    without = index.columns["label"] == NO_LABEL
    if without.any() and not without.all():
        i = int(np.flatnonzero(without)[0])
        raise UsageError(f"data: {index.groups[index.group(i)]}: {index.name(i)} has no label, others have one")
    index_cache.store("shards", key, index)
    return index


def _read(path: str) -> Part:
    """One shard's samples, from the headers of its files and the labels in them."""
    try:
        with tarfile.open(path, "r:") as tar:
            found = list(_samples(path, tar))
            tar.fileobj.seek(tar.offset)
            whole = tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UsageError(
            f"data: {path} cannot be read as a tar file ({error}); give whole .tar shards, not compressed"
        ) from None
    if not whole:
        raise UsageError(f"data: the shard {path} is cut short; make it or copy it anew")
    if not found:
        raise UsageError(f"data: the shard {path} holds no images: no files ending in .{', .'.join(SUFFIXES)}")
    keys, offsets, sizes, labels = zip(*found, strict=True)
    columns = {"offset": offsets, "size": sizes, "label": labels}
    return index_cache.entries(keys) | {k: np.array(v, np.int64) for k, v in columns.items()}


def _samples(path: str, tar: tarfile.TarFile) -> Iterator[tuple[bytes, int, int, int]]:
    """Key, offset, size and label of each sample that has an image."""
    files = ((*_key(m.name), m) for m in tar if m.isreg())
    for key, group in itertools.groupby(files, key=lambda f: f[0]):
        members = {extension: member for _, extension, member in group}
        image = next((m for extension, m in members.items() if extension in SUFFIXES), None)
        if image is not None:
            yield os.fsencode(key), image.offset_data, image.size, _label(path, tar, members)


def _key(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _label(path: str, tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> int:
    for extension, parse in (("cls", int), ("json", lambda text: json.loads(text).get("label", NO_LABEL))):
        if extension in members:
            try:
                label = parse(tar.extractfile(members[extension]).read())
            except (ValueError, AttributeError):
                label = None
            if type(label) is not int or label < NO_LABEL:
                raise UsageError(f"data: {path}: the label in {members[extension].name} is not a whole number from 0")
            return label
    return NO_LABEL
