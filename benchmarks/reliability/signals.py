"""Signals to the real command, in every phase of a run and at random moments: the exit code, what is saved, and that
the resumed run ends bit for bit as one that was left alone.

    python -m benchmarks.reliability.signals [--random 20] [--seed 0]

Each trial is a fork of this process, which has a single thread.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.reliability import resume
from fastgen import cli
from fastgen.checkpoint import checkpoints_of, verify
from fastgen.training import ddpm, run_folder
from fastgen.training.loop import Trainer
from fastgen.training.registry import RECIPES

STEPS = 6
PHASES = ("set-up", "step", "evaluation", "drawing", "save", "twice")
NUMBERS = (signal.SIGINT, signal.SIGTERM)
ARGUMENTS = [
    "--preset", "tiny", "--steps", STEPS, "--batch-size", 4, "--warmup", 2, "--save-every", 2, "--log-every", 1,
    "--validate-every", 3, "--sample-every", 3, "--holdout", 0.3, "--workers", 0, "--resume", "auto", "-q",
]  # fmt: skip


def command(data: Path, out: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """`fastgen train` in a fork of this process, silent, after ``prepare()``; its process's number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70  # if something else than an exit comes out of it
    try:
        for number in NUMBERS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        prepare()
        code = train(data, out)
    finally:
        os._exit(code)


def train(data: Path, out: Path) -> int:
    """`fastgen train` in this process; its exit code."""
    sys.argv = ["fastgen", "train", "ddpm", *map(str, ["--data", data, "--out", out, *ARGUMENTS])]
    try:
        cli.main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else bool(exit.code)
    return 0


def wait(pid: int) -> int:
    """The exit code of a fork; of one that a signal ended, minus its number."""
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def signalled(phase: str, number: int) -> Callable[[], None]:
    """What makes a run send itself the signal once, within a phase of step 3, or in the save after step 2."""
    sent = []

    def send(times: int = 1) -> None:
        if not sent:
            sent.append(True)
            for _ in range(times):
                os.kill(os.getpid(), number)

    def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True, times: int = 1) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if when(*args):
                send(times)
            return real(*args, **kwargs)

        setattr(owner, name, call)

    def prepare() -> None:
        if phase == "set-up":
            before(RECIPES["ddpm"], "__init__")
        elif phase in ("step", "twice"):
            before(Trainer, "_train_step", lambda trainer: trainer.step == 2, times=2 if phase == "twice" else 1)
        elif phase == "evaluation":
            before(RECIPES["ddpm"], "loss", lambda recipe, network, *_: not network.training)
        elif phase == "drawing":
            before(RECIPES["ddpm"], "grid")
        else:
            before(run_folder, "write_checkpoint")

    return prepare


# Where each phase's signal finds the run, and so what the last checkpoint is then.
SAVED = {"set-up": None, "step": 3, "evaluation": 3, "drawing": 3, "save": 2, "twice": 2}


def in_phases(data: Path, folder: Path, whole: dict[str, Any], phases: Sequence[str]) -> tuple[int, list[str]]:
    """Trials and failures: SIGINT and SIGTERM in each of the phases."""
    failures = []
    for phase in phases:
        for number in NUMBERS:
            out = folder / f"{phase}-{number}"
            what = f"{signal.Signals(number).name} in {phase}"
            code = wait(command(data, out, signalled(phase, number)))
            if code != 128 + number:
                failures.append(f"{what}: exit code {code}, not {128 + number}")
            there = [path.name for path in checkpoints_of(out)][-1:] if out.exists() else []
            expected = [] if SAVED[phase] is None else [run_folder.name(SAVED[phase])]
            if there != expected:
                failures.append(f"{what}: the newest checkpoint is {there}, not {expected}")
            failures += [f"{what}: {wrong}" for wrong in goes_on(data, out, whole)]
    return len(phases) * len(NUMBERS), failures


def goes_on(data: Path, out: Path, whole: dict[str, Any]) -> list[str]:
    """What is wrong with a run that is resumed to its end, beside the same run in one piece; its folder is removed."""
    for path in checkpoints_of(out) if out.exists() else []:
        verify(path)
    code = wait(command(data, out))
    if code:
        return [f"resumed, it ended with {code}"]
    wrong = resume.differences(whole, resume.result(out))
    left = [p.name for p in out.iterdir() if p.name.startswith(".fastgen")]
    shutil.rmtree(out)
    return ([f"resumed, it differs in {', '.join(wrong[:5])}"] if wrong else []) + [f"{name} is left" for name in left]


def at_random(
    data: Path, folder: Path, whole: dict[str, Any], seconds: float, count: int, seed: int
) -> tuple[int, int, list[str]]:
    """Trials, how many of them the signal reached in time, and failures: SIGINT, SIGTERM and SIGKILL in turn."""
    draw, failures, reached = random.Random(seed), [], 0
    for i in range(count):
        number = (*NUMBERS, signal.SIGKILL)[i % 3]
        out, delay = folder / f"random-{i}", draw.uniform(0, seconds)
        pid = command(data, out)
        time.sleep(delay)
        os.kill(pid, number)  # not yet waited for, so still there
        code = wait(pid)
        # Before the command has its own handlers, what Python and the system do: the same for who asks for the signal.
        expected = {0, 128 + number, -number} if number != signal.SIGKILL else {0, -number}
        if number == signal.SIGINT:
            expected.add(2)
        reached += code != 0
        what = f"{signal.Signals(number).name} after {delay:.2f} s"
        if code not in expected:
            failures.append(f"{what}: exit code {code}")
        failures += [f"{what}: {wrong}" for wrong in goes_on(data, out, whole)]
    return count, reached, failures


def check(random_trials: int, seed: int = 0, phases: Sequence[str] = PHASES) -> dict[str, Any]:
    """Counts and failures of all of it."""
    torch.set_num_threads(1)
    ddpm.GRID = 2  # pictures drawn while it trains
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = resume.pictures(folder / "pictures")
        with contextlib.redirect_stdout(io.StringIO()):
            train(data, folder / "first")  # in this process, so that the forks have everything imported
        started = time.perf_counter()
        if code := wait(command(data, folder / "whole")):
            return {"phases": 0, "random": 0, "reached": 0, "failures": [f"left alone, the run ended with {code}"]}
        seconds = time.perf_counter() - started
        whole = resume.result(folder / "whole")
        in_time, failures = in_phases(data, folder, whole, phases)
        trials, reached, more = at_random(data, folder, whole, seconds, random_trials, seed)
    return {"phases": in_time, "random": trials, "reached": reached, "failures": failures + more}


def main(
    random_trials: Annotated[int, typer.Option("--random", help="Signals at random moments.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the random moments.")] = 0,
) -> None:
    """Print the counts as JSON; exit code 1 if anything failed."""
    found = check(random_trials, seed)
    print(json.dumps(found, indent=2))
    raise SystemExit(bool(found["failures"]))


if __name__ == "__main__":
    typer.run(main)
