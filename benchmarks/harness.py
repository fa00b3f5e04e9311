"""How things are measured: parity first, then every column in turn, A B C A B C, on the same inputs in one run.

A row is one call (op, shape, dtype, forward or forward + backward); a column is one way to compute
it. A column whose result breaks the tolerance rule against the fp64 reference gets no speed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import Cell, Row
from fastgen.tolerance import frobenius_error, max_error, tolerance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARMUP, SLOW = 3, 0.3  # calls, left out where they take more seconds than that
ROUNDS = (5, 300)  # of all columns, at least and at most
SANE = 0.05  # eager's error is the yardstick, so it may not be absurd itself: relative to max|ref|


@dataclass(frozen=True)
class Work:
    """The least that a call must do: bytes read and written in memory, floating-point operations."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# Time


class CpuTimer:
    """Seconds of ``n`` calls by a clock; a sample should last at least ``min_sample`` seconds."""

    min_sample = 5e-3

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, call: Callable[[], Any], n: int) -> float:
        start = self.clock()
        for _ in range(n):
            call()
        return self.clock() - start


class CudaTimer:
    """Seconds of ``n`` calls by the GPU's events, with the L2 cache overwritten before each.

    While the GPU overwrites it, the host runs ahead: its own time shows only where it takes longer.
    """

    min_sample = 0.0  # each call is a sample
    flush_bytes = 256 << 20

    def __init__(self) -> None:
        self.flush = torch.empty(self.flush_bytes, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], Any], n: int) -> float:
        events = []
        for _ in range(n):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3


@dataclass
class Column:
    """One way to compute a row.

    call: what is timed. check: what the gate looks at, the same computation on inputs that have a
    known answer, ``truth``; None where there is none.
    """

    name: str
    call: Callable[[], Any]
    check: Callable[[], list[Tensor]] | None = None
    truth: Truth | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    ours: bool = False


def measure(columns: Sequence[Column], timer: Any, seconds: float) -> dict[str, list[float]]:
    """Seconds a call, by column: all columns in turn, round after round, for about ``seconds`` in all."""
    inner, cost = {}, 0.0
    for c in columns:
        with c.context():
            once = timer(c.call, 1)
            if once * WARMUP < SLOW:
                timer(c.call, WARMUP)
                once = timer(c.call, 1)
        once = max(once, 1e-9)
        inner[c.name] = max(1, math.ceil(timer.min_sample / once))
        cost += once * inner[c.name]
    rounds = min(max(int(seconds / max(cost, 1e-9)), ROUNDS[0]), ROUNDS[1])
    samples: dict[str, list[float]] = {c.name: [] for c in columns}
    for _ in range(rounds):
        for c in columns:
            with c.context():
                samples[c.name].append(timer(c.call, inner[c.name]) / inner[c.name])
    return samples


# Parity


@dataclass(frozen=True)
class Truth:
    """fp64 results of a call and, for each, the largest error that passes."""

    values: list[Tensor]
    bounds: list[float]
    distance: Callable[[Tensor, Tensor], float] = max_error


def errors(
    results: Sequence[Tensor], reference: Sequence[Tensor], distance: Callable[[Tensor, Tensor], float] = max_error
) -> list[float]:
    return [distance(a, r) for a, r in zip(results, reference, strict=True)]


def winograd_truth(reference: list[Tensor], eager_errors: Sequence[float], slack: float = 1.0) -> Truth:
    """The rule of Winograd's algorithm, with eager's error, in the Frobenius norm too, as the yardstick."""
    return Truth(reference, [min(slack * max(1e-5, 2 * e), SANE) for e in eager_errors], frobenius_error)


def truth(reference: list[Tensor], eager_errors: Sequence[float], dtype: torch.dtype, slack: float = 1.0) -> Truth:
    """The tolerance rule, with eager PyTorch's error in the same dtype as the yardstick.

    Integers may be one apart: a tie that another rounding broke. ``slack`` widens the rule.
    """
    bounds = []
    for r, error in zip(reference, eager_errors, strict=True):
        scale = r.abs().max().item() if r.numel() else 0.0
        bounds.append(min(slack * tolerance(r, error, dtype), SANE * scale) if r.is_floating_point() else 1.0)
    return Truth(reference, bounds)


def gate(column: Column) -> Cell:
    """A cell without a speed: "ok", "unchecked", "FAIL", or "error" with the reason."""
    try:
        with column.context():
            if column.check is None or column.truth is None:
                column.call()
                return Cell("unchecked")
            results = column.check()
        if len(results) != len(column.truth.values):
            return Cell(f"error: {len(results)} results, not {len(column.truth.values)}")
        pairs = list(zip(errors(results, column.truth.values, column.truth.distance), column.truth.bounds))
        error, bound = max(pairs, key=lambda p: p[0] / p[1] if p[1] else p[0])
        passed = all(e <= b for e, b in pairs)
        return Cell("ok" if passed else "FAIL", error=error if math.isfinite(error) else None, bound=bound)
    except Exception as exception:  # one column must not take the others with it
        text = " ".join(str(exception).split())[:200]
        return Cell(f"error: {type(exception).__name__}: {text}")


def run_row(row: Row, columns: Sequence[Column], timer: Any, seconds: float) -> Row:
    """Fills ``row.columns``: the gate for every column, then times for those that passed."""
    row.columns |= {c.name: gate(c) for c in columns}
    row.ours = [c.name for c in columns if c.ours]
    passed = [c for c in columns if row.columns[c.name].status in ("ok", "unchecked")]
    for name, samples in measure(passed, timer, seconds).items():
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        cell = row.columns[name]
        cell.ms, cell.p10_ms, cell.p90_ms = (1e3 * s for s in (statistics.median(samples), tenths[0], tenths[-1]))
        cell.samples = len(samples)
    return row


# The limit


@dataclass
class Bench:
    """A run: where, for how long, and what the machine can do, measured in this run."""

    device: str
    seconds: float  # a row
    dtypes: Sequence[str] = ("fp32",)
    compile: bool = True
    deadline: float = math.inf  # on time.monotonic(); past it, torch.compile is left out
    timer: Any = None
    copy: dict[int, float] = field(default_factory=dict)  # bytes moved -> bytes/s
    gemm: dict[str, float] = field(default_factory=dict)  # dtype -> FLOP/s

    def __post_init__(self) -> None:
        self.timer = self.timer or (CudaTimer() if self.device == "cuda" else CpuTimer())

    def _best(self, call: Callable[[], Any]) -> float:
        with torch.no_grad():
            return min(measure([Column("", call)], self.timer, 0.3)[""])

    def bandwidth(self, moved: int) -> float:
        """Bytes/s, read plus written, of a copy. On a CPU caches count: a copy that moves as many bytes as the row."""
        size = 2 << 30 if self.device == "cuda" else 1 << max(12, min(29, (moved - 1).bit_length()))
        if size not in self.copy:
            source = torch.ones(size // 2, dtype=torch.int8, device=self.device)
            self.copy[size] = size / self._best(partial(torch.empty_like(source).copy_, source))
        return self.copy[size]

    def flop_rate(self, dtype: str) -> float:
        """FLOP/s of a large matrix product."""
        if dtype not in self.gemm:
            n = 8192 if self.device == "cuda" else 2048
            a = torch.randn(n, n, device=self.device).to(DTYPES[dtype])
            self.gemm[dtype] = 2 * n**3 / self._best(partial(torch.mm, a, a))
        return self.gemm[dtype]

    def limit_ms(self, work: Work, dtype: str) -> float:
        memory = work.bytes / self.bandwidth(work.bytes) if work.bytes else 0.0
        return 1e3 * max(memory, work.flops / self.flop_rate(dtype) if work.flops else 0.0)

    def limits(self) -> dict[str, dict[str, float]]:
        """What was measured of the machine so far, for the record."""
        copies = {f"{size / 1e6:.3g} MB": rate / 1e9 for size, rate in sorted(self.copy.items())}
        return {"copy, GB/s": copies, "GEMM, GFLOP/s": {name: rate / 1e9 for name, rate in self.gemm.items()}}

    def compile_modes(self, row: Row) -> dict[str, dict[str, Any]]:
        """The torch.compile columns of a row, name -> options; where only time is lacking, the row says so.

        Contiguous inputs, which suit it best. The autotuned mode takes long: forward in the first dtype only.
        """
        modes: dict[str, dict[str, Any]] = {"compile": {}} if self.compile else {}
        if self.compile and self.device == "cuda" and row.direction == "forward" and row.dtype == self.dtypes[0]:
            modes["compile max"] = {"mode": "max-autotune-no-cudagraphs"}
        if time.monotonic() > self.deadline:
            row.columns |= {name: Cell("skipped: time budget") for name in modes}
            return {}
        return modes
