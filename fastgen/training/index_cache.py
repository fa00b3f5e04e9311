"""Indices on disk: what a folder or a set of shards holds, kept beside what `fastgen.tune` found (FASTGEN_CACHE).

A file is a line of JSON and arrays that are mapped, with a checksum; it is replaced whole or not at all. One that is
damaged, or another's, counts as none. Where nothing can be written one warning says so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgen import tuned
from fastgen.atomic import atomic_file

FORMAT = 1
RACY = 2_000_000_000  # ns: what changed this little before it was read may change again under the same time
NEVER = [-1]  # the stamp of what is to be read anew
Part = dict[str, np.ndarray]


@dataclass(frozen=True)
class Index:
    """What is found in ``groups`` (directories, shards), group after group: N entries.

    stamps: of each group what changes with it; starts: int64 [G+1], where its entries begin; names: uint8, the bytes of
    all names; ends: int64 [N+1], where they begin, and the last ends; columns: [N] each, "hash" (uint32) among them.
    """

    groups: list[str]
    stamps: list[list[int]]
    starts: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    columns: Part

    def __len__(self) -> int:
        return len(self.ends) - 1

    def group(self, i: int) -> int:
        """The group of entry i."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def name(self, i: int) -> str:
        return os.fsdecode(self.names[self.ends[i] : self.ends[i + 1]].tobytes())

    def part(self, g: int) -> Part:
        """The entries of group g, as `join` takes them."""
        a, b = self.starts[g], self.starts[g + 1]
        columns = {k: v[a:b] for k, v in self.columns.items()}
        return columns | {"names": self.names[self.ends[a] : self.ends[b]], "lengths": np.diff(self.ends[a : b + 1])}


def entries(names: Sequence[bytes], prefix: bytes = b"") -> Part:
    """A part of names alone; "hash": of ``prefix`` and name, by which the hold-out is chosen."""
    start = zlib.crc32(prefix)
    checks = np.fromiter((zlib.crc32(name, start) for name in names), np.uint64, len(names))
    return {
        "names": np.frombuffer(b"".join(names), np.uint8),
        "lengths": np.fromiter(map(len, names), np.int64, len(names)),
        "hash": (mix(checks) >> np.uint64(32)).astype(np.uint32),
    }


def mix(x: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers that looks random (SplitMix64, Steele, Lea & Flood 2014): uint64 [N]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def join(groups: list[str], stamps: list[list[int]], parts: Iterable[Part]) -> Index:
    """One index of all groups, in their order; each part has the same columns."""
    parts = list(parts)
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    names, ends = whole.pop("names"), _starts(whole.pop("lengths"))
    return Index(groups, stamps, _starts([len(p["lengths"]) for p in parts]), names, ends, whole)


def stamp(status: os.stat_result, now: int) -> list[int]:
    """What changes with a file or directory. One whose time is too near to ``now``, in ns, has none like it."""
    if now - status.st_mtime_ns < RACY:
        return NEVER
    return [status.st_mtime_ns, status.st_size, status.st_ino]


def load(kind: str, key: str) -> Index | None:
    """The index that was stored under this key; None where there is none, or a damaged one."""
    try:
        with open(_file(kind, key), "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            blob = np.memmap(f, np.uint8, "r", offset=f.tell())
        if header["format"] != FORMAT or header["key"] != key or header["crc32"] != zlib.crc32(blob):
            return None
        arrays, at = {}, 0
        for name, dtype, size in header["arrays"]:
            arrays[name] = np.asarray(blob[at : at + size]).view(dtype)
            at += size
        starts, names, lengths = (arrays.pop(k) for k in ("starts", "names", "lengths"))
        return Index(header["groups"], header["stamps"], starts, names, _starts(lengths), arrays)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return None


def store(kind: str, key: str, index: Index) -> None:
    """Keeps the index for the next `load`; where that fails, warns once a process and folder."""
    file = _file(kind, key)
    lengths = np.diff(index.ends).astype(np.uint32)
    arrays = {"starts": index.starts, "lengths": lengths, **index.columns, "names": index.names}
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))  # so that each is aligned
    header = {
        "format": FORMAT,
        "key": key,
        "crc32": functools.reduce(lambda crc, a: zlib.crc32(np.ascontiguousarray(a), crc), arrays.values(), 0),
        "groups": index.groups,
        "stamps": index.stamps,
        "arrays": [[k, a.dtype.str, a.nbytes] for k, a in arrays.items()],
    }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file, sync=False) as temporary, open(temporary, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                f.write(np.ascontiguousarray(array))
    except OSError as error:
        _warn(file.parent, str(error))


def _file(kind: str, key: str) -> Path:
    return tuned.folder() / f"{kind}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.index"


@functools.cache
def _warn(folder: Path, why: str) -> None:
    warnings.warn(
        f"fastgen: the index of the data cannot be kept in {folder} ({why}), and is made anew each time; "
        "set FASTGEN_CACHE to a folder that can be written",
        stacklevel=2,
    )


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where things of these lengths begin, one after another, and the last ends: int64 [N+1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
