"""`EulerDiscreteScheduler`: Karras et al. 2022, algorithm 2 without churn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.diffusion.samplers import euler_step
from fastgen.errors import UsageError
from fastgen.schedulers.base import SchedulerOutput, Table, result
from fastgen.schedulers.config import registered
from fastgen.schedulers.noise import Generators
from fastgen.schedulers.solver import SigmaScheduler


class EulerDiscreteScheduler(SigmaScheduler):
    """diffusers' EulerDiscreteScheduler. Settings and defaults are its own; supported are beta_schedule linear,
    scaled_linear and squaredcos_cap_v2, prediction_type epsilon, sample and v_prediction, every timestep_spacing,
    use_karras_sigmas with sigma_min and sigma_max, and both final_sigmas_type; neither s_churn nor get_velocity."""

    SUPPORTED: ClassVar = {
        "interpolation_type": ("linear",),
        "use_karras_sigmas": (False, True, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero", "sigma_min"),
    }

    @registered
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        super().__init__()
        self.is_scale_input_called = False
        T = num_train_timesteps
        self._begin(torch.arange(T - 1, -1, -1), torch.cat([self._levels.flip(0), self._levels.new_zeros(1)]), None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Lays out a run of ``num_inference_steps``, or over given ``timesteps``, or over given ``sigmas``, of which
        the last is where it ends. Raises UsageError unless exactly one of them is given and possible."""
        if (num_inference_steps, timesteps, sigmas).count(None) != 2:
            raise UsageError("num_inference_steps: give exactly one of it, timesteps and sigmas")
        self._restart()
        if sigmas is not None:
            sigma = torch.as_tensor(sigmas, dtype=torch.float32).cpu().double()
            if sigma.ndim != 1 or len(sigma) < 2 or not bool((sigma[:-1] > 0).all()) or not sigma[-1] >= 0:
                raise UsageError("sigmas: must be a list of at least 2 numbers above 0, of which the last may be 0")
            t = self._t_of(sigma[:-1])
        else:
            t, sigma = self._chosen(num_inference_steps, timesteps, len(self))
            sigma = torch.cat([sigma, self._last()])
        self._begin(t, sigma, device)
        self.num_inference_steps = len(t)

    def _begin(self, t: Tensor, sigmas: Tensor, device: Any) -> None:
        self._take(t, sigmas, device)
        sigma = self.sigmas.double()
        one, zero = torch.ones_like(sigma[1:]), torch.zeros_like(sigma[1:])
        update = euler_step(one, one, sigma[:-1], sigma[1:])
        self._table = Table(torch.stack([*self._predictions(sigma[:-1]), *update, zero, zero, zero], dim=1))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """From the state ``sample`` [N, *] to that of the next sigma, by the model's output [N, *], in whose dtype
        it returns. ``timestep`` says where the run begins; after that its steps are counted.

        Both tensors floating; computed in at least fp32. Differentiable. Without churn nothing is drawn from
        ``generator``. Raises UsageError for s_churn, an integer timestep, one that is not laid out, and a run
        that is over.
        """
        if s_churn:
            raise UsageError("s_churn: is not supported; leave it at 0, or keep diffusers' scheduler")
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise UsageError("timestep: must be one of scheduler.timesteps, not an integer such as enumerate gives")
        if not self.is_scale_input_called:
            warnings.warn("call scale_model_input before the model, or it sees the wrong size of noise", stacklevel=2)
        row = self._current(timestep)
        prev_sample, x0 = self._update(self._table, row, model_output, sample)
        self._step_index = row + 1
        return result(prev_sample.to(model_output.dtype), x0, return_dict)
