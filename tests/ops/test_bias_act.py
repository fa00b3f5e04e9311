"""bias_act: the suite, stylegan3's defaults, activations where they are hard, shapes, higher derivatives, arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from suite import OpSuite, places, threads

from fastgen import testing
from fastgen.ops import bias_act, bias_act_reference
from fastgen.ops.bias_act import FUNCTIONS
from fastgen.testing import EAGER
from fastgen.tolerance import max_error, tolerance


class TestBiasAct(OpSuite):
    op = "bias_act"
    few = ("3x5x4x7-swish-clamp1.5", "2x6x5x9-lrelu-clamp1.0")
    at_size = testing._bias_act(3, 4, 131, 151, clamp=2.0)
    second_derivatives = True


PLACES = places("bias_act")
# Other ways through the kernels: long runs of a channel and short ones, few channels and more than a tile is wide.
SHAPES = [
    ((3, 40, 9, 11), 1), ((2, 3, 70, 90), 1), ((30, 4, 1, 5), 1), ((9, 1100, 2), 1), ((40, 2100), 1), ((3, 300), 1),
    ((5, 6, 7), 2), ((5, 6, 7), 0), ((3, 5, 2, 3, 4), 1), ((4, 1, 3, 5), 1), ((3000,), 0),
]  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "act, expected",
    [
        ("linear", lambda z: z),
        ("relu", lambda z: z.relu() * math.sqrt(2)),
        ("lrelu", lambda z: F.leaky_relu(z, 0.2) * math.sqrt(2)),
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
        ("elu", F.elu),
        ("selu", F.selu),
        ("softplus", F.softplus),
        ("swish", lambda z: z * z.sigmoid() * math.sqrt(2)),
    ],
)
def test_defaults(act, expected):
    assert act in FUNCTIONS
    for place in PLACES:
        x, b = torch.randn(2, 3, 4, 5, generator=generator()).to(place.device), torch.randn(3).to(place.device)
        y = bias_act(x, b, act=act, backend=place.backend)
        torch.testing.assert_close(y, expected(x + b[:, None, None]))


def test_alpha_gain_and_clamp():
    x = torch.tensor([-8.0, -1.0, 0.5, 8.0])
    for place in PLACES:
        y = bias_act(x.to(place.device), act="lrelu", alpha=0.5, gain=2.0, clamp=3.0, backend=place.backend)
        assert y.tolist() == [-3.0, -1.0, 1.0, 3.0]


@pytest.mark.parametrize("act", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_and_near(act, dtype):
    """Arguments so large that exp overflows or a difference cancels, and so small that 1 + x is 1; derivatives too."""
    x = torch.cat([torch.linspace(-150, 150, 2000, dtype=torch.float64), torch.logspace(-12, 0, 200).double()])
    x = torch.cat([x, -x[-200:], torch.tensor([0.0, 19.999, 20.001])]).to(dtype)

    def derivatives(fn, x):
        x = x.clone().requires_grad_()
        y = fn(x, act=act)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        again = torch.autograd.grad(dx, x, torch.ones_like(dx), allow_unused=True)[0] if dx.requires_grad else None
        return [y, dx, torch.zeros_like(dx) if again is None else again]

    reference, eager = derivatives(bias_act_reference, x.double()), derivatives(EAGER["bias_act"], x)
    for place in PLACES:
        found = derivatives(lambda x, act, b=place.backend: bias_act(x, act=act, backend=b), x.to(place.device))
        for y, r, e in zip(found, reference, eager, strict=True):
            allowed = tolerance(r, max_error(e, r), dtype) if dtype == torch.float32 else 1e-12
            assert max_error(y.cpu(), r) <= max(allowed, 0.0)


def test_small_values_keep_their_digits():
    """elu, selu and tanh near 0 are the identity (times a number) to almost every digit."""
    x = -torch.logspace(-6, -2, 50)
    for place in PLACES:
        for act in ("elu", "selu"):
            y = bias_act(x.to(place.device), act=act, backend=place.backend).cpu()
            torch.testing.assert_close(y.double(), bias_act_reference(x.double(), act=act), rtol=1e-6, atol=0)


def test_nan_stays_and_infinity_is_clamped():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    for place in PLACES:
        y = bias_act(x.to(place.device), act="lrelu", clamp=2.0, backend=place.backend).cpu()
        assert y[0].isnan() and y[1:3].tolist() == [2.0, -2.0]


@pytest.mark.parametrize("shape, dim", SHAPES, ids=str)
@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_other_shapes(shape, dim, act):
    """Values and both derivatives, in every layout and with any number of threads."""
    g = generator()
    made = [torch.randn(s, generator=g, dtype=torch.float64) for s in (shape, shape[dim : dim + 1], shape, shape)]

    def results(fn, x, b, dy, ddx):
        x, b, dy = (t.detach().requires_grad_() for t in (x, b, dy))
        y = fn(x, b, dim=dim, act=act, clamp=2.0)
        dx, db = torch.autograd.grad(y, (x, b), dy, create_graph=True)
        wanted = (dy,) if act == "lrelu" else (dy, x, b)
        return [y, dx, db, *torch.autograd.grad((dx, db), wanted, (ddx, torch.ones_like(db)))]

    expected = results(bias_act_reference, *made)
    for place in PLACES:
        if place.interpreted and made[0].numel() > 2000:  # a minute each
            continue
        for layout in (torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])):
            for n in (1,) if place.interpreted else (1, 2):
                here = [t.to(place.device) for t in made]
                here[0] = here[0].contiguous(memory_format=layout)
                with threads(n):
                    found = results(lambda *a, b=place.backend, **k: bias_act(*a, **k, backend=b), *here)
                assert found[0].is_contiguous(memory_format=layout)
                for a, e in zip(found, expected, strict=True):
                    torch.testing.assert_close(a.cpu(), e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("act", FUNCTIONS)
@pytest.mark.parametrize("clamp", [None, 0.75])
def test_gradcheck_of_every_activation(act, clamp):
    """In fp64, of the kernels: the gradient, and the gradient of the gradient."""
    for place in PLACES:
        g = generator()
        x, b = (torch.randn(s, generator=g, dtype=torch.float64).to(place.device) for s in ((2, 3, 2, 3), (3,)))

        def fn(x, b, backend=place.backend):
            return bias_act(x, b, act=act, clamp=clamp, backend=backend)

        with threads(1):
            leaves = (x.requires_grad_(), b.requires_grad_())
            for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
                assert check(fn, leaves, fast_mode=place.interpreted)


def test_third_derivatives():
    for place in PLACES:
        x = torch.linspace(-1, 1, 5, dtype=torch.float64, device=place.device).requires_grad_()
        found = bias_act(x, act="tanh", backend=place.backend)
        expected = torch.tanh(x)
        for _ in range(3):
            found, expected = (torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in (found, expected))
        torch.testing.assert_close(found, expected)


def test_r1_penalty():
    """The squared gradient of a small discriminator, differentiated by its parameters, is that of plain PyTorch."""
    for place in PLACES:
        g = generator()
        x = torch.randn(4, 3, 6, 6, generator=g).to(place.device)
        weights = [torch.randn(s, generator=g).to(place.device) / 4 for s in ((8, 3, 3, 3), (8,), (1, 8, 6, 6), (1,))]
        results = []
        for fn in (EAGER["bias_act"], lambda *a, b=place.backend, **k: bias_act(*a, **k, backend=b)):
            w, b, v, c = (t.clone().requires_grad_() for t in weights)
            leaf = x.clone().requires_grad_()
            h = fn(F.conv2d(leaf, w, padding=1), b, act="swish", clamp=256.0)
            score = fn(F.conv2d(h, v).flatten(1), c, act="lrelu")
            (gradient,) = torch.autograd.grad(score.sum(), leaf, create_graph=True)
            results.append(torch.autograd.grad(gradient.square().sum() + score.sum(), (w, b, v, c)))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_a_bias_keeps_its_dtype():
    for place in PLACES:
        if place.interpreted:
            continue
        x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, device=place.device)
        b = torch.randn(3, device=place.device, requires_grad=True)
        y = bias_act(x, b, act="lrelu", backend=place.backend)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and b.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "^x must"),
        ({"b": torch.zeros(4)}, "^b must"),
        ({"b": torch.zeros(1, 3)}, "^b must"),
        ({"b": torch.zeros(3, dtype=torch.int64)}, "^b must"),
        ({"b": torch.zeros(3, device="meta")}, "^b is on meta"),
        ({"dim": 4}, "^dim must"),
        ({"dim": -1}, "^dim must"),
        ({"act": "silu"}, "^act must"),
        ({"clamp": -1.0}, "^clamp must"),
        ({"gain": "2"}, "^gain must"),
        ({"alpha": float("nan")}, "^alpha must"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_wrong_arguments(changes, message):
    good = {"x": torch.zeros(2, 3, 4, 4), "b": torch.zeros(3)}
    bias_act(**good)
    bias_act(good["x"], dim=9)  # without b it means nothing
    with pytest.raises(ValueError, match=message):
        bias_act(**good | changes)
