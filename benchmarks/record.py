"""One format for every result: JSON with all that is needed to read the numbers later, and the same rows as a table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastgen import backends
from fastgen.diagnosis import doctor

FORMAT = 1
ROOT = Path(__file__).parent.parent


@dataclass
class Cell:
    """One column of a row. status: "ok", "unchecked" (nothing to compare with), "FAIL", "skipped: …" or "error: …".

    ms: median of ``samples`` samples, with the 10th and 90th percentile; None where there is no speed.
    error, bound: of the result that came nearest to its bound, max |result - fp64 reference|.
    """

    status: str
    ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    samples: int = 0
    error: float | None = None
    bound: float | None = None


@dataclass
class Row:
    """One call. auto: the backend that "auto" takes. bytes, flops: the least it must move and compute;
    limit_ms: what that takes at the measured copy bandwidth and GEMM rate. images: made by one call, 0 for none."""

    op: str
    case: str
    dtype: str
    device: str
    direction: str = "forward"
    auto: str = ""
    bytes: int = 0
    flops: int = 0
    limit_ms: float | None = None
    images: int = 0
    ours: list[str] = field(default_factory=list)
    columns: dict[str, Cell] = field(default_factory=dict)

    def fastest(self, ours: bool) -> tuple[str, Cell] | None:
        """The fastest column of ours, or of the others."""
        timed = [(n, c) for n, c in self.columns.items() if c.ms is not None and (n in self.ours) == ours]
        return min(timed, key=lambda pair: pair[1].ms, default=None)

    def broken(self) -> list[str]:
        """Columns of ours that are wrong or do not run."""
        return [n for n in self.ours if self.columns[n].status.startswith(("FAIL", "error"))]


@dataclass
class Record:
    """A run of the benchmarks. limits: the bandwidths in GB/s and GEMM rates in GFLOP/s behind ``limit_ms``."""

    what: str
    device: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    limits: dict[str, dict[str, float]] = field(default_factory=dict)
    format: int = FORMAT
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    command: str = field(default_factory=lambda: " ".join(["python -m benchmarks", *sys.argv[1:]]))
    commit: str = field(default_factory=lambda: _shell("git", "rev-parse", "HEAD") or "unknown")
    dirty: bool = field(default_factory=lambda: bool(_shell("git", "status", "--porcelain")))
    hardware: dict[str, Any] = field(default_factory=lambda: hardware())
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def name(self) -> str:
        """Of the hardware that the rows are about."""
        return self.hardware["gpu" if self.device == "cuda" else "cpu"]

    def write(self, folder: Path) -> list[Path]:
        """<date>-<hardware>-<what>.json and .md, anew after each row: a run that is stopped leaves what it has."""
        folder.mkdir(parents=True, exist_ok=True)
        threads = f"-{self.hardware['threads']}t" if self.device == "cpu" else ""
        stem = folder / f"{self.date[:10]}-{slug(self.name)}{threads}-{self.what}"
        texts = {".json": json.dumps(asdict(self), indent=1) + "\n", ".md": self.markdown()}
        for ending, text in texts.items():
            Path(f"{stem}{ending}").write_text(text, encoding="utf-8")
        return [Path(f"{stem}{ending}") for ending in texts]

    def markdown(self) -> str:
        """Where it was run, then all rows: median in ms (10th-90th percentile), and eager's time over it."""
        facts = {**self.hardware, **self.versions, "commit": self.commit + (" + changes" if self.dirty else "")}
        lines = [f"# Benchmarks, {self.date[:10]}", "", f"`{self.command}`, {self.date}", ""]
        lines += [f"- {name}: {value}" for name, value in facts.items()]
        for name, values in self.limits.items():
            lines.append(f"- {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        lines += [
            "",
            "Median in ms (10th-90th percentile), eager's time over it (×). FAIL: a wrong result, so no speed.",
        ]
        if self.device == "cpu":
            lines.append("Times of a CPU depend on what else it runs: read the ratios.")
        names = list(dict.fromkeys(name for row in self.rows for name in row.columns))
        header = ["op", "case", "dtype", "direction", "auto", *names, "limit"]
        lines += ["", table_line(header), table_line(["---"] * len(header))]
        for row in self.rows:
            cells = [_cell(row, row.columns[name]) if name in row.columns else "" for name in names]
            limit = "" if row.limit_ms is None else f"{row.limit_ms:.3g}"
            lines.append(table_line([row.op, row.case, row.dtype, row.direction, row.auto, *cells, limit]))
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """The short table: eager, the best of the others, the best of ours, how many times faster, and the limit."""
        header = "op,case,dtype,dir,eager,best other,,ours,,×eager,×other,limit,reached"
        table = [tuple(header.split(","))]
        for row in self.rows:
            eager, other, ours = row.columns.get("eager"), row.fastest(ours=False), row.fastest(ours=True)
            ms = ours[1].ms if ours else None
            broken = "; ".join(row.columns[n].status for n in row.broken())[:60]
            table.append((
                row.op, row.case, row.dtype, "f+b" if "+" in row.direction else "fwd", _number(eager and eager.ms),
                _number(other and other[1].ms), other[0] if other else "",
                _number(ms) if ms else broken, ours[0] if ours else "",
                _ratio(eager and eager.ms, ms), _ratio(other and other[1].ms, ms), _number(row.limit_ms),
                f"{row.limit_ms / ms:.0%}" if ms and row.limit_ms else "",
            ))  # fmt: skip
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table)


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(row: Row, cell: Cell) -> str:
    if cell.ms is None:
        return cell.status.replace("|", "/")
    eager = row.columns.get("eager")
    text = f"{cell.ms:.3g} ({cell.p10_ms:.3g}-{cell.p90_ms:.3g})"
    if eager is not None and eager is not cell and eager.ms:
        text += f" {_ratio(eager.ms, cell.ms)}×"
    return text + (f", {1e3 * row.images / cell.ms:.4g} images/s" if row.images else "")


def _number(value: float | None) -> str:
    return f"{value:.3g}" if value else ""


def _ratio(other: float | None, ms: float | None) -> str:
    return f"{other / ms:.2f}" if other and ms else ""


def hardware() -> dict[str, Any]:
    """CPU, cores, threads and load; GPU, its memory and driver where there is one."""
    found = doctor().hardware
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out = {"cpu": found["cpu"].split(",")[0], "cores": cores, "threads": torch.get_num_threads()}
    out |= {name: value for name, value in found.items() if name not in ("cpu", "gpu")}
    out["load"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        out["gpu"] = properties.name
        out["gpu memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        out["capability"] = f"{properties.major}.{properties.minor}"
        driver = _shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        out["driver"] = driver[0] if driver else "unknown"
    return out


def versions() -> dict[str, str]:
    """Of Python, the libraries, CUDA and the compilers."""
    found = dict(doctor().versions)
    for kind, built in backends.build_info().items():
        if isinstance(built, dict) and built.get("compiler"):
            found[f"{kind} compiler"] = built["compiler"]
    return found


def _shell(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
