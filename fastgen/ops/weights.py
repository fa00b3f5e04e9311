"""Transformed weights of convolutions, kept from call to call and made again when the weights have changed.

Nothing in PyTorch tells reliably that a parameter changed (`_version` misses fused optimizers, edits of ``.data``
and averaged models), so an entry holds a checksum of all values, taken again at every use: it costs one pass over the
weights, a quarter of the bytes that the transformed ones have. Calls that record gradients do not come here.
Inside `unchanging`, whose caller promises that parameters stay as they are, each is checked once. An entry goes when
the memory of its weight is freed.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_LIMIT_MB = 1024
_trusted: contextvars.ContextVar[dict | None] = contextvars.ContextVar("fastgen_unchanging", default=None)
_kept: contextvars.ContextVar[bool] = contextvars.ContextVar("fastgen_weights_kept", default=True)


def limit_bytes() -> int:
    """FASTGEN_WEIGHT_CACHE, in MB: how much may be kept; 0 switches it off. Raises ValueError for what is no number."""
    text = os.environ.get("FASTGEN_WEIGHT_CACHE", "")
    if not text:
        return DEFAULT_LIMIT_MB << 20
    if not text.isdecimal():
        raise ValueError(f"FASTGEN_WEIGHT_CACHE must be a whole number of MB, 0 for no cache, not {text!r}")
    return int(text) << 20


class Entry(NamedTuple):
    """The checksum of a weight, what was made of it, and a reference to the weight's memory that drops the entry."""

    checksum: int
    made: Tensor
    memory: weakref.ref


class WeightCache:
    """(where a weight lies, what is made of it) -> Entry, the least recently used dropped first."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple, Entry] = OrderedDict()
        self.bytes = self.hits = self.misses = 0
        self.lock = threading.Lock()
        self.freed: deque[tuple] = deque()  # keys of weights whose memory is gone, to be dropped under the lock

    def clear(self) -> None:
        """Forgets everything."""
        with self.lock:
            self.entries.clear()
            self.bytes = self.hits = self.misses = 0

    def get(self, weight: Tensor, kind: tuple, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, or what it gave when weight had the values that it has now. ``kind`` names what is made."""
        limit = limit_bytes()
        if limit == 0 or not _kept.get() or not _dense(weight):
            return make()
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, *kind)
        trusted, owner = _trusted.get(), weight if weight._base is None else weight._base
        if trusted is None or type(owner) is not torch.nn.Parameter:
            return self._checked(weight, key, make, limit)
        # The parameter itself is held, so that nothing else can take its place in memory. Those that were made in
        # inference mode count no versions.
        version, known = 0 if owner.is_inference() else owner._version, (id(owner), *key)
        found = trusted.get(known)
        if found is None or found[1] != version:
            found = trusted[known] = owner, version, self._checked(weight, key, make, limit)
        return found[2]

    def _checked(self, weight: Tensor, key: tuple, make: Callable[[], Tensor], limit: int) -> Tensor:
        values = checksum(weight)
        with self.lock:
            self._drop_freed()
            found = self.entries.get(key)
            if found is not None and found.checksum == values:
                self.entries.move_to_end(key)
                self.hits += 1
                return found.made
            self.misses += 1
        made = make()
        if made.nbytes > limit or checksum(weight) != values:
            return made  # the latter where another thread has changed the weight meanwhile
        memory = weakref.ref(weight.untyped_storage(), lambda _: self._release(key))
        with self.lock:
            self._drop_freed()
            self._drop(key)
            self.entries[key] = Entry(values, made, memory)
            self.bytes += made.nbytes
            while self.bytes > limit:
                self._drop(next(iter(self.entries)))
        return made

    def _release(self, key: tuple) -> None:
        """Runs wherever memory is freed, so perhaps while this very thread holds the lock: then its next use drops."""
        self.freed.append(key)
        if self.lock.acquire(blocking=False):
            try:
                self._drop_freed()
            finally:
                self.lock.release()

    def _drop_freed(self) -> None:
        while self.freed:
            self._drop(self.freed.popleft())

    def _drop(self, key: tuple) -> None:
        old = self.entries.pop(key, None)
        if old is not None:
            self.bytes -= old.made.nbytes


CACHE = WeightCache()


def checksum(weight: Tensor) -> int:
    """64 bits of all values and their order, of a dense tensor."""
    return torch.ops.fastgen_cpp.conv2d_checksum(weight)


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def unchanging(known: dict | None = None) -> Iterator[None]:
    """The caller promises that no parameter changes within the block: each is checked at its first use only.

    Changes that PyTorch counts (in place, on the parameter itself) or that move it are noticed all the same; those
    through ``.data``, numpy or a fused optimizer are not. What was made stays alive until the end of the block,
    whatever the limit of the cache. A block within a block is part of the outer one. ``known``: what was checked in
    earlier blocks that the promise holds for too.
    """
    if _trusted.get() is not None:
        yield
        return
    token = _trusted.set({} if known is None else known)
    try:
        yield
    finally:
        _trusted.reset(token)


@contextlib.contextmanager
def unkept() -> Iterator[None]:
    """Within the block nothing is kept, and nothing that was kept is used."""
    token = _kept.set(False)
    try:
        yield
    finally:
        _kept.reset(token)
