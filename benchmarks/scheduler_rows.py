"""The rows of `fastgen.schedulers`: one step in mid-run, noise from a generator included, against diffusers' own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DTYPES, Bench, Column, Work, nbytes, run_row, truth
from benchmarks.record import Row
from fastgen import backends, schedulers

SHAPE, STEPS, STEP = (16, 3, 256, 256), 50, 25
# Name -> class, settings, arguments of step, tensors read, tensors written.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int]] = {
    "ddpm": ("DDPMScheduler", {}, {}, 3, 2),
    "ddim": ("DDIMScheduler", {}, {}, 2, 2),
    "ddim eta 1": ("DDIMScheduler", {}, {"eta": 1.0}, 3, 2),
    "euler": ("EulerDiscreteScheduler", {}, {}, 2, 2),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, {}, 3, 2),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, 4, 2),
}  # fmt: skip


def stepper(library: Any, name: str, x: Tensor, m: Tensor) -> Callable[[], list[Tensor]]:
    """A call that takes the same step each time: a scheduler that counts is set back, and its memory with it."""
    kind, settings, options, _, _ = KINDS[name]
    scheduler = getattr(library, kind)(**settings)
    scheduler.set_timesteps(STEPS, device=x.device)
    scheduler.is_scale_input_called = True  # which Euler asks for
    random = "generator" in inspect.signature(scheduler.step).parameters
    generator = torch.Generator(x.device)
    draws = {"generator": generator} if random else {}
    for t in scheduler.timesteps[STEP - 1 : STEP]:
        scheduler.step(m, t, x, **draws, **options)
    state, t = dict(vars(scheduler)), scheduler.timesteps[STEP]

    def call() -> list[Tensor]:
        vars(scheduler).update({k: copy.copy(v) if isinstance(v, list) else v for k, v in state.items()})
        generator.manual_seed(0)
        return [scheduler.step(m, t, x, **draws, **options).prev_sample]

    return call


def scheduler_row(name: str, dtype: str, bench: Bench) -> Row:
    import diffusers

    row = Row("schedulers", f"{name}-{'x'.join(map(str, SHAPE))}", dtype, bench.device, images=SHAPE[0])
    row.auto = backends.preferred("diffusion_step", bench.device)
    generator = torch.Generator().manual_seed(0)
    x, m = (torch.randn(SHAPE, generator=generator).to(bench.device, DTYPES[dtype]) for _ in range(2))
    row.bytes = nbytes(x) * sum(KINDS[name][3:])
    row.limit_ms = bench.limit_ms(Work(row.bytes), dtype)
    theirs, ours = stepper(diffusers, name, x, m), stepper(schedulers, name, x, m)
    right = truth([theirs()[0].double()], [0.0], DTYPES[dtype])
    columns = [
        Column("diffusers", theirs, theirs, right, torch.no_grad),
        Column("auto", ours, ours, right, torch.no_grad, ours=True),
    ]
    return run_row(row, columns, bench.timer, bench.seconds)


def scheduler_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    for name in list(KINDS)[: 1 if quick else None]:
        yield partial(scheduler_row, name, dtype, bench)


SCHEDULERS = {"schedulers": scheduler_rows}
