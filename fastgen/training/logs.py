"""What a run writes down as it goes: log.csv, and TensorBoard and Weights & Biases where they are asked for."""

from __future__ import annotations

import contextlib
import csv
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgen.atomic import atomic_file
from fastgen.training.config import TrainConfig

COLUMNS = ("step", "loss", "grad_norm", "lr", "images_per_s", "validation_loss")


class Log:
    """A context; `write` adds a line. Lines after ``step``, of a run that came further than its checkpoint, go.

    Raises ImportError where a package that was asked for is missing; `write`, OSError with the file's name.
    """

    def __init__(self, out: Path, step: int, config: TrainConfig) -> None:
        self._sinks: list[Any] = []
        self._closing = contextlib.ExitStack()
        if config.tensorboard:
            self._sinks.append(_tensorboard(out, step, self._closing))
        if config.wandb:
            self._sinks.append(_wandb(out, step, config, self._closing))
        self._file = out / "log.csv"
        _cut(self._file, step)

    def write(self, **values: float | None) -> None:
        """One line, of COLUMNS; what has no value is left empty."""
        new = not self._file.exists()
        try:
            with open(self._file, "a", newline="", encoding="utf-8") as f:
                writer = csv.writer(f)
                if new:
                    writer.writerow(COLUMNS)
                writer.writerow([_number(values.get(name)) for name in COLUMNS])
        except OSError as error:  # of a full disk: say at least where
            error.filename = str(self._file)
            raise
        for sink in self._sinks:
            sink({k: v for k, v in values.items() if v is not None and k != "step"}, values["step"])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closing.close()


def _number(value: float | None) -> str:
    """Of the losses every digit, so that two runs can be compared to the bit."""
    return "" if value is None else str(value)


def _cut(file: Path, step: int) -> None:
    """Drops the lines after ``step``, and one that was cut off; a file of other columns is put aside."""
    if not file.exists():
        return
    with open(file, newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f))
    if not rows or tuple(rows[0]) != COLUMNS:
        file.replace(file.with_suffix(".old.csv"))
        return
    kept = [row for row in rows[1:] if len(row) == len(COLUMNS) and row[0].isdecimal() and int(row[0]) <= step]
    with atomic_file(file) as work, open(work, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([COLUMNS, *kept])


def _tensorboard(out: Path, step: int, closing: contextlib.ExitStack) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs tensorboard: pip install 'fastgen-kernels[logs]'") from error
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
    closing.callback(writer.close)

    def write(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write


def _wandb(out: Path, step: int, config: TrainConfig, closing: contextlib.ExitStack) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("--wandb needs wandb: pip install wandb") from error
    file = out / "wandb.id"  # the same for a run that goes on, another for one that begins anew in its place
    if not step or not file.exists():
        file.write_text(secrets.token_hex(8))
    run = wandb.init(
        project="fastgen", name=out.name, id=file.read_text(), dir=str(out), config=asdict(config), resume="allow"
    )
    closing.callback(run.finish)
    return lambda values, step: run.log(values, step=step)
