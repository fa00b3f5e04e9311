"""CUDA graphs: what a function launches on a GPU, recorded once and replayed with a single launch.

A graph repeats the same kernels on the same memory. So a function that is to be recorded reads and writes tensors
that stay where they are, takes everything that changes from call to call (the row, the seeds) from such tensors, and
never waits for the GPU. A replay costs one launch instead of one for each kernel.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import nn

log = logging.getLogger(__name__)
_one_at_a_time = threading.RLock()  # a second thread's work on the stream that records would be recorded too


class CaptureError(RuntimeError):
    """A function could not be recorded. The message is the reason."""


class Replayable(Protocol):
    """What `Recorder.capture` gives: `torch.cuda.CUDAGraph`, or what stands in for it."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Recorder:
    """Records on one GPU, on a stream of its own, into memory that all its graphs share: none runs beside another, and
    none leaves a result there."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], None]) -> None:
        """Runs ``function`` once on the stream that records, where it compiles kernels and makes workspaces."""
        with _one_at_a_time:
            now, side = torch.cuda.current_stream(self.device), _side_stream(self.device.index)
            side.wait_stream(now)
            with torch.cuda.stream(side):
                function()
            now.wait_stream(side)

    def capture(self, function: Callable[[], None]) -> tuple[Replayable, int]:
        """Records ``function`` without running it; also gives the bytes that the shared memory grew by."""
        graph, side = torch.cuda.CUDAGraph(), _side_stream(self.device.index)
        cached = torch.is_autocast_cache_enabled()
        # The outer `stream` goes back to the caller's where the end of a failed capture raises, which the inner does
        # not. Weights that autocast has converted are freed with its block, so a graph converts them itself.
        with _one_at_a_time, torch.cuda.device(self.device), torch.cuda.stream(side):
            torch.set_autocast_cache_enabled(False)
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved()
                    function()
                return graph, torch.cuda.memory_reserved() - before
            except BaseException:
                # PyTorch before 2.13 goes on believing that it captures, and then refuses to empty its cache.
                with contextlib.suppress(RuntimeError, AttributeError):
                    torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                raise
            finally:
                torch.set_autocast_cache_enabled(cached)

    def wait(self) -> None:
        """Until the GPU has done all it was given. Not while another thread records, which that would break."""
        with _one_at_a_time:
            torch.cuda.synchronize(self.device)


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """One for all, since the vendor's libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(index)


# What records on which type of device.
RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": Recorder}


class Graphs:
    """The graphs of one job on one device, by key. ``bytes``: the GPU memory they hold."""

    def __init__(self, device: torch.device) -> None:
        self.recorder = RECORDERS[device.type](device)
        self.recorded: dict[Hashable, Replayable] = {}
        self.warmed: set[Hashable] = set()
        self.bytes = 0

    def warm(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs ``function`` as it is, after which it may be captured under ``key``."""
        self.recorder.warm(function)
        self.warmed.add(key)

    def capture(self, key: Hashable, function: Callable[[], None]) -> None:
        """Records ``function`` under ``key`` without running it. Raises CaptureError."""
        started = time.perf_counter()
        try:
            self.recorded[key], taken = self.recorder.capture(function)
        except Exception as error:
            while error.__context__ is not None:  # the end of a capture that was broken raises too
                error = error.__context__
            raise CaptureError(" ".join(str(error).split("\n")[0].split()) or type(error).__name__) from error
        self.bytes += taken
        seconds = time.perf_counter() - started
        log.info("recorded the CUDA graph %s in %.2f s; it takes %.1f MB", key, seconds, taken / 2**20)

    def replay(self, key: Hashable) -> None:
        """Runs what was recorded under ``key``."""
        self.recorded[key].replay()

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs ``function``: the first time as it is, from the second on as a graph. Raises CaptureError."""
        if key not in self.recorded:
            if key not in self.warmed:
                self.warm(key, function)
                return
            self.capture(key, function)
        self.replay(key)

    def clear(self) -> None:
        """Frees every graph and its memory."""
        if self.recorded:
            self.recorder.wait()
        for graph in self.recorded.values():
            graph.reset()
        self.recorded.clear()
        self.warmed.clear()
        self.bytes = 0


def footing(network: nn.Module, device: torch.device) -> tuple:
    """What a graph of ``network`` takes for granted: where its parameters and buffers lie, and autocast."""
    tensors = [*network.parameters(), *network.buffers()]
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return autocast, tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)


def hooked(network: nn.Module) -> str | None:
    """The name of the first submodule that calls functions of its user, which a replay would not; None without any."""
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return name or type(network).__name__
    return None
