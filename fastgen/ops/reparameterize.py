"""The reparameterisation of a Gaussian latent, with its KL divergence, in one pass.

Kingma & Welling 2014, "Auto-encoding variational Bayes", sections 2.4 and appendix B:

    z_i = mu_i + exp(logvar_i / 2) noise_i
    kl  = 1/2 sum_i (exp(logvar_i) + mu_i² - 1 - logvar_i)      KL(N(mu, sigma²) || N(0, I)), in nats

Legend: N samples, * any latent shape.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops.philox import Stream, philox_normal, philox_normal_reference
from fastgen.ops.registration import FusedOp, dense, empty_like, vjp, wide


def reparameterize(
    mu: Tensor, logvar: Tensor, noise: Tensor | None = None, seeds: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Samples z ~ N(mu, exp(logvar)) and returns (z, kl).

    mu, logvar: [N, *], floating, of one shape and dtype. Give either ``noise`` [N, *] or ``seeds``
    int64 [N], from which each sample's noise is made inside the kernel, and again in backward (on a CPU
    it is kept for that).
    z: [N, *] in mu's dtype and layout; kl: [N], fp32 (fp64 for fp64), in nats, >= 0.
    Differentiable in mu, logvar and noise, twice too. Raises ValueError for shapes that disagree
    and where not exactly one of noise and seeds is given.
    """
    if logvar.shape != mu.shape or logvar.dtype != mu.dtype or mu.ndim < 1:
        raise ValueError(
            f"logvar must have mu's shape and dtype, {list(mu.shape)} {mu.dtype}, "
            f"not {list(logvar.shape)} {logvar.dtype}"
        )
    check_noise(mu, noise, seeds)
    recorded = torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad)
    exact = mu.dtype in (torch.float32, torch.float64)
    free = seeds is not None and recorded and exact and not torch.compiler.is_compiling()
    if free and backends.resolve("reparameterize", mu.device, backend) == "cpp":
        # A CPU takes longer to make the noise again for the backward than to keep it.
        noise, seeds = philox_normal(seeds, mu.shape[1:], 0, Stream.REPARAMETERIZE, backend=backend).to(mu.dtype), None
    return _FORWARD(mu, logvar, noise, seeds, backend)


def check_noise(x: Tensor, noise: Tensor | None, seeds: Tensor | None, *, optional: bool = False) -> None:
    """Raises ValueError unless exactly one of noise (x's shape) and seeds (int64 [N]) is given."""
    if (noise is None) == (seeds is None) and not (optional and noise is None):
        raise ValueError("give exactly one of noise and seeds")
    if noise is not None and noise.shape != x.shape:
        raise ValueError(f"noise must have the shape {list(x.shape)}, not {list(noise.shape)}")
    if seeds is not None and (seeds.shape != x.shape[:1] or seeds.dtype != torch.int64):
        raise ValueError(f"seeds must be an int64 tensor [{x.shape[0]}], not {seeds.dtype} {list(seeds.shape)}")


def reparameterize_reference(
    mu: Tensor, logvar: Tensor, noise: Tensor | None = None, seeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The equations in plain PyTorch, in at least fp32. Same arguments as `reparameterize`."""
    if noise is None:
        noise = philox_normal_reference(seeds, mu.shape[1:], 0, Stream.REPARAMETERIZE)
    m, v = mu.to(wide(mu.dtype)), logvar.to(wide(mu.dtype))
    z = (m + (v / 2).exp() * noise.to(m.dtype)).to(mu.dtype)
    return z, 0.5 * (v.exp() + m.square() - 1 - v).reshape(len(m), math.prod(m.shape[1:])).sum(1)


def _forward(
    mu: Tensor, logvar: Tensor, noise: Tensor | None, seeds: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    backend = backends.resolve("reparameterize", mu.device, backend, like=(mu,))
    if backend == "reference":
        z, kl = reparameterize_reference(mu, logvar, noise, seeds)
        return dense(z, like=mu), kl
    mu, logvar, noise = dense(mu), dense(logvar, like=mu), dense(noise, like=mu)
    z, kl = torch.empty_like(mu), torch.empty(len(mu), dtype=wide(mu.dtype), device=mu.device)
    backends.kernel("reparameterize", "reparameterize_fwd", backend)(mu, logvar, noise, dense(seeds), z, kl)
    return z, kl


def _fake(mu: Tensor, logvar: Tensor, noise: Any, seeds: Any, backend: Any = None) -> tuple[Tensor, Tensor]:
    return empty_like(mu), mu.new_empty(mu.shape[0], dtype=wide(mu.dtype))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    mu, logvar, noise, seeds, backend = inputs
    ctx.save_for_backward(mu, logvar, noise, seeds)
    ctx.backend = backends.resolve("reparameterize", mu.device, backend, like=(mu,))


def _backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple:
    mu, logvar, noise, seeds = ctx.saved_tensors
    if dz is None and dkl is None:
        return None, None, None, None, None
    dmu, dlogvar = _BACKWARD(dz, dkl, mu, logvar, noise, seeds, ctx.backend)
    dnoise = dz * (logvar / 2).exp() if noise is not None and ctx.needs_input_grad[2] and dz is not None else None
    return dmu, dlogvar, dnoise, None, None


def _vjp(dz: Tensor | None, dkl: Tensor | None, mu: Tensor, logvar: Tensor, noise: Any, seeds: Any) -> tuple:
    return vjp(lambda m, v: reparameterize_reference(m, v, noise, seeds), (mu, logvar), (dz, dkl))


def _backward_op(
    dz: Tensor | None, dkl: Tensor | None, mu: Tensor, logvar: Tensor, noise: Any, seeds: Any, backend: str | None
) -> tuple[Tensor, Tensor]:
    """dmu = dz + dkl mu;  dlogvar = 1/2 (dz noise exp(logvar/2) + dkl (exp(logvar) - 1))."""
    backend = backends.resolve("reparameterize", mu.device, backend, like=(mu,))
    if backend == "reference":
        with torch.no_grad():
            dmu, dlogvar = _vjp(dz, dkl, mu, logvar, noise, seeds)
        return dense(dmu, like=mu), dense(dlogvar, like=mu)
    mu, logvar, noise, dz = dense(mu), dense(logvar, like=mu), dense(noise, like=mu), dense(dz, like=mu)
    dkl = None if dkl is None else dkl.contiguous()
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(logvar)
    launch = backends.kernel("reparameterize", "reparameterize_bwd", backend)
    launch(dz, dkl, mu, logvar, noise, dense(seeds), dmu, dlogvar)
    return dmu, dlogvar


def _backward_fake(dz: Any, dkl: Any, mu: Tensor, logvar: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like(mu), empty_like(mu)


def _backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:6])


def _double_backward(ctx: Any, ddmu: Tensor | None, ddlogvar: Tensor | None) -> tuple:
    def both(dz, dkl, mu, logvar, noise):  # the backward as a function of everything it depends on
        return _vjp(dz, dkl, mu, logvar, noise, ctx.saved_tensors[5])

    with torch.enable_grad():
        return (*vjp(both, ctx.saved_tensors[:5], (ddmu, ddlogvar)), None, None)


_BACKWARD = FusedOp(
    "reparameterize_bwd(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor? noise, Tensor? seeds, "
    "str? backend) -> (Tensor, Tensor)",
    _backward_op, _backward_fake, _backward_setup, _double_backward,
)  # fmt: skip
_FORWARD = FusedOp(
    "reparameterize(Tensor mu, Tensor logvar, Tensor? noise, Tensor? seeds, str? backend) -> (Tensor, Tensor)",
    _forward, _fake, _setup, _backward,
)  # fmt: skip
