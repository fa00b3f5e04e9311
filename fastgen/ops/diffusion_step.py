"""One step of any sampler: guidance, the predicted image, clipping, the update and fresh noise, in one pass.

Every sampler is a table of coefficients, one row a step (see `diffusion.samplers`):

    m      = uncond + guidance · (cond - uncond)              or the model's output as it is
    x0     = p0 · x_t + p1 · m, clamped to ±clip              the prediction type lives in p
    eps    = p2 · x_t + p3 · m
    x_next = q0 · x_t + q1 · x0 + q2 · eps + q3 · history + q4 · noise

Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Ho & Salimans 2022 (guidance, eq. 6 with w = guidance - 1).

Legend: N images, * their shape, S rows of the table.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops.philox import Stream, philox_normal_reference
from fastgen.ops.registration import FusedOp, dense, empty_like, layout, wide
from fastgen.ops.reparameterize import check_noise

KEEP = {None: 0, "x0": 1, "eps": 2}


def diffusion_step(
    x_t: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor,
    *,
    guidance: Tensor | None = None,
    clip: float | None = None,
    history: Tensor | None = None,
    keep: Literal["x0", "eps"] | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns (x_next [N, *], history_out [N, *] or None) in x_t's dtype and layout.

    x_t: [N, *], floating. model_out: [N, *]; with ``guidance`` (a tensor [] or [N]) a doubled
    batch [2N, *], the unconditional half first. coefficients: fp32 [S, 9], rows (p0 … p3, q0 … q4);
    step: int64 [], the row, a tensor on x_t's device so that a captured graph can replay (its
    value is not checked). clip: bound of x0, in image units; ε is never clipped. history: [N, *],
    what an earlier step kept; keep: what to return for the next, the clipped x0 or eps.
    Give noise [N, *], or seeds int64 [N] for noise made in the kernel (the step's row is its
    counter), or neither where q4 is 0. Differentiable in every floating tensor but the table.
    """
    _check(x_t, model_out, coefficients, step, guidance, history, keep)
    check_noise(x_t, noise, seeds, optional=True)
    x_next, kept = _FORWARD(
        x_t, model_out, coefficients, step, guidance, clip, history, KEEP[keep], noise, seeds, backend
    )
    return x_next, None if keep is None else kept


def _check(
    x_t: Tensor, model_out: Tensor, coefficients: Tensor, step: Tensor, guidance: Any, history: Any, keep: Any
) -> None:
    expected = (x_t.shape[0] * (1 if guidance is None else 2), *x_t.shape[1:])
    if tuple(model_out.shape) != expected:
        raise ValueError(f"model_out must have the shape {list(expected)}, not {list(model_out.shape)}")
    if coefficients.ndim != 2 or coefficients.shape[1] != 9 or coefficients.dtype != torch.float32:
        raise ValueError(
            f"coefficients must be an fp32 tensor [S, 9], not {coefficients.dtype} {list(coefficients.shape)}"
        )
    if step.numel() != 1 or step.dtype != torch.int64:
        raise ValueError(f"step must be an int64 tensor [], not {step.dtype} {list(step.shape)}")
    if guidance is not None and guidance.numel() != 1 and tuple(guidance.shape) != (x_t.shape[0],):
        raise ValueError(f"guidance must be a tensor [] or [{x_t.shape[0]}], not {list(guidance.shape)}")
    if history is not None and history.shape != x_t.shape:
        raise ValueError(f"history must have the shape {list(x_t.shape)}, not {list(history.shape)}")
    if keep not in KEEP:
        raise ValueError(f"keep must be None, 'x0' or 'eps', not {keep!r}")


def diffusion_step_reference(
    x_t: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor,
    *,
    guidance: Tensor | None = None,
    clip: float | None = None,
    history: Tensor | None = None,
    keep: Literal["x0", "eps"] | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The equations in plain PyTorch, in at least fp32. Same arguments as `diffusion_step`."""
    dtype = wide(x_t.dtype)
    p0, p1, p2, p3, q0, q1, q2, q3, q4 = _row(coefficients, step, dtype)
    x, m = x_t.to(dtype), model_out.to(dtype)
    if guidance is not None:
        uncond, cond = m.chunk(2)
        m = uncond + _per_image(guidance, x) * (cond - uncond)
    x0, eps = p0 * x + p1 * m, p2 * x + p3 * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    y = q0 * x + q1 * x0 + q2 * eps
    if history is not None:
        y = y + q3 * history.to(dtype)
    if seeds is not None:
        noise = philox_normal_reference(seeds, x.shape[1:], step, Stream.STEP)
    if noise is not None:
        y = y + q4 * noise.to(dtype)
    kept = {None: None, "x0": x0, "eps": eps}[keep]
    return y.to(x_t.dtype), None if kept is None else kept.to(x_t.dtype)


def _row(coefficients: Tensor, step: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The nine numbers of the step, without waiting for the device to tell which step it is."""
    return coefficients.index_select(0, step.reshape(1)).to(dtype)[0].unbind()


def _per_image(guidance: Tensor, x: Tensor) -> Tensor:
    return guidance.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _forward(
    x_t: Tensor, model_out: Tensor, coefficients: Tensor, step: Tensor, guidance: Any, clip: float | None,
    history: Any, keep: int, noise: Any, seeds: Any, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    backend = backends.resolve("diffusion_step", x_t.device, backend, like=(x_t,))
    if backend == "reference":
        name = next(k for k, v in KEEP.items() if v == keep)
        x_next, kept = diffusion_step_reference(
            x_t, model_out, coefficients, step,
            guidance=guidance, clip=clip, history=history, keep=name, noise=noise, seeds=seeds,
        )  # fmt: skip
        x_next = x_next.contiguous(memory_format=layout(x_t))
        return x_next, x_t.new_empty(0) if kept is None else kept.contiguous(memory_format=layout(x_t))
    x_t = dense(x_t)
    x_next, kept = _fake(x_t, model_out, coefficients, step, guidance, clip, history, keep, noise, seeds)
    launch = backends.kernel("diffusion_step", "diffusion_step_fwd", backend)
    guidance = None if guidance is None else guidance.to(wide(x_t.dtype)).contiguous()
    model_out = model_out.contiguous(memory_format=layout(x_t))
    history, noise = dense(history, like=x_t), dense(noise, like=x_t)
    launch(
        x_t, model_out, dense(coefficients), step, guidance, clip,
        history, keep, noise, dense(seeds), x_next, kept if keep else None,
    )  # fmt: skip
    return x_next, kept


def _fake(
    x_t: Tensor, model_out: Any, coefficients: Any, step: Any, guidance: Any, clip: Any, history: Any,
    keep: int, noise: Any, seeds: Any, backend: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_like(x_t), empty_like(x_t) if keep else x_t.new_empty(0)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x_t, model_out, coefficients, step, guidance, clip, history, keep, noise, _, _ = inputs
    ctx.save_for_backward(x_t, model_out, coefficients, step, guidance)
    ctx.clip, ctx.keep = clip, keep
    ctx.dtypes = None if history is None else history.dtype, None if noise is None else noise.dtype


def _backward(ctx: Any, dy: Tensor | None, dkept: Tensor | None) -> tuple:
    """The step is linear but for the clamp, whose mask is made again. Plain PyTorch: sampling rarely differentiates."""
    x_t, model_out, coefficients, step, guidance = ctx.saved_tensors
    # The gradient of guidance is a sum over whole images, whose terms fp32 would round.
    dtype = torch.float64 if guidance is not None and ctx.needs_input_grad[4] else wide(x_t.dtype)
    if dy is None and (dkept is None or not ctx.keep):
        return (None,) * 11
    p0, p1, p2, p3, q0, q1, q2, q3, q4 = _row(coefficients, step, dtype)
    x, m = x_t.to(dtype), model_out.to(dtype)
    if guidance is not None:
        uncond, cond = m.chunk(2)
        g = _per_image(guidance, x)
        m = uncond + g * (cond - uncond)
    dy = torch.zeros_like(x) if dy is None else dy.to(dtype)
    dx0, deps = q1 * dy, q2 * dy
    if dkept is not None and ctx.keep:
        dx0, deps = (dx0 + dkept.to(dtype), deps) if ctx.keep == KEEP["x0"] else (dx0, deps + dkept.to(dtype))
    if ctx.clip is not None:
        dx0 = torch.where((p0 * x + p1 * m).abs() <= ctx.clip, dx0, 0.0)
    dm = p1 * dx0 + p3 * deps
    dguidance = None
    if guidance is not None:
        if ctx.needs_input_grad[4]:
            per_image = (dm * (cond - uncond)).flatten(1).sum(1)
            dguidance = (
                (per_image if guidance.numel() == x.shape[0] else per_image.sum())
                .reshape(guidance.shape)
                .to(guidance.dtype)
            )
        dm = torch.cat([(1 - g) * dm, g * dm])
    dhistory, dnoise = ((q * dy).to(d) if d is not None else None for q, d in zip((q3, q4), ctx.dtypes, strict=True))
    dx = (q0 * dy + p0 * dx0 + p2 * deps).to(x_t.dtype)
    return dx, dm.to(model_out.dtype), None, None, dguidance, None, dhistory, None, dnoise, None, None


_FORWARD = FusedOp(
    "diffusion_step(Tensor x_t, Tensor model_out, Tensor coefficients, Tensor step, Tensor? guidance, float? clip, "
    "Tensor? history, int keep, Tensor? noise, Tensor? seeds, str? backend) -> (Tensor, Tensor)",
    _forward, _fake, _setup, _backward,
)  # fmt: skip
