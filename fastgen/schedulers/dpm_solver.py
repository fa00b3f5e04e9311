"""`DPMSolverMultistepScheduler`: DPM-Solver++, Lu et al. 2022, algorithm 2, and its SDE form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.diffusion.samplers import dpm_solver_update, predictions
from fastgen.diffusion.spacing import solver_sequence
from fastgen.errors import UsageError
from fastgen.schedulers.base import SchedulerOutput, Table, result
from fastgen.schedulers.config import Config, registered
from fastgen.schedulers.noise import Generators, draw
from fastgen.schedulers.solver import SolverScheduler

FEW = 15  # steps, below which lower_order_final holds


class DPMSolverMultistepScheduler(SolverScheduler):
    """diffusers' DPMSolverMultistepScheduler. Settings and defaults are its own; supported are algorithm_type
    dpmsolver++ and sde-dpmsolver++, solver_order 1 and 2, both solver_type, beta_schedule linear, scaled_linear and
    squaredcos_cap_v2, prediction_type epsilon, sample and v_prediction, every timestep_spacing, use_karras_sigmas,
    lambda_min_clipped, lower_order_final, euler_at_final, both final_sigmas_type, and thresholding with a
    sample_max_value of 1."""

    init_noise_sigma = 1.0
    SUPPORTED: ClassVar = {
        "solver_order": (1, 2),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "use_karras_sigmas": (False, True, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
        "final_sigmas_type": ("zero", "sigma_min"),
        "variance_type": (None,),
        "use_dynamic_shifting": (False, None),
    }

    @registered
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        # The settings of DEIS and UniPC, in place of which diffusers takes these too.
        if algorithm_type == "deis":
            self._internal_dict = Config({**self._internal_dict, "algorithm_type": "dpmsolver++"})
        if solver_type in ("logrho", "bh1", "bh2"):
            self._internal_dict = Config({**self._internal_dict, "solver_type": "midpoint"})
        super().__init__()
        abar = self.alphas_cumprod
        self.alpha_t, self.sigma_t = abar.sqrt(), (1 - abar).sqrt()
        self.lambda_t = self.alpha_t.log() - self.sigma_t.log()
        self._sigmas = self._levels.float()
        self._visit(torch.arange(num_train_timesteps - 1, -1, -1).float(), None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lays out a run of ``num_inference_steps``, or over given ``timesteps``. Raises UsageError for both or
        neither, for mu, which belongs to flow matching, and for steps that are not possible."""
        if mu is not None:
            raise UsageError("mu: goes with use_dynamic_shifting, which is not supported; leave it out")
        if (num_inference_steps is None) == (timesteps is None):
            raise UsageError("num_inference_steps: give either it or timesteps")
        if timesteps is not None and self._internal_dict.use_karras_sigmas:
            raise UsageError("timesteps: do not go with use_karras_sigmas, which chooses its own; leave them out")
        self._restart()
        if self._internal_dict.use_karras_sigmas:
            self._check_steps(num_inference_steps, len(self))
            t, sigma = self._ramp(self._levels[-1], self._levels[0], num_inference_steps)
            t = t.long() if self._internal_dict.beta_schedule == "squaredcos_cap_v2" else t.round().long()
        else:
            t = self._sequence(num_inference_steps) if timesteps is None else torch.as_tensor(timesteps).cpu().long()
            self._check_range(t)
            sigma = self._at(t)
        self._sigmas = torch.cat([sigma, self._last()]).float()
        self._visit(t, device)
        self._before: Tensor | None = None
        self._table = self._make()
        sigma = self.sigmas.double()
        a = 1 / (sigma.square() + 1).sqrt()
        self._noising = Table(torch.stack([a, a * sigma], dim=1))
        self.num_inference_steps = len(t)

    def _sequence(self, steps: int) -> Tensor:
        """The steps to visit, int64; lambda_min_clipped leaves out the noisiest of a schedule."""
        T, c = len(self), self._internal_dict
        last = T - int(torch.searchsorted(self.lambda_t.flip(0), c.lambda_min_clipped))
        self._check_steps(steps, T if c.timestep_spacing == "trailing" else last - 1)
        if c.timestep_spacing == "trailing" and last < T:
            i = torch.arange(math.ceil(last / (T / steps)), dtype=torch.float64)
            return (last + i * ((last - T / steps) - last)).round().long() - 1
        t = solver_sequence(last, steps, c.timestep_spacing)
        return t + c.steps_offset if c.timestep_spacing == "leading" else t

    def _make(self) -> Table:
        """2 S rows: those that look back, then those of the first order, which a run begins with wherever it does."""
        sigma, c = self.sigmas.double(), self._internal_dict
        here, after, S = sigma[:-1], sigma[1:], len(sigma) - 1
        h, k = here.log() - after.log(), 2.0 if c.algorithm_type == "sde-dpmsolver++" else 1.0
        share = torch.full_like(h, 0.5) if c.solver_type == "midpoint" else 1 / (1 - (-k * h).exp()) - 1 / (k * h)
        ends_low = c.euler_at_final or (c.lower_order_final and S < FEW) or c.final_sigmas_type == "zero"
        back = torch.zeros_like(h)
        if c.solver_order == 2:
            back[1:] = share[1:] * h[1:] / h[:-1]
            back[S - 1] = 0 if ends_low else back[S - 1]
        self._looks_back = (back != 0).tolist()
        first = predictions(1 / (1 + here.square()), self._prediction)
        rows = [
            torch.stack([*first, *dpm_solver_update(here, after, ahead, k == 2)], dim=1)
            for ahead in (back, torch.zeros_like(h))
        ]
        return Table(torch.cat(rows))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """From the state ``sample`` [N, *] to the next, by the model's output [N, *]; ``timestep`` says where the run
        begins, after that its steps are counted. The output has no ``pred_original_sample``.

        The SDE form draws fp32 noise from ``generator`` unless ``variance_noise`` [N, *] is given. Both tensors
        floating; computed in at least fp32. Differentiable. Raises UsageError before set_timesteps, for a
        timestep that is not laid out, and for a run that is over.
        """
        if self.num_inference_steps is None:
            raise UsageError("step: nothing is laid out yet; call set_timesteps first")
        row = self._current(timestep)
        history = self._before if self._looks_back[row] else None
        noise = None
        if self._internal_dict.algorithm_type == "sde-dpmsolver++":
            noise = draw(model_output, generator, torch.float32) if variance_noise is None else variance_noise
        place = row + (len(self._numbers) if history is None else 0)
        prev_sample, self._before = self._update(self._table, place, model_output, sample, history, noise)
        self._step_index = row + 1
        return result(prev_sample, None, return_dict)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [N, *] of images [N, *] at the timesteps [N] or [1], which are of ``scheduler.timesteps``; within a run
        that set_begin_index began, at its next step. Raises UsageError before set_timesteps."""
        if self.num_inference_steps is None:
            raise UsageError("add_noise: nothing is laid out yet; call set_timesteps first")
        return super().add_noise(original_samples, noise, timesteps)
