"""What the schedulers share: the process of their config, tables of coefficients on any device, and finding a step.

Betas and their products are fp32, rounded where diffusers rounds; all coefficients are computed from them in fp64.
Legend: T training steps, S sampling steps, abar the cumulated alpha at a step and abar' where the step leads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen import ops
from fastgen.diffusion.schedules import DiffusionConfig, Prediction, betas, zero_terminal_snr
from fastgen.diffusion.spacing import timestep_sequence
from fastgen.errors import UsageError
from fastgen.schedulers.config import Configurable

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
SPACINGS = ("leading", "linspace", "trailing")


@dataclass
class SchedulerOutput:
    """What a step returns: ``prev_sample`` [N, *], the state that it leads to, and ``pred_original_sample`` [N, *], the
    image that the model sees from where it began, clipped as the config says; None from DPM-Solver."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.prev_sample, self.pred_original_sample) if x is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


class Table:
    """Rows of coefficients, fp32 [R, C], and their numbers as tensors, on whatever device they are wanted."""

    def __init__(self, rows: Tensor) -> None:
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}
        with torch.inference_mode(False):  # or a step with gradients could not use what one without them made
            self._rows = rows.float().contiguous()

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows, and int64 [R] 0, 1, …: an element of it says which row without a copy to the device."""
        if device not in self._placed:
            with torch.inference_mode(False):
                self._placed[device] = self._rows.to(device), torch.arange(len(self._rows), device=device)
        return self._placed[device]


class Scheduler(Configurable):
    """The base of the schedulers: see each of them for its settings."""

    order = 1
    # Of settings that are supported in part: the values that are.
    SUPPORTED: ClassVar[Mapping[str, Sequence[Any]]] = {}

    def __init__(self) -> None:
        self._join_diffusers()
        # By its module a pipeline notes what class a part is of. diffusers has each of these under the same name, so
        # a pipeline that is saved with ours opens with diffusers alone.
        self.__module__ = "diffusers"
        self._check_settings()
        self._find_clip()
        with torch.inference_mode(False):
            self.betas = self._find_betas()
            self.alphas = 1.0 - self.betas
            self.alphas_cumprod = self.alphas.cumprod(0)
        self.num_inference_steps: int | None = None

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The schedulers that can be made from this one's config."""
        return _leaves(Scheduler)

    def __len__(self) -> int:
        return self._internal_dict.num_train_timesteps

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of the run, falling, on the device that set_timesteps was told."""
        return self._shown

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._shown = timesteps

    # Settings

    def register_to_config(self, **settings: Any) -> None:
        super().register_to_config(**settings)
        self._check_settings()

    @property
    def _prediction(self) -> Prediction:
        return PREDICTIONS[self._internal_dict.prediction_type]

    @property
    def _abar(self) -> Tensor:
        """fp64 [T], of ``alphas_cumprod`` wherever the caller has moved it."""
        return self.alphas_cumprod.double().cpu()

    def _own(self, name: str) -> Any:
        """A setting that this class takes; None for what the config only carries along."""
        return self._internal_dict[name] if name in self.settings() else None

    def _check_settings(self) -> None:
        known = {"prediction_type": tuple(PREDICTIONS), "timestep_spacing": SPACINGS}
        if self._internal_dict.trained_betas is None:
            known["beta_schedule"] = tuple(SCHEDULES)
        for name, values in {**known, **self.SUPPORTED}.items():
            value = self._internal_dict[name]
            if not any(value is v or (v is not None and type(value) is type(v) and value == v) for v in values):
                raise UsageError(
                    f"{name}: {value!r} is not supported by fastgen's {type(self).__name__}; choose "
                    f"{' or '.join(repr(v) for v in values)}, or keep diffusers' scheduler"
                )
        T, offset = self._internal_dict.num_train_timesteps, self._internal_dict.steps_offset
        if isinstance(T, bool) or not isinstance(T, int) or T < 1:
            raise UsageError(f"num_train_timesteps: must be a whole number of at least 1, not {T!r}")
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
            raise UsageError(f"steps_offset: must be a whole number of at least 0, not {offset!r}")

    def _find_clip(self) -> float | None:
        """The bound of the predicted image. Dynamic thresholds lie between 1 and sample_max_value: a clip where both
        are 1, as they are by default."""
        if self._own("thresholding"):
            if self._internal_dict.sample_max_value != 1:
                raise UsageError(
                    f"sample_max_value: must be 1 with thresholding, not {self._internal_dict.sample_max_value!r}: "
                    "thresholds from the image are not supported; set thresholding=False, or keep diffusers' scheduler"
                )
            return 1.0
        return float(self._internal_dict.clip_sample_range) if self._own("clip_sample") else None

    def _find_betas(self) -> Tensor:
        """fp32 [T]."""
        c, rescale = self._internal_dict, bool(self._own("rescale_betas_zero_snr"))
        T = c.num_train_timesteps
        if c.trained_betas is not None:
            trained = torch.as_tensor(c.trained_betas, dtype=torch.float32).clone()
            if trained.shape != (T,) or not bool(((trained > 0) & (trained <= 1)).all()):
                raise UsageError(f"trained_betas: must be num_train_timesteps = {T} numbers in (0, 1]")
            return zero_terminal_snr(trained) if rescale else trained
        try:  # the prediction has no part in the betas
            process = DiffusionConfig(SCHEDULES[c.beta_schedule], T, c.beta_start, c.beta_end, "v", None, rescale)
        except ValueError as error:
            raise UsageError(f"config: {error}") from None
        return betas(process, torch.float32)

    # Timesteps

    def _spaced(self, steps: int, T: int | None = None) -> Tensor:
        """The steps to visit by the spacing of the config, int64 [S]."""
        T, c = T or self._internal_dict.num_train_timesteps, self._internal_dict
        self._check_steps(steps, T)
        t = timestep_sequence(T, steps, c.timestep_spacing)
        return t + c.steps_offset if c.timestep_spacing == "leading" else t

    def _check_steps(self, steps: Any, most: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
            raise UsageError(f"num_inference_steps: must be a whole number between 1 and {most}, not {steps!r}")

    def _custom(self, timesteps: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        """Timesteps of the caller's, checked: falling, in 0 … T - 1."""
        t = torch.as_tensor(timesteps).cpu().to(dtype)
        self._check_range(t)
        if not bool((t[1:] < t[:-1]).all()):
            raise UsageError("timesteps: must be in descending order")
        return t

    def _check_range(self, t: Tensor) -> None:
        T = self._internal_dict.num_train_timesteps
        if t.ndim != 1 or not len(t):
            raise UsageError(f"timesteps: must be a list of numbers in 0 … {T - 1}")
        if not bool(((t >= 0) & (t <= T - 1)).all()):
            raise UsageError(
                f"timesteps: must lie in 0 … {T - 1}, not reach from {t.min().item()} to {t.max().item()}; "
                "mind steps_offset too"
            )

    def _visit(self, t: Tensor, device: Any) -> None:
        """Takes over the timesteps [S] of a run, as a tensor on ``device`` and as numbers."""
        self._numbers = t.tolist()
        self._positions: dict[float, int] = {}
        again: set[float] = set()
        for i, number in enumerate(self._numbers):
            if number not in self._positions:
                self._positions[number] = i
            elif number not in again:  # the second of equals, as in diffusers: there a run that begins later begins
                self._positions[number] = i
                again.add(number)
        self._shown = self._timesteps = t.to(device)

    def _number(self, timestep: float | Tensor) -> float:
        """A timestep as a number. For an element of ``timesteps`` on a GPU that is known without waiting for it."""
        if not isinstance(timestep, Tensor):
            return timestep
        own = self._timesteps
        if (
            timestep.device.type != "cpu" and timestep.ndim == 0 and timestep.dtype == own.dtype
            and timestep.untyped_storage()._cdata == own.untyped_storage()._cdata
        ):  # fmt: skip
            return self._numbers[timestep.storage_offset() - own.storage_offset()]
        if timestep.numel() != 1:
            raise UsageError(f"timestep: must be one number, not a tensor {list(timestep.shape)}")
        return timestep.item()

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The place of a timestep in ``timesteps``, of equals the second. Raises UsageError where there is none."""
        number = self._number(timestep)
        if number not in self._positions:
            raise UsageError(
                f"timestep: {number!r} is not one of the {len(self._numbers)} of set_timesteps; "
                "take them from scheduler.timesteps"
            )
        return self._positions[number]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        return sample

    # Computing

    def _update(
        self, table: Table, row: int, model_output: Tensor, sample: Tensor,
        history: Tensor | None = None, noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The state that a row of the table leads to and the predicted image, both [N, *]."""
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        rows, numbers = table.on(sample.device)
        history, noise = (None if x is None else x.to(dtype) for x in (history, noise))
        return ops.diffusion_step(
            sample.to(dtype), model_output, rows, numbers[row],
            clip=self._find_clip(), history=history, keep="x0", noise=noise,
        )  # fmt: skip

    def _mix(self, table: Table, x: Tensor, noise: Tensor, rows: Tensor) -> Tensor:
        """table[row, 0] x + table[row, 1] noise for each image; rows: [N], or one for all."""
        if noise.shape != x.shape:
            raise UsageError(f"noise: must have the shape {list(x.shape)}, not {list(noise.shape)}")
        rows = rows.to(x.device, torch.int64).flatten()
        if len(rows) not in (1, len(x)):
            raise UsageError(f"timesteps: give one, or one for each of the {len(x)} images, not {len(rows)}")
        dtype = torch.promote_types(x.dtype, noise.dtype)
        return ops.q_sample(x.to(dtype), rows.expand(len(x)).contiguous(), table.on(x.device)[0], noise.to(dtype))[0]


class DiscreteScheduler(Scheduler):
    """The base of those whose state is x_t = sqrt(abar) x0 + sqrt(1 - abar) noise at whole training steps."""

    init_noise_sigma = 1.0

    _mixing: tuple[Tensor, Table, Table] | None = None

    def _mixtures(self) -> tuple[Table, Table]:
        """sqrt(abar) and sqrt(1 - abar) of each training step, and the same with the second negative."""
        if self._mixing is None or self._mixing[0] is not self.alphas_cumprod:
            a, b = self._abar.sqrt(), (1 - self._abar).sqrt()
            tables = (Table(torch.stack([a, sign * b], dim=1)) for sign in (1, -1))
            self._mixing = self.alphas_cumprod, *tables
        return self._mixing[1:]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [N, *] of images [N, *] at the timesteps, an integer tensor [N] or [1] of 0 … T-1."""
        return self._mix(self._mixtures()[0], original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a v_prediction model should answer: sqrt(abar) noise - sqrt(1 - abar) sample, [N, *]."""
        return self._mix(self._mixtures()[1], noise, sample, timesteps)

    def _check_pure_noise(self, abar: Tensor) -> None:
        """abar: of the timesteps to visit."""
        if self._prediction == "eps" and bool((abar == 0).any()):
            raise UsageError(
                "prediction_type: 'epsilon' tells nothing of the image at a step of pure noise, which "
                "rescale_betas_zero_snr makes of the last; choose 'v_prediction' or 'sample', or another spacing"
            )


def _leaves(kind: type) -> list[type]:
    below = [leaf for k in kind.__subclasses__() for leaf in _leaves(k)]
    return below or [kind]


def result(prev_sample: Tensor, pred_original_sample: Tensor | None, return_dict: bool) -> Any:
    """A `SchedulerOutput`, or the tuple of what it holds."""
    output = SchedulerOutput(prev_sample, pred_original_sample)
    return output if return_dict else output.to_tuple()
