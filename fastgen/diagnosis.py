"""`fastgen.doctor()`: what runs here, op by op, and why the rest does not."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from fastgen import backends, tuned
from fastgen.ops import weights
from fastgen.version import __version__


@dataclass(frozen=True)
class Report:
    """The state of this installation. ``str(report)`` is for people, ``report.as_dict()`` for scripts.

    versions: name -> version or why it is missing; libraries: the compiled parts; cache: the transformed weights of
    convolutions that this process keeps: how many, how many MB, and the limit in MB, "off", or what is wrong with it;
    ops: op -> device -> backend -> None if it can run, else the reason; auto: op -> device -> backend.
    """

    versions: dict[str, str]
    hardware: dict[str, str]
    libraries: dict[str, str]
    cache: dict[str, Any]
    ops: dict[str, dict[str, dict[str, str | None]]] = field(repr=False)
    auto: dict[str, dict[str, str]] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("versions", "hardware", "libraries", "cache", "ops", "auto")}

    def __str__(self) -> str:
        lines = []
        for title, values in (
            ("versions", self.versions), ("hardware", self.hardware), ("libraries", self.libraries),
            ("weight cache", self.cache),
        ):  # fmt: skip
            lines += [title, *(f"  {name:<12}{value}" for name, value in values.items())]
        for device in next(iter(self.ops.values())):
            wide = max(map(len, self.ops)) + 2
            header = "".join(f"{name:<16}" for name in ("auto", *backends.BACKENDS))
            lines += [f"ops on {device}", f"  {'':<{wide}}{header}".rstrip()]
            reasons: dict[str, str] = {}
            for op, devices in self.ops.items():
                marks = []
                for reason in devices[device].values():
                    marks.append("yes" if reason is None else reasons.setdefault(reason, f"no ({len(reasons) + 1})"))
                cells = "".join(f"{cell:<16}" for cell in (self.auto[op][device], *marks))
                lines.append(f"  {op:<{wide}}{cells}".rstrip())
            lines += [f"  ({i}) {reason}" for i, reason in enumerate(reasons, 1)]
            if device == "cuda" and any(by_device[device] == "reference" for by_device in self.auto.values()):
                lines.append(
                    "  auto = reference: PyTorch's own operators, in the tensors' dtype, unless tuned otherwise"
                )
        return "\n".join(lines)

    __repr__ = __str__


def doctor() -> Report:
    """Looks at versions, hardware, compiled libraries and, per op and device, at every backend."""
    devices = ["cpu", "cuda"]
    table = {
        op: {d: {b: backends.why_not(op, b, d) for b in backends.BACKENDS} for d in devices} for op in backends.STEMS
    }
    auto = {
        op: {d: "none" if None not in by_device[d].values() else backends.preferred(op, d) for d in devices}
        for op, by_device in table.items()
    }
    return Report(_versions(), _hardware(), _libraries(), _cache(), table, auto)


def _versions() -> dict[str, str]:
    found = {"fastgen": __version__, "python": sys.version.split()[0], "torch": torch.__version__}
    for name in ("triton", "safetensors", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["CUDA"] = torch.version.cuda or "not in this torch"
    return found


def _hardware() -> dict[str, str]:
    found = {"cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads"}
    found["cpu vectors"] = torch.backends.cpu.get_cpu_capability()
    if backends.library_error("cpu") is None:
        forced = " (FASTGEN_CPU_ISA)" if os.environ.get("FASTGEN_CPU_ISA") else ""
        found["kernels use"] = torch.ops.fastgen_cpp.isa() + forced
    count = torch.cuda.device_count()
    found["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none visible to PyTorch"
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _libraries() -> dict[str, str]:
    found = {}
    for kind in ("cpu", "cuda"):
        built = backends.build_info().get(kind, {})
        error = backends.library_error(kind)
        how = ", ".join(f"{k} {v}" for k, v in built.items() if k not in ("built", "reason"))
        if built.get("built"):
            found[kind] = f"built ({how})" + ("" if error is None else f", but not in use: {error}")
        else:
            found[kind] = error or "loaded"
    found["triton"] = "installed" if importlib.util.find_spec("triton") else "not installed: pip install triton"
    found["tuned"] = _tuned()
    return found


def _tuned() -> str:
    if not torch.cuda.is_available():
        return "no: fastgen.tune() is for GPUs"
    device = torch.device("cuda", torch.cuda.current_device())
    calls = len(tuned.here(device).backends)
    file = tuned.path(torch.cuda.get_device_name(device))
    return f"{calls} shapes ({file})" if calls else "no: fastgen.tune() measures this GPU"


def _cache() -> dict[str, Any]:
    try:
        limit = weights.limit_bytes() >> 20 or "off (FASTGEN_WEIGHT_CACHE=0)"
    except ValueError as error:
        limit = str(error)
    return {"entries": len(weights.CACHE.entries), "MB": round(weights.CACHE.bytes / 2**20, 1), "limit": limit}
