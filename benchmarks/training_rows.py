"""The rows of training around the network: the averages of the parameters, and what the loop adds to a step."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.harness import DTYPES, Bench, Column, Truth, Work, errors, nbytes, run_row, truth
from benchmarks.model_rows import unet
from benchmarks.record import Cell, Row
from fastgen.training.config import TrainConfig
from fastgen.training.ddpm import DDPMRecipe
from fastgen.training.ema import EMA
from fastgen.training.loop import Trainer

DECAYS = (0.9999, 0.9995, 0.999, 0.99)
COUNTS = (1, 2, 4)
LATE = 10**6  # a step at which the memory is long
BATCH, BLOCK, BLOCKS = 32, 5, 12  # of the loop: images, steps in a row, blocks; the first is not counted


# The averages


def ema_row(preset: str, count: int, bench: Bench) -> Row:
    """One update of ``count`` averages. Every way has averages of its own, which begin away from the parameters."""
    model = unet(preset).to(device=bench.device, memory_format=torch.channels_last).requires_grad_(False)
    params = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for p in params.values():  # none is 0, or an average would go through numbers that are slow to compute with
        p.copy_(torch.randn(p.shape, generator=generator))
    size = sum(p.numel() for p in params.values())
    row = Row("ema", f"{preset} ({size / 1e6:.3g} M)-{count} decays", "fp32", bench.device, "update")
    row.bytes = (1 + 2 * count) * nbytes(*params.values())
    row.limit_ms = bench.limit_ms(Work(row.bytes), "fp32")
    decays = DECAYS[:count]
    starts = [[p * (2 + d) for p in params.values()] for d in decays]
    reference = [
        d * e.double() + (1 - d) * p.double()
        for d, each in zip(decays, starts, strict=True)
        for e, p in zip(each, params.values(), strict=True)
    ]
    lerped = [
        e.lerp(p, 1 - d)
        for d, each in zip(decays, starts, strict=True)
        for e, p in zip(each, params.values(), strict=True)
    ]
    right = truth(reference, errors(lerped, reference), DTYPES["fp32"])
    columns = [
        _column(name, way(model, params, decays), starts, right)
        for name, way in {"eager": _loop, "foreach": _foreach, "AveragedModel": _averaged_model, "auto": _ours}.items()
    ]
    return run_row(row, columns, bench.timer, bench.seconds)


Update = tuple[list[list[Tensor]], Callable[[], None]]  # averages, [decays][params], and what updates them


def _column(name: str, update: Update, starts: list[list[Tensor]], right: Truth) -> Column:
    averages, call = update

    def check() -> list[Tensor]:
        for each, begin in zip(averages, starts, strict=True):
            torch._foreach_copy_(each, begin)
        call()
        return [e.clone() for each in averages for e in each]

    return Column(name, call, check, right, torch.no_grad, ours=name == "auto")


def _loop(model: torch.nn.Module, params: dict[str, Tensor], decays: tuple[float, ...]) -> Update:
    averages = [[p.clone() for p in params.values()] for _ in decays]

    def call() -> None:
        for d, each in zip(decays, averages, strict=True):
            for e, p in zip(each, params.values(), strict=True):
                e.lerp_(p, 1 - d)

    return averages, call


def _foreach(model: torch.nn.Module, params: dict[str, Tensor], decays: tuple[float, ...]) -> Update:
    averages = [[p.clone() for p in params.values()] for _ in decays]

    def call() -> None:
        for d, each in zip(decays, averages, strict=True):
            torch._foreach_lerp_(each, list(params.values()), 1 - d)

    return averages, call


def _averaged_model(model: torch.nn.Module, params: dict[str, Tensor], decays: tuple[float, ...]) -> Update:
    models = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d)) for d in decays]
    for m in models:
        m.n_averaged.fill_(1)  # the first update only copies

    def call() -> None:
        for m in models:
            m.update_parameters(model)

    return [list(m.module.parameters()) for m in models], call


def _ours(model: torch.nn.Module, params: dict[str, Tensor], decays: tuple[float, ...]) -> Update:
    ema = EMA(params, decays)
    return [list(each.values()) for each in ema.averages.values()], partial(ema.update, LATE)


# The loop


def loop_row(bench: Bench, blocks: int, block: int) -> Row:
    """A step of the Trainer, and of a bare loop with the same network, loss, optimizer and clipping, which averages and
    writes nothing: blocks of both in turn, within one run of the Trainer. Its checkpoints are not counted."""
    row = Row("loop", f"ddpm mnist-batch {BATCH}", "fp32", bench.device, "step", ours=["auto"])
    for name, samples in trainer_and_bare(bench.device, blocks, block).items():
        row.columns[name] = _cell(samples)
    return row


def own_cost_row(bench: Bench, repeats: int) -> Row:
    """The same without the network, whose gradients are made up: what is left is the optimizer in both, and in the
    Trainer what the loop itself costs. Of a whole step it is too little to be seen between two runs of a network."""
    row = Row("loop", f"ddpm mnist-batch {BATCH}, no network", "fp32", bench.device, "step", ours=["auto"])
    config = TrainConfig(preset="mnist", batch_size=BATCH, augment=False)
    recipe = DDPMRecipe(config, bench.device)
    trainer = Trainer(recipe, config, Path(tempfile.gettempdir()))
    trainer.loader = trainer._loader(0)
    params = list(trainer.params.values())
    made_up = [1e-3 * torch.randn_like(p) for p in params]

    def loss(*batch: Any) -> Tensor:
        return MadeUp.apply(made_up, *params)

    def step() -> None:
        trainer._train_step()
        trainer.step += 1

    def bare() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(params, config.clip_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    recipe.loss = loss  # type: ignore[method-assign, assignment]
    samples: dict[str, list[float]] = {"eager": [], "auto": []}
    for _ in range(repeats):
        for name, call in (("eager", bare), ("auto", step)):
            started = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - started)
    for name, seconds in samples.items():
        row.columns[name] = _cell(seconds[repeats // 10 :])
    return row


class MadeUp(torch.autograd.Function):
    """A loss of 0 with the gradients that it is given."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def _cell(seconds: list[float]) -> Cell:
    """Median and tenths, in ms."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Cell("unchecked", *(1e3 * s for s in (statistics.median(seconds), tenths[0], tenths[-1])), len(seconds))


def trainer_and_bare(device: str, blocks: int, block: int) -> dict[str, list[float]]:
    """Seconds a step of the bare loop, "eager", and of the Trainer, "auto", a sample for each block but the first."""
    steps = (blocks + 1) * block + 1
    config = TrainConfig(preset="mnist", batch_size=BATCH, steps=steps, warmup=1, save_every=steps, log_every=block)
    alternating = Alternating(DDPMRecipe(config, device), BareLoop(DDPMRecipe(config, device)), block)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(alternating, config, Path(folder) / "run").run(progress=False)
    return {name: samples[1:] for name, samples in alternating.samples.items()}


class BareLoop:
    """The shortest loop that takes the Trainer's steps."""

    def __init__(self, recipe: Any) -> None:
        self.recipe, self.config = recipe, recipe.config
        self.images = recipe.data.images.float() / 127.5 - 1
        self.labels = recipe.data.labels
        self.params = list(recipe.model.train().parameters())
        self.optimizer = torch.optim.AdamW(
            self.params, lr=self.config.lr, betas=(0.9, 0.99), weight_decay=self.config.weight_decay, fused=True
        )

    def run(self, steps: int) -> None:
        device = self.params[0].device
        for _ in range(steps):
            index = torch.randint(len(self.images), (self.config.batch_size,))
            images, labels = self.images[index].to(device), self.labels[index].to(device)
            self.recipe.loss(self.recipe.model, self.recipe.augment(images), labels).backward()
            torch.nn.utils.clip_grad_norm_(self.params, self.config.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Alternating:
    """The recipe of a Trainer which after every ``block`` of its steps runs the bare loop for as many.

    ``samples``: seconds a step, of the bare loop ("eager") and of the Trainer ("auto").
    """

    def __init__(self, recipe: Any, bare: BareLoop, block: int) -> None:
        self.recipe, self.bare, self.block = recipe, bare, block
        self.samples: dict[str, list[float]] = {"eager": [], "auto": []}
        self.since, self.step = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recipe, name)

    def loss(self, *batch: Any) -> Tensor:
        if self.step % self.block == 0:
            if self.step:
                self.samples["auto"].append((self._now() - self.since) / self.block)
            start = self._now()
            self.bare.run(self.block)
            self.samples["eager"].append((self._now() - start) / self.block)
            self.since = self._now()
        self.step += 1
        return self.recipe.loss(*batch)

    def _now(self) -> float:
        if self.bare.params[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def ema_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    if dtype == "fp32":
        for count in COUNTS[: 2 if quick else None]:
            yield partial(ema_row, "tiny" if quick else "cifar10", count, bench)


def loop_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    if dtype == "fp32":
        yield partial(own_cost_row, bench, 10 if quick else 200)
        yield partial(loop_row, bench, *((2, 1) if quick else (BLOCKS, BLOCK)))


# A process that is told when it was started, trains one step and prints the seconds to that step's begin and end.
START = """
import sys, time
started, out = float(sys.argv[1]), sys.argv[2]
from fastgen import cli
from fastgen.training import loop
real = loop.Trainer._train_step
def timed(self):
    times.append(time.time() - started)
    real(self)
    times.append(time.time() - started)
times, loop.Trainer._train_step = [], timed
sys.argv[1:] = ["train", "ddpm", "--data", "mnist-5k", "--steps", "1", "--out", out, "-q", *sys.argv[3:]]
try:
    cli.main()
finally:
    print(*times)
"""


def start_row(repeats: int, batch_size: int) -> Row:
    """From the start of the process `fastgen train ddpm --data mnist-5k` to the begin and the end of its first step."""
    row = Row("start", f"ddpm mnist-batch {batch_size}", "fp32", "cpu", "first step")
    samples: list[list[float]] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", START, str(time.time()), f"{folder}/run", "--batch-size", str(batch_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        samples.append([1e3 * float(seconds) for seconds in done.stdout.splitlines()[-1].split()])
    for name, times in zip(("begins", "ends"), zip(*samples, strict=True), strict=True):
        row.columns[name] = Cell("unchecked", statistics.median(times), min(times), max(times), repeats)
    return row


def start_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    if dtype == "fp32" and bench.device == "cpu":
        for batch_size in (4,) if quick else (32, 128):
            yield partial(start_row, 1 if quick else 5, batch_size)


TRAINING = {"ema": ema_rows, "loop": loop_rows, "start": start_rows}
