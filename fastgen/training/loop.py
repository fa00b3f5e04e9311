"""The training loop of every recipe: accumulation, autocast, clipping, AdamW, averages, validation, checkpoints.

Everything random in step s is drawn after seeding with (seed, s), and batch k is a function of (seed, k), so a resumed
run needs no generator's state: step s is the same step whenever it runs.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgen.errors import UsageError
from fastgen.training import run_folder
from fastgen.training.config import TrainConfig
from fastgen.training.data import Loader
from fastgen.training.divergence import explain
from fastgen.training.ema import EMA
from fastgen.training.logs import Log
from fastgen.training.optimizer import AdamW
from fastgen.training.recipes import Recipe
from fastgen.training.seeding import derive_seed, seed_everything
from fastgen.training.stopping import StopRequest

CHECK_EVERY = 20  # steps between looks at whether all was finite, where a look waits for the device
VALIDATION_IMAGES = 5000  # at most
SMALLEST_SCALE = 2.0**-10  # of fp16's gradients: below it, it is not the scale


@dataclass
class Validation:
    """The least loss so far, the step it was at, and how many validations came after it."""

    best: float | None = None
    step: int = 0
    waited: int = 0


class Trainer:
    """One run in the folder ``out``: `run` trains from where it stands to ``config.steps``.

    After `run`, ``stopped_by`` is the number of the signal that ended it early, or None.
    """

    def __init__(self, recipe: Recipe, config: TrainConfig, out: Path) -> None:
        self.recipe, self.config, self.out = recipe, config, out
        self.params = {k: p for k, p in recipe.model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.params.values())).device
        self.network: nn.Module = torch.compile(recipe.model) if config.compile else recipe.model  # type: ignore[assignment]
        weights = [p for p in self.params.values() if p.ndim > 1]
        others = [p for p in self.params.values() if p.ndim <= 1]  # a bias or a norm is not pulled to 0
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay,
            fused=True,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.ema = EMA(self.params, config.ema_decay)
        self.step = 0
        self.saved: int | None = None  # the step of the last checkpoint, written or gone on from
        self.seen: list[str] | None = None  # the checkpoints that were there when this run was read from them
        self.finished = True  # whether what is due after this step (validation, a line of the log) is done
        self.validation = Validation()
        self.losses: list[Tensor] = []  # since the last line of the log
        self.stopped_by: int | None = None
        self.on_save: Callable[[Path], None] | None = None
        self.grad_norm = torch.zeros((), device=self.device)  # of the last step, before it was clipped
        self._unchecked: list[Tensor] = []  # of the last steps, whether each was not finite
        self._looks = 1 if self.device.type == "cpu" or self.scaler.is_enabled() else CHECK_EVERY
        self._average: nn.Module | None = None

    # The run

    def run(self, progress: bool | None = None, on_save: Callable[[Path], None] | None = None) -> Path:
        """Trains to the end, or to a signal, and returns the last checkpoint. ``progress`` None: a bar on a terminal
        only. ``on_save`` is called with each checkpoint, once it is whole.

        Raises FloatingPointError, with step, module and last good checkpoint, where a loss or a gradient is not finite;
        OSError where a checkpoint cannot be written, which leaves the ones before.
        """
        self.recipe.model.train()
        self.on_save = on_save
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            stack.enter_context(run_folder.prepared(self.out, self.recipe.name, self.config, self.seen))
            self.seen = None
            # A step whose rest is still due has its line to come, even where a run that was killed had written it.
            log = stack.enter_context(Log(self.out, self.step if self.finished else self.step - 1, self.config))
            self.loader = stack.enter_context(contextlib.closing(self._loader(self.step)))
            bar = stack.enter_context(
                tqdm(
                    total=self.config.steps,
                    initial=self.step,
                    unit="step",
                    disable=None if progress is None else not progress,
                )
            )
            stop.waiting()
            self._run(stop, log, bar)
        self.stopped_by = stop.signal  # which may have come while all of that was closed
        return self.out / run_folder.name(self.saved)

    def _run(self, stop: StopRequest, log: Log, bar: tqdm) -> None:
        timer = Timer(self.config.batch_size * self.config.accumulate, self.step)
        if not self.finished:
            self._finish_step(stop, log, bar, timer)
        while self.step < self.config.steps and not self.over and not stop.signal:
            self._train_step()
            self.step += 1
            self.finished = False
            bar.update()
            self._finish_step(stop, log, bar, timer)
        if self.saved != self.step:
            self._check()
            self.save()

    @property
    def over(self) -> bool:
        """Whether ``patience`` validations brought nothing better."""
        return 0 < self.config.patience <= self.validation.waited

    def _finish_step(self, stop: StopRequest, log: Log, bar: tqdm, timer: Timer) -> None:
        """What is due after a step, in this order; a signal leaves the rest, from validation on, to the resumed run."""
        config, last = self.config, self.step == self.config.steps
        due = [
            n and (last or self.step % n == 0) for n in (config.save_every, config.validate_every, config.sample_every)
        ]
        saving, validating, drawing = due
        logging = last or self.step % config.log_every == 0 or validating
        if saving or logging or drawing or len(self._unchecked) >= self._looks:
            self._check()
        loss = self.validate(stop) if validating else None
        if drawing and not stop.signal:
            self._draw()
        if (validating or drawing) and stop.signal:
            return
        best = loss is not None and self._judge(loss)  # not before: what the resumed run does again is judged once
        if logging:
            self._log(log, bar, timer(self.step), loss)
        self.finished = True
        if saving or best:
            self.save()

    def _log(self, log: Log, bar: tqdm, rate: float, validation: float | None) -> None:
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        shown = [f"loss {loss:.4f}", f"{rate:.0f} images/s"]
        if validation is not None:
            shown.insert(1, f"validation {validation:.4f}")
        if damaged := self.loader.damaged:
            shown.append(f"{len(damaged)} damaged")
            run_folder.list_damaged(self.out, damaged)
        bar.set_postfix_str(", ".join(shown))
        log.write(
            step=self.step, loss=loss, grad_norm=self.grad_norm.item(), lr=self.config.learning_rate(self.step - 1),
            images_per_s=round(rate, 1), validation_loss=validation,
        )  # fmt: skip

    # One step

    def _loader(self, step: int, workers: int | None = None) -> Loader:
        config = self.config
        return Loader(
            self.recipe.data, config.batch_size, seed=derive_seed(config.seed, "order"), start=step * config.accumulate,
            workers=config.workers if workers is None else workers, device=self.device,
        )  # fmt: skip

    def _losses(self, loader: Loader, step: int, network: nn.Module) -> Iterator[Tensor]:
        """The loss of each batch of a step, all that is random in them drawn from the step's own seed."""
        seed_everything(self.config.seed, "step", step)
        for _ in range(self.config.accumulate):
            images, labels = next(loader)
            if self.config.augment:
                images = self.recipe.augment(images)
            with self._autocast():
                loss = self.recipe.loss(network, images, labels)
            yield loss / self.config.accumulate

    def _autocast(self) -> torch.autocast:
        low = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, low, enabled=self.config.precision != "fp32")

    def _train_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.step)
        loss = torch.zeros((), device=self.device)
        for part in self._losses(self.loader, self.step, self.network):
            self.scaler.scale(part).backward()
            loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.config.clip_norm or math.inf)
        # Where a step is not finite it is not taken, nor any after it until somebody looks: the weights stay good, and
        # the step can be taken again to see why. The optimizer takes that as `found_inf`: nothing waits for the device.
        # In fp16 gradients that overflow belong to the search for their scale.
        bad = ~loss.isfinite() if self.scaler.is_enabled() else ~(loss + self.grad_norm).isfinite()
        self._unchecked.append(torch.stack([*self._unchecked[-1:], bad]).any())
        self.losses.append(loss)
        if self._looks == 1:
            self._check()
        elif not self.scaler.is_enabled():
            self.optimizer.found_inf = self._unchecked[-1].float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step, skip=None if self._looks == 1 else self._unchecked[-1])

    def _check(self) -> None:
        """Waits for the device. Raises FloatingPointError for the first of the last steps that was not finite."""
        bad = torch.stack(self._unchecked).tolist() if self._unchecked else []
        self._unchecked.clear()
        # Within a step its own number is still self.step.
        if any(bad):
            first = self.step - len(bad) + bad.index(True) + (self._looks == 1)
            raise FloatingPointError(self._diverged(first))
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise FloatingPointError(
                f"step {self.step}: the gradients overflow in fp16 however they are scaled; {self._last_good()}; use "
                "--precision bf16 or fp32"
            )

    def _diverged(self, step: int) -> str:
        with contextlib.closing(self._loader(step, workers=0)) as loader:
            where = explain(self.recipe.model, lambda: self._losses(loader, step, self.recipe.model))
        return (
            f"step {step + 1}: the loss or its gradient became NaN or inf; {where}; {self._last_good()}; lower --lr"
            + ("" if self.config.precision == "fp32" else " or use --precision fp32")
        )

    def _last_good(self) -> str:
        if self.saved is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.out / run_folder.name(self.saved)}"

    # The average: what is validated, drawn from and saved

    def average(self) -> nn.Module:
        """The model with the first average of the weights, in evaluation mode; the same module at each call."""
        if self._average is None:
            self._average = copy.deepcopy(self.recipe.model).requires_grad_(False).eval()
        with torch.no_grad():
            own = dict(self._average.named_parameters())
            for name, value in self.ema.averages[self.config.ema_decay[0]].items():
                own[name].copy_(value)
            for mine, its in zip(self._average.buffers(), self.recipe.model.buffers()):
                mine.copy_(its)
        return self._average

    def validate(self, stop: StopRequest | None = None) -> float | None:
        """The mean loss of the average on held-out images, the same noise each time; None if a signal came."""
        config, total = self.config, 0.0
        source = self.recipe.held_out
        size = min(config.batch_size, len(source), VALIDATION_IMAGES)
        batches = min(len(source), VALIDATION_IMAGES) // size
        network = self.average()
        loader = Loader(source, size, seed=0, workers=config.workers, device=self.device, shuffle=False)
        with contextlib.closing(loader), torch.no_grad(), self._autocast():
            for i in range(batches):
                if stop and stop.signal:
                    return None
                seed_everything(config.seed, "validation", i)
                total += self.recipe.loss(network, *next(loader)).item()
        return total / batches

    def _judge(self, loss: float) -> bool:
        """Takes note of a validation's loss; whether it is the best, which NaN never is."""
        if math.isfinite(loss) and (self.validation.best is None or loss < self.validation.best):
            self.validation = Validation(loss, self.step)
            return True
        self.validation.waited += 1
        return False

    def _draw(self) -> None:
        if (grid := self.recipe.grid(self.average())) is not None:
            folder = self.out / "samples"
            folder.mkdir(exist_ok=True)
            grid.save(folder / f"{run_folder.name(self.step)}.png")

    # Checkpoints

    def save(self) -> Path:
        """Writes checkpoint ``step-<n>`` (the average as the model, the rest for `resume`) and drops old ones."""
        path = run_folder.write(self, keep_also=self.validation.step)
        self.saved = self.step
        if self.on_save:
            self.on_save(path)
        return path


class Timer:
    """Images a second since the last call."""

    def __init__(self, images: int, step: int) -> None:
        self.images, self.step, self.at = images, step, time.perf_counter()

    def __call__(self, step: int) -> float:
        now, before = time.perf_counter(), self.at
        rate = self.images * (step - self.step) / max(now - before, 1e-9)
        self.step, self.at = step, now
        return rate


def start_or_resume(recipe: Recipe, config: TrainConfig, out: Path, resume: str | None) -> Trainer:
    """A Trainer at the right step: fresh, or from the newest whole checkpoint in ``out`` with resume="auto"."""
    if resume not in (None, "auto"):
        raise UsageError(f"resume: must be 'auto' or left out, not {resume!r}")
    existing = run_folder.check(out)
    if existing and resume is None:
        raise UsageError(f"out: {out} already holds a run; give --resume auto to go on with it, or another folder")
    trainer = Trainer(recipe, config, out)
    trainer.seen = existing
    if existing:
        run_folder.restore(trainer, run_folder.newest_verified(out))
    return trainer
