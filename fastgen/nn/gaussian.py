"""The latents of variational autoencoders: a Gaussian with a diagonal covariance for each sample.

Kingma & Welling 2014, "Auto-encoding variational Bayes". Legend: N samples, C latent channels, * their sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.errors import UsageError
from fastgen.ops.registration import wide

LOGVAR_RANGE = (-30.0, 20.0)  # what diffusers clamps to, so that var is neither 0 nor infinite in fp32


class DiagonalGaussian:
    """N(mean, diag(var)) over latents, from what an encoder puts out, as diffusers' DiagonalGaussianDistribution.

    moments: [N, 2C, *], floating, the means on the first C channels and the logarithms of the variances on
    the others, which are clamped to [-30, 20]. mean, logvar, std, var: [N, C, *] in its dtype. Everything
    is differentiable in moments. Raises UsageError for moments of another form.
    """

    def __init__(self, moments: Tensor) -> None:
        if moments.ndim < 2 or moments.shape[1] % 2 or not moments.is_floating_point():
            raise UsageError(
                f"moments: must be floating [N, 2C, *], means and log variances, not {moments.dtype} "
                f"{list(moments.shape)}; give the encoder 2C output channels"
            )
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    def __repr__(self) -> str:
        return f"DiagonalGaussian({list(self.mean.shape)}, {self.mean.dtype}, {self.mean.device})"

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The most likely latent: the mean, [N, C, *]."""
        return self.mean

    def sample(
        self, noise: Tensor | None = None, seeds: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """z = mean + std · noise, [N, C, *]; see `sample_and_kl`."""
        return self.sample_and_kl(noise, seeds, generator)[0]

    def sample_and_kl(
        self, noise: Tensor | None = None, seeds: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(z [N, C, *], kl [N]), a sample and the divergence `kl()` in one pass (`ops.reparameterize`).

        noise: [N, C, *], standard normal; or seeds: int64 [N], from each of which one sample's noise is
        made, whatever the batch; or generator: torch's, its default one if nothing is given, so that
        torch.manual_seed repeats the sample. Raises UsageError where more than one is given.
        """
        if sum(given is not None for given in (noise, seeds, generator)) > 1:
            raise UsageError("noise: give one of noise, seeds and generator, or none")
        if noise is None and seeds is None:
            # As diffusers draws it; where a generator stands on the CPU, so does what it draws.
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
            noise = noise.to(self.mean.device)
        return ops.reparameterize(self.mean, self.logvar, noise, seeds)

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL(self || other), by default the standard normal: fp32 (fp64 for fp64) [N], in nats, >= 0.

        1/2 Σ ((mean - mean')² / var' + var / var' - 1 - logvar + logvar')
        """
        mean, logvar = self._wide()
        if other is None:
            terms = mean.square() + logvar.exp() - 1 - logvar
        else:
            if other.mean.shape != self.mean.shape:
                raise UsageError(f"other: must be over {list(self.mean.shape)}, not {list(other.mean.shape)}")
            at, by = other._wide()
            terms = (mean - at).square() * torch.exp(-by) + torch.exp(logvar - by) - 1 - logvar + by
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, x: Tensor) -> Tensor:
        """The negative log likelihood of x [N, C, *]: fp32 (fp64 for fp64) [N], in nats.

        1/2 Σ (log 2π + logvar + (x - mean)² / var)
        """
        if x.shape != self.mean.shape:
            raise UsageError(f"x: must be {list(self.mean.shape)}, as the mean, not {list(x.shape)}")
        mean, logvar = self._wide()
        terms = math.log(2 * math.pi) + logvar + (x.to(mean.dtype) - mean).square() * torch.exp(-logvar)
        return 0.5 * terms.flatten(1).sum(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log density of x [N, C, *] over all latents of a sample, [N]: -`nll`."""
        return -self.nll(x)

    def _wide(self) -> tuple[Tensor, Tensor]:
        """mean and logvar in at least fp32: sums over latents are not for half precision."""
        dtype = wide(self.mean.dtype)
        return self.mean.to(dtype), self.logvar.to(dtype)


class Reparameterize(nn.Module):
    """The step between encoder and decoder of a variational autoencoder, with the divergence of its loss.

        z  = mu + exp(logvar / 2) · noise
        kl = 1/2 Σ (exp(logvar) + mu² - 1 - logvar)        in nats, over all latents of a sample

    forward(mu, logvar [N, *], noise, seeds) -> (z [N, *] in mu's dtype, kl [N] in fp32, fp64 for fp64), both
    differentiable in mu and logvar, in one pass (`ops.reparameterize`). By default the noise is
    torch.randn_like(mu), so that torch.manual_seed repeats what mu + exp(logvar / 2) · randn_like(mu) gave;
    noise: [N, *] instead of it; seeds: int64 [N] makes each sample's from its seed inside the kernel.
    logvar is not clamped. No parameters. Raises ValueError for shapes that disagree.
    """

    def forward(
        self, mu: Tensor, logvar: Tensor, noise: Tensor | None = None, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if noise is None and seeds is None:
            noise = torch.randn_like(mu)
        return ops.reparameterize(mu, logvar, noise, seeds)
