"""A DDPM sampling step, against plain PyTorch and diffusers' DDPMScheduler.step."""

import importlib.util

import torch

from benchmarks.harness import Work, nbytes
from benchmarks.ops import philox
from fastgen.diffusion.samplers import DDPM
from fastgen.diffusion.schedules import DiffusionConfig

STEPS, ROW = 1000, 500
TENSORS = ("x_t", "model_out", "history", "noise")


@torch.no_grad()
def prepare(inputs):
    """DDPM's table in place of a random one, so that others compute the same step, and no x0 at the edge of the clip,
    where the last bit decides between two gradients."""
    x, m, clip = inputs["x_t"], inputs["model_out"], inputs.get("clip")
    table = DDPM().plan(DiffusionConfig(timesteps=STEPS), STEPS).coefficients.to(x.device)
    if clip is not None:
        guided = len(m) == 2 * len(x)
        uncond, cond = m.chunk(2) if guided else (m, m)
        p0, p1 = table[ROW, :2]
        x0 = p0 * x + p1 * (uncond + inputs["guidance"] * (cond - uncond) if guided else m)
        edge = (x0.abs() - clip).abs() < max(1e-3, 16 * torch.finfo(x.dtype).eps)
        x.masked_fill_(edge, 0)
        m.masked_fill_(torch.cat([edge, edge]) if guided else edge, 0)
    return {**inputs, "coefficients": table, "step": torch.tensor(ROW, device=table.device)}


def work(inputs, outputs):
    x_next = outputs[0]
    moved = nbytes(*(inputs.get(name) for name in TENSORS), x_next)  # backward: the same, with gradients for values
    drawn = philox.FLOPS if inputs.get("seeds") is not None else 0
    forward = Work(moved, (15 + drawn) * x_next.numel())
    return forward, Work(moved + nbytes(inputs["x_t"], inputs["model_out"]), 20 * x_next.numel())


def columns(inputs):
    if inputs.get("guidance") is not None or importlib.util.find_spec("diffusers") is None:
        return {}
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=STEPS, variance_type="fixed_small", clip_sample=True)

    def step(x_t, model_out, noise=None, **_):
        # Where noise is given, it is what this generator draws.
        generator = None if noise is None else torch.Generator(x_t.device).manual_seed(0)
        return scheduler.step(model_out, STEPS - 1 - ROW, x_t, generator=generator).prev_sample

    return {"diffusers": step}
