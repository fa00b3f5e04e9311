"""The folder of a run: its lock, its config.json, and the checkpoints that it goes on from.

OUT/config.json          recipe and settings: `fastgen train --config` makes the same run again
OUT/log.csv              see logs.py
OUT/step-00001000/       a checkpoint: the average as the model, and training.safetensors
OUT/samples/             pictures, if they were asked for
OUT/damaged.txt          images that could not be read, and why
OUT/wandb.id             the run at Weights & Biases, if it was asked for
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen import atomic
from fastgen.checkpoint import (
    STEP_PREFIX,
    TRAINING_STATE,
    checkpoints_of,
    read_json,
    read_tensors,
    verify,
    write_checkpoint,
)
from fastgen.errors import UsageError
from fastgen.training.config import TrainConfig
from fastgen.version import __version__

if TYPE_CHECKING:
    from fastgen.training.loop import Trainer

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def name(step: int) -> str:
    return f"{STEP_PREFIX}{step:08d}"


def check(out: Path) -> list[str]:
    """The names of the checkpoints in ``out``; UsageError where it cannot be a folder."""
    if any(place.exists() and not place.is_dir() for place in (out, *out.parents)):
        raise UsageError(f"out: {out} is, or lies in, a file; give a folder, which is created where it does not exist")
    # One that a killed process had moved aside has its own name again, as it will have once it is back.
    return [p.name[p.name.index(STEP_PREFIX) :] for p in checkpoints_of(out)] if out.is_dir() else []


@contextlib.contextmanager
def prepared(out: Path, recipe: str, config: TrainConfig, seen: list[str] | None = None) -> Iterator[None]:
    """A context in which the folder is this process's own: made, without what a killed run left half-written, and with
    its config.json. Raises UsageError where another process trains in it, or has since its checkpoints were ``seen``.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        if seen is not None and check(out) != seen:
            raise UsageError(f"out: another process has trained in {out} in the meantime; give the command again")
        atomic.sweep(out)
        settings = {"fastgen": __version__, "recipe": recipe, "settings": asdict(config)}
        with atomic.atomic_file(out / "config.json") as file:
            file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock is on a file of its own, and ends with the process, however that ends. Windows has none: unlocked."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"out: another process is training in {folder}; wait for it, or give another folder"
            ) from None
        except OSError as error:  # some network file systems
            warnings.warn(
                f"out: {folder} cannot be locked ({error.strerror}): see to it that no other process trains in it",
                stacklevel=2,
            )
        yield
    finally:
        os.close(handle)


def newest_verified(out: Path) -> Path:
    """The newest checkpoint whose files are those of its manifest; a warning for each newer one that is damaged, and
    UsageError where all are."""
    problems = []
    for path in reversed(checkpoints_of(out)):
        try:
            verify(path)
        except UsageError as error:
            problems.append(str(error).removeprefix("model: "))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; going on from {path}", stacklevel=2)
        return path
    raise UsageError(f"resume: no checkpoint in {out} is whole: {'; '.join(problems)}")


def list_damaged(out: Path, damaged: dict[str, str]) -> None:
    """Adds to damaged.txt the images that it has not yet, each with what is wrong with it on a line."""
    place, lines = out / "damaged.txt", {f"{path}\t{why}\n" for path, why in damaged.items()}
    coding = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name may be any bytes
    if place.exists():  # what the run met before it was stopped
        lines |= {f"{line}\n" for line in place.read_text(**coding).split("\n")[:-1]}
    with atomic.atomic_file(place) as file:
        file.write_text("".join(sorted(lines)), **coding)


def write(trainer: Trainer, keep_also: int) -> Path:
    """Writes the trainer's checkpoint and removes all but the newest ``keep`` and the one of step ``keep_also``, if it
    is not 0. Those of later steps go too: they are damaged, and the run went on from one before them."""
    out, config, model = trainer.out, trainer.config, trainer.recipe.model
    path = out / name(trainer.step)
    training = {
        **asdict(config),
        "recipe": trainer.recipe.name,
        "images": len(trainer.recipe.data),
        "step": trainer.step,
        "finished": trainer.finished,
        "validation": asdict(trainer.validation),
        "scaler": trainer.scaler.state_dict(),
    }
    with atomic.atomic_directory(path) as directory:
        write_checkpoint(
            directory, model, family=trainer.recipe.family, preset=config.preset,
            weights={**model.state_dict(), **trainer.ema.averages[config.ema_decay[0]]},
            extra_config={"training": training}, extra_files={TRAINING_STATE: _state(trainer)},
        )  # fmt: skip
    there = checkpoints_of(out)
    kept = [p.name for p in there if p.name <= path.name][-config.keep :] + [name(keep_also)] * (keep_also > 0)
    for other in there:
        if other.name not in kept:
            atomic.remove(other)
    return path


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """What model.safetensors has not: raw weights, further averages, the optimizer's state, losses not yet logged."""
    state = {f"model.{k}": v for k, v in trainer.recipe.model.state_dict().items()}
    first = f"ema.{trainer.config.ema_decay[0]}."
    state |= {k: v for k, v in trainer.ema.state_dict().items() if not k.startswith(first)}
    for name, p in trainer.params.items():
        state |= {f"optimizer.{name}.{k}": v for k, v in trainer.optimizer.state.get(p, {}).items()}
    losses = torch.stack(trainer.losses) if trainer.losses else torch.zeros(0)
    return state | {"losses": losses, "grad_norm": trainer.grad_norm}


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Takes up a run where the verified ``checkpoint`` left it; UsageError where it was made with other settings."""
    saved: dict[str, Any] = read_json(checkpoint / "config.json").get("training", {})
    if "step" not in saved:
        raise UsageError(f"resume: {checkpoint} holds no training state; it can only be sampled from")
    differing = trainer.config.differences(saved, saved["step"])
    if saved.get("recipe") != trainer.recipe.name:
        differing.insert(0, f"recipe {saved.get('recipe')!r} there, {trainer.recipe.name!r} now")
    if differing:
        raise UsageError(f"resume: {checkpoint} was made with other settings: {'; '.join(differing)}")
    if saved["images"] != (now := len(trainer.recipe.data)):
        warnings.warn(
            f"data: {trainer.config.data} had {saved['images']} images when {checkpoint} was made and has {now} now: "
            "the run goes on with what there is, and not as it would have",
            stacklevel=2,
        )
    state = read_tensors(checkpoint / TRAINING_STATE)
    trainer.recipe.model.load_state_dict(_part(state, "model."))
    first = f"ema.{trainer.config.ema_decay[0]}."
    model = read_tensors(checkpoint / "model.safetensors")
    averages = {k: v for k, v in state.items() if k.startswith("ema.")}
    trainer.ema.load_state_dict(averages | {first + k: model[k] for k in trainer.params})
    _restore_optimizer(trainer, state)
    trainer.losses = list(state["losses"].to(trainer.device))
    trainer.grad_norm = state["grad_norm"].to(trainer.device)
    trainer.scaler.load_state_dict(saved["scaler"])
    trainer.validation = type(trainer.validation)(**saved["validation"])
    trainer.finished = saved["finished"]
    trainer.step = trainer.saved = saved["step"]


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _restore_optimizer(trainer: Trainer, state: dict[str, Tensor]) -> None:
    names = {p: k for k, p in trainer.params.items()}
    order = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    slots = {}
    for i, p in enumerate(order):
        # A file knows no memory layout, and the fused optimizer walks parameter and moments side by side in memory.
        slot = {
            k: torch.empty_like(p).copy_(v) if v.shape == p.shape else v
            for k, v in _part(state, f"optimizer.{names[p]}.").items()
        }
        if slot:
            slots[i] = slot
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": slots})
