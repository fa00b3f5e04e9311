"""Samplers against diffusers, step by step from the same state, and against what must hold of any of them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from test_diffusion import PREDICTION_NAMES, SCHEDULE_NAMES, scheduler, widen_diffusers
from torch import Tensor

from fastgen import ops
from fastgen.diffusion.samplers import (
    DDIM,
    DDPM,
    SAMPLERS,
    DPMSolverMultistep,
    EulerAncestral,
    Heun,
    Sampler,
    SamplingPlan,
    describe_sampler,
    get_sampler,
)
from fastgen.diffusion.schedules import DiffusionConfig, alphas_cumprod, training_target
from fastgen.diffusion.spacing import sigma_table
from fastgen.errors import UsageError
from fastgen.ops.diffusion_step import diffusion_step_reference

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

SPACINGS = ("leading", "trailing", "linspace")
DPM = {"solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}


def spacings(sampler: Sampler) -> tuple[str, ...]:
    return SPACINGS if isinstance(sampler, DDIM | DDPM | EulerAncestral) else (*SPACINGS, "karras")


def most_steps(sampler: Sampler, T: int) -> int:
    return T - 1 if isinstance(sampler, DPMSolverMultistep) and sampler.spacing in ("leading", "linspace") else T


EVERY = [pytest.param(replace(s, spacing=k), id=f"{name}-{k}") for name, s in SAMPLERS.items() for k in spacings(s)]


def walk(
    plan: SamplingPlan,
    config: DiffusionConfig,
    step_like_diffusers: Any,
    dtype: torch.dtype = torch.float32,
    beyond: Collection[int] = (),
) -> None:
    """Each step from the same state, model output and noise, all but the rows `beyond`; the state goes on as diffusers
    has it, and each side remembers the step before on its own."""
    step_like_ours = ops.diffusion_step if plan.coefficients.dtype == torch.float32 else diffusion_step_reference
    generator, looks_back = torch.Generator().manual_seed(1), plan.history
    x, history = torch.randn(2, 3, 4, 4, generator=generator).to(dtype), None
    for row, t in enumerate(plan.timesteps.tolist()):
        m, noise = torch.randn(2, *x.shape, generator=generator).to(dtype)
        theirs = step_like_diffusers(m, t, x, noise)
        ours, history = step_like_ours(
            x, m, plan.coefficients, torch.tensor(row), clip=config.clip, noise=noise,
            history=history if looks_back else None, keep="x0",
        )  # fmt: skip
        error, bound = (ours - theirs).abs().max().item(), 1e-5 * max(x.abs().max().item(), theirs.abs().max().item())
        assert error <= bound or row in beyond, f"step {row}, t = {t}: {error:.2e} > {bound:.2e}"
        x = theirs.to(dtype)
        if (row + 1) % plan.order == 0:  # an untrained "model" must not blow it up; within a step of Heun it may
            x = x / max(1.0, theirs.abs().max().item() / 4)


# DDIM and DDPM

CONFIGS = [
    ("linear", "eps", 1.0), ("linear", "eps", None), ("linear", "x0", 1.0), ("linear", "v", 1.0),
    ("scaled_linear", "v", None), ("cosine", "x0", None), ("cosine", "v", 1.0),
]  # fmt: skip


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(("eta", "clipped"), [(0.0, False), (0.0, True), (0.5, False), (0.5, True)])
@pytest.mark.parametrize(("schedule", "prediction", "clip"), CONFIGS)
def test_ddim_steps_are_those_of_diffusers(
    schedule: str, prediction: str, clip: float | None, eta: float, clipped: bool, steps: int
) -> None:
    config = DiffusionConfig(schedule, prediction=prediction, clip=clip)
    compare_ddim(config, DDIM(eta, spacing="leading", use_clipped_model_output=clipped), steps)


def compare_ddim(config: DiffusionConfig, sampler: DDIM, steps: int) -> None:
    theirs = scheduler(diffusers.DDIMScheduler, config, set_alpha_to_one=True, timestep_spacing=sampler.spacing)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double().copy_(alphas_cumprod(config))  # theirs are a product in fp32
    theirs.set_timesteps(steps)
    plan = sampler.plan(config, steps)
    assert plan.noisy == (sampler.eta > 0) and not plan.history
    assert plan.timesteps.tolist() == theirs.timesteps.tolist()

    def step(m: Tensor, t: int, x: Tensor, noise: Tensor) -> Tensor:
        variance_noise = noise if sampler.eta else None
        options = {"use_clipped_model_output": sampler.use_clipped_model_output, "variance_noise": variance_noise}
        return theirs.step(m, t, x, eta=sampler.eta, **options).prev_sample

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


def test_ddim_with_eta_1_adds_the_noise_of_ddpm() -> None:
    config = DiffusionConfig()
    torch.testing.assert_close(
        DDIM(1.0).plan(config, 20).coefficients[:, 8], DDPM().plan(config, 20).coefficients[:, 8]
    )


# The samplers of sigma space

SOLVERS = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", **DPM}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", **DPM}),
}
STEEP = 50.0


def cases() -> list[Any]:
    """What both sides know: diffusers' ancestral class has no x0, and its Euler classes do not clip."""
    chosen = []
    for name in SOLVERS:
        for prediction in PREDICTION_NAMES:
            if name == "euler_ancestral" and prediction == "x0":
                continue
            chosen += [(name, prediction, spacing, None) for spacing in spacings(SAMPLERS[name])]
            if not name.startswith("euler"):
                chosen.append((name, prediction, "trailing", 1.0))
    return chosen


def pair(
    name: str, config: DiffusionConfig, spacing: str, steps: int, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[SamplingPlan, Callable[..., Tensor]]:
    """Our plan and a step of diffusers' scheduler, whose state is converted if it is that of sigma space."""
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)
    theirs.is_scale_input_called = True
    plan = replace(SAMPLERS[name], spacing=spacing).plan(config, steps)
    assert plan.noisy == (name in ("euler_ancestral", "dpmpp_2m_sde") and steps > 1)
    assert len(plan.timesteps) == len(theirs.timesteps) == (2 * steps - 1 if name == "heun" else steps)
    module, dpm = sys.modules[type(theirs).__module__], name.startswith("dpm")
    if not (dpm and spacing == "karras" and config.schedule == "cosine"):  # where diffusers cuts the fraction off
        tolerance = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(plan.timesteps.double(), theirs.timesteps.double(), **tolerance)
    sigma = theirs.sigmas.double()
    scale = torch.ones_like(sigma) if dpm else (1 + sigma.square()).sqrt()
    dtype = theirs.sigmas.dtype

    def step(m: Tensor, t: float, x: Tensor, noise: Tensor) -> Tensor:
        row, options = theirs.step_index or 0, {}
        if name == "dpmpp_2m_sde":
            options["variance_noise"] = noise.to(dtype)
        if name == "euler_ancestral":
            monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise.to(dtype))
        x = (x.double() * scale[row]).to(dtype)
        return theirs.step(m.to(dtype), theirs.timesteps[row], x, **options).prev_sample.double() / scale[row + 1]

    return plan, step


def steep_rows(plan: SamplingPlan) -> set[int]:
    """The correcting rows of Heun's steps in which sigma falls more than `STEEP`-fold.

    They divide the difference between x^ and x0 by sigma' and multiply it by sigma / 2: more than 25 times the
    rounding of x^, in diffusers' fp32 as in ours. `test_heun_steps_in_fp64` compares them.
    """
    sigma = ((1 - plan.abar) / plan.abar).sqrt()
    return {row for row in range(1, len(sigma), plan.order) if plan.order == 2 and sigma[row - 1] > STEEP * sigma[row]}


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
@pytest.mark.parametrize(("name", "prediction", "spacing", "clip"), cases())
def test_solver_steps_are_those_of_diffusers(
    name: str, prediction: str, spacing: str, clip: float | None, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours in fp32 against diffusers' code in fp64, whose tables are its own."""
    widen_diffusers(monkeypatch)
    config = DiffusionConfig(schedule, prediction=prediction, clip=clip)
    kind, options = SOLVERS[name]
    options = options | ({"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing})
    theirs = scheduler(kind, config, **options)
    for steps in (5, 20, 50):
        plan, step = pair(name, config, spacing, steps, theirs, monkeypatch)
        assert theirs.sigmas.dtype == torch.float64
        walk(plan, config, step, beyond=steep_rows(plan))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_solver_steps_are_those_of_diffusers_as_it_is(
    name: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without a change to diffusers but for its cumulated alphas, where sigma falls gently enough for fp32."""
    config = DiffusionConfig("linear", prediction=prediction, clip=None)
    kind, options = SOLVERS[name]
    theirs = scheduler(kind, config, timestep_spacing="trailing", **options)
    theirs.alphas_cumprod = alphas_cumprod(config)
    for steps in (5, 20, 50):
        plan, step = pair(name, config, "trailing", steps, theirs, monkeypatch)
        assert theirs.sigmas.dtype == torch.float32
        walk(plan, config, step)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("spacing", [*SPACINGS, "karras"])
@pytest.mark.parametrize("prediction", PREDICTION_NAMES)
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_heun_steps_in_fp64(
    schedule: str, prediction: str, spacing: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table before it is rounded, and the state in fp64 too: every row agrees."""
    widen_diffusers(monkeypatch)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    config = DiffusionConfig(schedule, prediction=prediction, clip=clip)
    theirs = scheduler(diffusers.HeunDiscreteScheduler, config, use_karras_sigmas=spacing == "karras")
    theirs.register_to_config(timestep_spacing="linspace" if spacing == "karras" else spacing)
    plan, step = pair("heun", config, spacing, 5, theirs, monkeypatch)
    assert plan.coefficients.dtype == torch.float64
    walk(plan, config, step, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde"])
def test_zero_terminal_snr_steps_are_those_of_diffusers(
    name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pure noise: DDIM's abar is 0 there, and the others start at sigma = 4096."""
    widen_diffusers(monkeypatch)
    config = DiffusionConfig(schedule, prediction="v", clip=None, zero_terminal_snr=True)
    for steps in (5, 20, 50):
        if name == "ddim":
            compare_ddim(config, DDIM(0.0), steps)
            compare_ddim(config, DDIM(0.5, use_clipped_model_output=False), steps)
            continue
        kind, options = SOLVERS[name]
        theirs = scheduler(kind, config, timestep_spacing="trailing", **options)
        plan, step = pair(name, config, "trailing", steps, theirs, monkeypatch)
        assert theirs.sigmas[0] > 4095.9
        walk(plan, config, step)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine"])
def test_zero_terminal_snr_with_karras(name: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not linear: there diffusers' sigma falls at the end of the table, so that its t does not begin at T - 1."""
    widen_diffusers(monkeypatch)
    config = DiffusionConfig(schedule, prediction="v", clip=None, zero_terminal_snr=True)
    kind, options = SOLVERS[name]
    theirs = scheduler(kind, config, use_karras_sigmas=True, **options)
    plan, step = pair(name, config, "karras", 20, theirs, monkeypatch)
    assert plan.timesteps[0] == 999
    walk(plan, config, step)


# What holds of every sampler


def follow(
    plan: SamplingPlan, x: Tensor, model: Callable[[int, Tensor], Tensor], clip: float | None, seed: int = 0
) -> list[Tensor]:
    """The state at each row, and the last: the sampling loop in small."""
    generator, history, states = torch.Generator().manual_seed(seed), None, [x]
    for row in range(len(plan.timesteps)):
        noise = torch.randn(x.shape, generator=generator) if plan.noisy else None
        x, history = ops.diffusion_step(
            x, model(row, x), plan.coefficients, torch.tensor(row), clip=clip, noise=noise,
            history=history if plan.history else None, keep="x0" if plan.history else None,
        )  # fmt: skip
        states.append(x)
    return states


def perfect(plan: SamplingPlan, image: Tensor, prediction: str) -> Callable[[int, Tensor], Tensor]:
    """A model that knows the image: its answer is right whatever the noise."""
    table = torch.stack([plan.abar.sqrt(), (1 - plan.abar).sqrt()], dim=1)

    def model(row: int, x: Tensor) -> Tensor:
        noise = (x.double() - table[row, 0] * image) / table[row, 1]
        t = torch.full((len(image),), row)
        return training_target(image.double(), noise, t, table, prediction).float()

    return model


def noise_at(plan: SamplingPlan, row: int, x: Tensor, image: Tensor) -> Tensor:
    return (x.double() - plan.abar[row].sqrt() * image) / (1 - plan.abar[row]).sqrt()


@pytest.mark.parametrize("config", [
    DiffusionConfig("cosine", prediction="eps"), DiffusionConfig("linear", prediction="eps"),
    DiffusionConfig("cosine", prediction="x0"), DiffusionConfig("scaled_linear", prediction="v"),
    DiffusionConfig("linear", prediction="v", zero_terminal_snr=True),
    DiffusionConfig("cosine", prediction="x0", zero_terminal_snr=True),
], ids=lambda c: f"{c.schedule}-{c.prediction}-{c.zero_terminal_snr}")  # fmt: skip
@pytest.mark.parametrize("sampler", [*EVERY, pytest.param(DDIM(1.0), id="ddim-eta")])
def test_a_perfect_model_gives_the_image_back(sampler: Any, config: DiffusionConfig) -> None:
    """Told the truth at every step, each sampler ends at x0, for the last row adds no noise; before, x_t lies at the
    noise level of its row: with the noise that it began with, or, if the sampler adds some, with noise of variance 1.

    But after a steep step of Heun the noise of eps is off: the rounding of m, times sigma, is in x^, and d^ sees it."""
    plan = sampler.plan(config, 10)
    rough = config.prediction == "eps" and steep_rows(plan)
    torch.manual_seed(1)
    image, noise = torch.rand(2, 1, 64, 64) * 1.8 - 0.9, torch.randn(2, 1, 64, 64)
    x = (plan.abar[0].sqrt() * image + (1 - plan.abar[0]).sqrt() * noise).float()
    states = follow(plan, x, perfect(plan, image, config.prediction), clip=1.0)
    torch.testing.assert_close(states[-1], image, rtol=0, atol=1e-3)
    for row, x in enumerate(states[:-1]):
        left = noise_at(plan, row, x, image)
        if plan.noisy:
            assert left.std().item() == pytest.approx(1, abs=0.05) and abs(left.mean().item()) < 0.05, row
        elif not rough:
            torch.testing.assert_close(left.float(), noise, rtol=0, atol=5e-3, msg=lambda m, row=row: f"row {row}: {m}")


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_accuracy(name: str, order: int) -> None:
    """For images of one Gaussian the best prediction is known, and so is where the equation leads from any x:
    x / a - mean goes like sqrt(sigma² + variance). Twice the steps leave 1/2 or 1/4 of the error."""
    config = DiffusionConfig(prediction="x0", clip=None)
    mean, variance = 0.3, 0.25
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (20, 40, 80):
        plan = get_sampler(name, spacing="karras").plan(config, steps)
        a, spread = plan.abar.sqrt(), variance + (1 - plan.abar) / plan.abar

        def best(row: int, x: Tensor, a: Tensor = a, spread: Tensor = spread) -> Tensor:
            return (mean + variance / spread[row] * (x.double() / a[row] - mean)).float()

        exact = mean + (spread[-1] / spread[0]).sqrt() * (x.double() / a[0] - mean)
        errors.append((follow(plan, x, best, clip=None)[-2] / a[-1] - exact).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 0.75 * 2**order < coarse / fine < 1.35 * 2**order, errors


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


# Plans


CONFIGS_40 = [
    DiffusionConfig("linear", 40, prediction="eps"), DiffusionConfig("scaled_linear", 40, prediction="x0"),
    DiffusionConfig("cosine", 40, prediction="v"),
    DiffusionConfig("linear", 40, prediction="v", zero_terminal_snr=True),
    DiffusionConfig("cosine", 40, prediction="x0", zero_terminal_snr=True),
]  # fmt: skip


@pytest.mark.parametrize("sampler", EVERY)
def test_plans_of_every_length(sampler: Any) -> None:
    """Finite, in range, ever less noisy, and without noise or history where there can be none."""
    for config in CONFIGS_40:
        for steps in range(1, most_steps(sampler, 40) + 1):
            plan = sampler.plan(config, steps)
            rows = 2 * steps - 1 if isinstance(sampler, Heun) else steps
            assert plan.coefficients.shape == (rows, 9) and plan.coefficients.dtype == torch.float32
            assert plan.timesteps.shape == plan.abar.shape == (rows,) and plan.abar.dtype == torch.float64
            assert torch.isfinite(plan.coefficients).all(), (config, steps)
            t = plan.timesteps
            assert t.dtype == torch.int64 or (t.dtype == torch.float32 and sampler.spacing in ("linspace", "karras"))
            assert t.max() <= 39 and t.min() >= 0 and (t[1:] <= t[:-1]).all()
            assert plan.abar.min() >= 0 and plan.abar.max() < 1
            step = plan.abar[:: plan.order]
            assert (step[1:] > step[:-1]).all() and (plan.abar[1:] >= plan.abar[:-1]).all()
            assert plan.coefficients[-1, 8] == 0 and plan.coefficients[0, 7] == 0
            assert plan.order == (2 if isinstance(sampler, Heun) else 1)
            assert plan.noisy == bool(plan.coefficients[:, 8].any())
            assert plan.history == bool(plan.coefficients[:, 7].any())


@pytest.mark.parametrize("sampler", EVERY)
def test_plans_of_many_steps_from_pure_noise(sampler: Any) -> None:
    """diffusers' sigma falls before the last step of this schedule, and its ancestral and sde steps there are NaN."""
    config = DiffusionConfig("linear", prediction="v", zero_terminal_snr=True)
    for steps in (300, 500, most_steps(sampler, 1000)):
        assert torch.isfinite(sampler.plan(config, steps).coefficients).all(), steps


@pytest.mark.parametrize("prediction", PREDICTION_NAMES)
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_every_prediction_has_a_finite_plan(schedule: str, prediction: str) -> None:
    config = DiffusionConfig(schedule, 40, prediction=prediction)
    for sampler in SAMPLERS.values():
        for steps in (1, 2, 40):
            assert torch.isfinite(sampler.plan(config, steps).coefficients).all(), (sampler, steps)


@pytest.mark.parametrize("sampler", EVERY)
def test_abar_is_that_of_the_timestep(sampler: Any) -> None:
    """Where t is whole, but for DPM-Solver's karras, whose t is rounded."""
    config = DiffusionConfig("cosine")
    plan = sampler.plan(config, 7)
    if isinstance(sampler, DPMSolverMultistep) and sampler.spacing == "karras":
        assert not torch.equal(plan.timesteps, plan.timesteps.round()), "cosine keeps fractions"
        linear = sampler.plan(DiffusionConfig(), 7)
        assert linear.timesteps.dtype == torch.int64
        sigma = ((1 - linear.abar) / linear.abar).sqrt()
        near = sigma_table(DiffusionConfig())[linear.timesteps]
        assert ((near / sigma).log().abs() < 0.5).all()
        return
    assert (plan.timesteps == plan.timesteps.round()).any()
    for t, abar in zip(plan.timesteps.tolist(), plan.abar.tolist(), strict=True):
        if t == round(t):
            assert abar == pytest.approx(alphas_cumprod(config)[int(t)].item(), rel=1e-9)


@pytest.mark.parametrize("sampler", EVERY)
def test_wrong_steps(sampler: Any) -> None:
    for steps in (0, -1, 38, 2.0, True, "5", None):
        with pytest.raises(UsageError, match=r"^steps: .*between 1 and 3[67]\b"):
            sampler.plan(DiffusionConfig(timesteps=37), steps)


@pytest.mark.parametrize("sampler", EVERY)
def test_most_steps(sampler: Any) -> None:
    most = most_steps(sampler, 37)
    sampler.plan(DiffusionConfig(timesteps=37), most)
    with pytest.raises(UsageError, match=rf"^steps: .*between 1 and {most}\b"):
        sampler.plan(DiffusionConfig(timesteps=37), most + 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_wrong_spacing(name: str) -> None:
    sampler = SAMPLERS[name]
    for wrong in ("even", "", "karras"):
        if wrong not in spacings(sampler):
            with pytest.raises(UsageError, match=rf"^spacing: .*linspace.*not {wrong!r}$"):
                replace(sampler, spacing=wrong).plan(DiffusionConfig(timesteps=37), 5)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_wrong_eta(eta: float) -> None:
    with pytest.raises(UsageError, match=r"^eta: .*between 0 and 1"):
        DDIM(eta).plan(DiffusionConfig(), 5)


# The last steps only


@pytest.mark.parametrize("sampler", EVERY)
def test_tail_is_the_end_of_the_plan(sampler: Any) -> None:
    """The last k steps are the rows of the plan, all but the history of the first; n of n, and more, is the plan."""
    plan = sampler.plan(DiffusionConfig("cosine", 100), 8)
    for steps in range(11):
        tail = plan.tail(steps)
        rows = max(0, plan.order * (min(steps, 8) - 1) + 1)
        first = len(plan.timesteps) - rows
        assert len(tail.timesteps) == len(tail.abar) == len(tail.coefficients) == rows
        assert torch.equal(tail.timesteps, plan.timesteps[first:]) and torch.equal(tail.abar, plan.abar[first:])
        assert torch.equal(tail.coefficients[1:], plan.coefficients[first + 1 :]) and tail.order == plan.order
        assert tail.noisy == bool(tail.coefficients[:, 8].any())
        assert tail.history == bool(tail.coefficients[:, 7].any())
        if steps >= 8:
            assert torch.equal(tail.coefficients, plan.coefficients) and tail.noisy == plan.noisy
        if isinstance(sampler, Heun) and rows:
            assert first % 2 == 0 and torch.equal(tail.coefficients[0], plan.coefficients[first])
    assert torch.equal(plan.coefficients, sampler.plan(DiffusionConfig("cosine", 100), 8).coefficients)


def test_tail_without_abar() -> None:
    plan = replace(DDIM().plan(DiffusionConfig(), 5), abar=None)
    assert plan.tail(2).abar is None and len(plan.tail(2).timesteps) == 2


@pytest.mark.parametrize("spacing", [*SPACINGS, "karras"])
@pytest.mark.parametrize("sde", [False, True])
def test_tail_of_a_multistep_method_begins_with_first_order(sde: bool, spacing: str) -> None:
    """The row of the plan whose history is its own x0; without sde, a step of Euler between the same sigmas."""
    plan = DPMSolverMultistep(sde, spacing).plan(DiffusionConfig("cosine"), 8)
    torch.manual_seed(0)
    x, m, noise = torch.randn(3, 2, 1, 8, 8)
    for row in range(1, 8):
        tail, step = plan.tail(8 - row), torch.tensor(row)
        assert tail.coefficients[0, 7] == 0 and torch.equal(tail.coefficients[0, :4], plan.coefficients[row, :4])
        ours, _ = ops.diffusion_step(x, m, tail.coefficients, torch.tensor(0), clip=1.0, noise=noise)
        _, x0 = ops.diffusion_step(x, m, plan.coefficients, step, clip=1.0, keep="x0")
        expected, _ = ops.diffusion_step(x, m, plan.coefficients, step, clip=1.0, noise=noise, history=x0)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        if not sde:
            now, after = [*((1 - tail.abar) / tail.abar).sqrt().tolist(), 0.0][:2]
            a, a2 = (1 + now**2) ** -0.5, (1 + after**2) ** -0.5
            euler = a2 * (x.double() / a + (after - now) * (x.double() / a - x0) / now)
            torch.testing.assert_close(ours, euler.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", EVERY)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tail_from_a_noised_image(sampler: Any, steps: int) -> None:
    """The image with the noise of abar[0], a perfect model, and it is back."""
    config = DiffusionConfig("linear", prediction="v")
    tail = sampler.plan(config, 10).tail(steps)
    torch.manual_seed(0)
    image, noise = torch.rand(2, 1, 8, 8) * 1.8 - 0.9, torch.randn(2, 1, 8, 8)
    x = (tail.abar[0].sqrt() * image + (1 - tail.abar[0]).sqrt() * noise).float()
    states = follow(tail, x, perfect(tail, image, "v"), clip=1.0)
    torch.testing.assert_close(states[-1], image, rtol=0, atol=1e-4)
    if not tail.noisy:
        for row, x in enumerate(states[:-1]):
            torch.testing.assert_close(noise_at(tail, row, x, image).float(), noise, rtol=0, atol=1e-3)


# The samplers by name


def test_names() -> None:
    assert [*SAMPLERS] == ["ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde"]
    for name, sampler in SAMPLERS.items():
        assert get_sampler(name) is sampler and get_sampler(name, eta=None, spacing=None) is sampler
        assert sampler.spacing == ("karras" if name == "heun" else "trailing")
    assert not SAMPLERS["dpmpp_2m"].sde and SAMPLERS["dpmpp_2m_sde"].sde
    own = DDIM(0.3)
    assert get_sampler(own) is own


def test_options() -> None:
    assert get_sampler("ddim", eta=0.5, spacing="linspace") == DDIM(0.5, "linspace")
    assert get_sampler("ddim", eta=0.0) == DDIM()
    assert get_sampler(DDIM(0.3), spacing="leading", eta=None) == DDIM(0.3, "leading")
    assert get_sampler("heun", spacing="karras") == Heun("karras")
    assert get_sampler("dpmpp_2m_sde", spacing="karras") == DPMSolverMultistep(True, "karras")
    assert SAMPLERS["ddim"] == DDIM(), "the table stays as it is"


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "ddim"])
def test_eta_is_ddims_alone(name: str) -> None:
    with pytest.raises(UsageError, match=rf"^eta: {type(SAMPLERS[name]).__name__} has no eta; leave it out"):
        get_sampler(name, eta=0.5)
    with pytest.raises(UsageError, match=r"^eta: "):
        get_sampler(SAMPLERS[name], eta=0.0)


@dataclass(frozen=True)
class OwnSampler:
    strength: float = 1.0

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        return DDIM().plan(config, steps)


class PlainSampler:
    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        return DDIM().plan(config, steps)


def test_a_sampler_of_ones_own() -> None:
    assert get_sampler(OwnSampler(), strength=2.0) == OwnSampler(2.0)
    plain = PlainSampler()
    assert get_sampler(plain) is plain and get_sampler(plain, eta=None) is plain
    with pytest.raises(UsageError, match=r"^eta: PlainSampler has no eta"):
        get_sampler(plain, eta=0.5)
    assert describe_sampler(plain) is None and describe_sampler(OwnSampler()) is None


@pytest.mark.parametrize("wrong", ["euler-a", "", 3, None])
def test_unknown_sampler(wrong: Any) -> None:
    with pytest.raises(
        UsageError, match=r"^sampler: .*ddim, ddpm, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde"
    ):
        get_sampler(wrong)


@pytest.mark.parametrize("sampler", [*EVERY, DDIM(0.7, "leading", False), DPMSolverMultistep(True, "karras")])
def test_a_description_makes_the_sampler_again(sampler: Any) -> None:
    described = describe_sampler(sampler)
    assert described is not None and described["sampler"] in SAMPLERS
    assert get_sampler(described["sampler"], **described["options"]) == sampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_description_has_the_samplers_name(name: str) -> None:
    described = describe_sampler(SAMPLERS[name])
    assert described["sampler"] == name
    assert described["options"] == {f.name: getattr(SAMPLERS[name], f.name) for f in fields(SAMPLERS[name])}


def test_the_name_of_a_sampler_is_the_nearest() -> None:
    """Of two names of one kind, that which agrees with more of its fields."""
    assert describe_sampler(DPMSolverMultistep(sde=True, spacing="karras"))["sampler"] == "dpmpp_2m_sde"
    assert describe_sampler(DPMSolverMultistep(spacing="leading"))["sampler"] == "dpmpp_2m"


@pytest.mark.parametrize("wrong", [DDIM, Heun])
def test_a_class_is_no_sampler(wrong: type) -> None:
    with pytest.raises(UsageError, match=r"^sampler: .*or a sampler object"):
        get_sampler(wrong)
