"""Schedules, predictions and the timesteps to visit, against closed forms and against diffusers."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fastgen import ops
from fastgen.diffusion.samplers import predictions
from fastgen.diffusion.schedules import DiffusionConfig, alphas_cumprod, betas, forward_table, training_target
from fastgen.diffusion.spacing import (
    interpolate,
    karras_sigmas,
    sigma_sequence,
    sigma_table,
    solver_sequence,
    timestep_sequence,
)
from fastgen.errors import UsageError

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

SCHEDULE_NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def scheduler(kind: Any, config: DiffusionConfig, **kwargs: Any) -> Any:
    """diffusers' scheduler of the same process."""
    known = inspect.signature(kind).parameters
    if "clip_sample" in known:
        kwargs |= {"clip_sample": config.clip is not None, "clip_sample_range": config.clip or 1.0}
    elif config.clip is not None:  # DPM-Solver's threshold, held between 1 and sample_max_value, is 1
        assert config.clip == 1 and "thresholding" in known
        kwargs |= {"thresholding": True, "sample_max_value": 1.0}
    if config.zero_terminal_snr:
        kwargs["rescale_betas_zero_snr"] = True
    return kind(
        num_train_timesteps=config.timesteps, beta_schedule=SCHEDULE_NAMES[config.schedule],
        beta_start=config.beta_start, beta_end=config.beta_end, prediction_type=PREDICTION_NAMES[config.prediction],
        **kwargs,
    )  # fmt: skip


class Widened:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, "float64" if name == "float32" else name)


def widen_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of diffusers' schedulers in fp64, tables and steps: from a large sigma, fp32 cancels too much."""
    for name in ("DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverMultistep"):
        module = sys.modules[getattr(diffusers, f"{name}Scheduler").__module__]
        monkeypatch.setattr(module, "np", Widened(np))
        monkeypatch.setattr(module, "torch", Widened(torch))


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


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_zero_terminal_snr_is_that_of_diffusers(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' classes of sigma space put 2^-24 for the last abar; ours is 0, but sigma's table has that stand-in."""
    widen_diffusers(monkeypatch)
    config = DiffusionConfig(schedule, prediction="v", clip=None, zero_terminal_snr=True)
    abar = alphas_cumprod(config)
    for kind in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        theirs = scheduler(kind, config)
        assert theirs.betas.dtype == torch.float64
        torch.testing.assert_close(betas(config), theirs.betas, rtol=0, atol=1e-9)
        torch.testing.assert_close(abar[:-1], theirs.alphas_cumprod[:-1], rtol=1e-9, atol=0)
    assert abar[-1] == 0 and theirs.alphas_cumprod[-1] == 2**-24
    sigma = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt()
    same = theirs.alphas_cumprod > 2**-23
    same[-1] = True
    assert same.sum() > 990
    torch.testing.assert_close(sigma_table(config)[same], sigma[same], rtol=1e-9, atol=0)


@pytest.mark.parametrize("T", [2, 3, 40, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_sigma_grows_under_zero_terminal_snr(schedule: str, T: int) -> None:
    """Even where the steps before the last have an abar below the stand-in (linear, T = 1000): with diffusers' table
    sigma would fall there, and an ancestral step's variance be negative."""
    table = sigma_table(DiffusionConfig(schedule, T, prediction="v", zero_terminal_snr=True))
    assert torch.isfinite(table).all() and (table[1:] > table[:-1]).all()
    assert table[-1].item() == pytest.approx(math.sqrt((1 - 2**-24) / 2**-24), rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_zero_terminal_snr_ends_in_pure_noise(schedule: str) -> None:
    """The first step stays as it was, the last is noise and nothing else, and all lie between."""
    for T in (2, 3, 1000):
        config = DiffusionConfig(schedule, T, prediction="v", zero_terminal_snr=True)
        before, after = alphas_cumprod(DiffusionConfig(schedule, T, prediction="v")), alphas_cumprod(config)
        torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=0)
        assert after[-1] == 0 and betas(config)[-1] == 1 and forward_table(config)[-1].tolist() == [0, 1]
        assert (after[1:] < after[:-1]).all() and (after[1:] < before[1:]).all()
        assert ((betas(config)[:-1] > 0) & (betas(config)[:-1] < 1)).all()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_zero_terminal_snr_needs_a_prediction_that_tells_of_the_image(prediction: str) -> None:
    if prediction != "eps":
        assert DiffusionConfig(prediction=prediction, zero_terminal_snr=True).zero_terminal_snr
        return
    with pytest.raises(ValueError, match="zero_terminal_snr needs prediction v or x0"):
        DiffusionConfig(prediction=prediction, zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"schedule": "sigmoid"}, "schedule"),
        ({"prediction": "noise"}, "prediction"),
        ({"timesteps": 0}, "timesteps"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"zero_terminal_snr": True, "prediction": "v", "timesteps": 1}, "zero_terminal_snr"),
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
    """For every number of steps, ties included. diffusers' trailing overshoots to -1 for some: that one is cut off."""
    ddpm = diffusers.DDPMScheduler(timestep_spacing=spacing)
    solver = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing)
    for steps in range(1, 1001):
        for theirs, sequence in [(ddpm, timestep_sequence), (solver, solver_sequence)]:
            if steps == 1000 and sequence is solver_sequence and spacing != "trailing":
                continue
            theirs.set_timesteps(steps)
            expected = theirs.timesteps.tolist()
            if spacing == "trailing" and expected[-1] == -1:
                expected.pop()
            ours = sequence(1000, steps, spacing)
            assert ours.dtype == torch.int64 and ours.tolist() == expected, (sequence, steps)


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


@pytest.mark.parametrize(("spacing", "most"), [("leading", 36), ("linspace", 36), ("trailing", 37)])
def test_most_solver_steps(spacing: str, most: int) -> None:
    """leading and linspace leave t = 0 out, so they have one step less to give."""
    t = solver_sequence(37, most, spacing).tolist()
    assert t == list(range(36, 36 - most, -1))
    for steps in (0, most + 1):
        with pytest.raises(UsageError, match=rf"^steps: .*between 1 and {most}\b"):
            solver_sequence(37, steps, spacing)


# Noise levels


def test_sigma_table() -> None:
    config = DiffusionConfig("linear", 3, 0.1, 0.5)
    abar = [0.9, 0.9 * 0.7, 0.9 * 0.7 * 0.5]
    expected = torch.tensor([math.sqrt((1 - a) / a) for a in abar], dtype=torch.float64)
    torch.testing.assert_close(sigma_table(config), expected, rtol=1e-14, atol=0)


def test_interpolate() -> None:
    """Like np.interp: on the points, between them and beyond them; also with one point only."""
    xs, ys = torch.tensor([[-3.0, 0.5, 2.0, 7.0], [1.0, 4.0, -2.0, 6.0]], dtype=torch.float64)
    x = torch.cat([xs, torch.linspace(-5, 9, 57, dtype=torch.float64)])
    torch.testing.assert_close(interpolate(x, xs, ys), torch.from_numpy(np.interp(x, xs, ys)), rtol=1e-14, atol=1e-14)
    assert interpolate(x, xs[:1], ys[:1]).tolist() == [1.0] * len(x)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_karras_in_closed_form(schedule: str, zero: bool) -> None:
    """Even steps in sigma^(1/7) from the largest sigma to the least; log sigma is linear between training steps."""
    config = DiffusionConfig(schedule, prediction="v", zero_terminal_snr=zero)
    table = sigma_table(config).tolist()
    for steps in (1, 2, 10, 1000):
        t, sigma = (x.tolist() for x in karras_sigmas(config, steps))
        assert (
            len(t) == len(sigma) == steps
            and t[0] == pytest.approx(999)
            and sigma[0] == pytest.approx(table[-1], rel=1e-12)
        )
        if steps > 1:
            assert t[-1] == pytest.approx(0, abs=1e-9) and sigma[-1] == pytest.approx(table[0], rel=1e-12)
        assert all(0 <= b < a <= 999 for a, b in itertools.pairwise(t))
        for i, (level, time) in enumerate(zip(sigma, t, strict=True)):
            share = i / max(1, steps - 1)
            root = (1 - share) * table[-1] ** (1 / 7) + share * table[0] ** (1 / 7)
            assert level == pytest.approx(root**7, rel=1e-12)
            k = min(int(time), 998)
            log = (k + 1 - time) * math.log(table[k]) + (time - k) * math.log(table[k + 1])
            assert log == pytest.approx(math.log(level), abs=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_sigma_sequence(spacing: str) -> None:
    """Where t is whole, sigma is the table's; under linspace it lies on the straight line between two entries."""
    config = DiffusionConfig("cosine", 37)
    table = sigma_table(config)
    for steps in range(1, 38):
        t, sigma = sigma_sequence(config, steps, spacing)
        assert t.dtype == sigma.dtype == torch.float64 and len(t) == len(sigma) == steps
        assert t.max() <= 36 and t.min() >= 0 and (t[1:] < t[:-1]).all() and (sigma[1:] < sigma[:-1]).all()
        if spacing == "karras":
            continue
        torch.testing.assert_close(sigma, torch.from_numpy(np.interp(t, np.arange(37), table)), rtol=1e-12, atol=0)
        if spacing == "linspace":
            exact = [36 * i / max(1, steps - 1) for i in reversed(range(steps))]
            assert t.tolist() == pytest.approx(exact, abs=1e-9)
        else:
            assert t.tolist() == timestep_sequence(37, steps, spacing).tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
@pytest.mark.parametrize("steps", [0, -1, 38, 2.0, True, "5", None])
def test_wrong_steps(spacing: str, steps: Any) -> None:
    with pytest.raises(UsageError, match=r"^steps: .*between 1 and 37"):
        sigma_sequence(DiffusionConfig(timesteps=37), steps, spacing)
    if spacing != "karras":
        with pytest.raises(UsageError, match=r"^steps: .*between 1 and 3[67]"):
            solver_sequence(37, steps, spacing)


@pytest.mark.parametrize("spacing", ["even", "", None, 3])
def test_wrong_spacing(spacing: Any) -> None:
    with pytest.raises(UsageError, match=rf"^spacing: .*karras, not {spacing!r}$"):
        sigma_sequence(DiffusionConfig(timesteps=37), 5, spacing)
    with pytest.raises(UsageError, match=rf"^spacing: .*linspace, not {spacing!r}$"):
        solver_sequence(37, 5, spacing)
