"""Schedules and samplers against closed forms and against diffusers, step by step from the same state."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen import ops
from fastgen.diffusion.samplers import DDIM, DDPM, SAMPLERS, SamplingPlan, get_sampler, predictions, timestep_sequence
from fastgen.diffusion.schedules import DiffusionConfig, alphas_cumprod, betas, forward_table, training_target
from fastgen.errors import UsageError

diffusers = pytest.importorskip("diffusers")

SCHEDULE_NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def scheduler(kind: Any, config: DiffusionConfig, **kwargs: Any) -> Any:
    """diffusers' scheduler of the same process."""
    return kind(
        num_train_timesteps=config.timesteps, beta_schedule=SCHEDULE_NAMES[config.schedule],
        beta_start=config.beta_start, beta_end=config.beta_end, prediction_type=PREDICTION_NAMES[config.prediction],
        clip_sample=config.clip is not None, clip_sample_range=config.clip or 1.0, **kwargs,
    )  # fmt: skip


# Schedules


@pytest.mark.parametrize("T", [1, 10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_betas_are_those_of_diffusers(schedule: str, T: int) -> None:
    config = DiffusionConfig(schedule, T, beta_start=0.001, beta_end=0.015)
    ours = betas(config)
    assert ours.dtype == torch.float64 and ours.shape == (T,) and ((ours > 0) & (ours < 1)).all()
    theirs = scheduler(diffusers.DDPMScheduler, config)
    torch.testing.assert_close(ours, theirs.betas.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alphas_cumprod(config), theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


def test_betas_in_closed_form() -> None:
    linear = betas(DiffusionConfig("linear", 5, 0.1, 0.5))
    torch.testing.assert_close(linear, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64), rtol=1e-14, atol=0)
    scaled = betas(DiffusionConfig("scaled_linear", 3, 0.04, 0.36))
    torch.testing.assert_close(scaled, torch.tensor([0.04, 0.16, 0.36], dtype=torch.float64), rtol=1e-14, atol=0)


def test_cosine_telescopes() -> None:
    """Below the clamp at 0.999, abar_t = f((t+1)/T) / f(0)."""
    config = DiffusionConfig("cosine", 100)
    f = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(101)]
    expected = torch.tensor(f[1:], dtype=torch.float64) / f[0]
    torch.testing.assert_close(alphas_cumprod(config)[:98], expected[:98], rtol=1e-12, atol=0)
    assert betas(config)[-1].item() == 0.999


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_forward_table(schedule: str) -> None:
    config = DiffusionConfig(schedule)
    table, abar = forward_table(config), 1.0
    assert table.shape == (1000, 2) and table.dtype == torch.float32
    for t, beta in enumerate(betas(config).tolist()):
        abar *= 1 - beta
        if t in (0, 1, 500, 998, 999):
            torch.testing.assert_close(
                table[t].double(),
                torch.tensor([abar**0.5, (1 - abar) ** 0.5], dtype=torch.float64),
                rtol=1e-6,
                atol=1e-9,
            )
    torch.testing.assert_close(table.square().sum(1), torch.ones(1000), rtol=0, atol=3e-7)
    assert (table[1:, 0] < table[:-1, 0]).all(), "the image fades at every step"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"schedule": "sigmoid"}, "schedule"),
        ({"prediction": "noise"}, "prediction"),
        ({"timesteps": 0}, "timesteps"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
    ],
)
def test_wrong_configuration(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        DiffusionConfig(**arguments)


# Predictions


@pytest.mark.parametrize("prediction", PREDICTION_NAMES)
def test_target_and_prediction_are_inverse(prediction: str) -> None:
    """A network that answers training_target exactly lets the sampler see x0 and the noise exactly."""
    config = DiffusionConfig(prediction=prediction)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 3, 1, 4, 4).double().unbind()
    t, table = torch.tensor([0, 500, 999]), forward_table(config)
    x_t, _ = ops.q_sample(x0, t, table, noise=noise)
    m = training_target(x0, noise, t, table, prediction)
    p0, p1, p2, p3 = (p[:, None, None, None] for p in predictions(alphas_cumprod(config)[t], prediction))
    torch.testing.assert_close(p0 * x_t + p1 * m, x0, rtol=0, atol=2e-4)
    torch.testing.assert_close(p2 * x_t + p3 * m, noise, rtol=0, atol=2e-4)


def test_training_target() -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 3, 1, 4, 4)
    t, config = torch.tensor([0, 500, 999]), DiffusionConfig("cosine")
    table = forward_table(config)
    assert training_target(x0, noise, t, table, "eps") is noise
    assert training_target(x0, noise, t, table, "x0") is x0
    theirs = scheduler(diffusers.DDPMScheduler, config).get_velocity(x0, noise, t)
    torch.testing.assert_close(training_target(x0, noise, t, table, "v"), theirs, rtol=0, atol=1e-4)


# Timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(spacing: str) -> None:
    theirs = diffusers.DDPMScheduler(timestep_spacing=spacing)
    for steps in [1, 2, 3, 4, 5, 7, 8, 10, 15, 20, 25, 30, 40, 50, 75, 100, 200, 250, 333, 500, 999, 1000]:
        theirs.set_timesteps(steps)
        ours = timestep_sequence(1000, steps, spacing)
        assert ours.dtype == torch.int64 and ours.tolist() == theirs.timesteps.tolist(), steps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_in_closed_form(spacing: str) -> None:
    """The nearest whole step to the exact fraction (either one where it lies half-way), distinct and in range."""
    for T in (37, 1000):
        for steps in range(1, T + 1, max(1, T // 100)):
            t = timestep_sequence(T, steps, spacing).tolist()
            exact = {
                "leading": [Fraction(i * (T // steps)) for i in reversed(range(steps))],
                "trailing": [T - Fraction(T * i, steps) - 1 for i in range(steps)],
                "linspace": [Fraction((T - 1) * i, max(1, steps - 1)) for i in reversed(range(steps))],
            }[spacing]
            assert len(t) == len(set(t)) == steps and t == sorted(t, reverse=True) and T > t[0] and t[-1] >= 0
            assert all(abs(a - b) <= Fraction(1, 2) for a, b in zip(t, exact, strict=True)), (T, steps)
        assert timestep_sequence(T, T, spacing).tolist() == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 38])
def test_too_many_or_too_few_steps(steps: int) -> None:
    with pytest.raises(UsageError, match=r"^steps: .*between 1 and 37"):
        timestep_sequence(37, steps)


def test_unknown_spacing() -> None:
    with pytest.raises(UsageError, match=r"^spacing: .*'even'"):
        timestep_sequence(37, 5, "even")


# Steps

CONFIGS = [
    ("linear", "eps", 1.0), ("linear", "eps", None), ("linear", "x0", 1.0), ("linear", "v", 1.0),
    ("scaled_linear", "v", None), ("cosine", "x0", None), ("cosine", "v", 1.0),
]  # fmt: skip


def walk(plan: SamplingPlan, config: DiffusionConfig, step_like_diffusers: Any) -> None:
    """Each step from the same state, model output and noise; the state goes on as diffusers has it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    for row, t in enumerate(plan.timesteps.tolist()):
        m, noise = torch.randn(2, *x.shape, generator=generator)
        theirs = step_like_diffusers(m, t, x, noise)
        ours, _ = ops.diffusion_step(x, m, plan.coefficients, torch.tensor(row), clip=config.clip, noise=noise)
        error, bound = (ours - theirs).abs().max().item(), 1e-5 * max(x.abs().max().item(), theirs.abs().max().item())
        assert error <= bound, f"step {row}, t = {t}: {error:.2e} > {bound:.2e}"
        x = theirs / max(1.0, theirs.abs().max().item() / 4)  # an untrained "model" must not blow it up


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(("eta", "clipped"), [(0.0, False), (0.0, True), (0.5, False), (0.5, True)])
@pytest.mark.parametrize(("schedule", "prediction", "clip"), CONFIGS)
def test_ddim_steps_are_those_of_diffusers(
    schedule: str, prediction: str, clip: float | None, eta: float, clipped: bool, steps: int
) -> None:
    config = DiffusionConfig(schedule, prediction=prediction, clip=clip)
    theirs = scheduler(diffusers.DDIMScheduler, config, set_alpha_to_one=True, timestep_spacing="leading")
    theirs.alphas_cumprod = theirs.alphas_cumprod.double().copy_(alphas_cumprod(config))  # theirs are a product in fp32
    theirs.set_timesteps(steps)
    plan = DDIM(eta, spacing="leading", use_clipped_model_output=clipped).plan(config, steps)
    assert plan.noisy == (eta > 0) and plan.timesteps.tolist() == theirs.timesteps.tolist()

    def step(m: Tensor, t: int, x: Tensor, noise: Tensor) -> Tensor:
        options = {"eta": eta, "use_clipped_model_output": clipped, "variance_noise": noise if eta else None}
        return theirs.step(m, t, x, **options).prev_sample

    walk(plan, config, step)


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(("schedule", "prediction", "clip"), CONFIGS)
def test_ddpm_steps_are_those_of_diffusers(
    schedule: str, prediction: str, clip: float | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.schedulers import scheduling_ddpm

    config = DiffusionConfig(schedule, prediction=prediction, clip=clip)
    theirs = scheduler(diffusers.DDPMScheduler, config, timestep_spacing="leading")
    theirs.alphas_cumprod = theirs.alphas_cumprod.double().copy_(alphas_cumprod(config))
    theirs.set_timesteps(steps)
    plan = DDPM(spacing="leading").plan(config, steps)
    assert plan.noisy and plan.timesteps.tolist() == theirs.timesteps.tolist()

    def step(m: Tensor, t: int, x: Tensor, noise: Tensor) -> Tensor:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: noise)
        return theirs.step(m, t, x).prev_sample

    walk(plan, config, step)


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(1.0), DDPM()])
@pytest.mark.parametrize("prediction", PREDICTION_NAMES)
def test_a_perfect_model_gives_the_image_back(sampler: Any, prediction: str) -> None:
    """Told the truth at every step, each sampler ends at x0 exactly: the last row adds no noise."""
    config = DiffusionConfig("cosine", 1000, prediction=prediction)
    plan, table = sampler.plan(config, 10), forward_table(config)
    torch.manual_seed(0)
    image = torch.rand(2, 1, 4, 4) * 1.8 - 0.9
    x = torch.randn_like(image)
    for row, t in enumerate(plan.timesteps):
        a, b = table[t].double()
        noise = ((x - a * image) / b).float()
        m = training_target(image, noise, t.expand(2), table, prediction)
        x, _ = ops.diffusion_step(x, m, plan.coefficients, torch.tensor(row), clip=1.0, noise=torch.randn_like(x))
    torch.testing.assert_close(x, image, rtol=0, atol=1e-3)


def test_ddim_with_eta_1_adds_the_noise_of_ddpm() -> None:
    config = DiffusionConfig()
    torch.testing.assert_close(
        DDIM(1.0).plan(config, 20).coefficients[:, 8], DDPM().plan(config, 20).coefficients[:, 8]
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance(scale: float) -> None:
    config = DiffusionConfig("cosine", prediction="v")
    plan = DDIM().plan(config, 10)
    torch.manual_seed(0)
    x, uncond, cond = torch.randn(3, 2, 1, 4, 4)
    step = torch.tensor(3)
    guided, _ = ops.diffusion_step(
        x, torch.cat([uncond, cond]), plan.coefficients, step, guidance=torch.tensor(scale), clip=1.0
    )
    m = (uncond.double() + scale * (cond.double() - uncond.double())).float()
    expected, _ = ops.diffusion_step(x, m, plan.coefficients, step, clip=1.0)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-5)


# The samplers by name


def test_plan() -> None:
    for name, kind in SAMPLERS.items():
        assert get_sampler(name) == kind()
        plan = kind().plan(DiffusionConfig(timesteps=100), 7)
        assert plan.coefficients.shape == (7, 9) and plan.coefficients.dtype == torch.float32
        assert torch.isfinite(plan.coefficients).all() and plan.coefficients[-1, 8] == 0
    own = DDIM(0.3)
    assert get_sampler(own) is own


@pytest.mark.parametrize("prediction", PREDICTION_NAMES)
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_plans_of_every_length_are_finite(schedule: str, prediction: str) -> None:
    config = DiffusionConfig(schedule, 40, prediction=prediction)
    for sampler in (DDIM(0.5), DDPM()):
        for steps in range(1, 41):
            assert np.isfinite(sampler.plan(config, steps).coefficients.numpy()).all(), (sampler, steps)


@pytest.mark.parametrize("wrong", ["euler-a", "", 3, None])
def test_unknown_sampler(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"^sampler: .*ddim, ddpm"):
        get_sampler(wrong)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_wrong_eta(eta: float) -> None:
    with pytest.raises(UsageError, match=r"^eta: .*between 0 and 1"):
        DDIM(eta).plan(DiffusionConfig(), 5)
