"""`explain`: place by place what `accelerate` finds in a model, and what it is worth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fastgen.acceleration.checks import check_model
from fastgen.acceleration.observing import arguments, as_written, gradients, observe, undisturbed
from fastgen.acceleration.rewriting import Place

SECONDS = 0.06  # that each place is timed for, before and after


@dataclass(frozen=True)
class Row:
    """One place of a model.

    name: the module around which it is built; found: what stands there; replaced_by: the operation of `fastgen.ops`,
    None where it stays; why_not: the reason, where it stays. Times in ms and bytes read and written, before and after,
    None where they were not measured; share: of the time of the whole call as written, in 0 … 1.
    """

    name: str
    found: str
    replaced_by: str | None
    why_not: str | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class Explanation:
    """rows: the places in the order of the call; ms: of the whole call as written; backward: whether times include it;
    failures: graphs that run as they were written, and why."""

    rows: list[Row]
    ms: float
    backward: bool
    failures: list[str]

    def __str__(self) -> str:
        header = ("place", "found", "replaced by", "ms before", "after", "MB before", "after", "share")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
                 for line in table]  # fmt: skip
        lines.insert(1, "  ".join("-" * w for w in widths))
        saved = sum(r.ms_before - r.ms_after for r in self.rows if r.ms_after is not None)
        done = sum(r.replaced_by is not None for r in self.rows)
        what = "forward and backward" if self.backward else "forward"
        lines.append(f"{done} of {len(self.rows)} places replaced; the call as written takes {self.ms:.1f} ms "
                     f"({what}), the places together {saved:.1f} ms less")  # fmt: skip
        return "\n".join([*lines, *(f"a graph runs as it was written: {f}" for f in self.failures)])


def _cells(row: Row) -> tuple[str, ...]:
    def number(x: float | None, form: str, unit: float = 1.0) -> str:
        return "" if x is None else format(x / unit, form)

    return (
        row.name or "(the model)", row.found, row.replaced_by or f"no: {row.why_not}", number(row.ms_before, ".2f"),
        number(row.ms_after, ".2f"), number(row.bytes_before, ".1f", 1e6), number(row.bytes_after, ".1f", 1e6),
        number(row.share, ".1%"),
    )  # fmt: skip


def explain(model: nn.Module, batch: Any, *, backward: bool | None = None) -> Explanation:
    """Calls ``model`` with ``batch`` and tells, place by place, what `accelerate` finds, what replaces it or why
    nothing does, time and bytes before and after, and the share of the whole. ``print`` it, or read its ``rows``.

    batch: the arguments of one call: a tuple, a dict of keywords or the only one. backward: whether times include the
    backward pass; by default where the model is in training mode. Whether the model is accelerated plays no part, and
    it is left as it was, buffers, gradients and random numbers too. Bytes are those of the tensors that functions
    read and write. Raises UsageError as `accelerate` does.
    """
    check_model(model)
    args, kwargs = arguments(batch)
    backward = model.training if backward is None else backward
    with undisturbed(model), as_written(model), torch.set_grad_enabled(backward):
        observed = observe(model, args, kwargs)
        wanted = [p for p in model.parameters() if p.requires_grad] if backward else []
        whole = _median_ms([lambda: model(*args, **kwargs)], 10 * SECONDS, wanted)[0]
        rows = [_row(place, given, whole, backward) for place, given in observed.places]
    rows += [Row(name, found, None, why) for name, found, why in observed.left]
    return Explanation(rows, whole, backward, observed.failures)


def _row(place: Place, given: list[Any] | None, whole: float, backward: bool) -> Row:
    if given is None:
        return Row(place.name, place.kind, place.op)
    calls = [lambda: place.before(*given), lambda: place.after(*given)]
    wanted = [t for t in given if isinstance(t, Tensor) and t.requires_grad] if backward else []
    before, after = _median_ms(calls, SECONDS, wanted)
    counter = _Bytes(place.before)
    with torch.no_grad():
        result = counter.run(*given)
    moved = sum(t.nbytes for t in (*given, result) if isinstance(t, Tensor))
    return Row(place.name, place.kind, place.op, None, before, after, counter.bytes, moved, before / whole)


class _Bytes(Interpreter):
    """Adds up what the functions of a graph read and write; views move nothing."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.bytes = 0

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.op in ("call_function", "call_method") and isinstance(result, Tensor):
            given = [x for x in self.map_nodes_to_values(list(node.all_input_nodes), node) if isinstance(x, Tensor)]
            memory = result.untyped_storage().data_ptr()
            view = any(x.untyped_storage().data_ptr() == memory for x in given) and not _writes(node)
            self.bytes += 0 if view else result.nbytes + sum(x.nbytes for x in given)
        return result


def _writes(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or bool(node.kwargs.get("inplace"))


def _median_ms(calls: list[Callable[[], Any]], seconds: float, wanted: list[Tensor]) -> list[float]:
    """The median time of each of ``calls``, run in turns, with the gradients of ``wanted``."""

    def once(call: Callable[[], Any]) -> float:
        start = _now()
        result = call()
        if wanted:
            gradients(result, wanted)
        return 1e3 * (_now() - start)

    for call in calls:
        once(call)
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while len(taken[0]) < 3 or time.perf_counter() < end:
        for times, call in zip(taken, calls, strict=True):
            times.append(once(call))
    return [statistics.median(times) for times in taken]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
