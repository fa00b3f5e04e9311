"""Transformed weights of convolutions, kept from call to call and made again when the weights have changed.

Nothing in PyTorch tells reliably that a parameter changed (`_version` misses fused optimizers, edits of ``.data``
and averaged models), so an entry holds a checksum of all values, taken again at every use: it costs one pass over the
weights, a quarter of the bytes that the transformed ones have. Calls that record gradients do not come here.
Inside `unchanging`, whose caller promises that parameters stay as they are, each is checked once.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DEFAULT_LIMIT_MB = 1024
_trusted: contextvars.ContextVar[dict | None] = contextvars.ContextVar("fastgen_unchanging", default=None)


def limit_bytes() -> int:
    """FASTGEN_WEIGHT_CACHE, in MB: how much may be kept; 0 switches it off. Raises ValueError for what is no number."""
    text = os.environ.get("FASTGEN_WEIGHT_CACHE", "")
    if not text:
        return DEFAULT_LIMIT_MB << 20
    if not text.isdigit():
        raise ValueError(f"FASTGEN_WEIGHT_CACHE must be a number of MB, 0 for no cache, not {text!r}")
    return int(text) << 20


class WeightCache:
    """(where a weight lies, what is made of it) -> (checksum, what was made), the least recently used dropped first."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple, tuple[int, Tensor]] = OrderedDict()
        self.bytes = self.hits = self.misses = 0
        self.lock = threading.Lock()

    def clear(self) -> None:
        """Forgets everything."""
        with self.lock:
            self.entries.clear()
            self.bytes = self.hits = self.misses = 0

    def get(self, weight: Tensor, kind: tuple, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, or what it gave when weight had the values that it has now. ``kind`` names what is made."""
        limit = limit_bytes()
        if limit == 0 or not _dense(weight):
            return make()
        trusted = _trusted.get()
        if trusted is not None and type(weight) is torch.nn.Parameter:
            # The parameter itself is held, so that nothing else can take its place in memory.
            found = trusted.get((id(weight), weight._version, *kind))
            if found is not None:
                return found[1]
        made = self._checked(weight, kind, make, limit)
        if trusted is not None and type(weight) is torch.nn.Parameter:
            trusted[(id(weight), weight._version, *kind)] = (weight, made)
        return made

    def _checked(self, weight: Tensor, kind: tuple, make: Callable[[], Tensor], limit: int) -> Tensor:
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, *kind)
        checksum = torch.ops.fastgen_cpp.conv2d_checksum(weight)
        with self.lock:
            found = self.entries.get(key)
            if found is not None and found[0] == checksum:
                self.entries.move_to_end(key)
                self.hits += 1
                return found[1]
            self.misses += 1
        made = make()
        size = made.nbytes
        with self.lock:
            self._drop(key)
            if size <= limit:
                self.entries[key] = (checksum, made)
                self.bytes += size
            while self.bytes > limit:
                self._drop(next(iter(self.entries)))
        return made

    def _drop(self, key: tuple) -> None:
        old = self.entries.pop(key, None)
        if old is not None:
            self.bytes -= old[1].nbytes


CACHE = WeightCache()


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def unchanging() -> Iterator[None]:
    """The caller promises that no parameter changes within the block: each is checked at its first use only.

    What was made stays alive until the end of the block, whatever the limit of the cache.
    """
    token = _trusted.set({})
    try:
        yield
    finally:
        _trusted.reset(token)
