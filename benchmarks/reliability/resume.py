"""Runs that are stopped after each of their steps and resumed, against the same run in one piece: bit for bit."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from fastgen.checkpoint import checkpoints_of, read_json
from fastgen.training.config import TrainConfig
from fastgen.training.loop import Trainer, start_or_resume
from fastgen.training.registry import RECIPES

PRESETS = {"ddpm": "tiny", "classifier": "digits-tiny"}
# Every setting that keeps something from step to step, in three precisions.
BASE = TrainConfig(
    steps=9, batch_size=4, accumulate=2, warmup=3, cooldown=3, lr=2e-3, ema_decay=(0.9, 0.99), save_every=4,
    log_every=2, validate_every=3, holdout=0.3, workers=0,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16", "cooldown": 0, "schedule": "cosine"},
    "fp16": {"precision": "fp16", "patience": 3},
    "workers": {"workers": 2, "accumulate": 1},
}


def pictures(folder: Path, count: int = 30, size: int = 28) -> Path:
    """A folder of images of two classes: noise of a seed each."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        (folder / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (size, size), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"class-{i % 2}" / f"{i:03d}.png")
    return folder


def trainer(recipe: str, config: TrainConfig, out: Path, resume: str | None = None) -> Trainer:
    """A trainer as the command line makes it, with the recipe's smallest preset."""
    config = replace(config, preset=PRESETS[recipe])
    return start_or_resume(RECIPES[recipe](config), config, out, resume)


def stopped(recipe: str, config: TrainConfig, out: Path, step: int, number: int = signal.SIGTERM) -> None:
    """A run that a signal reaches in the midst of ``step`` (0, 1, …), and that ends after it."""
    run = trainer(recipe, config, out, "auto")
    real = run.recipe.loss

    def loss(network: Any, *batch: Any) -> Any:
        if network.training and run.step == step:
            run.recipe.loss = real  # type: ignore[method-assign]
            os.kill(os.getpid(), number)
        return real(network, *batch)

    run.recipe.loss = loss  # type: ignore[method-assign]
    with silent():
        run.run(progress=False)
    assert run.stopped_by == number and run.step == step + 1, (run.stopped_by, run.step, step)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what goes to stderr, by whatever way: a stopped run says so."""
    before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(null)


def result(out: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on where it was stopped: all tensors and states of its last checkpoint,
    and its log but for the times."""
    last = checkpoints_of(out)[-1]
    tensors = {f"{f.name}:{k}": v for f in sorted(last.glob("*.safetensors")) for k, v in load_file(f).items()}
    with open(out / "log.csv", newline="", encoding="utf-8") as f:
        rows = [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(f)]
    return {"step": last.name, "tensors": tensors, "training": read_json(last / "config.json")["training"], "log": rows}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs between two results; no tensor may differ in a bit."""
    found = [k for k in ("step", "training", "log") if a[k] != b[k]]
    names = a["tensors"].keys() | b["tensors"].keys()
    return found + [k for k in sorted(names) if not _same(a["tensors"].get(k), b["tensors"].get(k))]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


def resume_at_every_step(recipe: str, variant: str = "fp32", steps: int | None = None) -> tuple[int, list[str]]:
    """How many stops were tried, one after each step, and of those that did not end as the whole run did, why."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = replace(BASE, data=str(pictures(folder / "pictures")), **VARIANTS[variant])
        config = replace(config, steps=steps or config.steps, cooldown=min(config.cooldown, steps or config.steps))
        trainer(recipe, config, folder / "whole").run(progress=False)
        whole, failures = result(folder / "whole"), []
        for step in range(config.steps - 1):
            out = folder / f"stopped-{step}"
            stopped(recipe, config, out, step)
            torch.manual_seed(step)  # whatever state the next process is in
            trainer(recipe, config, out, "auto").run(progress=False)
            if wrong := differences(whole, result(out)):
                failures.append(f"{recipe} {variant}, stopped after step {step + 1}: {', '.join(wrong[:5])}")
        return config.steps - 1, failures
