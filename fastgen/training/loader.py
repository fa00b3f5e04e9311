"""The batches of a run: which images are in batch k is a function of the source, the batch size, the seed and k alone.

Epoch e takes the images in the order of hash(seed, e, i), i = 0, 1, …, a permutation; where one epoch ends within a
batch the next goes on. So any batch can be had at once, on any number of workers, with nothing to remember.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastgen.errors import UsageError
from fastgen.training.index_cache import mix
from fastgen.training.sources import Pictures, Source

WORKERS = 2
PREFETCH = 4  # batches a worker is ahead


class Batch(NamedTuple):
    """images: fp32 [N, C, S, S] in [-1, 1]; labels: int64 [N], zeros where there are no classes; on the device."""

    images: Tensor
    labels: Tensor


class Batches:
    """Batch k of a source, for k = 0, 1, …, for ever, always full; what a worker process holds."""

    def __init__(self, source: Source, batch_size: int, seed: int, shuffle: bool) -> None:
        self.source, self.batch_size, self.seed, self.shuffle = source, batch_size, seed, shuffle
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __getitem__(self, k: int) -> Pictures | str:
        """The batch, or why there is none: a worker's exception would come with its traceback."""
        try:
            return self.source.take(self.indices(k))
        except UsageError as error:
            return str(error)

    def indices(self, k: int) -> np.ndarray:
        """The numbers of the images in batch k: int64 [batch_size]."""
        n = len(self.source)
        first, last = k * self.batch_size, (k + 1) * self.batch_size
        parts = []
        while first < last:
            epoch, at = divmod(first, n)
            some = min(n - at, last - first)
            parts.append(self.order(epoch)[at : at + some] if self.shuffle else np.arange(at, at + some))
            first += some
        return np.concatenate(parts)

    def order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = epoch, permutation(len(self.source), self.seed, epoch)
        return self._order[1]


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """0..n-1 in an order of its own for each (seed, epoch), the same in every version of every library: int64 [n]."""
    key = np.array([seed % 2**64, epoch % 2**64], np.uint64)
    start = mix(mix(key[:1]) + key[1:])
    return np.argsort(mix(start + np.arange(n, dtype=np.uint64)))  # mix is one-to-one: no two are equal


class Loader:
    """Batches ``start``, ``start`` + 1, … of a source, for ever; with ``shuffle`` False its images in order.

    workers: processes that decode (None: 0 for what is in memory, else 2, and no more than there are cores). They leave
    signals to the main process, end with it, and start at once, so that the first batch is on its way while a network
    is built. torch's global generator is not touched. An image that does not decode is replaced by the next good one,
    and noted in ``damaged``. Raises UsageError: where the source is strict, at the first damaged image; where all are.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        workers: int | None = None,
        device: torch.device | str = "cpu",
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1 or start < 0 or (workers or 0) < 0:
            raise UsageError(f"batch-size, start, workers: cannot be {batch_size}, {start}, {workers}")
        self.source, self.device = source, torch.device(device)
        batches = Batches(source, batch_size, seed, shuffle)
        if workers is None:
            workers = 0 if source.in_memory else min(WORKERS, cores())
        self._batches: Iterator[Pictures | str] = map(batches.__getitem__, itertools.count(start))
        self._end: Callable[[], None] = lambda: None
        if workers:
            self._batches = _Workers(batches, start, workers)
            # Also when the loader is forgotten, and, before others wait for the workers, when the process ends.
            self._end = Finalize(self, self._batches.end, exitpriority=10)

    @property
    def damaged(self) -> dict[str, str]:
        """Path -> reason, of the damaged images met so far."""
        return self.source.damaged

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        pictures = next(self._batches)
        if isinstance(pictures, str):
            raise UsageError(pictures)
        images, labels, damaged = pictures
        self.source.damaged.update(damaged)
        x, y = (self._on_device(torch.from_numpy(a)) for a in (images, labels))
        return Batch(x.float().div_(127.5).sub_(1), y)

    def _on_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def close(self) -> None:
        """Ends the workers; no batch comes any more."""
        self._batches = iter(())
        self._end()


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Workers:
    """The processes of a DataLoader, and their batches in order."""

    def __init__(self, batches: Batches, start: int, workers: int) -> None:
        before = multiprocessing.active_children()
        with _signals_held_back():
            self.batches: Iterator[Pictures | str] = iter(_data_loader(batches, start, workers))
        self.processes = [p for p in multiprocessing.active_children() if p not in before]
        atexit.register(self.end)  # runs before DataLoader's own, after which it ends no workers

    def __iter__(self) -> _Workers:
        return self

    def __next__(self) -> Pictures | str:
        return next(self.batches)

    def end(self) -> None:
        """Ends them: asks first, which takes milliseconds, and kills one that hangs, in a file system say."""
        atexit.unregister(self.end)
        self.batches = iter(())
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        self.processes = []


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """What a new process inherits, until `_begin_worker`; this process gets them afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _data_loader(batches: Batches, start: int, workers: int) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,  # an item is a batch
        sampler=_Count(start),
        num_workers=workers,
        # NumPy's arrays go through a pipe, not through /dev/shm, which containers make too small for large batches.
        collate_fn=_as_it_is,
        worker_init_fn=_begin_worker,
        prefetch_factor=PREFETCH,
        generator=torch.Generator(),  # for the workers' seeds, which nothing uses
    )


class _Count:
    """start, start + 1, …"""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _as_it_is(pictures: Pictures | str) -> Pictures | str:
    return pictures


def _begin_worker(_: int) -> None:
    """In a worker: the main process alone acts on Ctrl-C and SIGTERM, which a terminal or a scheduler sends to all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed may wait for ever for someone to read what it decoded."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
