"""group_norm_act: the suite, and infinities, hard statistics, mixed dtypes, memory, its arguments."""

import pytest
import torch
from suite import OpSuite, Place, places
from torch import nn

from fastgen import testing
from fastgen.ops import ACTIVATIONS, group_norm_act, group_norm_act_reference
from fastgen.testing import EAGER
from fastgen.tolerance import max_error, tolerance

eager = EAGER["group_norm_act"]


class TestGroupNormAct(OpSuite):
    op = "group_norm_act"
    few = ("2x8x5x3-g4-silu", "2x6x5x7-g2-silu-adagn-skip2")
    at_size = testing._group_norm_act(2, 4, 131, 151, groups=2, scale_shift=True, skip=2)
    second_derivatives = True


PLACES = places("group_norm_act")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def test_is_what_pytorch_modules_compute():
    x = torch.randn(2, 8, 5, 5)
    modules = [(nn.GroupNorm(4, 8), 4), (nn.InstanceNorm2d(8, affine=True), 8)]
    for norm, groups in modules:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        expected = nn.functional.silu(norm(x))
        for place in PLACES:
            args = [t.to(place.device) for t in (x, norm.weight, norm.bias)]
            y = group_norm_act(args[0], groups, *args[1:], backend=place.backend)
            torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_infinities_reach_the_activation_as_in_eager(act):
    inf, nan = float("inf"), float("nan")
    bias = torch.tensor([inf, -inf, nan, 3e38, -3e38, 100.0, -100.0, 0.0])
    x = torch.randn(1, 8, 3, 4)
    expected = eager(x.double(), 2, None, bias.double(), act=act).float()
    for place in PLACES:
        if place == Place("reference", "cpu") and act == "gelu":
            continue  # in fp32, and on CPUs only, PyTorch's gelu(inf) is NaN
        for layout in LAYOUTS:
            here = x.to(place.device).contiguous(memory_format=layout)
            y = group_norm_act(here, 2, None, bias.to(place.device), act=act, backend=place.backend).cpu()
            assert torch.equal(y.isnan(), expected.isnan())
            finite = expected.isfinite()
            assert torch.equal(y[~finite & ~y.isnan()], expected[~finite & ~expected.isnan()])
            torch.testing.assert_close(y[finite], expected[finite], rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_stay_in_their_group():
    x = torch.randn(2, 4, 3, 5)
    x[0, 0, 1, 2], x[1, 3, 0, 0] = float("nan"), float("inf")
    expected = eager(x, 2, act="none").isnan()
    assert expected[0, :2].all() and expected[1, 2:].all() and expected.sum() == 4 * 15
    for place in PLACES:
        for layout in LAYOUTS:
            here = x.to(place.device).contiguous(memory_format=layout)
            assert torch.equal(group_norm_act(here, 2, act="none", backend=place.backend).isnan().cpu(), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_large_mean_and_small_variance(layout):
    """E[x²] - E[x]² in fp32 would lose all of it: the mean is 4096 times the deviation."""
    x = (torch.randn(2, 8, 31, 33, generator=torch.Generator().manual_seed(3)) + 4096).contiguous(memory_format=layout)
    reference = group_norm_act_reference(x.double(), 2, act="none")
    allowed = tolerance(reference, max_error(eager(x, 2, act="none"), reference), torch.float32)
    for place in PLACES:
        y = group_norm_act(x.to(place.device), 2, act="none", backend=place.backend)
        assert max_error(y.cpu(), reference) <= allowed


def test_constant_input_gives_the_bias():
    for place in PLACES:
        x = torch.full((2, 4, 7, 9), 3.3, device=place.device)
        bias = torch.arange(4.0, device=place.device)
        y = group_norm_act(x, 2, None, bias, act="none", backend=place.backend)
        # The variance is 0, so rstd is 316, and so many times the rounding of a sum of 126 numbers shows.
        torch.testing.assert_close(y, bias[:, None, None].expand_as(y), rtol=0, atol=8 * 2**-23 * 3.3 * 316)


def test_parameters_may_keep_fp32():
    """As under autocast: activations in half precision, parameters in fp32; gradients have their tensors' dtypes."""
    g = torch.Generator().manual_seed(0)
    made = {"x": torch.randn(2, 6, 5, 7, generator=g), "skip": torch.randn(2, 2, 5, 7, generator=g)}
    made |= {
        n: torch.randn(s, generator=g) for n, s in (("weight", 8), ("bias", 8), ("scale", (2, 8)), ("shift", (2, 8)))
    }
    for place in PLACES:
        for dtype in (torch.float16, torch.bfloat16):
            if place.interpreted and dtype == torch.bfloat16:
                continue
            here = {
                k: v.to(place.device, dtype if k in ("x", "skip") else None).requires_grad_() for k, v in made.items()
            }
            y = group_norm_act(num_groups=2, **here, backend=place.backend)
            reference = group_norm_act_reference(num_groups=2, **{k: v.detach().double() for k, v in here.items()})
            rounding = max_error(reference.to(dtype), reference)
            assert y.dtype == dtype and max_error(y, reference) <= tolerance(reference, rounding, dtype)
            y.float().square().sum().backward()
            assert all(v.grad.dtype == v.dtype and v.grad.isfinite().all() for v in here.values())


def test_five_dimensions_and_one_pixel():
    g = torch.Generator().manual_seed(0)
    for shape, layout in (((2, 4, 3, 2, 5), torch.channels_last_3d), ((3, 8, 1, 1), torch.channels_last)):
        x = torch.randn(shape, generator=g)
        for memory_format in (torch.contiguous_format, layout):
            for place in PLACES:
                here = x.to(place.device).contiguous(memory_format=memory_format).requires_grad_()
                y = group_norm_act(here, 2, backend=place.backend)
                torch.testing.assert_close(y.cpu(), eager(x, 2), rtol=1e-5, atol=1e-5)
                assert y.is_contiguous(memory_format=memory_format)
                (dx,) = torch.autograd.grad(y.square().sum(), here)
                wide = x.double().requires_grad_()
                (expected,) = torch.autograd.grad(eager(wide, 2).square().sum(), wide)
                torch.testing.assert_close(dx.cpu().double(), expected, rtol=1e-3, atol=1e-4)


def test_images_without_pixels():
    for place in PLACES:
        x = torch.zeros(2, 4, 0, 3, device=place.device, requires_grad=True)
        y = group_norm_act(x, 2, backend=place.backend)
        assert y.shape == x.shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_only_what_needs_a_gradient_gets_one():
    for place in PLACES:
        x, weight = (
            torch.randn(2, 4, 3, 3, device=place.device),
            torch.randn(4, device=place.device, requires_grad=True),
        )
        bias = torch.randn(4, device=place.device)
        group_norm_act(x, 2, weight, bias, backend=place.backend).sum().backward()
        assert weight.grad is not None and x.grad is None and bias.grad is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(4)}, "^x must"),
        ({"x": torch.zeros(2, 4, 3, 3, dtype=torch.int64)}, "^x must"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 0}, "num_groups"),
        ({"weight": torch.zeros(5)}, "weight"),
        ({"bias": torch.zeros(1, 4)}, "bias"),
        ({"scale": torch.zeros(4)}, "scale"),
        ({"shift": torch.zeros(2, 3)}, "shift"),
        ({"skip": torch.zeros(2, 4, 3, 4)}, "skip"),
        ({"skip": torch.zeros(2, 4, 3)}, "skip"),
        ({"skip": torch.zeros(2, 1, 3, 3)}, "num_groups"),
        ({"skip": torch.zeros(2, 2, 3, 3), "weight": torch.zeros(4)}, "weight"),
        ({"weight": torch.zeros(4, device="meta")}, "weight is on meta"),
        ({"act": "swish"}, "act must"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_wrong_arguments(changes, message):
    good = {"x": torch.zeros(2, 4, 3, 3), "num_groups": 2}
    group_norm_act(**good)
    with pytest.raises(ValueError, match=message):
        group_norm_act(**good | changes)
