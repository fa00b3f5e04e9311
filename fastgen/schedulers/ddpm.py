"""`DDPMScheduler`: Ho et al. 2020."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.diffusion.samplers import ddpm_update, predictions
from fastgen.errors import UsageError
from fastgen.schedulers.base import DiscreteScheduler, SchedulerOutput, Table, result
from fastgen.schedulers.config import registered
from fastgen.schedulers.noise import Generators, draw

LEAST_DEVIATION = 1e-10  # diffusers' least variance is 1e-20


class DDPMScheduler(DiscreteScheduler):
    """diffusers' DDPMScheduler. Settings and defaults are its own; supported are beta_schedule linear, scaled_linear
    and squaredcos_cap_v2, every prediction_type and timestep_spacing, variance_type fixed_small, fixed_small_log and
    fixed_large, and thresholding with a sample_max_value of 1."""

    SUPPORTED: ClassVar = {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")}

    @registered
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()
        self.one, self.variance_type, self.custom_timesteps = torch.tensor(1.0), variance_type, False
        self._visit(torch.arange(num_train_timesteps - 1, -1, -1), None)
        self._table: Table | None = None  # of all T steps, where there was no set_timesteps

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of the run, falling; others may take their place: a step leads from one to the next."""
        return self._shown

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._visit(timesteps.cpu(), timesteps.device)
        self._table = None

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Lays out a run of ``num_inference_steps``, or over given ``timesteps``, falling. Raises UsageError for both
        or neither, and for steps outside 0 … T-1."""
        if (num_inference_steps is None) == (timesteps is None):
            raise UsageError("num_inference_steps: give either it or timesteps")
        t = self._spaced(num_inference_steps) if timesteps is None else self._custom(timesteps)
        self._check_range(t)
        table = self._make(t)
        self.custom_timesteps = timesteps is not None
        if timesteps is None:
            self.num_inference_steps = num_inference_steps
        self._visit(t, device)
        self._table = table

    def _make(self, t: Tensor) -> Table:
        abar = self._abar[t]
        self._check_pure_noise(abar)
        after = torch.cat([abar[1:], abar.new_ones(1)])
        # In fp32 as in diffusers: of a thousand steps, 1 - alpha has three digits right there, and they decide.
        alpha = (abar.float() / after.float()).double()
        *update, sigma = ddpm_update(abar, after, alpha)
        if self.variance_type == "fixed_large":
            sigma = (1 - alpha).sqrt()
        sigma = sigma.clamp(min=LEAST_DEVIATION) * (t > 0)
        return Table(torch.stack([*predictions(abar, self._prediction), *update, sigma], dim=1))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """From the state ``sample`` [N, *] at ``timestep`` to the next, by the model's output there, [N, *].

        Noise is drawn from ``generator`` in the output's dtype, but at timestep 0. Both tensors floating; computed in
        at least fp32. Differentiable. Raises UsageError for a timestep that set_timesteps did not lay out.
        """
        row = self.index_for_timestep(timestep)
        if self._table is None:
            self._table = self._make(self._timesteps.cpu())
        noise = draw(model_output, generator) if self._numbers[row] > 0 else None
        return result(*self._update(self._table, row, model_output, sample, noise=noise), return_dict)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep that follows in the run; -1 after the last."""
        return [*self._numbers, -1][self.index_for_timestep(timestep) + 1]
