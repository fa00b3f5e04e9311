"""The rows of `fastgen.accelerate` on models that other people wrote: a call, a training step, and what a call costs.

Columns: the model as it was written; the same channels_last; torch.compile, also with freezing; accelerated.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastgen
from benchmarks.drop_in_models import MODELS, Foreign, gan_step, plain_step, tensor
from benchmarks.harness import DTYPES, Bench, Column, Truth, run_row
from benchmarks.record import Cell, Row
from fastgen.acceleration import accelerating
from fastgen.acceleration.backend import compile_graph
from fastgen.tolerance import frobenius_error

# Name in drop_in_models.MODELS, batch.
CALLS = (
    ("unet2d-cifar10", 4), ("denoising-diffusion-pytorch", 4), ("unet2d-cifar10", 1), ("dcgan-generator", 16),
    ("cyclegan-instance", 1),
)  # fmt: skip
DECODE = (("autoencoder-kl-decode", 1),)
STEPS = (("unet2d-cifar10", 8), ("dcgan", 64), ("vae", 64))
TOLERANCE = 1e-4  # of a whole model in fp32, relative


def _quiet(model: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastgen.accelerate(copy.deepcopy(model), **options)


def call_row(name: str, batch: int, dtype: str, bench: Bench) -> Row:
    """A call in evaluation, without gradients."""
    torch._dynamo.reset()
    foreign, kind = MODELS[name], DTYPES[dtype]
    row = Row("accelerate", f"{name}-batch {batch}", dtype, bench.device, auto="accelerate")
    model = foreign.build().eval().to(bench.device, kind)
    args, kwargs = foreign.inputs(model, batch)
    with torch.no_grad():
        reference = [tensor(model(*args, **kwargs)).clone()]
    right = Truth(reference, [TOLERANCE], frobenius_error)

    def column(label: str, network: Callable[..., Any], last: bool = False, ours: bool = False) -> Column:
        given = tuple(a.contiguous(memory_format=torch.channels_last) if last and _image(a) else a for a in args)

        def call() -> list[Tensor]:
            return [tensor(network(*given, **kwargs))]

        return Column(label, call, call, right, torch.no_grad, ours=ours)

    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    large = (name, batch) in DECODE  # which takes half a minute a call as it was written
    columns = [column("eager", model), column("accelerate infer", _quiet(model, mode="infer"), ours=True)]
    if not large:
        columns += [
            column("eager channels_last", last, last=True),
            column("accelerate", _quiet(model), ours=True),
        ]
    modes = bench.compile_modes(row)
    if modes and bench.device == "cpu" and not large:
        modes["compile freezing"] = {"options": {"freezing": True}}
    for label, options in modes.items():
        columns.append(column(label, torch.compile(copy.deepcopy(model), dynamic=False, **options)))
    if modes:
        columns.append(column("compile channels_last", torch.compile(copy.deepcopy(last), dynamic=False), last=True))
    return run_row(row, columns, bench.timer, bench.seconds)


def _image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4


def step_row(name: str, batch: int, dtype: str, bench: Bench) -> Row:
    """A training step: forward, backward, the optimizer; of a GAN both networks'. Right if the losses are."""
    torch._dynamo.reset()
    foreign, kind = MODELS[name], DTYPES[dtype]
    row = Row(
        "accelerate", f"{name} training-batch {batch}", dtype, bench.device, "forward+backward", auto="accelerate"
    )
    model = foreign.build().train().to(bench.device, kind)
    args, kwargs = foreign.inputs(model, batch)

    def column(label: str, network: nn.Module, ours: bool = False) -> Column:
        networks = list(network.values()) if foreign.gan else [network]
        optimizers = [torch.optim.AdamW(n.parameters(), lr=1e-9, weight_decay=0.0) for n in networks]

        def step() -> list[Tensor]:
            torch.manual_seed(0)
            losses = (gan_step if foreign.gan else plain_step)(network, foreign, optimizers, args, kwargs)
            return [torch.tensor(losses)]

        return Column(label, step, step, right, ours=ours)

    right = Truth([torch.zeros(0)], [0.0])
    eager = column("eager", copy.deepcopy(model))
    right = Truth(eager.call(), [TOLERANCE], frobenius_error)
    columns = [
        column("eager", copy.deepcopy(model)),
        column("accelerate", _each(copy.deepcopy(model), foreign, _accelerated), ours=True),
    ]
    for label, options in bench.compile_modes(row).items():
        compiled = _each(copy.deepcopy(model), foreign, partial(_compiled, dynamic=False, **options))
        columns.append(column(label, compiled))
    return run_row(row, columns, bench.timer, bench.seconds)


def _each(model: nn.Module, foreign: Foreign, do: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """``do`` to the network, or to each of a GAN's."""
    for network in model.values() if foreign.gan else [model]:
        do(network)
    return model


def _accelerated(network: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastgen.accelerate(network)


def _compiled(network: nn.Module, **options: Any) -> nn.Module:
    network.compile(**options)
    return network


def overhead_row(name: str, bench: Bench, calls: int = 60) -> Row:
    """What a call costs around the captured graph: Dynamo's guards and what stands before them. And the first call.

    Columns: "Dynamo" is torch.compile with a backend that runs what it is given. Each once with the graph at work, and
    once ("idle") with a graph that returns at once, so that caches stay warm. No gate: there is nothing to compute.
    """
    row = Row("accelerate", f"{name} around the graph", "fp32", bench.device, auto="accelerate")
    foreign = MODELS[name]
    made = foreign.build().eval().to(bench.device)
    args, kwargs = foreign.inputs(made, 1)
    row.case += f", {sum(1 for _ in made.parameters())} parameters"
    for label in ("Dynamo", "accelerate", "accelerate infer"):
        torch._dynamo.reset()
        model, clock = copy.deepcopy(made), _Clock()
        with torch.no_grad(), mock.patch.object(accelerating, "compile_graph", clock.compile_graph):
            start = time.perf_counter()
            if label == "Dynamo":
                model.compile(backend=clock.backend)
            else:
                fastgen.accelerate(model, mode="infer" if "infer" in label else "auto")
            model(*args, **kwargs)
            row.columns[f"first call, {label}"] = _cell([time.perf_counter() - start])
            for clock.idle in (False, True):
                around = [clock.around(lambda model=model: model(*args, **kwargs)) for _ in range(calls)]
                row.columns[f"{label}, idle" if clock.idle else label] = _cell(around)
    return row


def _cell(seconds: list[float]) -> Cell:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds
    ms = [1e3 * s for s in (statistics.median(seconds), tenths[0], tenths[-1])]
    return Cell("unchecked", ms=ms[0], p10_ms=ms[1], p90_ms=ms[2], samples=len(seconds))


class _Clock:
    """Adds up the time that captured graphs take, so that what a call takes beside them is known."""

    def __init__(self) -> None:
        self.inside, self.idle, self.last = 0.0, False, None

    def timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            if not self.idle:
                start = time.perf_counter()
                self.last = forward(*given)
                self.inside += time.perf_counter() - start
            return self.last

        return run

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return self.timed(graph.forward)

    def compile_graph(self, *args: Any) -> Any:
        (result, forward), failure = compile_graph(*args)
        return (result, self.timed(forward)), failure

    def around(self, call: Callable[[], Any]) -> float:
        self.inside = 0.0
        start = time.perf_counter()
        call()
        return time.perf_counter() - start - self.inside


def call_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    for name, batch in CALLS[-2:-1] if quick else CALLS:
        yield partial(call_row, name, batch, dtype, bench)


def decode_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    """A row that takes ten minutes."""
    for name, batch in () if quick else DECODE:
        yield partial(call_row, name, batch, dtype, bench)


def step_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    for name, batch in STEPS[-1:] if quick else STEPS:
        yield partial(step_row, name, batch, dtype, bench)


def overhead_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    if dtype == "fp32" and not quick:
        yield partial(overhead_row, "unet2d-cifar10", bench)


DROP_IN = {
    "accelerate": call_rows, "accelerate-training": step_rows, "accelerate-overhead": overhead_rows,
    "accelerate-decode": decode_rows,
}  # fmt: skip
