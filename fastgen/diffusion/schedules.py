"""Noise schedules: the betas of the forward process, in fp64.

Legend: T steps, beta_t the variance added at step t, abar_t = prod_{s<=t} (1 - beta_s).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["linear", "scaled_linear", "cosine"]
Prediction = Literal["eps", "x0", "v"]
SCHEDULES: tuple[str, ...] = ("linear", "scaled_linear", "cosine")
PREDICTIONS: tuple[str, ...] = ("eps", "x0", "v")


@dataclass(frozen=True)
class DiffusionConfig:
    """How a diffusion model was trained: the forward process and what the network predicts.

    ``prediction`` is the network's output m: "eps" (the noise), "x0" (the image) or
    "v" = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022, eq. 11).
    ``clip`` bounds the predicted image to [-clip, clip] while sampling; None leaves it free.
    ``zero_terminal_snr`` rescales the schedule so that its last step is pure noise (Lin et al. 2024,
    algorithm 1); "eps" is refused with it, for from pure noise the noise tells nothing of the image.
    """

    schedule: Schedule = "linear"
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: Prediction = "eps"
    clip: float | None = 1.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, not {self.prediction!r}")
        if self.zero_terminal_snr and (self.prediction == "eps" or self.timesteps < 2):
            raise ValueError("zero_terminal_snr needs prediction v or x0, and at least 2 timesteps")
        if self.timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, not {self.timesteps}")
        if self.schedule != "cosine" and not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, "
                f"not {self.beta_start} and {self.beta_end}"
            )


def betas(config: DiffusionConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    """The variances of the forward process, [T], each in (0, 1), the last 1 for zero terminal SNR.

    - linear: beta_start … beta_end (Ho et al. 2020, section 4).
    - scaled_linear: linear in sqrt(beta), then squared (latent diffusion, Rombach et al. 2022).
    - cosine: beta_t = min(0.999, 1 - f((t+1)/T) / f(t/T)), f(u) = cos²((u + 0.008) / 1.008 · π/2)
      (Nichol & Dhariwal 2021, eq. 17).
    - zero_terminal_snr: then sqrt(abar) is shifted to 0 at the end and scaled to what it was at the
      start (Lin et al. 2024, algorithm 1).

    In fp32 they are rounded where diffusers rounds, for `fastgen.schedulers`; all else wants fp64.
    """
    return zero_terminal_snr(_betas(config, dtype)) if config.zero_terminal_snr else _betas(config, dtype)


def _betas(config: DiffusionConfig, dtype: torch.dtype) -> Tensor:
    T = config.timesteps
    if config.schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, T, dtype=dtype)
    if config.schedule == "scaled_linear":
        return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, T, dtype=dtype).square()
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999).to(dtype)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The betas [T] rescaled so that abar ends at 0 (Lin et al. 2024, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """abar_t = prod_{s<=t} (1 - beta_s), fp64 [T], decreasing."""
    return (1 - betas(config)).cumprod(0)


def forward_table(config: DiffusionConfig) -> Tensor:
    """fp32 [T, 2] of (sqrt(abar_t), sqrt(1 - abar_t)), computed in fp64: what `ops.q_sample` reads."""
    abar = alphas_cumprod(config)
    return torch.stack([abar.sqrt(), (1 - abar).sqrt()], dim=1).float()


def training_target(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor, prediction: Prediction) -> Tensor:
    """What the network should answer at x_t = sqrt(abar) x0 + sqrt(1 - abar) noise.

    x0, noise: [N, *]; t: int64 [N] in 0 … T-1; table: fp32 [T, 2] from `forward_table`.
    """
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    a, b = table[t].reshape(len(t), 2, *[1] * (x0.ndim - 1)).unbind(1)
    return a * noise - b * x0
