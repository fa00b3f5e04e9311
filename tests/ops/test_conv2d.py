"""conv2d and norm_act_conv2d: the suite, every algorithm on every case it fits, PyTorch's modules, NaN, infinity and
overflow, mixed dtypes and layouts, which gradients there are, their arguments."""

import pytest
import torch
import torch.nn.functional as F
from suite import DTYPES, OpSuite, Place, assert_same, errors, every_second, places
from torch import nn

from fastgen import backends, testing
from fastgen.ops import conv2d, convolution, norm_act_conv2d
from fastgen.testing import EAGER
from fastgen.tolerance import max_error, tolerance

OPS = {"conv2d": conv2d, "norm_act_conv2d": norm_act_conv2d}
PLACES = places("conv2d")
CPP = Place("cpp", "cpu")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
ALGORITHMS = {"direct": 0, "F(2,3)": 1, "F(4,3)": 2, "F(3,2)": 3}
TAPS = {1: 3, 2: 3, 3: 2}  # of the kernels that an algorithm is for

needs_cpp = pytest.mark.skipif(CPP not in PLACES, reason="no C++ library")


def force(monkeypatch, algorithm):
    """Takes this algorithm wherever it fits, and notes for which outputs it did."""
    taken = []

    def choose(n, c, k, h, w, taps, passes=1):
        fits = algorithm == convolution.DIRECT or TAPS[algorithm] == taps
        if fits:
            taken.append((n, k, h, w))
        return algorithm if fits else convolution.DIRECT

    monkeypatch.setattr(convolution, "choose", choose)
    return taken


class ConvolutionSuite(OpSuite):
    second_derivatives = True
    interpreted = ""  # of the few cases, the one for Triton's interpreter

    def matrix(self, found):
        """Interpreted, in one layout: kernels see channels last only."""
        return (row for row in super().matrix(found) if not (row[1].interpreted and row[3]))

    @pytest.fixture(autouse=True)
    def thinned(self, request):
        """Interpreted, what goes through PyTorch's machinery is tested on one case; values are, on all."""
        given = getattr(request.node, "callspec", None)
        given = {} if given is None else given.params
        case = given.get("few", given.get("case"))
        if "place" not in given or not given["place"].interpreted or case is None:
            return
        if case.label != self.interpreted or given.get("view", "every_second") != "every_second":
            pytest.skip("one case in the interpreter")

    @needs_cpp
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_every_algorithm(self, case, algorithm, monkeypatch):
        """On cases of all sizes, whatever size it is chosen for."""
        taken = force(monkeypatch, ALGORITHMS[algorithm])
        for dtype, channels_last in zip(DTYPES, (False, True, True, False), strict=True):
            assert not errors(case, CPP, dtype, channels_last)
            if not taken:
                pytest.skip("does not fit")

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_batch_invariance(self, place, few, algorithm, monkeypatch):
        """Which algorithm is the fastest depends on the batch; what one of them gives does not."""
        if place.backend == "triton" and algorithm != "direct":
            pytest.skip("has one algorithm")
        force(monkeypatch, ALGORITHMS[algorithm])
        super().test_batch_invariance(place, few)

    @needs_cpp
    @pytest.mark.parametrize("algorithm", ("F(2,3)", "F(4,3)"))
    def test_threads_and_algorithms(self, algorithm, monkeypatch):
        taken = force(monkeypatch, ALGORITHMS[algorithm])
        self.test_thread_count()
        assert taken


class TestConv2d(ConvolutionSuite):
    op = "conv2d"
    few = (
        "2x3x4x5x4-3x3-padding1-actsilu-skip2-each",
        "2x6x5x6x4-3x3-padding1-upsample2",
        "2x5x7x6x9-1x1-acttanh-residual",
    )
    interpreted = few[2]
    at_size = testing._conv2d(2, 40, 72, 45, 37, padding=1, skip=9, each=True, residual=True, act="silu")


class TestNormActConv2d(ConvolutionSuite):
    op = "norm_act_conv2d"
    few = ("2x8x6x5x7-3x3-padding1", "2x6x5x6x5-3x3-padding1-skip4-each-residual-adagn")
    interpreted = few[0]
    at_size = testing._conv2d(2, 40, 72, 45, 37, norm=True, padding=1, skip=8, scale_shift=True, residual=True)


# What PyTorch's modules compute

GEOMETRIES = {
    "plain": ({"padding": 1}, 3),
    "stride": ({"stride": 2, "padding": 1}, 3),
    "unequal": ({"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}, 3),
    "four-sided": ({"padding": (0, 1, 2, 1), "stride": 2}, 3),
    "four-sided-whole": ({"padding": (2, 0, 0, 3)}, 3),
    "dilation": ({"padding": 2, "dilation": 2}, 3),
    "groups": ({"padding": 1, "groups": 2}, 3),
    "kernel5": ({"padding": 2}, 5),
    "kernel5-stride3": ({"padding": 1, "stride": 3}, 5),
    "much-padding": ({"padding": 4}, 3),
    "upsample": ({"padding": 1, "upsample": 2}, 3),
    "upsample-stride": ({"padding": 1, "upsample": 2, "stride": 2}, 3),
    "upsample-groups": ({"padding": (0, 1, 0, 1), "upsample": 2, "groups": 2}, 3),
    "upsample-kernel1": ({"upsample": 2}, 1),
}


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_is_what_pytorch_modules_compute(geometry, place):
    options, kernel = GEOMETRIES[geometry]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 7, 9, generator=g)
    norm, conv = nn.GroupNorm(4, 8), nn.Conv2d(8, 6, kernel, groups=options.get("groups", 1))
    with torch.no_grad():
        for p in (*norm.parameters(), *conv.parameters()):
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    padding, upsample = options.get("padding", 0), options.get("upsample", 1)
    sides = padding if isinstance(padding, tuple) and len(padding) == 4 else None
    conv.stride, conv.dilation = (
        (v, v) if isinstance(v, int) else v for v in map(options.get, ("stride", "dilation"), (1, 1))
    )
    conv.padding = (0, 0) if sides else (padding, padding) if isinstance(padding, int) else padding

    def modules(h):
        h = F.interpolate(h, scale_factor=2.0) if upsample == 2 else h
        return conv(F.pad(h, sides) if sides else h)

    def ours(op, x, **more):
        args = (p.to(place.device) for p in (x, conv.weight, conv.bias))
        return op(*args, **options, **more, backend=place.backend).cpu()

    affine = {"norm_weight": norm.weight.to(place.device), "norm_bias": norm.bias.to(place.device)}
    for expected, op, more in (
        (modules(x), conv2d, {}),
        (modules(F.silu(norm(x))), norm_act_conv2d, {"num_groups": 4, **affine}),
    ):
        for layout in LAYOUTS[:1] if place.interpreted else LAYOUTS:
            y = ours(op, x.contiguous(memory_format=layout), **more)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)
            parameters = list(conv.parameters())
            outer = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            for a, e in zip(*(torch.autograd.grad(z, parameters, outer, retain_graph=True) for z in (y, expected))):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


# NaN, infinity and overflow


def same_exceptions(actual, expected):
    """NaN where there is NaN, the same infinities, and the rest close."""
    assert torch.equal(actual.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(actual.isinf(), infinite) and torch.equal(actual[infinite], expected[infinite])
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-4)


@needs_cpp
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("options", ({"padding": 1}, {"padding": 1, "upsample": 2}), ids=("plain", "upsample"))
def test_nan_and_infinity_come_out_where_eager_has_them(options, algorithm, monkeypatch):
    taken = force(monkeypatch, ALGORITHMS[algorithm])
    g = torch.Generator().manual_seed(0)
    made = {"x": torch.randn(2, 5, 9, 10, generator=g), "weight": torch.randn(6, 5, 3, 3, generator=g)}
    made["residual"] = torch.randn(EAGER["conv2d"](**made, **options).shape, generator=g)
    for name, at in (
        ("x", (0, 2, 4, 5)),
        ("x", (1, 0, 8, 9)),
        ("x", (0, 4, 0, 3)),
        ("weight", (3, 2, 1, 1)),
        ("residual", (1, 3, 4, 4)),
    ):
        for value in (float("nan"), float("inf"), -float("inf")):
            inputs = made | {name: made[name].clone()}
            inputs[name][at] = value
            expected = EAGER["conv2d"](**inputs, **options)
            assert not expected.isfinite().all()
            for layout in LAYOUTS:
                given = {k: v.contiguous(memory_format=layout) for k, v in inputs.items()}
                same_exceptions(conv2d(**given, **options, backend="cpp"), expected)
    if not taken:
        pytest.skip("does not fit")


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_nan_and_infinity_stay_in_their_image_and_group(place):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 4, 9, 9, generator=g), torch.randn(6, 4, 3, 3, generator=g)
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[1, 2, 4, 4] = value
        for w in (weight, weight.clone()):
            w = w.to(place.device)
            y = norm_act_conv2d(bad.to(place.device), w, padding=1, num_groups=2, backend=place.backend).cpu()
            expected = EAGER["norm_act_conv2d"](bad, w.cpu(), padding=1, num_groups=2)
            assert expected[1].isnan().all() and expected[[0, 2]].isfinite().all()
            same_exceptions(y, expected)


@needs_cpp
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_what_overflows_is_infinite(algorithm, monkeypatch):
    """Near the largest float the transformed tiles and weights overflow, though the sums do not."""
    force(monkeypatch, ALGORITHMS[algorithm])
    g = torch.Generator().manual_seed(0)
    for options in ({"padding": 1}, {"padding": 1, "upsample": 2}):
        x, weight = torch.rand(1, 2, 8, 9, generator=g) + 0.5, (torch.rand(3, 2, 3, 3, generator=g) + 0.5) / 40
        expected = EAGER["conv2d"](x.double(), weight.double(), **options)
        for large, small in ((x * 1.5e38, weight), (x / 1e3, weight * 40 * 2e38)):
            y = conv2d(large, small, **options, backend="cpp")
            wanted = EAGER["conv2d"](large.double(), small.double(), **options)
            assert wanted.max() < torch.finfo(torch.float32).max and wanted.shape == expected.shape
            assert y.isfinite().all() and max_error(y, wanted) <= 1e-5 * wanted.max()


@needs_cpp
@pytest.mark.parametrize("algorithm", ("direct", "F(2,3)", "F(4,3)"))
def test_gradients_that_overflow_in_between(algorithm, monkeypatch):
    force(monkeypatch, ALGORITHMS[algorithm])
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 2, 9, 8, generator=g).requires_grad_()
    weight = (torch.rand(3, 2, 3, 3, generator=g) / 64).requires_grad_()
    outer = torch.rand(1, 3, 9, 8, generator=g) * 5e36
    outer[0, 1, 4, 4] = 2e38
    found = torch.autograd.grad(conv2d(x, weight, padding=1, backend="cpp"), (x, weight), outer)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(F.conv2d(*wide, padding=1), wide, outer.double())
    for a, e in zip(found, expected, strict=True):
        finite = e.abs() < 3.4e38
        assert a[finite].isfinite().all() and max_error(a[finite], e[finite]) <= 1e-5 * e[finite].abs().max()


# Dtypes and layouts


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_parameters_may_keep_fp32(op, place):
    """As under autocast: activations in half precision, parameters in fp32; gradients have their tensors' dtypes."""
    case = TestConv2d.few_cases()[0] if op == "conv2d" else TestNormActConv2d.few_cases()[1]
    for dtype in (torch.float16,) if place.interpreted else (torch.float16, torch.bfloat16):
        made = {
            k: v.detach().to(dtype if k in case.images else torch.float32).requires_grad_()
            if isinstance(v, torch.Tensor) else v
            for k, v in case.inputs(device=place.device).items()
        }  # fmt: skip
        tensors = {k: v for k, v in made.items() if isinstance(v, torch.Tensor)}
        y = OPS[op](**made, backend=place.backend)
        wide = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
        reference = EAGER[op](**made | wide)
        rounding = max_error(reference.to(dtype), reference)
        assert y.dtype == dtype and max_error(y, reference) <= tolerance(reference, rounding, dtype)
        outer = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(place.device, dtype)
        found = torch.autograd.grad(y, tensors.values(), outer)
        expected = torch.autograd.grad(reference, wide.values(), outer.double())
        for (name, t), a, e in zip(tensors.items(), found, expected, strict=True):
            assert a.dtype == t.dtype and a.shape == t.shape, name
            # Between the steps of the backward, images are rounded to their dtype.
            assert (a.double() - e).norm() <= 4 * torch.finfo(dtype).eps * e.norm(), name


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_weights_in_any_layout(place):
    """Channels last as `model.to(memory_format=…)` leaves them, with gaps, transposed."""
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=g).to(place.device) for s in ((2, 5, 9, 8), (7, 5, 3, 3)))
    ways = (
        lambda w: w.contiguous(memory_format=torch.channels_last),
        every_second,
        lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
        lambda w: w.flip(2, 3).contiguous().flip(2, 3),
    )
    every = ({"padding": 1}, {"padding": 1, "upsample": 2}, {"stride": 2})
    for options in every[:1] if place.interpreted else every:
        results = []
        for way in (lambda w: w, *ways):
            w = way(weight.clone()).requires_grad_()
            y = conv2d(x, w, **options, backend=place.backend)
            (dw,) = torch.autograd.grad(y.square().sum(), w)
            with torch.no_grad():  # transformed weights come from the cache
                results.append([y.detach(), dw, *(conv2d(x, w, **options, backend=place.backend) for _ in range(2))])
        for other in results[1:]:
            if place.backend == "reference":
                [torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4) for a, e in zip(other, results[0], strict=True)]
            else:
                assert_same(other, results[0])


@needs_cpp
def test_changed_weights_are_transformed_again():
    """However they changed: in place, by an edit of .data that no version counter sees, by other memory."""
    x, weight = torch.randn(2, 8, 12, 12), nn.Parameter(torch.randn(6, 8, 3, 3))
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: weight.mul_(2),
            lambda: weight.data.view(-1)[7].add_(1),
            lambda: weight.zero_(),
        ):
            change()
            torch.testing.assert_close(
                conv2d(x, weight, padding=1, backend="cpp"), F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4
            )


# Gradients


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_only_what_needs_a_gradient_gets_one(op, place):
    case = TestConv2d.few_cases()[0] if op == "conv2d" else TestNormActConv2d.few_cases()[1]
    made = case.inputs(device=place.device)
    tensors = {k: v.detach() for k, v in made.items() if isinstance(v, torch.Tensor)}
    everything = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    y = OPS[op](**made | everything, backend=place.backend)
    outer = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(place.device)
    y.backward(outer, retain_graph=True)
    first = {k: v.grad.clone() for k, v in everything.items()}
    y.backward(outer)  # a graph that is kept is as good the second time
    assert_same([v.grad for v in everything.values()], [2 * g for g in first.values()])
    for name in tensors:
        alone = {k: v.clone().requires_grad_(k == name) for k, v in tensors.items()}
        y = OPS[op](**made | alone, backend=place.backend)
        assert y.requires_grad
        y.backward(outer)
        assert [k for k, v in alone.items() if v.grad is not None] == [name]
        torch.testing.assert_close(alone[name].grad, first[name], rtol=1e-5, atol=1e-5)
    assert not OPS[op](**made | tensors, backend=place.backend).requires_grad


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_images_without_pixels_and_empty_batches(place):
    weight = torch.randn(6, 4, 3, 3, device=place.device, requires_grad=True)
    bias = torch.randn(6, device=place.device, requires_grad=True)
    for shape, size in (((2, 4, 0, 3), (2, 6, 2, 5)), ((0, 4, 5, 5), (0, 6, 7, 7))):
        for layout in LAYOUTS:
            x = torch.zeros(shape, device=place.device).contiguous(memory_format=layout).requires_grad_()
            for y in (
                conv2d(x, weight, bias, padding=2, backend=place.backend),
                norm_act_conv2d(x, weight, bias, padding=2, num_groups=2, backend=place.backend),
            ):
                assert y.shape == size
                torch.testing.assert_close(y, bias[:, None, None].expand(size))  # only padding
                dx, dw, db = torch.autograd.grad(y.sum(), (x, weight, bias))
                assert dx.shape == shape and not dw.any()
                torch.testing.assert_close(db, torch.full_like(db, y.numel() / 6))


# Arguments

WRONG = [
    ({"x": torch.zeros(4, 6, 6)}, "^x must"),
    ({"x": torch.zeros(2, 4, 6, 6, dtype=torch.int64)}, "^x must"),
    ({"x": torch.zeros(2, 4, 2, 6)}, "^x .* smaller than the kernel"),
    ({"x": torch.zeros(2, 4, 6, 6), "dilation": (1, 3)}, "^x .* smaller than the kernel"),
    ({"weight": torch.zeros(6, 5, 3, 3)}, "^weight must"),
    ({"weight": torch.zeros(6, 4, 3)}, "^weight must"),
    ({"weight": torch.zeros(0, 4, 3, 3)}, "^weight must"),
    ({"weight": torch.zeros(6, 4, 3, 0)}, "^weight must"),
    ({"weight": torch.zeros(6, 4, 3, 3, dtype=torch.int32)}, "^weight must be floating"),
    ({"weight": torch.zeros(5, 2, 3, 3), "groups": 2}, "^weight must"),
    ({"bias": torch.zeros(5)}, "^bias must"),
    ({"bias": torch.zeros(3, 6)}, "^bias must"),
    ({"bias": torch.zeros(6, dtype=torch.int64)}, "^bias must be floating"),
    ({"stride": 0}, "^stride must"),
    ({"stride": (1, 2, 1)}, "^stride must"),
    ({"stride": (1, 1, 1, 1)}, "^stride must"),
    ({"padding": -1}, "^padding must"),
    ({"padding": (1, 1, 1)}, "^padding must"),
    ({"padding": (0, 1, 0, -1)}, "^padding must"),
    ({"padding": "same"}, "^padding must"),
    ({"padding": ()}, "^padding must"),
    ({"dilation": 0}, "^dilation must"),
    ({"dilation": (2,)}, "^dilation must"),
    ({"groups": 3}, "^groups must"),
    ({"groups": 0}, "^groups must"),
    ({"upsample": 3}, "^upsample must"),
    ({"upsample": 0}, "^upsample must"),
    ({"skip": torch.zeros(2, 4, 6, 5)}, "^skip must"),
    ({"skip": torch.zeros(2, 4, 6)}, "^skip must"),
    ({"skip": torch.zeros(2, 1, 6, 6)}, "^weight must"),
    ({"skip": torch.zeros(2, 4, 6, 6), "weight": torch.zeros(6, 8, 3, 3, device="meta")}, "^weight is on meta"),
    ({"residual": torch.zeros(2, 6, 6, 6)}, "^residual must"),
    ({"residual": torch.zeros(6, 4, 4)}, "^residual must"),
    ({"bias": torch.zeros(6, device="meta")}, "^bias is on meta"),
    ({"residual": torch.zeros(2, 6, 4, 4, device="meta")}, "^residual is on meta"),
    ({"act": "swish"}, "^act must"),
    ({"backend": "fortran"}, "fortran"),
]
WRONG_NORM = [
    ({"num_groups": 3}, "^num_groups must"),
    ({"num_groups": 0}, "^num_groups must"),
    ({"num_groups": -1}, "^num_groups must"),
    ({"in_act": "swish"}, "^in_act must"),
    ({"norm_weight": torch.zeros(5)}, "^norm_weight must"),
    ({"norm_bias": torch.zeros(1, 4)}, "^norm_bias must"),
    ({"scale": torch.zeros(4)}, "^scale must"),
    ({"shift": torch.zeros(2, 3)}, "^shift must"),
    ({"norm_weight": torch.zeros(4, device="meta")}, "^norm_weight is on meta"),
    ({"shift": torch.zeros(2, 4, device="meta")}, "^shift is on meta"),
]


GOOD = {"x": torch.zeros(2, 4, 6, 6), "weight": torch.zeros(6, 4, 3, 3)}


@pytest.mark.parametrize("changes, message", WRONG)
def test_wrong_arguments(changes, message):
    for op, more in ((conv2d, {}), (norm_act_conv2d, {"num_groups": 2})):
        op(**GOOD, **more)
        with pytest.raises(ValueError, match=message):
            op(**GOOD | more | changes)


@pytest.mark.parametrize("changes, message", WRONG_NORM)
def test_wrong_arguments_of_the_norm(changes, message):
    with pytest.raises(ValueError, match=message):
        norm_act_conv2d(**GOOD | {"num_groups": 2} | changes)


@pytest.mark.skipif(backends.library_error("cpu") is not None, reason=str(backends.library_error("cpu")))
@pytest.mark.parametrize("kernel, how", [(1, {}), (3, {"stride": 2, "padding": 1}), (5, {"padding": 2})])
@pytest.mark.parametrize("grad", [False, True])
def test_bare_sums_are_pytorchs(kernel, how, grad, monkeypatch):
    """Where there is nothing to fuse and no better algorithm, auto takes F.conv2d; a named backend is obeyed.

    A strided one with gradients is ours, for the sake of its weight gradient.
    """
    monkeypatch.delenv("FASTGEN_BACKEND", raising=False)
    x, w, b = torch.randn(2, 16, 9, 9), torch.randn(32, 16, kernel, kernel, requires_grad=grad), torch.randn(32)
    expected, real, called = F.conv2d(x, w, b, **how), F.conv2d, []
    monkeypatch.setattr(F, "conv2d", lambda *args: called.append(args) or real(*args))
    ours = grad and "stride" in how
    found = conv2d(x, w, b, **how)
    assert torch.allclose(found, expected, atol=1e-5) if ours else torch.equal(found, expected)
    assert len(called) == (0 if ours else 1)
    with torch.no_grad():
        conv2d(x, w, b, act="relu", **how)
        conv2d(x, w, b, backend="cpp", **how)
    assert len(called) == (0 if ours else 1)
