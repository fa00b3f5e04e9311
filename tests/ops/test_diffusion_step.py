"""diffusion_step: the suite, and DDPM's own formula, replay, its arguments."""

import pytest
import torch
from suite import OpSuite, places

from fastgen import testing
from fastgen.ops import Stream, diffusion_step, diffusion_step_reference, philox_normal_reference


class TestDiffusionStep(OpSuite):
    op = "diffusion_step"
    few = ("3x2x5x7-clip-x0-seeds", "3x1x5x3-guidance-each-history-eps-seeds")
    at_size = testing._diffusion_step(3, 5, 67, 71, guidance="each", clip=1.0, history=True, keep="eps", noise="seeds")


PLACES = places("diffusion_step")


@pytest.mark.parametrize("seed", [2, 5])
def test_gradient_of_one_guidance_for_many_images(seed):
    """A sum over 196,608 terms, right to the last bit of fp32: in fp32 their rounding alone would show."""
    (case,) = (case for case in testing.cases("diffusion_step", bench=True) if "guidance-one" in case.label)
    for place in PLACES:
        if place.interpreted:
            continue
        made = case.inputs(torch.float32, place.device, seed=seed)
        exact = {k: v.detach().double() if k in case.differentiable else v for k, v in made.items()}
        exact["guidance"].requires_grad_()
        outer = torch.randn(made["x_t"].shape, generator=torch.Generator().manual_seed(3)).to(place.device)
        (expected,) = torch.autograd.grad(diffusion_step_reference(**exact)[0], exact["guidance"], outer.double())
        (actual,) = torch.autograd.grad(diffusion_step(**made, backend=place.backend)[0], made["guidance"], outer)
        torch.testing.assert_close(actual.double(), expected, rtol=2**-23, atol=0)


def inputs(**changes):
    made = {
        "x_t": torch.randn(2, 3, 4, 4),
        "model_out": torch.randn(2, 3, 4, 4),
        "coefficients": torch.rand(5, 9),
        "step": torch.tensor(2),
        "noise": torch.randn(2, 3, 4, 4),
    }
    return made | changes


def on(device, made):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


def test_ancestral_step_of_ddpm():
    """Ho et al. 2020, algorithm 2 line 4, written with its alphas and betas, against the table's row for it."""
    alpha, alpha_bar, beta = 0.98, 0.4, 0.02
    sigma = beta**0.5
    row = torch.zeros(1, 9, dtype=torch.float64)
    row[0, 3] = 1.0  # eps = model_out
    row[0, 4], row[0, 6], row[0, 8] = alpha**-0.5, -(alpha**-0.5) * beta / (1 - alpha_bar) ** 0.5, sigma
    made = inputs(coefficients=row.float(), step=torch.tensor(0))
    expected = alpha**-0.5 * (made["x_t"] - beta / (1 - alpha_bar) ** 0.5 * made["model_out"]) + sigma * made["noise"]
    for place in PLACES:
        x, kept = diffusion_step(**on(place.device, made), backend=place.backend)
        torch.testing.assert_close(x.cpu(), expected)
        assert kept is None


def test_every_row_has_noise_of_its_own():
    """The step is read from its tensor at run time, as the row and as the counter: a captured graph can replay."""
    seeds, coefficients = torch.tensor([11, -12]), torch.zeros(4, 9)
    coefficients[:, 8] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for place in PLACES:
        step = torch.tensor(0, device=place.device)
        fixed = on(place.device, inputs(coefficients=coefficients, noise=None, seeds=seeds))
        for i in range(4):
            x, _ = diffusion_step(**fixed | {"step": step}, backend=place.backend)
            assert torch.equal(x.cpu(), (i + 1) * philox_normal_reference(seeds, (3, 4, 4), i, Stream.STEP))
            step += 1


def test_guidance_of_one_is_the_conditional_half():
    made = inputs()
    uncond, cond = torch.randn(2, 2, 3, 4, 4)
    for place in PLACES:
        alone, _ = diffusion_step(**on(place.device, made | {"model_out": cond}), backend=place.backend)
        zero, _ = diffusion_step(**on(place.device, made | {"model_out": uncond}), backend=place.backend)
        both = on(place.device, made | {"model_out": torch.cat([uncond, cond])})
        one, _ = diffusion_step(**both, guidance=torch.tensor(1.0, device=place.device), backend=place.backend)
        torch.testing.assert_close(one, alone)
        mixed, _ = diffusion_step(**both, guidance=torch.tensor([0.0, 1.0], device=place.device), backend=place.backend)
        torch.testing.assert_close(mixed, torch.stack([zero[0], alone[1]]))


def test_clip_bounds_x0_and_leaves_eps():
    made = inputs(clip=0.25, noise=None)
    p = made["coefficients"][2]
    for place in PLACES:
        here = on(place.device, made)
        x0 = diffusion_step(**here, keep="x0", backend=place.backend)[1]
        assert x0.abs().max() == 0.25
        eps = diffusion_step(**here, keep="eps", backend=place.backend)[1]
        torch.testing.assert_close(eps.cpu(), p[2] * made["x_t"] + p[3] * made["model_out"])


def test_nan_passes_through_the_clip():
    made = inputs(clip=1.0, noise=None)
    made["x_t"][0, 0, 0, 0] = float("nan")
    for place in PLACES:
        x, x0 = diffusion_step(**on(place.device, made), keep="x0", backend=place.backend)
        assert x.isnan().sum() == x0.isnan().sum() == 1 and x0[0, 0, 0, 0].isnan()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_out": torch.zeros(4, 3, 4, 4)}, "model_out"),
        ({"guidance": torch.tensor(2.0)}, "model_out"),
        ({"guidance": torch.zeros(3), "model_out": torch.zeros(4, 3, 4, 4)}, "guidance"),
        ({"coefficients": torch.zeros(5, 8)}, "coefficients"),
        ({"coefficients": torch.zeros(5, 9, dtype=torch.float64)}, "coefficients"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, "step"),
        ({"step": torch.tensor(1.0)}, "step"),
        ({"history": torch.zeros(2, 3, 4, 5)}, "history"),
        ({"keep": "v"}, "keep"),
        ({"noise": torch.zeros(2, 3, 4, 5)}, "noise"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, "noise and seeds"),
        ({"noise": None, "seeds": torch.zeros(2)}, "seeds"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_wrong_arguments(changes, message):
    diffusion_step(**inputs())
    with pytest.raises(ValueError, match=message):
        diffusion_step(**inputs(**changes))
