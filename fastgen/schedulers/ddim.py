"""`DDIMScheduler`: Song et al. 2021."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.diffusion.samplers import ddim_update, predictions
from fastgen.errors import UsageError
from fastgen.schedulers.base import DiscreteScheduler, SchedulerOutput, Table, result
from fastgen.schedulers.config import registered
from fastgen.schedulers.noise import Generators, draw


class DDIMScheduler(DiscreteScheduler):
    """diffusers' DDIMScheduler. Settings and defaults are its own; supported are beta_schedule linear, scaled_linear
    and squaredcos_cap_v2, every prediction_type and timestep_spacing, and thresholding with a sample_max_value of 1."""

    @registered
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self._visit(torch.arange(num_train_timesteps - 1, -1, -1), None)
        self._made: tuple[tuple[float, bool], Table] | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Lays out a run. Raises UsageError for a number of steps that is not in 1 … T, or steps beyond T-1."""
        t = self._spaced(num_inference_steps)
        self._check_range(t)
        self._check_pure_noise(self._abar[t])
        self.num_inference_steps = num_inference_steps
        self._visit(t, device)
        self._made = None

    def _table(self, eta: float, use_clipped_model_output: bool) -> Table:
        """A row for each training step t: as in diffusers any may be asked for, and leads to t - T // S, whatever the
        spacing, and before 0 to the final alpha."""
        key = (eta, use_clipped_model_output)
        if self._made is None or self._made[0] != key:
            abar = self._abar
            leap = len(abar) // self.num_inference_steps
            after = torch.cat([self.final_alpha_cumprod.double().cpu().expand(leap), abar[:-leap]])
            update = ddim_update(abar, after, *key)
            self._made = key, Table(torch.stack([*predictions(abar, self._prediction), *update], dim=1))
        return self._made[1]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """From the state ``sample`` [N, *] at ``timestep``, any of 0 … T-1, by the model's output there, [N, *].

        eta: 0 is deterministic, 1 as noisy as DDPM; only above 0 noise is drawn, from ``generator`` in the output's
        dtype, unless ``variance_noise`` [N, *] is given. use_clipped_model_output: take the noise from the clipped
        image, not from the model. Both tensors floating; computed in at least fp32. Differentiable. Raises
        UsageError before set_timesteps, for another timestep or eta, and for a generator and noise at once.
        """
        if self.num_inference_steps is None:
            raise UsageError("step: nothing is laid out yet; call set_timesteps first")
        t, T = self._number(timestep), len(self)
        if not 0 <= t < T or t != int(t):
            raise UsageError(f"timestep: must be a whole number in 0 … {T - 1}, not {t!r}")
        if not 0 <= eta <= 1:
            raise UsageError(f"eta: must be a number between 0 and 1, not {eta!r}")
        if eta > 0 and generator is not None and variance_noise is not None:
            raise UsageError("variance_noise: give either it or a generator")
        noise = None
        if eta > 0:
            noise = draw(model_output, generator) if variance_noise is None else variance_noise
        table = self._table(float(eta), bool(use_clipped_model_output))
        return result(*self._update(table, int(t), model_output, sample, noise=noise), return_dict)
