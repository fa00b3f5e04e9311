"""`fastgen.tune`: measures every backend and configuration on this GPU, for the shapes at hand; keeps the fastest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastgen import backends, ops, testing, tuned
from fastgen.errors import UsageError
from fastgen.ops import registration, vendor
from fastgen.tolerance import max_error

WORTH = 0.97  # another configuration must take at most this share of the time: less is noise
DTYPES = (torch.bfloat16, torch.float32)  # of the shapes that are tuned if nobody gives any
FAR = {torch.float32: 1e-3, torch.float64: 1e-9}  # from the reference, relative; half precision: 3e-2
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Measured:
    """One distinct call of an op: milliseconds by backend (forward, and backward where the call had gradients), the
    backend taken from now on, and for each one that is not in the running the reason."""

    op: str
    shapes: str
    milliseconds: dict[str, float]
    backend: str
    out_of_the_running: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in self.milliseconds.items())
        reasons = "".join(f"; {name}: {why}" for name, why in self.out_of_the_running.items())
        return f"{self.op} {self.shapes}: {self.backend} ({times} ms{reasons})"


@dataclass(frozen=True)
class Tuning:
    """What `tune` found. calls: one each; configurations: how many kernels take another one than they came with;
    file: where it is kept for later processes."""

    calls: list[Measured]
    configurations: int
    file: Path

    def __str__(self) -> str:
        lines = [
            *map(str, self.calls),
            f"{self.configurations} kernels have another configuration; kept in {self.file}",
        ]
        return "\n".join(lines)


def tune(
    workload: Callable[[], Any] | None = None,
    *,
    ops: Sequence[str] | None = None,
    device: torch.device | str = "cuda",
    progress: bool | None = None,
    timer: Timer | None = None,
) -> Tuning:
    """Finds, for each op that ``workload()`` calls, the fastest backend and configuration on this GPU, and keeps them.

    workload: your own code, such as ``lambda: model(x, t)``, with a backward pass in it if that matters; it
    runs once. Without it the shapes of the benchmarks are taken, in bf16 and fp32. ops: only these. Other shapes than
    those measured keep the defaults. timer: call -> milliseconds; by default Triton's do_bench, the median.
    Backends whose result is far from the reference's, or that fail, are left out, with the reason. Nothing
    is tuned unless this is called; results are kept on disk (see `fastgen.tuned`) and used by every later process.
    Raises UsageError where there is no GPU, or where an op has no such name.
    """
    device = torch.device(device)
    backends.check_device(device)
    if timer is None:
        if device.type != "cuda":
            raise UsageError(f"device: only GPUs are tuned, not {device}")
        timer = _do_bench
    unknown = sorted(set(ops or ()) - set(backends.STEMS))
    if unknown:
        raise UsageError(f"ops: unknown {', '.join(unknown)}; choose from {', '.join(backends.STEMS)}")
    wanted = set(ops or backends.STEMS)
    calls = list(_calls(workload or (lambda: _benchmarks(wanted, device)), wanted))
    if not calls:
        raise UsageError("workload: it calls no op of fastgen that can be tuned")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    # What was found before is kept; what is measured again replaces it.
    old = tuned.load(name)
    found = tuned.Tuned(dict(old.backends), dict(old.configurations))
    quiet = None if progress is None else not progress
    rows = [_tune(c, found, timer) for c in tqdm(calls, "tuning", unit="call", disable=quiet, file=sys.stderr)]
    file = tuned.save(found, name)
    backends.use_configurations.cache_clear()
    backends.use_configurations()
    return Tuning(rows, len(found.configurations), file)


@dataclass(frozen=True)
class _Call:
    """A call of a dispatcher op as it was seen. like: what `backends.resolve` was told about it."""

    op: registration.FusedOp
    args: tuple[Any, ...]
    like: tuple[Any, ...]
    name: str

    def run(self, backend: str) -> list[Tensor]:
        """The first output, then all gradients there are. Other outputs may be what a backend keeps for itself."""
        named = {a.name: i for i, a in enumerate(self.op.op._schema.arguments)}
        args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in self.args]
        args[named["backend"]] = backend
        if backend == "reference" and self.name == "conv2d":
            out = vendor.convolution(*args[: named["shift"] + 1])  # what auto takes on a GPU in the reference's place
        else:
            out = self.op(*args)
        outputs = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if o is not None]
        leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        roots = [o for o in outputs if o.requires_grad]
        if roots:
            found = torch.autograd.grad(roots, leaves, [torch.ones_like(o) for o in roots], allow_unused=True)
            return [outputs[0].detach(), *(g for g in found if g is not None)]
        return outputs[:1]


def _calls(workload: Callable[[], Any], wanted: set[str]) -> Iterator[_Call]:
    """The distinct calls of ops in a workload."""
    seen: dict[Any, tuple[registration.FusedOp, tuple]] = {}
    asked: dict[Any, tuple[str, tuple]] = {}

    def describe(a: Any) -> Any:
        return (a.shape, a.dtype, a.stride(), a.requires_grad) if isinstance(a, Tensor) else str(a)

    current: list[Any] = []

    def note_call(op: registration.FusedOp, args: tuple) -> None:
        current.clear()
        if op.name in wanted:  # not the backward of one
            current.append((op.name, tuple(map(describe, args))))
            seen.setdefault(current[0], (op, args))

    def note_like(op: str, like: tuple) -> None:
        if current and backends.STEMS[op] == backends.STEMS[current[0][0]]:
            asked.setdefault(current[0], (op, like))

    with registration.recording(note_call), backends.recording(note_like):
        workload()
    for key, (name, like) in asked.items():
        yield _Call(*seen[key], like, name)


def _tune(call: _Call, found: tuned.Tuned, timer: Timer) -> Measured:
    """Measures one call by every backend and puts what is best into ``found``."""
    x = call.like[0]
    reference = call.run("reference")
    times, reasons = {"reference": timer(lambda: call.run("reference"))}, {}
    for backend in backends.BACKENDS[1:]:
        if backends.why_not(call.name, backend, x.device.type) is not None:
            continue
        try:
            far = _far(call.run(backend), reference)
            if far:
                reasons[backend] = far
            elif backend == "triton":
                times[backend] = _configure(call, found, timer)
            else:
                times[backend] = timer(lambda b=backend: call.run(b))
        except Exception as error:  # a kernel that does not fit this GPU must not stop the others
            reasons[backend] = " ".join(str(error).split())[:100]
    best = min(times, key=times.__getitem__)
    found.backends[tuned.key(call.name, call.like)] = best
    shapes = f"{x.dtype} {list(x.shape)}".removeprefix("torch.")
    return Measured(call.name, shapes, times, best, reasons)


def _far(results: list[Tensor], reference: list[Tensor]) -> str:
    """Why results are not those of the reference; empty where they are near."""
    for result, right in zip(results, reference, strict=True):
        if right.is_floating_point() and right.numel():
            allowed = FAR.get(right.dtype, 3e-2) * max(1e-3, right.abs().max().item())
            off = max_error(result, right)
            if not off <= allowed:
                return f"differs from the reference by {off:.2g}"
    return ""


def _configure(call: _Call, found: tuned.Tuned, timer: Timer) -> float:
    """Tries every configuration of each kernel that the call launches, one kernel after the other; the best time."""
    from fastgen.kernels import _tuning

    kernels: dict[tuned.Key, Sequence[dict[str, int]]] = {}
    best: dict[tuned.Key, dict[str, int]] = {}

    def choose(key: tuned.Key, options: Sequence[dict[str, int]]) -> dict[str, int]:
        kernels.setdefault(key, options)
        return best.get(key, options[0])

    _tuning.choosers.append(choose)
    try:
        fastest = timer(lambda: call.run("triton"))
        for key, options in list(kernels.items()):
            for option in options[1:]:
                before = best.get(key, options[0])
                best[key] = option
                try:
                    ms = timer(lambda: call.run("triton"))
                except Exception:  # more shared memory or registers than this GPU has, as Triton's own kinds of error
                    ms = float("inf")
                if ms < WORTH * fastest:
                    fastest = ms
                else:
                    best[key] = before
    finally:
        _tuning.choosers.remove(choose)
    for key in kernels:
        found.configurations.pop(key, None)
    found.configurations |= {key: config for key, config in best.items() if config != kernels[key][0]}
    return fastest


def _benchmarks(wanted: set[str], device: torch.device) -> None:
    """Calls every op on the shapes of its benchmarks."""
    for op in wanted & set(testing.CASES):
        for case in testing.cases(op, bench=True, device=device.type):
            for dtype in DTYPES:
                inputs = case.inputs(dtype, str(device), True, 0)
                getattr(ops, op)(**inputs)


def _do_bench(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=30, return_mode="median")
