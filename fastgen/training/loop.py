"""The training loop that every recipe shares: AdamW, warm-up, clipping, EMA, checkpoints, resume.

Everything random in step s is drawn after seeding with (seed, s), so a resumed run needs no
generator state: step s is the same step whenever it runs.
"""

from __future__ import annotations

import csv
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgen.checkpoint import (
    STEP_PREFIX,
    atomic_directory,
    checkpoints_of,
    read_json,
    read_tensors,
    verify,
    write_checkpoint,
)
from fastgen.errors import UsageError
from fastgen.models import FAMILIES

LOG_EVERY = 100


@dataclass(frozen=True)
class TrainConfig:
    """The knobs of a run. Times are in steps; ``precision`` is "fp32" or "bf16" (autocast).

    The learning rate rises over ``warmup`` steps, stays, and falls linearly to 0 over the last ``cooldown``.
    """

    data: str = "mnist-5k"
    preset: str = "mnist"
    steps: int = 10_000
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 500
    cooldown: int = 0
    weight_decay: float = 0.01
    ema_decay: float = 0.9995
    clip_norm: float = 1.0
    precision: str = "fp32"
    seed: int = 0
    save_every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')}: must be at least 1, not {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr: must be a number above 0, not {self.lr}")
        if not 0 <= self.cooldown <= self.steps:
            raise UsageError(f"cooldown: must be between 0 and steps, {self.steps}, not {self.cooldown}")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"precision: must be fp32 or bf16, not {self.precision!r}")


def network_of(family: str, config: TrainConfig) -> Any:
    """The network's configuration that ``config.preset`` names; UsageError, with the names, for an unknown one."""
    presets = FAMILIES[family].presets
    if config.preset not in presets:
        raise UsageError(f"preset: unknown preset {config.preset!r}; choose one of {', '.join(presets)}")
    return presets[config.preset]


class Recipe(Protocol):
    """What a family brings to the loop: its network and the loss of one step."""

    family: str
    model: nn.Module

    def loss(self, step: int) -> Tensor: ...


class Trainer:
    """One run in the folder ``out``: `run()` trains from where the folder stands to ``config.steps``."""

    def __init__(self, recipe: Recipe, config: TrainConfig, out: Path) -> None:
        self.recipe, self.config, self.out = recipe, config, out
        self.params = dict(recipe.model.named_parameters())
        self.ema = {k: p.detach().clone() for k, p in self.params.items()}
        self.optimizer = torch.optim.AdamW(
            self.params.values(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.step = 0

    def run(self, progress: bool | None = None, on_save: Callable[[Path], None] | None = None) -> Path:
        """Trains to the end and returns the last checkpoint. ``progress`` None: a bar on a terminal only.
        ``on_save`` is called with each checkpoint, once it is whole."""
        model, config = self.recipe.model.train(), self.config
        self.out.mkdir(parents=True, exist_ok=True)
        bar = tqdm(
            total=config.steps, initial=self.step, unit="step", disable=None if progress is None else not progress
        )
        losses, started, first = [], time.perf_counter(), self.step
        with bar:
            while self.step < config.steps:
                losses.append(self._train_step(model))
                self.step += 1
                bar.update()
                last = self.step == config.steps
                saving = last or self.step % config.save_every == 0
                if saving or self.step % LOG_EVERY == 0:  # looked at before saving: a NaN must not replace what is good
                    rate = config.batch_size * (self.step - first) / (time.perf_counter() - started)
                    loss = torch.stack(losses).mean().item()
                    losses.clear()
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"the loss became NaN or inf before step {self.step}; lower --lr or use --precision fp32"
                        )
                    bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
                    self._log(loss, rate)
                if saving:
                    path = self.save()
                    if on_save:
                        on_save(path)
        return checkpoints_of(self.out)[-1]

    def _train_step(self, model: nn.Module) -> Tensor:
        config = self.config
        torch.manual_seed(config.seed * 1_000_003 + self.step)
        left = config.steps - self.step
        rise = min(1.0, (self.step + 1) / max(1, config.warmup))
        fall = min(1.0, left / config.cooldown) if config.cooldown else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(rise, fall)
        device = next(iter(self.params.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = self.recipe.loss(self.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params.values(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # A short memory at first, so that the average forgets the random start.
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.params.values()], 1 - decay)
        return loss.detach()

    def _log(self, loss: float, rate: float) -> None:
        file = self.out / "log.csv"
        new = not file.exists()
        with open(file, "a", newline="") as f:
            writer = csv.writer(f)
            if new:
                writer.writerow(["step", "loss", "images_per_s"])
            writer.writerow([self.step, f"{loss:.5f}", f"{rate:.1f}"])

    def save(self) -> Path:
        """Writes checkpoint ``step-<n>`` (the EMA as the model, the rest for `resume`) and drops old ones."""
        state = {f"model.{k}": p for k, p in self.params.items()}
        for (name, _), slot in zip(self.params.items(), self.optimizer.state_dict()["state"].values(), strict=True):
            state |= {f"optimizer.{name}.{k}": v for k, v in slot.items()}
        path = self.out / f"{STEP_PREFIX}{self.step:08d}"
        with atomic_directory(path) as directory:
            write_checkpoint(
                directory,
                self.recipe.model,
                family=self.recipe.family,
                preset=self.config.preset,
                weights=self.ema,
                extra_config={"training": {**asdict(self.config), "step": self.step}},
                extra_files={"training.safetensors": state},
            )
        for old in checkpoints_of(self.out)[: -self.config.keep]:
            shutil.rmtree(old)
        return path

    def resume(self, checkpoint: Path) -> None:
        """Takes up a run where ``checkpoint`` left it; UsageError where it was made with other settings."""
        verify(checkpoint)
        saved: dict[str, Any] = read_json(checkpoint / "config.json").get("training", {})
        step = saved.pop("step", None)
        if step is None:
            raise UsageError(f"resume: {checkpoint} holds no training state; it can only be sampled from")
        now = asdict(self.config)
        free = ["save_every", "keep"]  # these change no step already taken
        begun = [c for c in (saved, now) if step > c.get("steps", 0) - c.get("cooldown", 0)]
        if not begun:  # nor do these, before any cooldown
            free += ["steps", "cooldown"]
        differing = [
            f"{k} {saved.get(k)!r} there, {v!r} now" for k, v in now.items() if k not in free and saved.get(k) != v
        ]
        if differing:
            raise UsageError(f"resume: {checkpoint} was made with other settings: {'; '.join(differing)}")
        state = read_tensors(checkpoint / "training.safetensors")
        self.recipe.model.load_state_dict(
            {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        )
        for k, v in read_tensors(checkpoint / "model.safetensors").items():
            self.ema[k].copy_(v)
        slots = {}
        for i, (name, p) in enumerate(self.params.items()):
            slot = {k.rsplit(".", 1)[1]: v for k, v in state.items() if k.startswith(f"optimizer.{name}.")}
            # A file knows no memory layout, and the fused optimizer walks parameter and moments side by side in memory.
            slots[i] = {k: torch.empty_like(p).copy_(v) if v.shape == p.shape else v for k, v in slot.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.step = step


def start_or_resume(recipe: Recipe, config: TrainConfig, out: Path, resume: str | None) -> Trainer:
    """A Trainer at the right step: fresh, or from the newest checkpoint in ``out`` with resume="auto"."""
    if resume not in (None, "auto"):
        raise UsageError(f"resume: must be 'auto' or left out, not {resume!r}")
    if any(place.exists() and not place.is_dir() for place in (out, *out.parents)):
        raise UsageError(f"out: {out} is, or lies in, a file; give a folder, which is created where it does not exist")
    existing = checkpoints_of(out) if out.is_dir() else []
    if existing and resume is None:
        raise UsageError(f"out: {out} already holds a run; give --resume auto to go on with it, or another folder")
    trainer = Trainer(recipe, config, out)
    if existing:
        trainer.resume(existing[-1])
    return trainer
