"""Samplers: each is a timestep sequence and a table of coefficients for `ops.diffusion_step`.

Everything is computed in fp64 and rounded to fp32 once. The state is always the x_t that the network was
trained on, x_t = sqrt(abar) x0 + sqrt(1 - abar) noise; what a paper writes for x_t / sqrt(abar) = x0 + sigma noise
("sigma space") is scaled accordingly. Legend: T training steps, S rows of the table, one for each call of the
network; abar the cumulated alpha at a row, abar' at the row that follows (1 after the last), sigma and sigma' =
sqrt((1 - abar) / abar) likewise, a = sqrt(abar).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from fastgen.diffusion.schedules import DiffusionConfig, Prediction, alphas_cumprod
from fastgen.diffusion.spacing import (
    SigmaSpacing,
    Spacing,
    karras_sigmas,
    sigma_sequence,
    sigma_table,
    solver_sequence,
    timestep_sequence,
)
from fastgen.errors import UsageError


@dataclass(frozen=True)
class SamplingDefaults:
    """What `fastgen.sample` uses where the caller does not say; it travels with a model's weights."""

    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 1.0


@dataclass(frozen=True)
class SamplingPlan:
    """A sampler laid out for a model.

    timesteps: [S], not increasing; int64, or fp32 where some lie between training steps.
    coefficients: fp32 [S, 9], the columns of `ops.diffusion_step`. noisy: whether any row adds noise.
    abar: fp64 [S], of the state at each row; only a start image needs it. order: rows a step (2 for Heun).
    Where a row has q3, its history is the x0 that the row before it kept.
    """

    timesteps: Tensor
    coefficients: Tensor
    noisy: bool
    abar: Tensor | None = None
    order: int = 1

    @property
    def history(self) -> bool:
        """Whether any row looks back at the x0 of the row before it."""
        return bool((self.coefficients[:, 7] != 0).any())

    def tail(self, steps: int) -> SamplingPlan:
        """The last ``steps`` of the sampler's steps, to start from a noised image. The first row has no
        history: it takes its own x0 instead, which makes a multistep method first order there."""
        row = max(0, len(self.timesteps) - (steps * self.order - (self.order - 1)))
        table = self.coefficients[row:].clone()
        table[:1, 5] += table[:1, 7]
        table[:1, 7] = 0
        abar = None if self.abar is None else self.abar[row:]
        noisy = bool((table[:, 8] != 0).any())
        return replace(self, timesteps=self.timesteps[row:], coefficients=table, noisy=noisy, abar=abar)


class Sampler(Protocol):
    """Anything that lays out a plan can be passed to `fastgen.sample`."""

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan: ...


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
    return timesteps, abar, _next(abar, 1.0)


def _next(x: Tensor, last: float) -> Tensor:
    return torch.cat([x[1:], x.new_full((1,), last)])


def _plan(t: Tensor, abar: Tensor, config: DiffusionConfig, q: list[Tensor], order: int = 1) -> SamplingPlan:
    """The plan of rows with the update q0 … q4 (each [S]) at abar [S]."""
    table = torch.stack([*predictions(abar, config.prediction), *q], dim=1).float()
    timesteps = t.long() if torch.equal(t, t.round()) else t.float()
    return SamplingPlan(timesteps, table, bool((table[:, 8] != 0).any()), abar, order)


@dataclass(frozen=True)
class DDIM:
    """Song et al. 2021, eq. 12 and 16:

    x' = sqrt(abar') x0 + sqrt(1 - abar' - s²) eps + s noise,
    s = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar').

    ``eta`` 0 is deterministic, 1 is as noisy as DDPM. ``use_clipped_model_output`` (diffusers' name)
    takes eps = (x_t - sqrt(abar) x0) / sqrt(1 - abar) from the clipped x0 instead of from the network:
    the same where nothing was clipped, and far better under guidance, which often overshoots.
    """

    eta: float = 0.0
    spacing: Spacing = "trailing"
    use_clipped_model_output: bool = True

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        if not isinstance(self.eta, Real) or not 0 <= self.eta <= 1:
            raise UsageError(f"eta: must be a number between 0 and 1, not {self.eta!r}")
        timesteps, abar, after = _layout(config, steps, self.spacing)
        update = ddim_update(abar, after, self.eta, self.use_clipped_model_output)
        return _plan(timesteps, abar, config, update)


def ddim_update(abar: Tensor, after: Tensor, eta: float, use_clipped_model_output: bool) -> list[Tensor]:
    """q0 … q4 of `DDIM` from abar to abar', all fp64 [S]."""
    sigma = eta * ((1 - after) / (1 - abar) * (1 - abar / after)).sqrt()
    zero = torch.zeros_like(abar)
    eps = (1 - after - sigma.square()).clamp(min=0).sqrt()
    if not use_clipped_model_output:
        return [zero, after.sqrt(), eps, zero, sigma]
    x_t = eps / (1 - abar).sqrt()
    return [x_t, after.sqrt() - x_t * abar.sqrt(), zero, zero, sigma]


@dataclass(frozen=True)
class DDPM:
    """Ho et al. 2020, eq. 7, on the visited steps, with alpha = abar / abar' and beta = 1 - alpha:

    x' = sqrt(alpha) (1 - abar') / (1 - abar) x_t + sqrt(abar') beta / (1 - abar) x0 + s noise,
    s² = beta (1 - abar') / (1 - abar).
    """

    spacing: Spacing = "trailing"

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        timesteps, abar, after = _layout(config, steps, self.spacing)
        return _plan(timesteps, abar, config, ddpm_update(abar, after, abar / after))


def ddpm_update(abar: Tensor, after: Tensor, alpha: Tensor) -> list[Tensor]:
    """q0 … q4 of `DDPM` from abar to abar' with alpha = abar / abar', all fp64 [S]."""
    keep = alpha.sqrt() * (1 - after) / (1 - abar)
    towards = after.sqrt() * (1 - alpha) / (1 - abar)
    sigma = ((1 - alpha) * (1 - after) / (1 - abar)).sqrt()
    zero = torch.zeros_like(abar)
    return [keep, towards, zero, zero, sigma]


def euler_step(a: Tensor, a2: Tensor, sigma: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor]:
    """q0 and q1 of a step straight from sigma to sigma2, both [S]; a and a2 scale the states before and after:
    x2 / a2 = x / a + (sigma2 - sigma) (x / a - x0) / sigma."""
    share = sigma2 / sigma
    return a2 / a * share, a2 * (1 - share)


def _scale(sigma: Tensor) -> Tensor:
    """a = sqrt(abar) = 1 / sqrt(1 + sigma²)."""
    return 1 / (1 + sigma.square()).sqrt()


@dataclass(frozen=True)
class Euler:
    """Karras et al. 2022, algorithm 2 without churn; in sigma space

    x' = x + (sigma' - sigma) d,    d = (x - x0) / sigma.
    """

    spacing: SigmaSpacing = "trailing"

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        t, sigma = sigma_sequence(config, steps, self.spacing)
        a, after = _scale(sigma), _next(sigma, 0.0)
        keep, towards = euler_step(a, _scale(after), sigma, after)
        zero = torch.zeros_like(a)
        return _plan(t, a.square(), config, [keep, towards, zero, zero, zero])


@dataclass(frozen=True)
class EulerAncestral:
    """k-diffusion's sample_euler_ancestral: an Euler step beyond sigma', and noise back up to it; in sigma space

    x' = x + (down - sigma) (x - x0) / sigma + up noise,
    up² = sigma'² (sigma² - sigma'²) / sigma²,    down² = sigma'² - up².
    """

    spacing: Spacing = "trailing"

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        if self.spacing == "karras":
            raise UsageError("spacing: must be leading, trailing or linspace for euler_ancestral, not 'karras'")
        t, sigma = sigma_sequence(config, steps, self.spacing)
        a, after = _scale(sigma), _next(sigma, 0.0)
        a2, down = _scale(after), after.square() / sigma
        keep, towards = euler_step(a, a2, sigma, down)
        up = after * (1 - (after / sigma).square()).sqrt()
        zero = torch.zeros_like(a)
        return _plan(t, a.square(), config, [keep, towards, zero, zero, a2 * up])


@dataclass(frozen=True)
class Heun:
    """Karras et al. 2022, algorithm 1 without churn; in sigma space, with d = (x - x0) / sigma,

    x^ = x + (sigma' - sigma) d,    x' = x + (sigma' - sigma) (d + d^) / 2.

    ``steps`` n takes 2n - 1 calls of the network: an Euler row and a correcting row each, the last
    step without. Both derivatives point at x^, d = (x^ - x0) / sigma' and d^ = (x^ - x0^) / sigma',
    so the correcting row is x' = x^ + (sigma' - sigma) / (2 sigma') (x0 - x0^), and the x0 of the
    row before, clipped as it was, is all the history it needs. That factor is why it steps evenly in
    sigma^(1/7) unless told otherwise: where one step divides sigma by hundreds, the correction
    multiplies the error of x0 by as much (trailing on a cosine schedule).
    """

    spacing: SigmaSpacing = "karras"

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        t, sigma = sigma_sequence(config, steps, self.spacing)
        after = _next(sigma, 0.0)
        a, a2 = _scale(sigma), _scale(after)
        keep, towards = euler_step(a, a2, sigma, after)
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        half = a2 * (after - sigma) / (2 * after)  # infinite after the last step, whose correction is left out
        predict = torch.stack([t, a, keep, towards, zero], dim=1)
        correct = torch.stack([_next(t, 0.0), a2, one, -half, half], dim=1)
        rows = torch.stack([predict, correct], dim=1).flatten(0, 1)[:-1]
        t, a, keep, towards, history = rows.unbind(1)
        zero = torch.zeros_like(a)
        return _plan(t, a.square(), config, [keep, towards, zero, history, zero], order=2)


@dataclass(frozen=True)
class DPMSolverMultistep:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, and its SDE form (their section 5, diffusers' "sde-dpmsolver++").

    With lambda = -log sigma, h = lambda' - lambda, h_0 that of the step before, D = x0 + h / (2 h_0) (x0 - x0_before):

    x' = (sigma' a') / (sigma a) x + a' (1 - exp(-h)) D,
    x' = (sigma' a') / (sigma a) exp(-h) x + a' (1 - exp(-2h)) D + sigma' a' sqrt(1 - exp(-2h)) noise    (sde).

    The first step, and the last, which goes to sigma' = 0, are of first order: D = x0.
    """

    sde: bool = False
    spacing: SigmaSpacing = "trailing"

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        t, sigma = self._sequence(config, steps)
        after = _next(sigma, 0.0)
        h = sigma[:-1].log() - sigma[1:].log()
        ahead = torch.zeros_like(sigma)
        ahead[1:-1] = h[1:] / (2 * h[:-1])
        return _plan(t, _scale(sigma).square(), config, dpm_solver_update(sigma, after, ahead, self.sde))

    def _sequence(self, config: DiffusionConfig, steps: int) -> tuple[Tensor, Tensor]:
        if self.spacing == "karras":
            t, sigma = karras_sigmas(config, steps)
            # As diffusers has it, whose cosine schedule keeps fractions (and then cuts them off, which we do not).
            return (t if config.schedule == "cosine" else t.round()), sigma
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise UsageError(f"spacing: must be leading, trailing, linspace or karras, not {self.spacing!r}")
        t = solver_sequence(config.timesteps, steps, self.spacing)
        return t.double(), sigma_table(config)[t]


def dpm_solver_update(sigma: Tensor, after: Tensor, ahead: Tensor, sde: bool) -> list[Tensor]:
    """q0 … q4 of `DPMSolverMultistep` from sigma to sigma', with D = x0 + ahead (x0 - x0_before), all fp64 [S]."""
    a, a2, e = _scale(sigma), _scale(after), after / sigma  # e = exp(-h)
    keep, full = a2 / a * e, a2 * (1 - e)
    noise = zero = torch.zeros_like(a)
    if sde:
        keep, full, noise = keep * e, a2 * (1 - e.square()), a2 * after * (1 - e.square()).sqrt()
    return [keep, full * (1 + ahead), zero, -full * ahead, noise]


SAMPLERS: dict[str, Sampler] = {
    "ddim": DDIM(),
    "ddpm": DDPM(),
    "euler": Euler(),
    "euler_ancestral": EulerAncestral(),
    "heun": Heun(),
    "dpmpp_2m": DPMSolverMultistep(),
    "dpmpp_2m_sde": DPMSolverMultistep(sde=True),
}


def get_sampler(sampler: str | Sampler, **options: object) -> Sampler:
    """The sampler of a name, or the object itself; ``options`` that are not None replace its fields (eta, spacing, …).

    Raises UsageError, with the names, for an unknown one, and for an option that it has not.
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise UsageError(f"sampler: unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
        sampler = SAMPLERS[sampler]
    if isinstance(sampler, type) or not hasattr(sampler, "plan"):
        raise UsageError(f"sampler: must be one of {', '.join(SAMPLERS)} or a sampler object, not {sampler!r}")
    for name, value in options.items():
        if value is None:
            continue
        if not is_dataclass(sampler) or name not in {f.name for f in fields(sampler)}:
            raise UsageError(f"{name}: {type(sampler).__name__} has no {name}; leave it out")
        sampler = replace(sampler, **{name: value})
    return sampler


def describe_sampler(sampler: Sampler) -> dict[str, object] | None:
    """A sampler's name and fields, from which `get_sampler` makes it again; None for a kind that is not in SAMPLERS."""
    named = [k for k, v in SAMPLERS.items() if type(v) is type(sampler)]
    if not named:
        return None
    own = {f.name: getattr(sampler, f.name) for f in fields(sampler)}
    nearest = max(named, key=lambda k: sum(getattr(SAMPLERS[k], field) == value for field, value in own.items()))
    return {"sampler": nearest, "options": own}
