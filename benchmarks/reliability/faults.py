"""Faults at will: faults.c, compiled and loaded before libc into a process of its own, which forks a child a trial.

`batch` calls checks in such a process, and returns the `Counts` of each. There a child does the work (`forked`), armed
by `arm`: it is killed at, in or after the n-th operation on files, or that operation fails.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("faults.c")
ROOT = Path(__file__).parent.parent.parent
MODES = {"log": 1, "before": 2, "half": 3, "after": 4, "fail": 5}  # as in faults.c
OTHER_ERROR = 150  # an exit code beyond any errno


class Unavailable(Exception):
    """A check that cannot be made on this machine; the message says why."""


@dataclass
class Counts:
    """What came of a check.

    trials: processes that were started, or cases. inside: of those, how many were hit while they saved. old, new: which
    checkpoint was found afterwards, whole. torn: neither, or another promise broken; the first few are in ``notes``.
    """

    trials: int = 0
    inside: int = 0
    old: int = 0
    new: int = 0
    torn: int = 0
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0

    def add(self, verdict: str, note: str = "") -> None:
        """One trial: verdict "old", "new" or anything else, which is what is wrong."""
        self.trials += 1
        if verdict in ("old", "new"):
            setattr(self, verdict, getattr(self, verdict) + 1)
        else:
            self.torn += 1
            if len(self.notes) < 5:
                self.notes.append(f"{note}: {verdict}" if note else verdict)


def several(check: str, cases: list[dict[str, Any]]) -> Counts:
    """The sums of a check over several cases, two processes at a time."""
    total, shares = Counts(), [cases[i::2] for i in range(min(2, len(cases)))]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda share: batch([(check, case) for case in share]), shares)
        for case, counts in [pair for share, results in zip(shares, found) for pair in zip(share, results)]:
            for name in ("trials", "inside", "old", "new", "torn", "seconds"):
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            total.notes += [f"{case}: {note}" for note in counts.notes]
            if counts.skipped:
                raise Unavailable(counts.skipped)
    return total


def library() -> Path:
    """faults.c, compiled by cc at first use. Raises Unavailable on another system than Linux, or without a compiler."""
    if sys.platform != "linux":
        raise Unavailable(f"faults are injected on Linux only, not on {sys.platform}")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise Unavailable("no C compiler (cc, gcc, clang) to build faults.c with")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"fastgen-faults-{os.getuid()}-{digest}.so"
    if not built.exists():
        work = built.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(work), str(SOURCE), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"faults.c does not compile: {done.stderr.strip().splitlines()[0]}")
        work.replace(built)
    return built


def batch(calls: list[tuple[str, dict[str, Any]]]) -> list[Counts]:
    """Calls each ("module:function", arguments) in one process with the library loaded; the Counts of each, with
    ``skipped`` where one cannot be made here. Raises Unavailable where none can."""
    environment = {
        **os.environ, "LD_PRELOAD": str(library()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.reliability.faults", json.dumps(calls)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{calls} failed:\n{done.stderr}")
    return [Counts(**json.loads(line)) for line in done.stdout.splitlines()]


def arm(folder: Path, mode: str, at: int = 0, error: int = 0, all_later: bool = False, log: int = -1) -> None:
    """In a child: what is to happen at the ``at``-th operation, from 1, under ``folder``. log: a descriptor."""
    own = ctypes.CDLL(None)
    own.faults_arm(os.fsencode(folder), MODES[mode], ctypes.c_long(at), error, int(all_later), log)


def fork(work: Callable[[], None]) -> int:
    """A child that calls ``work`` and ends; its id. Exit codes: 0, the errno of an OSError that names a file, or
    OTHER_ERROR."""
    child = os.fork()
    if child:
        return child
    status = OTHER_ERROR
    try:
        work()
        status = 0
    except OSError as error:
        if error.errno and error.filename:
            status = error.errno
        else:
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """The exit code of a child; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work: Callable[[], None]) -> int:
    """`wait` for a `fork`."""
    return wait(fork(work))


def kill_after(work: Callable[[], None], delay: float | None) -> tuple[int, float]:
    """Forks a child and sends it SIGKILL ``delay`` seconds after ``work`` begins, or never; `wait`'s code, which is
    -SIGKILL for one killed in ``work`` and -SIGTERM for one that came to its end, and the seconds it worked."""
    began, begin = os.pipe()

    def told() -> None:
        os.write(begin, b"b")
        work()
        os.kill(os.getpid(), signal.SIGTERM)  # at once: what Python does when it ends is no part of saving

    child = fork(told)
    os.close(begin)
    os.read(began, 1)
    started = time.perf_counter()
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    code = wait(child)
    seconds = time.perf_counter() - started
    os.close(began)
    return code, seconds


def main(calls: str) -> None:
    for check, arguments in json.loads(calls):
        module, _, name = check.partition(":")
        function = getattr(importlib.import_module(module), name)
        started = time.perf_counter()
        try:
            counts = function(**arguments)
        except Unavailable as error:
            counts = Counts(skipped=str(error))
        counts.seconds = round(time.perf_counter() - started, 1)
        print(json.dumps(asdict(counts)), flush=True)


if __name__ == "__main__":
    from benchmarks.reliability import faults  # by its name: classes of __main__ would be others than the checks'

    faults.main(sys.argv[1])
