"""A run that is stopped after any of its steps and resumed ends, bit for bit, as one in one piece; and signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reliability.resume import BASE, PRESETS, pictures, resume_at_every_step, trainer
from fastgen.training import loop, run_folder
from fastgen.training.config import TrainConfig
from fastgen.training.ema import EMA
from fastgen.training.logs import Log
from fastgen.training.loop import Trainer, Validation
from fastgen.training.registry import RECIPES
from fastgen.training.stopping import Stopped, StopRequest

ROOT = Path(__file__).parent.parent


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("recipe", "variant"), [("ddpm", "fp32"), ("ddpm", "fp16"), ("classifier", "bf16"), ("classifier", "workers")]
)
def test_resumes_to_the_same_bits_from_every_step(recipe: str, variant: str) -> None:
    assert resume_at_every_step(recipe, variant, steps=7) == (6, [])


def test_every_recipe_is_tried() -> None:
    assert PRESETS.keys() == RECIPES.keys()


def lost(name: str, value: Callable[[Trainer], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A restore that forgets an attribute of the trainer."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        real = run_folder.restore

        def restore(trainer: Trainer, path: Path) -> None:
            real(trainer, path)
            setattr(trainer, name, value(trainer))

        monkeypatch.setattr(run_folder, "restore", restore)

    return plant


def once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers go on where the generator is, as without a seed for each step."""
    seeded = []
    real = loop.seed_everything
    monkeypatch.setattr(loop, "seed_everything", lambda *path: seeded or (real(*path), seeded.append(path)))


def from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of a resumed run begin anew."""
    real = Trainer._loader
    monkeypatch.setattr(Trainer, "_loader", lambda self, step, workers=None: real(self, 0, workers))


DEFECTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "optimizer": lambda m: m.setattr(run_folder, "_restore_optimizer", lambda *_: None),
    "averages": lambda m: m.setattr(EMA, "load_state_dict", lambda *_: None),
    "losses": lost("losses", lambda trainer: [loss + 1 for loss in trainer.losses]),
    "grad_norm": lost("grad_norm", lambda trainer: torch.zeros(())),
    "validation": lost("validation", lambda trainer: Validation()),
    "finished": lost("finished", lambda trainer: True),
    "step": lost("step", lambda trainer: trainer.step - 1),
    "random numbers": once_for_all,
    "images": from_the_start,
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    DEFECTS[defect](monkeypatch)
    trials, failures = resume_at_every_step("classifier", steps=5)
    assert trials == 4 and failures, f"{defect} may be lost"


@pytest.mark.usefixtures("one_thread")
def test_the_scale_of_fp16_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda *_: None)
    assert resume_at_every_step("classifier", "fp16", steps=3)[1]


# Signals


def signals(arguments: str, patch: str = "") -> dict[str, Any]:
    """What `benchmarks.reliability.signals.check(...)` finds in a process of its own, after the lines of ``patch``."""
    script = f"import json, sys\nfrom benchmarks.reliability import signals\n{patch}\n"
    script += f"print(json.dumps(signals.check({arguments})))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="each trial is a fork")


@needs_fork
def test_signals_in_every_phase() -> None:
    found = signals("3")
    assert found["failures"] == [] and (found["phases"], found["random"]) == (12, 3)


DEAF = "from fastgen.training.stopping import StopRequest; StopRequest.waiting = lambda self: self"
FORGETFUL = """
from fastgen.training import run_folder
real = run_folder.write
run_folder.write = lambda trainer, keep_also: trainer.step == 3 or real(trainer, keep_also)
"""
WRONG_CODE = """
from fastgen.training.loop import Trainer
real = Trainer.run
Trainer.run = lambda self, *args, **more: (real(self, *args, **more), setattr(self, "stopped_by", None))[0]
"""


@needs_fork
@pytest.mark.parametrize(
    ("phase", "patch", "words"),
    [
        ("step", DEAF, "the newest checkpoint is"),
        ("save", DEAF, "the newest checkpoint is"),
        ("step", FORGETFUL, "the newest checkpoint is"),
        ("step", WRONG_CODE, "exit code 0, not 1"),
    ],
    ids=["ends at once", "ends in the save", "saves nothing", "wrong code"],
)
def test_a_defect_in_stopping_is_found(phase: str, patch: str, words: str) -> None:
    found = signals(f"0, phases=[{phase!r}]", patch)
    assert any(words in failure for failure in found["failures"]), found


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A classifier's run of one step, after which something is drawn."""
    data = str(pictures(tmp_path / "pictures"))
    return replace(BASE, data=data, preset="digits-tiny", steps=1, cooldown=0, validate_every=0, sample_every=1)


def stopped_in_drawing(config: TrainConfig, out: Path) -> Trainer:
    run = trainer("classifier", config, out)
    run.recipe.grid = lambda network: os.kill(os.getpid(), signal.SIGTERM)
    run.run(progress=False)
    assert run.stopped_by == signal.SIGTERM and run.step == 1 and not run.finished
    return run


def test_a_validation_that_is_made_again_is_judged_once(tmp_path: Path, config: TrainConfig) -> None:
    """After a signal in the drawing: else the best would be its own better, and cost patience."""
    config = replace(config, validate_every=1)
    stopped_in_drawing(config, tmp_path / "run")
    run = trainer("classifier", config, tmp_path / "run", "auto")
    assert run.validation == Validation()
    run.run(progress=False)
    assert run.validation == Validation(run.validate(), 1, 0)


def test_the_line_of_a_step_is_logged_once(tmp_path: Path, config: TrainConfig) -> None:
    """Where the run that wrote it after the checkpoint of an unfinished step was killed."""
    out, config = tmp_path / "run", replace(config, steps=2, log_every=1, save_every=9)
    stopped_in_drawing(config, out)
    for killed in (True, False):
        run = trainer("classifier", config, out, "auto")
        assert run.step == 1 and not run.finished
        if killed:
            run._train_step = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError) if killed else contextlib.nullcontext():
            run.run(progress=False)
        lines = (out / "log.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["step", "1", "2"][: 2 if killed else 3]


def test_a_signal_while_the_run_is_closed(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """While wandb ends its upload, say: it was taken, so it is told."""
    monkeypatch.setattr(Log, "__exit__", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    run = trainer("classifier", config, tmp_path / "run")
    run.run(progress=False)
    assert run.stopped_by == signal.SIGTERM


def test_the_second_signal_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught, StopRequest() as stop:
        stop.waiting()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.signal == signal.SIGTERM and str(caught.value) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_nobody_waits_for_ends_at_once() -> None:
    with pytest.raises(Stopped), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_a_thread(tmp_path: Path) -> None:
    """Where Python lets nobody handle signals."""
    config = replace(BASE, data=str(pictures(tmp_path / "pictures")), preset="digits-tiny", steps=2, cooldown=0)
    with ThreadPoolExecutor(1) as pool:
        run = Trainer(RECIPES["classifier"](config), config, tmp_path / "run").run
        assert pool.submit(run, progress=False).result().name == "step-00000002"
