"""Samplers: each is a timestep sequence and a table of coefficients for `ops.diffusion_step`.

Everything is computed in fp64 and rounded to fp32 once. Legend: T training steps, S sampling steps,
abar the cumulated alpha at a step, abar' at the step that follows in sampling (1 after the last).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastgen.diffusion.schedules import DiffusionConfig, Prediction, alphas_cumprod
from fastgen.errors import UsageError

Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class SamplingDefaults:
    """What `fastgen.sample` uses where the caller does not say; it travels with a model's weights."""

    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 1.0


@dataclass(frozen=True)
class SamplingPlan:
    """A sampler laid out for a model: timesteps int64 [S], decreasing; coefficients fp32 [S, 9]
    (the columns of `ops.diffusion_step`); noisy: whether any step adds noise."""

    timesteps: Tensor
    coefficients: Tensor
    noisy: bool


class Sampler(Protocol):
    """Anything that lays out a plan can be passed to `fastgen.sample`."""

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan: ...


def timestep_sequence(T: int, steps: int, spacing: Spacing = "trailing") -> Tensor:
    """The steps to visit, int64 [S], decreasing (Lin et al. 2024, table 2; as in diffusers).

    trailing begins at T-1, where training ended; leading ends at 0; linspace does both.
    Raises UsageError unless 1 <= steps <= T.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= T:
        raise UsageError(f"steps: must be between 1 and {T}, the steps the model was trained with, not {steps!r}")
    if spacing == "trailing":
        return (T - torch.arange(steps, dtype=torch.float64) * (T / steps)).round().long() - 1
    if spacing == "leading":
        return (torch.arange(steps) * (T // steps)).flip(0)
    if spacing == "linspace":
        return torch.linspace(0, T - 1, steps, dtype=torch.float64).round().long().flip(0)
    raise UsageError(f"spacing: must be leading, trailing or linspace, not {spacing!r}")


def predictions(abar: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p0 … p3, each like abar: x0 = p0 x_t + p1 m and eps = p2 x_t + p3 m for the network's output m."""
    a, b = abar.sqrt(), (1 - abar).sqrt()
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    if prediction == "eps":
        return 1 / a, -b / a, zero, one
    if prediction == "x0":
        return zero, one, 1 / b, -a / b
    return a, -b, b, a


def _layout(config: DiffusionConfig, steps: int, spacing: Spacing) -> tuple[Tensor, Tensor, Tensor]:
    """timesteps [S], abar [S] and abar' [S]."""
    timesteps = timestep_sequence(config.timesteps, steps, spacing)
    abar = alphas_cumprod(config)[timesteps]
    return timesteps, abar, torch.cat([abar[1:], abar.new_ones(1)])


def _plan(timesteps: Tensor, columns: list[Tensor]) -> SamplingPlan:
    table = torch.stack(columns, dim=1)
    return SamplingPlan(timesteps, table.float(), bool((table[:, 8] != 0).any()))


@dataclass(frozen=True)
class DDIM:
    """Song et al. 2021, eq. 12 and 16:

    x' = sqrt(abar') x0 + sqrt(1 - abar' - sigma²) eps + sigma noise,
    sigma = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar').

    ``eta`` 0 is deterministic, 1 is as noisy as DDPM. ``use_clipped_model_output`` (diffusers' name)
    takes eps = (x_t - sqrt(abar) x0) / sqrt(1 - abar) from the clipped x0 instead of from the network:
    the same where nothing was clipped, and far better under guidance, which often overshoots.
    """

    eta: float = 0.0
    spacing: Spacing = "trailing"
    use_clipped_model_output: bool = True

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        if not 0 <= self.eta <= 1:
            raise UsageError(f"eta: must be between 0 and 1, not {self.eta}")
        timesteps, abar, after = _layout(config, steps, self.spacing)
        sigma = self.eta * ((1 - after) / (1 - abar) * (1 - abar / after)).sqrt()
        zero = torch.zeros_like(abar)
        eps = (1 - after - sigma.square()).clamp(min=0).sqrt()
        update = [zero, after.sqrt(), eps]
        if self.use_clipped_model_output:
            x_t = eps / (1 - abar).sqrt()
            update = [x_t, after.sqrt() - x_t * abar.sqrt(), zero]
        return _plan(timesteps, [*predictions(abar, config.prediction), *update, zero, sigma])


@dataclass(frozen=True)
class DDPM:
    """Ho et al. 2020, eq. 7, on the visited steps, with alpha = abar / abar' and beta = 1 - alpha:

    x' = sqrt(alpha) (1 - abar') / (1 - abar) x_t + sqrt(abar') beta / (1 - abar) x0 + sigma noise,
    sigma² = beta (1 - abar') / (1 - abar).
    """

    spacing: Spacing = "trailing"

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        timesteps, abar, after = _layout(config, steps, self.spacing)
        alpha = abar / after
        keep = alpha.sqrt() * (1 - after) / (1 - abar)
        towards = after.sqrt() * (1 - alpha) / (1 - abar)
        sigma = ((1 - alpha) * (1 - after) / (1 - abar)).sqrt()
        zero = torch.zeros_like(abar)
        return _plan(timesteps, [*predictions(abar, config.prediction), keep, towards, zero, zero, sigma])


SAMPLERS: dict[str, type] = {"ddim": DDIM, "ddpm": DDPM}


def get_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of a name, or the object itself; UsageError, with the names, for an unknown one."""
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise UsageError(f"sampler: unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
        return SAMPLERS[sampler]()
    if not hasattr(sampler, "plan"):
        raise UsageError(f"sampler: must be one of {', '.join(SAMPLERS)} or a sampler object, not {sampler!r}")
    return sampler
