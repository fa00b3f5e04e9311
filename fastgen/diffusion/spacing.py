"""Which of the T training steps a sampler visits: timestep sequences, and noise levels sigma for those of sigma space.

sigma = sqrt((1 - abar) / abar) is the noise beside an image of unscaled size: x_t = sqrt(abar) (x0 + sigma noise).
Everything is fp64. Legend: T training steps, S sampling steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastgen.diffusion.schedules import DiffusionConfig, alphas_cumprod
from fastgen.errors import UsageError

Spacing = Literal["leading", "trailing", "linspace"]
SigmaSpacing = Literal["leading", "trailing", "linspace", "karras"]
RHO = 7.0  # Karras et al. 2022, section 3
LEAST_ABAR = 2.0**-24  # diffusers' stand-in for an abar of 0, whose sigma is infinite


def check_steps(steps: int, most: int, why: str = "the steps the model was trained with") -> None:
    """Raises UsageError unless ``steps`` is a whole number from 1 to ``most``."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise UsageError(f"steps: must be between 1 and {most}, {why}, not {steps!r}")


def timestep_sequence(T: int, steps: int, spacing: Spacing = "trailing") -> Tensor:
    """The steps to visit, int64 [S], decreasing (Lin et al. 2024, table 2; as in diffusers).

    trailing begins at T-1, where training ended; leading ends at 0; linspace does both.
    Raises UsageError unless 1 <= steps <= T.
    """
    check_steps(steps, T)
    i = torch.arange(steps, dtype=torch.float64)  # multiplied out as NumPy does for diffusers, so that ties round alike
    if spacing == "trailing":
        return (T + i * ((T - T / steps) - T)).round().long() - 1
    if spacing == "leading":
        return (torch.arange(steps) * (T // steps)).flip(0)
    if spacing == "linspace":
        return (i * ((T - 1) / max(1, steps - 1))).round().long().flip(0)
    raise UsageError(f"spacing: must be leading, trailing or linspace, not {spacing!r}")


def solver_sequence(T: int, steps: int, spacing: Spacing = "trailing") -> Tensor:
    """`timestep_sequence` as DPM-Solver lays it out, int64 [S]: leading and linspace divide the range
    into steps + 1 and leave out the last, which would be t = 0. Raises UsageError beyond T - 1 steps there."""
    if spacing == "trailing":
        return timestep_sequence(T, steps, spacing)
    check_steps(steps, T - 1, f"one less than the steps the model was trained with, for spacing {spacing}")
    if spacing == "leading":
        return (torch.arange(1, steps + 1) * (T // (steps + 1))).flip(0)
    return timestep_sequence(T, steps + 1, spacing)[:-1]


def sigma_table(config: DiffusionConfig) -> Tensor:
    """sigma of each training step, fp64 [T], increasing; finite, with `LEAST_ABAR`, for zero terminal SNR: there
    the few steps before it with an even smaller abar are raised too, to between once and twice that."""
    abar = alphas_cumprod(config)
    if config.zero_terminal_snr:
        T = config.timesteps
        abar = abar.maximum(LEAST_ABAR * (1 + torch.arange(T - 1, -1, -1, dtype=torch.float64) / T))
    return ((1 - abar) / abar).sqrt()


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The piecewise linear function through (xs, ys), xs increasing, at x; constant outside. All fp64."""
    if len(xs) == 1:
        return ys.expand_as(x)
    i = torch.searchsorted(xs, x, right=True).clamp(1, len(xs) - 1)
    share = ((x - xs[i - 1]) / (xs[i] - xs[i - 1])).clamp(0, 1)
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


def karras_sigmas(config: DiffusionConfig, steps: int) -> tuple[Tensor, Tensor]:
    """t fp64 [S], fractional, and sigma [S] (Karras et al. 2022, eq. 5), from the schedule's largest to its least:

    sigma_i = (sigma_max^(1/rho) + i / (S - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, rho = 7;
    t is where log sigma, interpolated between training steps, has that value.
    """
    check_steps(steps, config.timesteps)
    sigmas = sigma_table(config)
    chosen = karras_ramp(sigmas[-1].item(), sigmas[0].item(), steps)
    return interpolate(chosen.log(), sigmas.log(), torch.arange(len(sigmas), dtype=torch.float64)), chosen


def karras_ramp(largest: float, least: float, steps: int) -> Tensor:
    """The sigma of `karras_sigmas` between any two, fp64 [S]."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = largest ** (1 / RHO), least ** (1 / RHO)
    return (high + ramp * (low - high)) ** RHO


def sigma_sequence(config: DiffusionConfig, steps: int, spacing: SigmaSpacing) -> tuple[Tensor, Tensor]:
    """t fp64 [S] and sigma fp64 [S], decreasing, as in diffusers: linspace has fractional t and interpolates sigma."""
    if spacing == "karras":
        return karras_sigmas(config, steps)
    sigmas = sigma_table(config)
    if spacing == "linspace":
        check_steps(steps, config.timesteps)
        t = torch.linspace(0, config.timesteps - 1, steps, dtype=torch.float64).flip(0)
        return t, interpolate(t, torch.arange(len(sigmas), dtype=torch.float64), sigmas)
    if spacing not in ("leading", "trailing"):
        raise UsageError(f"spacing: must be leading, trailing, linspace or karras, not {spacing!r}")
    t = timestep_sequence(config.timesteps, steps, spacing)
    return t.double(), sigmas[t]
