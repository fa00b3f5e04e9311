"""batch_norm_act: the suite, and nn.BatchNorm2d with its running statistics, hard statistics, shapes, its arguments."""

import math

import pytest
import torch
from suite import OpSuite, names, places, threads
from torch import nn

from fastgen import testing
from fastgen.ops import batch_norm_act, batch_norm_act_reference
from fastgen.testing import EAGER
from fastgen.tolerance import max_error, tolerance

eager = EAGER["batch_norm_act"]


class TestBatchNormAct(OpSuite):
    op = "batch_norm_act"
    few = ("3x5x4x7-train-silu-residual", "3x6x5x3-eval-relu-residual")
    at_size = testing._batch_norm_act(3, 4, 131, 151, training=True, residual=True)
    second_derivatives = True

    def test_batch_invariance(self, place, few):
        if few.inputs()["training"]:
            pytest.skip("in training the images are normalised by one another")
        super().test_batch_invariance(place, few)


PLACES = places("batch_norm_act")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
STATISTICS = ("running_mean", "running_var")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def module(channels: int, device: str, **options) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        norm.weight.normal_(generator=generator()), norm.bias.uniform_(-1, 1, generator=generator())
        norm.running_mean.normal_(generator=generator()), norm.running_var.uniform_(0.5, 2, generator=generator())
    return norm.to(device)


def arguments(norm: nn.BatchNorm2d) -> dict:
    """Those of the op, from a module; the running statistics are copies."""
    return {
        **{n: getattr(norm, n).clone() for n in STATISTICS}, "weight": norm.weight, "bias": norm.bias,
        "training": norm.training, "momentum": norm.momentum, "eps": norm.eps,
    }  # fmt: skip


# Beside nn.BatchNorm2d


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0])
def test_three_steps_leave_the_running_statistics_of_the_module(momentum):
    for place in PLACES:
        norm = module(6, place.device, momentum=momentum)
        ours = arguments(norm)
        for step in range(3):
            x = torch.randn(4, 6, 5, 7, generator=generator()).to(place.device) * (step + 1) + step
            expected = norm(x).relu()
            torch.testing.assert_close(batch_norm_act(x, **ours, backend=place.backend), expected)
        for n in STATISTICS:
            torch.testing.assert_close(ours[n], getattr(norm, n), rtol=2e-6, atol=1e-6)
        norm.eval()
        expected = norm(x).relu()
        torch.testing.assert_close(
            batch_norm_act(x, **ours | {"training": False}, backend=place.backend), expected, rtol=1e-5, atol=1e-5
        )
        for n in STATISTICS:
            torch.testing.assert_close(ours[n], getattr(norm, n), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_is_what_the_module_computes_with_its_gradients(training, layout):
    for place in PLACES:
        norm = module(40, place.device).train(training)
        x, residual = (
            torch.randn(3, 40, 7, 9, generator=generator()).to(place.device).contiguous(memory_format=layout) * s
            for s in (2, 0.5)
        )
        leaves = [x.requires_grad_(), residual.requires_grad_(), norm.weight, norm.bias]
        args = arguments(norm)
        results = []
        for y in (
            (norm(x) + residual).relu(),
            batch_norm_act(x, **args, residual=residual, backend=place.backend),
        ):
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for a, e in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_the_running_statistics_are_moved_in_inference_mode_too():
    for place in PLACES:
        norm = module(4, place.device)
        x = torch.randn(2, 4, 5, 5, generator=generator()).to(place.device)
        ours = arguments(norm)
        with torch.inference_mode():
            batch_norm_act(x, **ours, backend=place.backend)
        norm(x)
        for n in STATISTICS:
            torch.testing.assert_close(ours[n], getattr(norm, n))


def test_the_running_statistics_keep_their_dtype():
    """Activations in half precision, everything else in fp32, as under autocast; and statistics in half precision."""
    for place in PLACES:
        for dtype, kept in zip(
            (torch.bfloat16, torch.float64, torch.float32), (torch.float32, torch.float32, torch.half), strict=True
        ):
            x = torch.randn(4, 3, 5, 5, generator=generator()).to(place.device, dtype)
            mean, var = (torch.full((3,), v, dtype=kept, device=place.device) for v in (0.0, 1.0))
            weight = torch.ones(3, device=place.device, requires_grad=True)
            y = batch_norm_act(x, mean, var, weight, training=True, momentum=1.0, backend=place.backend)
            y.sum().backward()
            assert y.dtype == dtype and weight.grad.dtype == torch.float32 and mean.dtype == var.dtype == kept
            expected_var, expected = torch.var_mean(x.double(), dim=(0, 2, 3))
            torch.testing.assert_close(mean.double(), expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(var.double(), expected_var, rtol=1e-3, atol=1e-3)


def test_compiled_training_moves_the_running_statistics():
    """One graph, which may be called again and again; the gradients are those of eager mode."""
    for place in PLACES:

        def step(x, weight, mean, var, backend=place.backend):
            return batch_norm_act(x * 2, mean, var, weight, training=True, backend=backend) + 1

        x = torch.randn(4, 3, 6, 5, generator=generator()).to(place.device).requires_grad_()
        weight = torch.rand(3, generator=generator()).to(place.device).requires_grad_()
        results = []
        for fn in (step, torch.compile(step, fullgraph=True)):
            mean, var = torch.zeros(3, device=place.device), torch.ones(3, device=place.device)
            for _ in range(3):
                y = fn(x, weight, mean, var)
                grads = torch.autograd.grad(y.square().sum(), (x, weight))
            assert mean.any() and not mean.requires_grad
            results.append([y, mean, var, *grads])
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e)


def test_backward_does_not_mind_that_the_running_statistics_moved():
    """As a network that is called with frozen statistics and then trained, before the first call's backward."""
    for place in PLACES:
        norm = module(4, place.device).eval()
        x = torch.randn(3, 4, 5, 5, generator=generator()).to(place.device).requires_grad_()
        ours = arguments(norm)
        (expected,) = torch.autograd.grad(norm(x).relu().sum(), x)
        y = batch_norm_act(x, **ours, backend=place.backend)
        batch_norm_act(x.detach() * 9, **ours | {"training": True}, backend=place.backend)
        assert not torch.equal(ours["running_mean"], norm.running_mean)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_an_empty_batch_leaves_the_running_statistics():
    for place in PLACES:
        mean, var = torch.zeros(3, device=place.device), torch.ones(3, device=place.device)
        x = torch.zeros(0, 3, 4, 4, device=place.device, requires_grad=True)
        y = batch_norm_act(x, mean, var, training=True, backend=place.backend)
        assert y.shape == x.shape and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
        assert not mean.any() and (var == 1).all()


def test_the_reference_moves_the_running_statistics_as_the_op_does():
    x = torch.randn(4, 3, 5, 5, generator=generator())
    for place in PLACES:
        ours, theirs = ([torch.zeros(3, device=d), torch.ones(3, device=d)] for d in (place.device, "cpu"))
        batch_norm_act(x.to(place.device), *ours, training=True, backend=place.backend)
        batch_norm_act_reference(x, *theirs, training=True)
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), e)


# Statistics


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_large_mean_and_small_variance(layout, act):
    """E[x²] - E[x]² in fp32 would lose all of it: the mean is 4096 times the deviation."""
    x = (torch.randn(2, 8, 31, 33, generator=generator()) + 4096).contiguous(memory_format=layout)
    reference = batch_norm_act_reference(x.double(), training=True, act=act)
    allowed = tolerance(reference, max_error(eager(x, training=True, act=act), reference), torch.float32)
    for place in PLACES:
        y = batch_norm_act(x.to(place.device), training=True, act=act, backend=place.backend)
        assert max_error(y.cpu(), reference) <= allowed


def test_nan_and_infinity_stay_in_their_channel():
    x = torch.randn(2, 4, 3, 5, generator=generator())
    x[0, 0, 1, 2], x[1, 3, 0, 0] = float("nan"), float("inf")
    for place in PLACES:
        for layout in LAYOUTS:
            here = x.to(place.device).contiguous(memory_format=layout)
            y = batch_norm_act(here, training=True, act="none", backend=place.backend).cpu()
            assert y[:, [0, 3]].isnan().all() and y[:, 1:3].isfinite().all()


def test_infinities_pass_frozen_statistics_as_in_eager():
    """Of what is infinite in x, relu keeps the positive part; the gradient is finite wherever eager's is."""
    x = torch.randn(2, 4, 3, 5, generator=generator())
    x[0, 0, 1, 2], x[1, 3, 0, 0] = -float("inf"), float("inf")
    statistics = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    leaf = x.clone().requires_grad_()
    expected = eager(leaf, **statistics)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    for place in PLACES:
        for layout in LAYOUTS:
            here = x.to(place.device).contiguous(memory_format=layout).requires_grad_()
            y = batch_norm_act(here, **{n: s.to(place.device) for n, s in statistics.items()}, backend=place.backend)
            torch.testing.assert_close(y.cpu(), expected)
            torch.testing.assert_close(torch.autograd.grad(y.sum(), here)[0].cpu(), gradient)


# Shapes that take other ways through the C++ kernel: enough channels for one a thread, planes longer than a tile,
# images that share a tile, more channels than a tile is wide, no plane at all, five dimensions; channels last, few
# channels, whose pixels share a row of the matrix, and an odd number of pixels.
SHAPES = [
    (3, 40, 9, 11), (5, 33, 1, 3), (2, 3, 70, 90), (300, 4, 3, 5), (9, 600, 2, 2), (70, 130), (3, 5, 2, 3, 4),
    (3, 3, 5, 7),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_parity_of_other_shapes(shape, training, act):
    layouts = {4: LAYOUTS, 5: (torch.contiguous_format, torch.channels_last_3d)}
    for residual in (False, True):
        case = testing._batch_norm_act(*shape, training=training, act=act, residual=residual)
        inputs = case.inputs(torch.float64)
        wanted = names(case, inputs)
        expected = batch_norm_act_reference(**inputs)
        outer = torch.randn(shape, generator=generator(), dtype=torch.float64)
        gradients = torch.autograd.grad(expected, [inputs[n] for n in wanted], outer)
        for place in PLACES:
            if place.interpreted and math.prod(shape) > 5000:
                continue  # minutes
            for layout in layouts.get(len(shape), LAYOUTS[:1]):
                here = case.inputs(torch.float64, place.device)
                x = here["x"].detach().contiguous(memory_format=layout).requires_grad_()
                for n in (1,) if place.interpreted else (1, 2):
                    with threads(n):
                        y = batch_norm_act(**here | {"x": x}, backend=place.backend)
                        found = torch.autograd.grad(
                            y, [x if w == "x" else here[w] for w in wanted], outer.to(place.device)
                        )
                    assert y.is_contiguous(memory_format=layout)
                    for a, e in zip((y, *found), (expected, *gradients), strict=True):
                        torch.testing.assert_close(a.cpu(), e, rtol=1e-11, atol=1e-11)


def test_only_what_needs_a_gradient_gets_one():
    for place in PLACES:
        x, residual = (torch.randn(2, 4, 3, 3, device=place.device) for _ in range(2))
        weight = torch.randn(4, device=place.device, requires_grad=True)
        bias = torch.randn(4, device=place.device)
        batch_norm_act(x, None, None, weight, bias, True, residual=residual, backend=place.backend).sum().backward()
        assert weight.grad is not None and x.grad is None and bias.grad is None and residual.grad is None


# Arguments


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(4)}, "^x must"),
        ({"x": torch.zeros(2, 4, 3, 3, dtype=torch.int64)}, "^x must"),
        ({"x": torch.zeros(2, 0, 3, 3)}, "^x must"),
        ({"x": torch.zeros(1, 4, 1, 1), "training": True}, "^x must have more than one value"),
        ({"weight": torch.zeros(5)}, "^weight"),
        ({"bias": torch.zeros(1, 4)}, "^bias"),
        ({"weight": torch.zeros(4, dtype=torch.int64)}, "^weight"),
        ({"running_mean": torch.zeros(5)}, "^running_mean"),
        ({"running_var": torch.zeros(5)}, "^running_var"),
        ({"running_mean": None}, "^running_mean must be given where training is False"),
        ({"running_var": None}, "^running_var must be given where training is False"),
        ({"running_var": None, "training": True}, "^running_var must be given if"),
        ({"momentum": None, "training": True}, "^momentum"),
        ({"residual": torch.zeros(2, 4, 3, 4)}, "^residual"),
        ({"residual": torch.zeros(2, 4, 3)}, "^residual"),
        ({"weight": torch.zeros(4, device="meta")}, "^weight is on meta"),
        ({"act": "swish"}, "^act must"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_wrong_arguments(changes, message):
    good = {"x": torch.zeros(2, 4, 3, 3), "running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    batch_norm_act(**good)
    batch_norm_act(good["x"], training=True, momentum=None)  # nothing to update
    with pytest.raises(ValueError, match=message):
        batch_norm_act(**good | changes)
