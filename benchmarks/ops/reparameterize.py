"""A VAE's latent with its KL divergence, against the two lines that everyone writes around torch.randn_like."""

from benchmarks.harness import Work, nbytes
from benchmarks.ops import philox


def work(inputs, outputs):
    z, kl = outputs[:2]
    mu, logvar, noise, seeds = (inputs.get(name) for name in ("mu", "logvar", "noise", "seeds"))
    drawn = philox.FLOPS if noise is None else 0
    read = nbytes(mu, logvar, noise, seeds)
    forward = Work(read + nbytes(z, kl), (9 + drawn) * z.numel())
    # Reads dz, dkl and the inputs, draws the noise again, writes dmu and dlogvar (and dnoise).
    backward = Work(read + nbytes(z, kl, mu, logvar, noise), (8 + drawn) * z.numel())
    return forward, backward
