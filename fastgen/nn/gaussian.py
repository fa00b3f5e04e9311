"""A Gaussian with a diagonal covariance, N(mean, exp(logvar) I): the latents of an autoencoder.

Legend: N batch, C channels, H W size of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen import ops

LOWEST, HIGHEST = -30.0, 20.0  # of logvar, as in Rombach et al. 2022's code and in diffusers


class DiagonalGaussian:
    """``mean``, ``logvar`` (clamped to [-30, 20]) and ``std``, [N,C,H,W], from both in one [N,2C,H,W]."""

    def __init__(self, mean_and_logvar: Tensor) -> None:
        self.mean, logvar = mean_and_logvar.chunk(2, dim=1)
        self.logvar = logvar.clamp(LOWEST, HIGHEST)

    @property
    def std(self) -> Tensor:
        return (self.logvar / 2).exp()

    def sample(
        self, noise: Tensor | None = None, seeds: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """mean + std · noise, [N,C,H,W]: of the noise that is given, or drawn from ``seeds``, int64 [N], or from
        ``generator``, or else from PyTorch's own. Raises ValueError where more than one of them is given."""
        if sum(given is not None for given in (noise, seeds, generator)) > 1:
            raise ValueError("give one of noise, seeds and generator")
        if noise is None and seeds is None:
            place = self.mean.device if generator is None else generator.device
            noise = torch.empty(self.mean.shape, dtype=self.mean.dtype, device=place).normal_(generator=generator)
            noise = noise.to(self.mean.device)
        return ops.reparameterize(self.mean, self.logvar, noise, seeds)[0]

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(N(mean, std²) || N(0, I)) = 1/2 sum (mean² + std² - 1 - logvar), in nats, [N]."""
        return (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(dim=1) / 2
