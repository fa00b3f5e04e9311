"""The knobs of a training run, and the JSON that makes the same run again. Imports no torch: `--help` reads it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastgen.errors import UsageError

SCHEDULES = ("constant", "cosine", "linear")
PRECISIONS = ("fp32", "bf16", "fp16")
POSITIVE = ("steps", "batch_size", "accumulate", "save_every", "keep", "log_every")
NOT_NEGATIVE = ("warmup", "weight_decay", "clip_norm", "validate_every", "patience", "sample_every")

# By the type as it is written below.
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
}

# What may differ between a run and what goes on from it: it changes no step.
FREE = frozenset(
    {
        "data_root",
        "keep",
        "log_every",
        "patience",
        "sample_every",
        "save_every",
        "strict",
        "tensorboard",
        "wandb",
        "workers",
    }
)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run but its recipe, folder and device. Times are in steps of the optimizer.

    Raises UsageError that names the setting. `describe` gives the help of each, which the command line shows.
    """

    data: str = _option(
        "mnist-5k",
        "mnist-5k (needs the extra 'data'); a folder of images, whose folders are the classes; tar shards, such as "
        "'s-{000..031}.tar'; or mnist, cifar10, cifar100, celeba, lsun of torchvision, with --data-root.",
    )
    data_root: str | None = _option(None, "Where torchvision's data set lies; nothing is downloaded.")
    image_size: int | None = _option(None, "Pixels a side. Default: the preset's.")
    holdout: float = _option(0.0, "Share of a folder or of shards that is kept out of training, to validate with.")
    strict: bool = _option(False, "Stop at a damaged image, instead of skipping and listing it.")
    workers: int | None = _option(None, "Processes that decode images. Default: 2, and 0 for data held in memory.")
    augment: bool = _option(True, "The recipe's augmentation.")
    preset: str | None = _option(None, "The network. Default: the recipe's.")
    dropout: float | None = _option(None, "Of the network, from 0 to 1. Default: the preset's.")
    steps: int = _option(10_000, "Optimizer steps in all.")
    batch_size: int = _option(128, "Images at once.")
    accumulate: int = _option(1, "Batches whose gradients make one step.")
    lr: float = _option(1e-3, "Learning rate of AdamW, after the warm-up.")
    schedule: str = _option("constant", "The learning rate after the warm-up: constant, or cosine or linear to 0.")
    warmup: int = _option(500, "Steps over which the learning rate rises.")
    cooldown: int = _option(0, "Steps at the end of a constant schedule over which the learning rate falls to 0.")
    weight_decay: float = _option(0.01, "AdamW's, of weights; biases and norms have none.")
    clip_norm: float = _option(1.0, "Largest norm of the gradient; 0 clips nothing.")
    ema_decay: tuple[float, ...] = _option(
        (0.9995,), "Of the average of the weights, which is the model; more, such as 0.9995,0.999, keep more averages."
    )
    precision: str = _option("fp32", "fp32; bf16 or fp16 for autocast (fp16 with scaled gradients).")
    compile: bool = _option(False, "Let torch.compile work on the network first, for a minute or so.")
    seed: int = _option(0, "Of everything random in the run.")
    save_every: int = _option(1000, "Steps between checkpoints.")
    keep: int = _option(2, "Newest checkpoints that stay; with validation the best one stays too.")
    log_every: int = _option(100, "Steps between lines of log.csv.")
    validate_every: int = _option(0, "Steps between looks at the loss on held-out images; 0 is never.")
    patience: int = _option(0, "Stop after so many validations without a new best; 0 is never.")
    sample_every: int = _option(0, "Steps between pictures drawn from the model, in OUT/samples; 0 is never.")
    tensorboard: bool = _option(False, "Also log for TensorBoard (needs tensorboard).")
    wandb: bool = _option(False, "Also log to Weights & Biases (needs wandb).")

    def __post_init__(self) -> None:
        self._check_kinds()
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise UsageError(f"{_dashed(name)}: must be at least 1, not {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{_dashed(name)}: must be at least 0, not {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**64:
            raise UsageError(f"seed: must be from -2^63 up to 2^64, which torch's generators take, not {self.seed}")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr: must be a number above 0, not {self.lr}")
        if not 0 <= self.cooldown <= self.steps:
            raise UsageError(f"cooldown: must be between 0 and steps, {self.steps}, not {self.cooldown}")
        if self.cooldown and self.schedule != "constant":
            raise UsageError(f"cooldown: goes with the constant schedule only; {self.schedule} ends at 0 by itself")
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        self._check_shares()
        if self.patience and not self.validate_every:
            raise UsageError("patience: needs --validate-every, whose losses it waits for")

    def _check_kinds(self) -> None:
        for f in fields(self):
            value, kind = getattr(self, f.name), f.type.split(" | ")[0]
            known, words = KINDS.get(kind, (object, "one number or several"))
            fits = isinstance(value, known) and (kind == "bool" or not isinstance(value, bool))
            if not fits and not (value is None and "None" in f.type):
                raise UsageError(f"{_dashed(f.name)}: must be {words}, not {value!r}")
        decays = self.ema_decay if isinstance(self.ema_decay, tuple | list) else (self.ema_decay,)
        try:
            object.__setattr__(self, "ema_decay", tuple(float(d) for d in decays))
        except (TypeError, ValueError):
            raise UsageError(f"ema-decay: must be one number or several, not {self.ema_decay!r}") from None

    def _check_shares(self) -> None:
        if not 0 <= self.holdout < 1:
            raise UsageError(f"holdout: must be a share from 0 up to 1, not {self.holdout}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UsageError(f"dropout: must be from 0 up to 1, not {self.dropout}")
        if not self.ema_decay or len(set(self.ema_decay)) < len(self.ema_decay):
            raise UsageError(f"ema-decay: must be one number or several different ones, not {self.ema_decay}")
        if wrong := [d for d in self.ema_decay if not 0 <= d < 1]:
            raise UsageError(f"ema-decay: must be from 0 up to 1, not {wrong[0]}")
        if self.image_size is not None and self.image_size < 1:
            raise UsageError(f"image-size: must be at least 1, not {self.image_size}")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"workers: must be at least 0, not {self.workers}")

    def learning_rate(self, step: int) -> float:
        """Of step 0 … steps-1: lr · min(1, (step + 1) / warmup) · the schedule, which the cosine (Loshchilov & Hutter
        2017) and the line take from the end of the warm-up to 0 at ``steps``."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = (self.steps - step) / max(1, self.steps - min(self.warmup, self.steps - 1))
        if self.schedule == "cosine":
            fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
        elif self.schedule == "linear":
            fall = min(1.0, left)
        else:
            fall = min(1.0, (self.steps - step) / self.cooldown) if self.cooldown else 1.0
        return self.lr * (min(rise, fall) if self.schedule == "constant" else rise * fall)

    def differences(self, saved: dict[str, Any], step: int) -> list[str]:
        """In words, what of these settings would make other steps than the run ``saved`` (as from `asdict`), which has
        come to ``step``. Before any cooldown begins, nothing depends on the length of a run of constant rate."""
        free = set(FREE)
        now = json.loads(json.dumps(asdict(self)))
        begun = any(step > c.get("steps", 0) - c.get("cooldown", 0) for c in (saved, now))
        if self.schedule == "constant" and not begun:
            free |= {"steps", "cooldown"}
        return [f"{k} {saved.get(k)!r} there, {v!r} now" for k, v in now.items() if k not in free and saved.get(k) != v]


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name}: must be {', '.join(known[:-1])} or {known[-1]}, not {value!r}")


def describe() -> list[tuple[str, str, Any, str]]:
    """Name, type (as written above), default and help of each setting."""
    return [(f.name, str(f.type), f.default, f.metadata["help"]) for f in fields(TrainConfig)]


def read_config(file: Path) -> tuple[str, dict[str, Any]]:
    """Recipe and settings of a run's ``config.json``; UsageError where it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        recipe, settings = str(content["recipe"]), dict(content["settings"])
    except FileNotFoundError:
        raise UsageError(f"config: there is no file {file}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"config: {file} is no config.json of a training run ({error!r})") from None
    if unknown := settings.keys() - {f.name for f in fields(TrainConfig)}:
        raise UsageError(f"config: {file} has settings that this fastgen does not know: {', '.join(sorted(unknown))}")
    return recipe, settings
