"""What the schedulers of sigma space share: levels of noise sigma, a counter of steps, and where a run begins.

sigma = sqrt((1 - abar) / abar) is the noise beside an image of unscaled size. Euler and Heun keep the state x0 + sigma
noise; DPM-Solver keeps x_t = a (x0 + sigma noise), a = sqrt(abar).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.diffusion.samplers import predictions
from fastgen.diffusion.spacing import LEAST_ABAR, interpolate, karras_ramp
from fastgen.errors import UsageError
from fastgen.schedulers.base import Scheduler, Table


class SolverScheduler(Scheduler):
    """The base of Euler, Heun and DPM-Solver."""

    def __init__(self) -> None:
        super().__init__()
        if self._own("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = LEAST_ABAR
        self._restart()

    def _restart(self) -> None:
        # fp64 [T], rising, with the rounding of diffusers' fp32, which decides where t is cut off to a whole number.
        abar = self.alphas_cumprod.cpu()
        levels = ((1 - abar) / abar).sqrt()
        self._levels, self._logs = levels.double(), torch.from_numpy(np.log(levels.numpy())).double()
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def sigmas(self) -> Tensor:
        """The levels of the run and where it ends, fp32 [S + 1], on the CPU."""
        return self._sigmas

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    # Levels

    def _at(self, t: Tensor) -> Tensor:
        """sigma at timesteps between the training steps too, fp64 [S]."""
        return interpolate(t.double(), torch.arange(len(self._levels), dtype=torch.float64), self._levels)

    def _ramp(self, largest: Tensor, least: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """t and sigma [S] of use_karras_sigmas, between the given two or the config's own."""
        most, fewest = self._internal_dict.get("sigma_max"), self._internal_dict.get("sigma_min")
        sigma = karras_ramp(largest.item() if most is None else most, least.item() if fewest is None else fewest, steps)
        return self._t_of(sigma), sigma

    def _t_of(self, sigma: Tensor) -> Tensor:
        if not bool((self._levels[1:] >= self._levels[:-1]).all()):
            raise UsageError(
                "rescale_betas_zero_snr: leaves a schedule whose noise does not rise to its end, where a sigma has no "
                "one timestep; set use_karras_sigmas=False and give no sigmas, or keep diffusers' scheduler"
            )
        return interpolate(sigma.clamp(min=1e-10).log(), self._logs, torch.arange(len(self), dtype=torch.float64))

    def _last(self) -> Tensor:
        """The sigma at which a run ends, [1]."""
        if self._own("final_sigmas_type") == "sigma_min":
            return self._levels[:1]
        return torch.zeros(1, dtype=torch.float64)

    # Steps

    def _current(self, timestep: float | Tensor) -> int:
        """The number of the step to take; the first is where the timestep lies, or where set_begin_index said."""
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        if not 0 <= self._step_index < len(self._numbers):
            raise UsageError(
                f"step: the run of {len(self._numbers)} steps is over; call set_timesteps to begin another"
            )
        return self._step_index

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The state [N, *] of images [N, *] at the timesteps [N] or [1], which are of ``scheduler.timesteps``; within a
        run that set_begin_index began, at its next step."""
        if self._begin_index is None:
            rows = [self.index_for_timestep(t) for t in timesteps.flatten().tolist()]
        else:
            rows = [self._begin_index if self._step_index is None else self._step_index]
        return self._mix(self._noising, original_samples, noise, torch.tensor(rows))


class SigmaScheduler(SolverScheduler):
    """The base of Euler and Heun, whose state is x0 + sigma noise, and whose model wants it scaled."""

    @property
    def init_noise_sigma(self) -> Tensor:
        """The standard deviation of the state at the first step, fp32 []."""
        largest = self.sigmas.max()
        if self._internal_dict.timestep_spacing in ("linspace", "trailing"):
            return largest
        return (largest.square() + 1).sqrt()

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The state [N, *] as the model was trained on it: divided by sqrt(sigma² + 1)."""
        self.is_scale_input_called = True
        return sample / self._sizes[self._current(timestep)]

    def _linspace(self, steps: int, T: int) -> Tensor:
        return torch.linspace(0, T - 1, steps, dtype=torch.float64).flip(0)

    def _chosen(self, steps: int, timesteps: Any, T: int) -> tuple[Tensor, Tensor]:
        """t and sigma, fp64 [S], of a number of steps or of given timesteps."""
        if timesteps is not None:
            if self._internal_dict.use_karras_sigmas:
                raise UsageError("timesteps: do not go with use_karras_sigmas, which chooses its own; leave them out")
            t = torch.as_tensor(timesteps, dtype=torch.float32).cpu()
            self._check_range(t)
        elif self._internal_dict.timestep_spacing == "linspace":
            self._check_steps(steps, T)
            t = self._linspace(steps, T)
        else:
            t = self._spaced(steps, T)
        t = t.float().double()
        sigma = self._at(t)
        if self._internal_dict.use_karras_sigmas:
            return self._ramp(sigma[0], sigma[-1], len(sigma))
        return t, sigma

    def _take(self, t: Tensor, sigmas: Tensor, device: Any) -> None:
        """Begins a run over t [R] at sigmas [R + 1], the last where it ends."""
        self._sigmas = sigmas.float()
        sigma = self.sigmas.double()
        self._sizes = (sigma.square() + 1).sqrt().tolist()
        self._noising = Table(torch.stack([torch.ones_like(sigma), sigma], dim=1))
        self._visit(t.float(), device)

    def _predictions(self, sigma: Tensor) -> list[Tensor]:
        """p0 … p3 of the state x0 + sigma noise."""
        abar = 1 / (1 + sigma.square())
        p0, p1, p2, p3 = predictions(abar, self._prediction)
        return [p0 * abar.sqrt(), p1, p2 * abar.sqrt(), p3]
