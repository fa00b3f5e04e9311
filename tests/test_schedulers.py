"""fastgen.schedulers against diffusers' schedulers of the same names, step by step, in its pipelines, and on disk."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import ops, schedulers
from fastgen.errors import UsageError
from fastgen.schedulers import config as config_module
from fastgen.schedulers.base import Table
from fastgen.schedulers.config import Config
from fastgen.schedulers.noise import draw

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

KINDS = schedulers.__all__
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (2, 3, 4, 4)
TOLERANCE = 1e-5  # of a step, relative to its largest value


def both(kind: str, **settings: Any) -> tuple[Any, Any]:
    """diffusers' scheduler, and ours made from its config."""
    theirs = getattr(diffusers, kind)(**settings)
    return theirs, getattr(schedulers, kind).from_config(theirs.config)


def ready(kind: str, steps: int = 10, **settings: Any) -> Any:
    scheduler = getattr(schedulers, kind)(**settings)
    scheduler.set_timesteps(steps)
    scheduler.is_scale_input_called = True
    return scheduler


def takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def close(ours: Tensor, theirs: Tensor, scale: float, what: str) -> None:
    error = (ours.double() - theirs.double()).abs().max().item()
    assert error <= TOLERANCE * scale, f"{what}: {error:.2e} > {TOLERANCE * scale:.2e}"


def walk(theirs: Any, ours: Any, dtype: torch.dtype = torch.float32, first: int = 0, **options: Any) -> None:
    """A run fed with the same model outputs, both from diffusers' state, each side with a generator of its own."""
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=0)
    inputs = torch.Generator().manual_seed(0)
    own = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
    noise = [{"generator": g} for g in own] if takes_generator(theirs) else [{}, {}]
    assert torch.as_tensor(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    x = torch.randn(SHAPE, generator=inputs) * theirs.init_noise_sigma
    for i, t in enumerate(theirs.timesteps[first:]):
        model_input = ours.scale_model_input(x, t)
        close(model_input, theirs.scale_model_input(x, t), model_input.abs().max().item(), f"input {i}")
        m = torch.randn(SHAPE, generator=inputs)
        a = theirs.step(m.to(dtype), t, x.to(dtype), **noise[0], **options)
        b = ours.step(m, ours.timesteps[first + i], x, **noise[1], **options)
        scale = max(x.abs().max().item(), a.prev_sample.abs().max().item())
        assert torch.isfinite(b.prev_sample).all()
        close(b.prev_sample, a.prev_sample, scale, f"step {i}, t = {t}")
        if b.pred_original_sample is not None:
            x0 = a.pred_original_sample
            close(b.pred_original_sample, x0, max(x.abs().max().item(), x0.abs().max().item()), f"image {i}")
        x = a.prev_sample.float()
    assert torch.equal(own[0].get_state(), own[1].get_state())  # as many numbers were drawn


def run(
    kind: str, steps: int = 10, begin: bool = False, options: dict[str, Any] | None = None, **settings: Any
) -> None:
    theirs, ours = both(kind, **settings)
    # diffusers' difference of two images at a large sigma' cancels all but a few digits of fp32: there it runs in fp64.
    steep = kind.startswith("Heun") and (settings.get("beta_schedule") == "squaredcos_cap_v2" or steps < 4)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
        if begin:
            scheduler.set_begin_index(0)
    walk(theirs, ours, dtype=torch.float64 if steep else torch.float32, **(options or {}))


# Steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_diffusers(kind: str, schedule: str, prediction: str, spacing: str) -> None:
    settings = {"beta_schedule": schedule, "prediction_type": prediction, "timestep_spacing": spacing}
    for steps in (10, 17):
        run(kind, steps, **settings)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_few_steps(kind: str, steps: int) -> None:
    run(kind, steps)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_of_a_thousand(kind: str) -> None:
    """Where diffusers' fp32 cancels most, and its pipelines' default for DDPM."""
    run(kind, 1000, **({"timestep_spacing": "trailing"} if kind.startswith("DPM") else {}))


CLIPS = [{"clip_sample": False}, {"clip_sample_range": 0.5}, {"thresholding": True}]
OPTIONS = {
    "DDPMScheduler": [
        *CLIPS,
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
        {"steps_offset": 3},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ],
    "DDIMScheduler": [
        *CLIPS,
        {"set_alpha_to_one": False},
        {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "beta_schedule": "scaled_linear"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"rescale_betas_zero_snr": True},  # leading does not visit the step of pure noise
    ],
    "EulerDiscreteScheduler": [
        {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear"},
        {"final_sigmas_type": "sigma_min"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"},
    ],
    "HeunDiscreteScheduler": [
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 2.0, "prediction_type": "v_prediction"},
    ],
    "DPMSolverMultistepScheduler": [
        {"solver_order": 1},
        {"solver_type": "heun"},
        {"solver_type": "heun", "algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
        {"thresholding": True},
        {"timestep_spacing": "leading", "steps_offset": 1},
        *({"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": s} for s in SPACINGS),
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"},
    ],
}  # fmt: skip


def cases(options: dict[str, list[dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(k, o, id=f"{k}-{'-'.join(map(str, itertools.chain(*o.items())))}")
        for k in options
        for o in options[k]
    ]


@pytest.mark.parametrize(("kind", "settings"), cases(OPTIONS))
def test_options(kind: str, settings: dict[str, Any]) -> None:
    for steps in (10, 16):
        run(kind, steps, **settings)


@pytest.mark.parametrize("limits", [{}, {"sigma_min": 0.1, "sigma_max": 10.0}], ids=["", "limited"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("DD")])
def test_karras_sigmas(kind: str, schedule: str, spacing: str, limits: dict[str, float]) -> None:
    """Euler takes limits; the others too, where a config carries them along, as in diffusers."""
    source = diffusers.EulerDiscreteScheduler(
        beta_schedule=schedule, timestep_spacing=spacing, use_karras_sigmas=True, **limits
    )
    theirs = getattr(diffusers, kind).from_config(source.config)
    ours = getattr(schedulers, kind).from_config(source.config)
    steep = kind.startswith("Heun")
    for s in (theirs, ours):
        s.set_timesteps(12)
        s.set_begin_index(0)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    if not ours.timesteps.is_floating_point():
        assert torch.equal(ours.timesteps, theirs.timesteps)
    else:
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-6)
        ours.timesteps = theirs.timesteps
    walk(theirs, ours, torch.float64 if steep else torch.float32)


@pytest.mark.parametrize("clipped", [False, True, None])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_with_eta(eta: float, clipped: bool | None) -> None:
    for spacing in SPACINGS:
        run("DDIMScheduler", 20, options={"eta": eta, "use_clipped_model_output": clipped}, timestep_spacing=spacing)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_betas(kind: str) -> None:
    betas = torch.linspace(0.001, 0.05, 100).tolist()
    run(kind, 10, trained_betas=betas, num_train_timesteps=100)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "DDIMScheduler"])
def test_timesteps_of_the_callers(kind: str) -> None:
    theirs, ours = both(kind)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(timesteps=[900, 700, 650, 300, 20])
    walk(theirs, ours)
    assert ours.num_inference_steps == theirs.num_inference_steps


def test_sigmas_of_the_callers() -> None:
    theirs, ours = both("EulerDiscreteScheduler")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=[20.0, 9.0, 3.0, 0.7, 0.0])
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-6)
    ours.timesteps = theirs.timesteps
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(0)
    walk(theirs, ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", [False, True])
def test_a_run_may_begin_later(kind: str, begin: bool) -> None:
    """As image to image does; without set_begin_index it is found by its timestep."""
    theirs, ours = both(kind)
    first = 4 * theirs.order
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
    walk(theirs, ours, first=first)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_before_set_timesteps_every_step_is_visited(kind: str) -> None:
    walk(*both(kind, num_train_timesteps=20))


def test_ddim_takes_any_timestep() -> None:
    theirs, ours = both("DDIMScheduler")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(20)
    x, m = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for t in (999, 500, 37, 3, 0):
        for given in (t, torch.tensor(t), torch.tensor([t])):
            close(ours.step(m, given, x).prev_sample, theirs.step(m, t, x).prev_sample, 5.0, str(t))


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_half_precision(kind: str) -> None:
    """In it and out of it, and no less right than what diffusers makes of it."""
    for dtype, eps in ((torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        theirs, ours = both(kind)
        x, m = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(10)
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        a = (
            theirs.step(m, theirs.timesteps[5], x, generator=generators[0])
            if kind.startswith("DDPM")
            else theirs.step(m, theirs.timesteps[5], x)
        )
        b = ours.step(m, theirs.timesteps[5], x, generator=generators[1])
        assert b.prev_sample.dtype == a.prev_sample.dtype == dtype
        assert (a.prev_sample.float() - b.prev_sample.float()).abs().max() <= 4 * eps * x.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_that_differ(kind: str) -> None:
    """An image in fp32 and a model in bf16, and the other way round: the result has diffusers' dtype."""
    for x_dtype, m_dtype in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        theirs, ours = both(kind)
        outputs = []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(10)
            t = scheduler.timesteps[3]
            x, m = torch.ones(SHAPE, dtype=x_dtype), torch.ones(SHAPE, dtype=m_dtype)
            scheduler.scale_model_input(x, t)
            outputs.append(scheduler.step(m, t, x).prev_sample.dtype)
        assert outputs[0] == outputs[1], (x_dtype, m_dtype)


# Noise


def test_noise_is_what_diffusers_draws() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    like = torch.zeros(3, 2, 4)

    def generators(n: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(n)]

    for n in (1, 3):
        assert torch.equal(draw(like, generators(n)), randn_tensor(like.shape, generators(n)))
    assert torch.equal(draw(like, generators(1)[0]), randn_tensor(like.shape, generators(1)[0]))
    half = draw(like.half(), generators(1)[0])
    assert torch.equal(half, randn_tensor(like.shape, generators(1)[0], dtype=torch.float16))
    torch.manual_seed(5)
    mine = draw(like, None)
    torch.manual_seed(5)
    assert torch.equal(mine, randn_tensor(like.shape))
    with pytest.raises(UsageError, match="generator: give one, or one for each of the 3 images; 2 were given"):
        draw(like, generators(2))


def test_a_generator_for_each_image() -> None:
    """An image is the same whatever its batch."""
    m, x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    scheduler = ready("DDPMScheduler")
    t = scheduler.timesteps[2]
    whole = scheduler.step(m, t, x, generator=[torch.Generator().manual_seed(i) for i in range(2)]).prev_sample
    alone = scheduler.step(m[1:], t, x[1:], generator=torch.Generator().manual_seed(1)).prev_sample
    assert torch.equal(whole[1:], alone)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_noise_of_the_callers(kind: str) -> None:
    options = {"eta": 0.5} if kind.startswith("DDIM") else {}
    settings = {} if options else {"algorithm_type": "sde-dpmsolver++"}
    theirs, ours = both(kind, **settings)
    x, m, noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        results.append(scheduler.step(m, scheduler.timesteps[3], x, variance_noise=noise, **options).prev_sample)
    close(*results, 5.0, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_add_noise(kind: str) -> None:
    theirs, ours = both(kind)
    x, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    t = theirs.timesteps[[3, 7]]
    for given in (t, t[:1]):
        close(
            ours.add_noise(x, noise, given), theirs.add_noise(x, noise, given), 200.0 if "Euler" in kind else 5.0, kind
        )
    if hasattr(theirs, "set_begin_index"):
        for scheduler in (theirs, ours):
            scheduler.set_begin_index(4)
        close(ours.add_noise(x, noise, t[:1]), theirs.add_noise(x, noise, t[:1]), 5.0, kind)
    if kind.startswith("DD"):
        close(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t), 5.0, "velocity")
        assert ours.add_noise(x.half(), noise.half(), t).dtype == torch.float16


# What holds of every scheduler


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_diffusers(kind: str) -> None:
    for schedule in SCHEDULES:
        theirs, ours = both(kind, beta_schedule=schedule)
        for name in ("betas", "alphas", "alphas_cumprod"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=0)
        assert len(ours) == len(theirs) == 1000 and ours.order == theirs.order


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_kernel_and_keeps_its_arguments(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = ready(kind)
    calls = []
    step = ops.diffusion_step
    monkeypatch.setattr(ops, "diffusion_step", lambda *args, **kwargs: calls.append(1) or step(*args, **kwargs))
    x, m = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    before = x.clone(), m.clone()
    output = scheduler.step(m, scheduler.timesteps[0], x)
    assert calls == [1] and torch.equal(x, before[0]) and torch.equal(m, before[1])
    assert output["prev_sample"] is output.prev_sample is output[0]


@pytest.mark.parametrize("kind", KINDS)
def test_tuples(kind: str) -> None:
    theirs, ours = both(kind)
    x = torch.ones(SHAPE)
    lengths = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        output = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
        assert isinstance(output, tuple)
        lengths.append(len(output))
    assert lengths[0] == lengths[1]


def trajectory(scheduler: Any, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    options = {"generator": generator} if takes_generator(scheduler) else {}
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x, **options).prev_sample
        yield x


@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_do_not_share_anything(kind: str) -> None:
    """Two in turns, a copy made in mid-run, and another run with the first."""
    alone = list(trajectory(ready(kind)))
    one, other = ready(kind), ready(kind, 7)
    got = [a for a, _ in itertools.zip_longest(trajectory(one), trajectory(other, 3))]
    assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))
    one.set_timesteps(10)
    assert all(torch.equal(a, b) for a, b in zip(alone, trajectory(one), strict=True))
    one.set_timesteps(10)
    x, m = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for t in one.timesteps[:3]:
        one.step(m, t, x, **({"generator": torch.Generator().manual_seed(0)} if takes_generator(one) else {}))
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        options = [{"generator": torch.Generator().manual_seed(0)} if takes_generator(one) else {} for _ in range(2)]
        again = copy.deepcopy(one)
        a, b = (s.step(m, one.timesteps[3], x, **o).prev_sample for s, o in zip((again, twin), options, strict=True))
        assert torch.equal(a, b) and type(twin) is type(one) and twin.config == one.config


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow(kind: str) -> None:
    """Also where the tables were made, and used first, in inference mode."""
    scheduler = getattr(schedulers, kind)(num_train_timesteps=100)
    x, m = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)) / 4
    with torch.inference_mode():
        scheduler.set_timesteps(10)
        scheduler.scale_model_input(x.clone(), scheduler.timesteps[0])
        scheduler.step(m.clone(), scheduler.timesteps[0], x.clone())
    x, m = x.requires_grad_(), m.requires_grad_()
    scheduler.step(m, scheduler.timesteps[1], x).prev_sample.sum().backward()
    assert x.grad.abs().sum() > 0 and m.grad.abs().sum() > 0


def test_a_timestep_on_another_device_is_known_by_its_place() -> None:
    """So that a GPU is not waited for. On the meta device, which could not answer."""
    scheduler = ready("DDPMScheduler")
    scheduler.set_timesteps(10, device="meta")
    tail = scheduler.timesteps[4:]
    assert [scheduler._number(t) for t in tail] == [500, 400, 300, 200, 100, 0]
    with pytest.raises(RuntimeError):
        scheduler._number(tail.clone()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_its_device(kind: str) -> None:
    """A whole run on the meta device, where whatever asks for a value raises."""
    scheduler = getattr(schedulers, kind)()
    scheduler.set_timesteps(5, device="meta")
    x = torch.empty(SHAPE, device="meta")
    options = {"eta": 0.5} if kind.startswith("DDIM") else {}
    for t in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, t), t, x, **options).prev_sample
    assert x.shape == SHAPE and x.device.type == "meta"


def test_tables_are_placed_once() -> None:
    table = Table(torch.ones(3, 9))
    assert table.on(torch.device("cpu"))[0] is table.on(torch.device("cpu"))[0]
    assert table.on(torch.device("meta"))[0].device.type == "meta"


# What callers change in a scheduler


def test_other_timesteps_may_take_their_place() -> None:
    """DDPM goes from one to the next of what is there; what the others were not told of, they refuse."""
    theirs, ours = both("DDPMScheduler")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(20)
        scheduler.timesteps = scheduler.timesteps[2::3]
    walk(theirs, ours)
    solver = ready("DPMSolverMultistepScheduler")
    solver.timesteps = torch.tensor([5])
    with pytest.raises(UsageError, match="timestep: 5 is not one of the 10"):
        solver.step(torch.ones(SHAPE), solver.timesteps[0], torch.ones(SHAPE))
    with pytest.raises(AttributeError):
        solver.sigmas = torch.ones(11)


@pytest.mark.parametrize("kind", KINDS)
def test_other_alphas_count(kind: str) -> None:
    """As where a caller rescales them. Ours are what is asked of it at set_timesteps."""
    theirs, ours = both(kind)
    x, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for scheduler in (theirs, ours):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone().pow(0.5)
        scheduler.set_timesteps(10)
    t = theirs.timesteps[[2, 4]]
    close(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t), 5.0, kind)
    walk(theirs, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_are_changed_count(kind: str) -> None:
    """By the method, and as diffusers' pipelines do it, which put a config in the place of an old one."""
    theirs, ours = both(kind, timestep_spacing="trailing", prediction_type="sample")
    for scheduler in (theirs, ours):
        scheduler.register_to_config(timestep_spacing="leading", prediction_type="v_prediction")
        scheduler._internal_dict = diffusers.configuration_utils.FrozenDict({**scheduler.config, "steps_offset": 1})
        scheduler.set_timesteps(10)
    assert ours.config.steps_offset == 1
    walk(theirs, ours)
    with pytest.raises(UsageError, match="timestep_spacing: 'even'"):
        ours.register_to_config(timestep_spacing="even")


# Configs


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_those_of_diffusers(kind: str) -> None:
    """The same names in the same order with the same defaults, of the class, of set_timesteps and of step."""
    ours, theirs = getattr(schedulers, kind), getattr(diffusers, kind)
    for name in ("__init__", "set_timesteps", "step"):
        a, b = (inspect.signature(getattr(c, name)).parameters.values() for c in (ours, theirs))
        assert [(p.name, p.default) for p in a] == [(p.name, p.default) for p in b], name


@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_configs_convert_as_in_diffusers(source: str, target: str) -> None:
    """What was left at its default takes the default of the other class; what it does not take is carried along."""
    settings = {"beta_start": 0.002, "num_train_timesteps": 500}
    config = getattr(diffusers, source)(**settings, timestep_spacing="trailing").config
    theirs = getattr(diffusers, target).from_config(config, beta_end=0.03)
    ours = getattr(schedulers, target).from_config(config, beta_end=0.03)
    again = getattr(schedulers, target).from_config(
        getattr(schedulers, source).from_config(config).config, beta_end=0.03
    )

    def plain(config: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if not k.startswith("_")}

    assert plain(ours.config) == plain(theirs.config) == plain(again.config)
    assert ours.config.beta_end == ours.config["beta_end"] == dict(ours.config)["beta_end"] == 0.03
    assert plain(getattr(diffusers, source).from_config(ours.config).config)["beta_start"] == 0.002


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_in_both_directions(kind: str, tmp_path: Path) -> None:
    settings = {"beta_start": 0.002, "trained_betas": torch.linspace(0.01, 0.1, 50).numpy(), "num_train_timesteps": 50}
    theirs, ours = getattr(diffusers, kind)(**settings), getattr(schedulers, kind)(**settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours" / "scheduler")
    read = [json.loads(f.read_text()) for f in sorted(tmp_path.rglob(config_module.FILE))]
    version = {"_diffusers_version": None}
    assert read[0] | version == read[1] | version and read[0]["_diffusers_version"] == config_module.FORMAT
    back = getattr(diffusers, kind).from_pretrained(tmp_path / "ours", subfolder="scheduler")
    for folder, subfolder in ((tmp_path / "theirs", None), (tmp_path / "ours", "scheduler")):
        mine = getattr(schedulers, kind).from_pretrained(folder, subfolder=subfolder, local_files_only=True)
        assert torch.equal(mine.betas, back.betas) and mine.config.beta_start == 0.002
    assert sorted(p.name for p in (tmp_path / "ours" / "scheduler").iterdir()) == [config_module.FILE]
    assert kind in repr(ours) and '"beta_start": 0.002' in repr(ours)


def test_unused_settings() -> None:
    config = {"beta_start": 0.002, "strange": 1, "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.0"}
    scheduler, unused = schedulers.DDIMScheduler.from_config(config, return_unused_kwargs=True, other=2)
    assert scheduler.config["strange"] == 1 and scheduler.config._class_name == "DDIMScheduler"
    assert unused == {"other": 2, "strange": 1, "_class_name": "DDIMScheduler", "_diffusers_version": "0.1.0"}
    assert schedulers.DDIMScheduler(**{"beta_start": 0.002, "_class_name": "x"}).config.beta_start == 0.002
    with pytest.warns(UserWarning, match="DDIMScheduler has no setting use_karras_sigmas"):
        schedulers.DDIMScheduler.from_config(config, use_karras_sigmas=True)
    with pytest.raises(TypeError):
        schedulers.DDIMScheduler(use_karras_sigmas=True)


def test_a_config_is_read_only() -> None:
    config = schedulers.DDIMScheduler().config
    for change in (
        lambda: config.__setitem__("beta_start", 1.0), lambda: setattr(config, "beta_start", 1.0),
        lambda: config.update(beta_start=1.0), lambda: config.pop("beta_start"), lambda: config.clear(),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="config: is read-only"):
            change()
    assert config.beta_start == 0.0001 and not hasattr(config, "absent")
    assert isinstance(copy.deepcopy(config), Config) and pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(("kind", "settings", "message"), [
    ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type: 'learned_range' is not supported"),
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule: 'sigmoid' is not supported"),
    ("DDPMScheduler", {"thresholding": True, "sample_max_value": 2.0}, "sample_max_value: must be 1"),
    ("DDPMScheduler", {"prediction_type": "flow"}, "prediction_type: 'flow'"),
    ("DDIMScheduler", {"timestep_spacing": "even"}, "timestep_spacing: 'even'"),
    ("DDIMScheduler", {"num_train_timesteps": 0}, "num_train_timesteps: must be a whole number"),
    ("DDIMScheduler", {"steps_offset": -1}, "steps_offset: must be a whole number"),
    ("DDIMScheduler", {"beta_start": -1.0}, "config: beta_start and beta_end must satisfy"),
    ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas: must be num_train_timesteps = 1000 numbers"),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas: True"),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas: True"),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type: 'log_linear'"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type: 'continuous'"),
    ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, "beta_schedule: 'exp'"),
    ("HeunDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas: True"),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order: 3 is not supported .* choose 1 or 2"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type: 'dpmsolver'"),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "use_lu_lambdas: True"),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas: True"),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance_type: 'learned'"),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "one"}, "final_sigmas_type: 'one'"),
])  # fmt: skip
def test_what_is_not_supported_is_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        getattr(schedulers, kind)(**settings)
    with pytest.raises(UsageError, match=message):
        getattr(schedulers, kind).from_config(settings)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    kind = schedulers.DDIMScheduler
    with pytest.raises(UsageError, match=r"there is no .*scheduler_config.json.*nothing is downloaded"):
        kind.from_pretrained("google/ddpm-cat-256", subfolder="scheduler")
    (tmp_path / config_module.FILE).write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        kind.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a file; give a folder"):
        kind().save_pretrained(tmp_path / config_module.FILE)
    with pytest.raises(UsageError, match="push_to_hub: is not supported"):
        kind().save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(UsageError, match="config: must be a mapping"):
        kind.from_config("google/ddpm-cat-256")


# Wrong calls


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_step_before_set_timesteps(kind: str) -> None:
    x = torch.ones(SHAPE)
    with pytest.raises(UsageError, match="step: nothing is laid out yet; call set_timesteps first"):
        getattr(schedulers, kind)().step(x, 999, x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_timestep_that_is_not_laid_out(kind: str) -> None:
    x, scheduler = torch.ones(SHAPE), ready(kind)
    for t in (1000.5, torch.tensor(-1.0), torch.tensor([1.0, 2.0])):
        with pytest.raises(UsageError, match="timestep: "):
            scheduler.step(x, t, x)


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("DD")])
def test_a_run_that_is_over(kind: str) -> None:
    scheduler, x = ready(kind, 2), torch.ones(SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(UsageError, match=r"step: the run of \d steps is over; call set_timesteps"):
        scheduler.step(x, scheduler.timesteps[-1], x)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_steps(kind: str) -> None:
    scheduler = getattr(schedulers, kind)(num_train_timesteps=20)
    for steps in (0, 21, -1, 2.5, "3", True):
        with pytest.raises(UsageError, match="num_inference_steps: must be a whole number between 1 and"):
            scheduler.set_timesteps(steps)
    if kind != "DDIMScheduler":
        for timesteps in ([], [20], [-1], [[3, 2]]):
            with pytest.raises(UsageError, match="timesteps: must "):
                scheduler.set_timesteps(timesteps=timesteps)
        for both_or_neither in ({}, {"num_inference_steps": 2, "timesteps": [3, 1]}):
            with pytest.raises(UsageError, match="num_inference_steps: give "):
                scheduler.set_timesteps(**both_or_neither)


def test_other_wrong_calls() -> None:
    x = torch.ones(SHAPE)
    with pytest.raises(UsageError, match="timesteps: must be in descending order"):
        schedulers.DDPMScheduler().set_timesteps(timesteps=[3, 5])
    with pytest.raises(UsageError, match="timesteps: must lie in 0 … 99"):
        schedulers.DDIMScheduler(num_train_timesteps=100, steps_offset=1).set_timesteps(100)
    ddim = ready("DDIMScheduler")
    with pytest.raises(UsageError, match="eta: must be a number between 0 and 1"):
        ddim.step(x, 900, x, eta=1.5)
    with pytest.raises(UsageError, match="variance_noise: give either it or a generator"):
        ddim.step(x, 900, x, eta=1.0, variance_noise=x, generator=torch.Generator())
    for name, settings in (("DDPMScheduler", {}), ("DDIMScheduler", {})):
        with pytest.raises(UsageError, match="prediction_type: 'epsilon' tells nothing"):
            ready(name, rescale_betas_zero_snr=True, timestep_spacing="trailing", **settings)
    euler = ready("EulerDiscreteScheduler")
    with pytest.raises(UsageError, match="s_churn: is not supported"):
        euler.step(x, euler.timesteps[0], x, s_churn=1.0)
    for t in (1, torch.tensor(1)):
        with pytest.raises(UsageError, match=r"timestep: must be one of scheduler\.timesteps, not an integer"):
            euler.step(x, t, x)
    euler.is_scale_input_called = False
    with pytest.warns(UserWarning, match="call scale_model_input"):
        euler.step(x, euler.timesteps[0], x)
    for sigmas in ([], [1.0], [1.0, 0.0, 0.0], [[1.0, 0.0]], [1.0, -1.0]):
        with pytest.raises(UsageError, match="sigmas: must be a list"):
            euler.set_timesteps(sigmas=sigmas)
    for kind in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"):
        with pytest.raises(UsageError, match="timesteps: do not go with use_karras_sigmas"):
            getattr(schedulers, kind)(use_karras_sigmas=True).set_timesteps(timesteps=[5, 3])
    heun = ready("HeunDiscreteScheduler")
    heun.set_begin_index(1)
    with pytest.raises(UsageError, match="set_begin_index: 1 is the second call of a step"):
        heun.step(x, heun.timesteps[1], x)
    with pytest.raises(UsageError, match="mu: "):
        schedulers.DPMSolverMultistepScheduler().set_timesteps(5, mu=1.0)
    with pytest.raises(UsageError, match="add_noise: nothing is laid out"):
        schedulers.DPMSolverMultistepScheduler().add_noise(x, x, torch.tensor([5]))
    with pytest.raises(UsageError, match="noise: must have the shape"):
        ddim.add_noise(x, x[:1], torch.tensor([5]))
    with pytest.raises(UsageError, match="timesteps: give one, or one for each of the 2 images, not 3"):
        ddim.add_noise(x, x, torch.tensor([5, 4, 3]))
    with pytest.raises(UsageError, match="rescale_betas_zero_snr: leaves a schedule"):
        ready("EulerDiscreteScheduler", rescale_betas_zero_snr=True,
              prediction_type="v_prediction", use_karras_sigmas=True)  # fmt: skip


# Pipelines


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, **blocks,
    ).eval()  # fmt: skip


def images(pipe: Any, generator: Any, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(
        pipe(batch_size=2, generator=generator, num_inference_steps=10, output_type="np", **options).images
    )


@pytest.mark.parametrize("several", [False, True], ids=["one generator", "one an image"])
@pytest.mark.parametrize(("pipeline", "kind", "options"), [
    ("DDPMPipeline", "DDPMScheduler", {}), ("DDPMPipeline", "DDIMScheduler", {}),
    ("DDPMPipeline", "DPMSolverMultistepScheduler", {}),
    ("DDIMPipeline", "DDIMScheduler", {}), ("DDIMPipeline", "DDIMScheduler", {"eta": 1.0}),
    ("DDIMPipeline", "DDIMScheduler", {"eta": 0.5, "use_clipped_model_output": True}),
])  # fmt: skip
def test_pipelines_draw_the_same_images(
    unet: Any, pipeline: str, kind: str, options: dict[str, Any], several: bool
) -> None:
    def generator() -> Any:
        made = [torch.Generator().manual_seed(i) for i in range(2)]
        return made if several else made[0]

    pipe = getattr(diffusers, pipeline)(unet, getattr(diffusers, kind)())
    expected = images(pipe, generator(), **options)
    pipe.scheduler = getattr(schedulers, kind).from_config(pipe.scheduler.config)
    got = images(pipe, generator(), **options)
    assert type(pipe.scheduler) is getattr(schedulers, kind) and expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_are_saved_with_ours_and_open_with_diffusers_alone(unet: Any, kind: str, tmp_path: Path) -> None:
    pipe = diffusers.DDPMPipeline(unet, getattr(schedulers, kind)(beta_end=0.03))
    assert type(pipe.scheduler) is getattr(schedulers, kind)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", kind]
    opened = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(opened.scheduler) is getattr(diffusers, kind) and opened.scheduler.config.beta_end == 0.03
    ours = getattr(schedulers, kind).from_pretrained(tmp_path, subfolder="scheduler")
    given = diffusers.DDPMPipeline.from_pretrained(tmp_path, scheduler=ours)
    assert given.scheduler is ours and set(given.components) == {"unet", "scheduler"}
    assert set(ours.compatibles) == {getattr(schedulers, k) for k in KINDS}
    assert isinstance(ours, diffusers.SchedulerMixin)


def test_nothing_needs_diffusers(tmp_path: Path) -> None:
    """Neither is it imported; and a scheduler that was made before it is let into pipelines all the same."""
    script = f"""if True:
        import sys, torch, types
        from fastgen import schedulers
        made = [getattr(schedulers, name)() for name in schedulers.__all__]
        for s in made:
            s.set_timesteps(3)
            x = torch.ones(1, 3, 4, 4)
            for t in s.timesteps:
                x = s.step(s.scale_model_input(x, t), t, x).prev_sample
            s.save_pretrained({str(tmp_path)!r})
            type(s).from_pretrained({str(tmp_path)!r})
        assert "diffusers" not in sys.modules
        sys.modules["diffusers.schedulers.scheduling_utils"] = later = types.ModuleType("later")
        later.SchedulerMixin = type("SchedulerMixin", (), dict(save_pretrained=None))
        for s in made:
            assert s.config and isinstance(s, later.SchedulerMixin) and s.save_pretrained
        print("good")
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout == "good\n", done.stderr
