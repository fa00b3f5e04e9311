"""The harness of benchmarks.reliability, with few trials: checkpoints pass it, and planted defects do not."""

from __future__ import annotations

import errno
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import __main__ as command
from benchmarks.reliability import faults
from benchmarks.reliability.checkpoints import FOUND_BY, misordered
from benchmarks.reliability.faults import Counts, Unavailable, batch, kill_after, library

CHECKPOINTS = "benchmarks.reliability.checkpoints"
DOCS = Path(__file__).parent.parent / "docs" / "reliability.md"


GOOD_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "order, run": ("order_of_operations", {"kind": "run"}),
    "order, model": ("order_of_operations", {"kind": "model"}),
    "order, moved": ("order_of_operations", {"kind": "model", "exchange": False}),
    "killed, run": ("kill_at_every_operation", {"kind": "run", "every": 5}),
    "killed, model": ("kill_at_every_operation", {"kind": "model", "every": 2}),
    "killed, moved": ("kill_at_every_operation", {"kind": "model", "exchange": False, "every": 3}),
    "at random": ("kill_at_random", {"kind": "run", "count": 15}),
    "errors": ("fail_at_every_operation", {"kind": "model", "error": errno.EIO}),
    "full": ("real_full_disk", {"kind": "run", "rooms": 6}),
    "read-only": ("real_read_only", {"kind": "model"}),
    "at once": ("two_at_once", {"count": 3}),
}


@pytest.fixture(scope="module")
def results() -> dict[str, Counts]:
    """Every check and every defect, in one process, which imports torch once."""
    cases = {**GOOD_CASES, **{name: (check, {**case, "defect": name}) for name, (check, case) in FOUND_BY.items()}}
    try:
        found = batch([(f"{CHECKPOINTS}:{check}", case) for check, case in cases.values()])
    except Unavailable as reason:
        pytest.skip(str(reason))
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("case", GOOD_CASES)
def test_checkpoints_survive(results: dict[str, Counts], case: str) -> None:
    """The old and the new are both found: faults fall before and after the moment that decides."""
    counts = results[case]
    if counts.skipped:
        pytest.skip(counts.skipped)
    assert counts.torn == 0 and counts.trials == counts.old + counts.new > 0, counts.notes
    least = {"killed, run": 10, "killed, model": 20, "killed, moved": 15, "errors": 20, "full": 6, "at once": 3}
    assert counts.trials >= least.get(case, 1)
    if case.startswith("killed"):
        assert counts.inside == counts.trials and counts.old and counts.new
    if case in ("errors", "full"):
        assert counts.old and counts.new and counts.inside >= counts.old
    if case == "at random":
        assert counts.inside == 15 and counts.old
    if case == "read-only":
        assert (counts.inside, counts.old) == (2, 2)
    if case.startswith("order"):
        assert counts.new == 1


@pytest.mark.parametrize("defect", FOUND_BY)
def test_planted_defects_are_found(results: dict[str, Counts], defect: str) -> None:
    assert results[defect].torn and results[defect].notes, f"{defect} went unnoticed"


# The order of operations, line by line

WORK = "/x/.fastgen-01234567-m"
GOOD = [
    f"mkdir\t0\t{WORK}\t\t0", f"open\t0\t{WORK}/w\t\t0", f"write\t1\t{WORK}/w\t\t9",
    f"open\t0\t{WORK}/manifest.json\t\t0", f"write\t2\t{WORK}/manifest.json\t\t9", f"fsync\t1\t{WORK}/w\t\t0",
    f"fsync\t2\t{WORK}/manifest.json\t\t0", f"fsync\t3\t{WORK}\t\t0", f"exchange\t0\t{WORK}\t/x/m\t0",
    "fsync\t4\t/x\t\t0", f"unlink\t0\t{WORK}/w\t\t0",
]  # fmt: skip


def problems(lines: list[str]) -> str:
    return "; ".join(misordered([line.split("\t") for line in lines], Path("/x")))


def moved(index: int, to: int) -> list[str]:
    lines = GOOD[:index] + GOOD[index + 1 :]
    return [*lines[:to], GOOD[index], *lines[to:]]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (GOOD, ""),
        (moved(5, 2), "w is not synced after its last write"),
        (moved(6, 8), "manifest.json is not synced"),
        (moved(7, 3), "the directory is not synced"),
        (moved(9, 10), "the folder is not synced"),
        (moved(9, 0), "the folder is not synced"),
        (moved(4, 2), "['w'] is written last"),
        (GOOD[:8], "nothing takes its place by a rename"),
    ],
)
def test_misordered(lines: list[str], words: str) -> None:
    assert words in problems(lines) and bool(words) == bool(problems(lines))


# The command


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A line a check as it ends, a record of all, the section of the document; 1 where something is torn."""

    def unavailable(full: bool) -> Counts:
        raise Unavailable("no compiler")

    good = Counts(trials=5, inside=4, old=2, new=3)
    checks = [("good", lambda full: good), ("left out", unavailable)]
    monkeypatch.setattr(command, "CHECKS", checks)
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- reliability -->\nold\n<!-- /reliability -->\nafter\n")
    arguments = ["--out", str(tmp_path / "out"), "--docs", str(docs)]
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "good: 5 trials, 4 inside, 2 old, 3 new, 0 torn" in out and "left out: skipped: no compiler" in out
    (file,) = (tmp_path / "out").glob("*-reliability.json")
    record = json.loads(file.read_text())
    assert [row["name"] for row in record["rows"]] == ["good", "left out"] and record["commit"] and record["hardware"]
    text = docs.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert (
        "| good | 5 | 4 | 2 | 3 | 0 |" in text and "skipped: no compiler" in text and command.markdown(record) in text
    )
    checks.append(("bad", lambda full: Counts(trials=1, torn=1, notes=["why"])))
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "bad"])
    assert ended.value.code == 1 and "why" in capsys.readouterr().out


def test_the_document_shows_the_record() -> None:
    """The section is what the newest record says, and the record says that nothing was torn."""
    records = sorted((DOCS.parent.parent / "benchmarks" / "results").glob("*-reliability.json"))
    record = json.loads(records[-1].read_text(encoding="utf-8"))
    assert (
        command.SECTION.search(DOCS.read_text(encoding="utf-8"))[0]
        .split("\n", 1)[1]
        .startswith(command.markdown(record))
    )
    assert not any(row["torn"] or row["skipped"] for row in record["rows"])


# Of the harness itself


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.shutil, "which", lambda _: None)
    with pytest.raises(Unavailable, match="on Linux only" if sys.platform != "linux" else "no C compiler"):
        library()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_kill_after() -> None:
    assert kill_after(lambda: time.sleep(30), 0.05)[0] == -signal.SIGKILL
    code, seconds = kill_after(lambda: time.sleep(0.1), None)
    assert code == -signal.SIGTERM and 0.05 < seconds < 10
