"""The table of what was survived.

    python -m benchmarks.reliability
    python -m benchmarks.reliability --full --out benchmarks/results --docs docs/reliability.md

With --out a record is written after each row, with --docs the section of that file that shows it. Exit code 1 where
anything was torn, or a planted defect was not found.
"""

from __future__ import annotations

import argparse
import errno
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Record, _shell, slug, table_line
from benchmarks.reliability import resume
from benchmarks.reliability.checkpoints import DISK_ERRORS, FOUND_BY
from benchmarks.reliability.faults import Counts, Unavailable, batch, several

CHECKPOINTS = "benchmarks.reliability.checkpoints"
KINDS: list[dict[str, Any]] = [{"kind": "run"}, {"kind": "model"}, {"kind": "model", "exchange": False}]
SECTION = re.compile(r"(<!-- reliability -->\n).*?(<!-- /reliability -->)", re.DOTALL)


def order(full: bool) -> Counts:
    return several(f"{CHECKPOINTS}:order_of_operations", KINDS)


def killed_everywhere(full: bool) -> Counts:
    return several(f"{CHECKPOINTS}:kill_at_every_operation", KINDS)


def killed_at_random(full: bool) -> Counts:
    count = 5000 if full else 500
    return several(f"{CHECKPOINTS}:kill_at_random", [{**kind, "count": count} for kind in KINDS[:2]])


def disk_errors(full: bool) -> Counts:
    cases = [{**kind, "error": code} for kind in KINDS for code in (DISK_ERRORS if full else (errno.ENOSPC, errno.EIO))]
    return several(f"{CHECKPOINTS}:fail_at_every_operation", cases if full else cases[:-1])


def lasting_disk_errors(full: bool) -> Counts:
    cases = [{**kind, "error": code} for kind in KINDS for code in (DISK_ERRORS if full else (errno.EROFS,))]
    return several(f"{CHECKPOINTS}:fail_at_every_operation", [{**case, "all_later": True} for case in cases])


def full_disk(full: bool) -> Counts:
    return several(f"{CHECKPOINTS}:real_full_disk", KINDS[:2])


def read_only(full: bool) -> Counts:
    return several(f"{CHECKPOINTS}:real_read_only", KINDS[:2])


def two_at_once(full: bool) -> Counts:
    count = 200 if full else 20
    return several(f"{CHECKPOINTS}:two_at_once", [{"count": count}, {"count": count, "exchange": False}])


def resumed(full: bool) -> Counts:
    """new: ended as the run in one piece did; torn: did not."""
    counts = Counts()
    torch.set_num_threads(1)  # networks this small are faster on one
    for recipe in resume.PRESETS:
        for variant in resume.VARIANTS:
            trials, failures = resume.resume_at_every_step(recipe, variant, steps=25 if full else None)
            counts.trials += trials
            counts.torn += len(failures)
            counts.notes += failures
    counts.inside, counts.new = counts.trials, counts.trials - counts.torn
    return counts


def signalled(full: bool) -> Counts:
    return from_json("signals", "--random", "200" if full else "21")


def from_json(module: str, *arguments: str) -> Counts:
    """The counts that a module of its own process prints. new: trials that ended as promised."""
    command = [sys.executable, "-m", f"benchmarks.reliability.{module}", *arguments]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)
    trials, failures = found["phases"] + found["random"], found["failures"]
    return Counts(
        trials=trials, inside=found["phases"] + found["reached"], new=max(0, trials - len(failures)),
        torn=len(failures), notes=failures[:5],
    )  # fmt: skip


def planted_defects(full: bool) -> Counts:
    """torn: the defects that went unnoticed; inside: those that were found."""
    calls = [(f"{CHECKPOINTS}:{check}", {**case, "defect": name}) for name, (check, case) in FOUND_BY.items()]
    found = dict(zip(FOUND_BY, batch(calls)))
    unnoticed = [f"{name} was not found" for name, counts in found.items() if not counts.torn]
    return Counts(trials=len(found), inside=len(found) - len(unnoticed), torn=len(unnoticed), notes=unnoticed)


CHECKS: list[tuple[str, Callable[[bool], Counts]]] = [
    ("checkpoints: order of writes, syncs and renames", order),
    ("checkpoints: `kill -9` at every operation on files", killed_everywhere),
    ("checkpoints: `kill -9` at random moments", killed_at_random),
    ("checkpoints: an error of the disk at every operation", disk_errors),
    ("checkpoints: an error at every operation and all later ones", lasting_disk_errors),
    ("checkpoints: a disk with too little room", full_disk),
    ("checkpoints: a read-only disk, a folder without permission", read_only),
    ("checkpoints: two processes save at one path", two_at_once),
    ("checkpoints: defects planted to see that these checks find them", planted_defects),
    ("runs: stopped after each step and resumed, to the same bits", resumed),
    ("runs: SIGINT, SIGTERM in each phase; they and SIGKILL at random; resumed, to the same bits", signalled),
]


def line_of(name: str, counts: Counts) -> str:
    if counts.skipped:
        return f"{name}: skipped: {counts.skipped}"
    numbers = ", ".join(f"{getattr(counts, k)} {k}" for k in ("trials", "inside", "old", "new", "torn"))
    return "\n  ".join([f"{name}: {numbers}; {counts.seconds:.0f} s", *counts.notes])


def markdown(record: dict[str, Any]) -> str:
    """The section of docs/reliability.md: where and when, then a line a check."""
    facts = record["hardware"]
    commit = record["commit"][:12] + (" with changes" if record["dirty"] else "")
    lines = [
        f"{record['date'][:10]}, {facts['cpu']}, {facts['cores']} cores, {record['settings']['file system']}, commit "
        f"{commit}: `{record['command']}`",
        "",
        table_line(["check", "trials", "hit while saving", "old found", "new found", "torn"]),
        table_line(["---"] * 6),
    ]
    for row in record["rows"]:
        cells = [row[k] for k in ("trials", "inside", "old", "new", "torn")]
        cells = [f"skipped: {row['skipped']}", *[""] * 4] if row["skipped"] else cells
        lines.append(table_line([row["name"], *map(str, cells)]))
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.reliability", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="ten times the trials, every error of a disk")
    parser.add_argument("--only", default="", help="only the checks with this in their names")
    parser.add_argument("--out", type=Path, help="folder for the record; without it nothing is written")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose section between <!-- reliability --> is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    file_system = _shell("df", "--output=fstype", tempfile.gettempdir()).split()[-1:]
    settings = {"full": args.full, "file system": "".join(file_system) or "unknown"}
    record = asdict(Record("reliability", "cpu", settings))
    record["command"] = " ".join(["python -m benchmarks.reliability", *(sys.argv[1:] if argv is None else argv)])
    stem = f"{record['date'][:10]}-{slug(record['hardware']['cpu'])}-reliability.json"
    for name, check in CHECKS:
        if args.only not in name:
            continue
        started = time.perf_counter()
        try:
            counts = check(args.full)
        except Unavailable as error:
            counts = Counts(skipped=str(error))
        counts.seconds = round(time.perf_counter() - started, 1)
        print(line_of(name, counts), flush=True)
        record["rows"].append({"name": name, **asdict(counts)})
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / stem).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.docs:
        text = SECTION.sub(lambda m: m[1] + markdown(record) + m[2], args.docs.read_text(encoding="utf-8"))
        args.docs.write_text(text, encoding="utf-8")
    sys.exit(any(row["torn"] for row in record["rows"]))


if __name__ == "__main__":
    main()
