"""Rows that only a GPU has: sampling and training of google/ddpm-cifar10-32's network as people run it there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import DTYPES, Bench, Column, Truth, run_row, truth
from benchmarks.model_rows import MODEL_TOLERANCE, diffusers_unet, plain_pytorch, unet
from benchmarks.record import Row
from fastgen import backends

BATCHES, STEPS = (1, 16, 256), 50
TRAINING_BATCH = 128
GREY_LEVELS = 4.0  # that an image may be off on average: fifty steps in half precision, summed in another order


def _mean_error(actual: Tensor, reference: Tensor) -> float:
    return (actual.double() - reference.double()).abs().mean().item()


def sampling_row(batch: int, dtype: str, bench: Bench) -> Row:
    """DDIM, 50 steps, to uint8 images: fastgen.sample by launches, by graphs, by one graph, compiled; and diffusers."""
    from fastgen.sampling import sample

    torch._dynamo.reset()
    row = Row("sampling", f"cifar10-batch {batch}-ddim {STEPS}", dtype, bench.device, images=batch)
    row.auto = backends.preferred("diffusion_step", bench.device)
    model = unet("cifar10").to(bench.device, DTYPES[dtype])

    def ours(**options: object) -> Callable[[], list[Tensor]]:
        return lambda: [
            sample(model, batch, batch_size=batch, steps=STEPS, sampler="ddim", progress=False, **options).images
        ]

    with plain_pytorch():
        right = Truth(ours(graph=False)(), [GREY_LEVELS], _mean_error)

    def column(name: str, call: Callable, context: Callable = nullcontext, fused: bool = True) -> Column:
        return Column(name, call, call, right, context, ours=fused)

    columns = [
        column("eager", ours(graph=False), plain_pytorch, fused=False),
        column("launches", ours(graph=False)),
        column("auto", ours()),
        column("loop graph", ours(graph="loop")),
    ]
    others = diffusers_unet("cifar10", model)
    if others is not None:
        columns.append(Column("diffusers", partial(_pipeline, others, others, batch)))
    if bench.compile_modes(row):
        columns.append(column("compiled", ours(compile=True)))
        if others is not None:
            compiled = torch.compile(others, mode="max-autotune", dynamic=False)
            columns.append(Column("diffusers compiled", partial(_pipeline, others, compiled, batch)))
    return run_row(row, columns, bench.timer, bench.seconds)


@torch.no_grad()
def _pipeline(network: nn.Module, forward: Callable, batch: int) -> list[Tensor]:
    """What diffusers' DDIMPipeline does, with its own noise, so that its images are others."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=True)
    scheduler.set_timesteps(STEPS)
    parameter = next(network.parameters())
    size = network.config.sample_size
    x = torch.randn(batch, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    for t in scheduler.timesteps:
        if forward is not network:
            torch.compiler.cudagraph_mark_step_begin()
        x = scheduler.step(forward(x, t.to(parameter.device)).sample, t, x).prev_sample
    return [((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()]


def training_row(dtype: str, bench: Bench) -> Row:
    """Forward, backward and a fused AdamW step at batch 128, weights in fp32, the network under autocast."""
    torch._dynamo.reset()
    row = Row("training", f"cifar10-batch {TRAINING_BATCH}-autocast", dtype, bench.device, "forward + backward")
    row.auto = backends.preferred("norm_act_conv2d", bench.device)
    model = unet("cifar10").to(bench.device)
    generator, size = torch.Generator().manual_seed(0), model.config.image_size
    x = torch.randn((TRAINING_BATCH, model.config.in_channels, size, size), generator=generator).to(bench.device)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.randint(1000, (TRAINING_BATCH,), generator=generator).to(bench.device)
    with torch.no_grad(), plain_pytorch():
        loss = model(x, t).double().square().mean()
    right = truth([loss], [MODEL_TOLERANCE * loss.item()], DTYPES[dtype])

    def column(name: str, network: nn.Module, context: Callable = nullcontext, compile: bool = False) -> Column:
        network = copy.deepcopy(network).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-9, weight_decay=0.0, fused=True)
        forward = torch.compile(network, dynamic=False) if compile else network

        def step() -> list[Tensor]:
            optimizer.zero_grad()
            with torch.autocast(bench.device, DTYPES[dtype]):
                output = forward(x, t)
            loss = getattr(output, "sample", output).float().square().mean()
            loss.backward()
            optimizer.step()
            return [loss.detach()]

        return Column(name, step, step, right, context, ours=context is nullcontext and name != "diffusers")

    columns = [column("eager", model, plain_pytorch), column("auto", model)]
    others = diffusers_unet("cifar10", model)
    if others is not None:
        columns.append(column("diffusers", others))
    if bench.compile_modes(row):
        columns += [column("compile", model, plain_pytorch, compile=True), column("auto compiled", model, compile=True)]
    return run_row(row, columns, bench.timer, bench.seconds)
