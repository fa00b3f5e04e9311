"""`HeunDiscreteScheduler`: Karras et al. 2022, algorithm 1 without churn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.diffusion.samplers import euler_step
from fastgen.errors import UsageError
from fastgen.schedulers.base import SchedulerOutput, Table, result
from fastgen.schedulers.config import registered
from fastgen.schedulers.solver import SigmaScheduler


class HeunDiscreteScheduler(SigmaScheduler):
    """diffusers' HeunDiscreteScheduler. Settings and defaults are its own; supported are beta_schedule linear,
    scaled_linear and squaredcos_cap_v2, every prediction_type and timestep_spacing, clip_sample, use_karras_sigmas.

    A step takes two calls of the model and of `step`, with d = (x - x0) / sigma:

        x^ = x + (sigma' - sigma) d,    x' = x + (sigma' - sigma) (d + d^) / 2 = (x + x^) / 2 + (sigma' - sigma) d^ / 2.
    """

    order = 2
    SUPPORTED: ClassVar = {
        "use_karras_sigmas": (False, True, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
    }

    @registered
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        super().__init__()
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lays out a run of ``num_inference_steps``, or over given ``timesteps``: 2 S - 1 entries, the last step being
        one of Euler's. num_train_timesteps: spread them over fewer than the model was trained with. Raises
        UsageError for both or neither, and for what is not possible."""
        if (num_inference_steps is None) == (timesteps is None):
            raise UsageError("num_inference_steps: give either it or timesteps")
        T = num_train_timesteps or len(self)
        if not 1 <= T <= len(self):
            raise UsageError(f"num_train_timesteps: must be in 1 … {len(self)}, not {T!r}")
        self._restart()
        t, sigma = self._chosen(num_inference_steps, timesteps, T)
        sigma, t = (torch.cat([x[:1], x[1:].repeat_interleave(2)]) for x in (sigma, t))
        self._take(t, torch.cat([sigma, self._last()]), device)
        self._table, self._before = self._make(), None
        self.num_inference_steps = num_inference_steps or len(timesteps)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first of its step."""
        return self._before is None

    def _make(self) -> Table:
        """Rows in turn of Euler's step and of its correction, whose history is the x that the step began at; that is
        kept anyway, and a difference of two predicted images, which the correction would blow up where sigma falls
        steeply, is not needed."""
        sigma = self.sigmas.double()
        here, ahead = sigma[:-1], sigma[1:]
        one, zero = torch.ones_like(here), torch.zeros_like(here)
        keep, towards = euler_step(one, one, here, ahead)
        half = torch.cat([here[:1], (here[1:] - here[:-1]) / 2])
        if self._find_clip() is None:
            correct = [one / 2, zero, half, one / 2, zero]
        else:  # eps is not clipped: (x^ - x0^) / sigma' is
            correct = [0.5 + half / here, -half / here, zero, one / 2, zero]
        odd = torch.arange(len(here)) % 2 == 1
        update = [torch.where(odd, c, p) for c, p in zip(correct, [keep, towards, zero, zero, zero], strict=True)]
        return Table(torch.stack([*self._predictions(here), *update], dim=1))

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """From ``sample`` [N, *] to x^ at the first call of a step, and to x' at the second, by the model's output
        [N, *]. ``timestep`` says where the run begins; after that its steps are counted.

        Both tensors floating; computed in at least fp32. Differentiable. Raises UsageError for a timestep that is
        not laid out, a run that is over, and one that would begin at a second call.
        """
        row = self._current(timestep)
        if row % 2 == 1 and self._before is None:
            raise UsageError(f"set_begin_index: {row} is the second call of a step; begin at an even number")
        history = self._before if row % 2 == 1 else None
        output = self._update(self._table, row, model_output, sample, history=history)
        self._before = sample if row % 2 == 0 else None
        self._step_index = row + 1
        return result(*output, return_dict)
