"""upfirdn2d: the suite, SciPy's upfirdn, other geometries, second derivatives, the helpers, its arguments."""

import pytest
import scipy.signal
import torch
from suite import OpSuite, places, threads

from fastgen import testing
from fastgen.ops import downsample2d, filter2d, setup_filter, upfirdn2d, upfirdn2d_reference, upsample2d


class TestUpfirdn2d(OpSuite):
    op = "upfirdn2d"
    few = ("2x3x5x7-f4x4-up2x2-padding(2, 1, 2, 1)", "2x4x9x8-f6-down2x2-padding(2, 2, 2, 2)-flip")
    at_size = testing._upfirdn2d(3, 4, 131, 151, taps=(4, 4), up=(2, 2), padding=(2, 1, 2, 1))


PLACES = places("upfirdn2d")
NATIVE = [p for p in PLACES if not p.interpreted]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (4, 4)])
def test_is_scipys_upfirdn_in_both_directions(up, down):
    """SciPy pads by the filter's length - 1 on the left; on the right as far as a pixel is met."""
    g = generator()
    x, f = torch.randn(1, 1, 6, 9, generator=g, dtype=torch.float64), torch.randn(5, generator=g)
    expected = x[0, 0].numpy()
    for axis in (0, 1):
        expected = scipy.signal.upfirdn(f.double().numpy(), expected, up, down, axis=axis)
    for place in PLACES:
        here = x.to(place.device), f.to(place.device)
        y = upfirdn2d(*here, up, down, (4, 4 + down), backend=place.backend)[0, 0].cpu()
        h, w = min(len(y), len(expected)), min(y.shape[1], expected.shape[1])
        torch.testing.assert_close(y[:h, :w], torch.from_numpy(expected)[:h, :w])


GEOMETRIES = [
    ((2, 3, 17, 19), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1)), ((2, 33, 8, 6), (12,), (2, 2), (1, 1), (6, 5, 6, 5)),
    ((1, 17, 40, 50), (4, 4), (1, 1), (2, 2), (1, 1, 1, 1)), ((1, 2, 300, 21), (7,), (1, 1), (3, 3), (3, 3, 3, 3)),
    ((1, 2, 9, 200), (5, 3), (5, 1), (3, 4), (-3, 7, 2, -4)), ((1, 4, 3, 3), (24,), (4, 4), (1, 1), (14, 13, 14, 13)),
    ((1, 3, 6, 6), (2, 2), (5, 3), (1, 1), (0, 0, 0, 0)), ((2, 1, 5, 5), (5, 5), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((1, 2, 5, 6), (3, 3), (2, 2), (7, 1), (9, 12, 20, 3)), ((2, 5, 1, 1), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1)),
]  # fmt: skip


@pytest.mark.parametrize("shape, taps, up, down, padding", GEOMETRIES, ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_other_geometries(shape, taps, up, down, padding, flip):
    """Values and gradients, in both layouts, with any number of threads: bands, phases, crops, more channels."""
    case = testing._upfirdn2d(*shape, taps=taps, up=up, down=down, padding=padding, flip=flip)
    inputs = case.inputs(torch.float64)
    expected = upfirdn2d_reference(**inputs)
    dy = torch.randn(expected.shape, generator=generator(), dtype=torch.float64)
    (dx,) = torch.autograd.grad(expected, inputs["x"], dy)
    for place in PLACES:
        for last in (False, True):
            here = case.inputs(torch.float64, place.device, last)
            for n in (1,) if place.interpreted else (1, 2):
                with threads(n):
                    y = upfirdn2d(**here, backend=place.backend)
                    (found,) = torch.autograd.grad(y, here["x"], dy.to(place.device))
                torch.testing.assert_close(y.cpu(), expected, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(found.cpu(), dx, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", testing.cases("upfirdn2d"), ids=str)
def test_second_derivatives(case):
    for place in NATIVE:
        inputs = case.inputs(torch.float64, place.device)
        rest = {k: v for k, v in inputs.items() if k != "x"}

        def fn(x, rest=rest, backend=place.backend):
            return upfirdn2d(x, **rest, backend=backend).pow(2)

        with threads(1):
            assert torch.autograd.gradgradcheck(fn, inputs["x"], fast_mode=True)


def test_a_row_of_one_is_the_identity():
    for place in PLACES:
        x = torch.randn(2, 3, 4, 5, device=place.device)
        assert torch.equal(upfirdn2d(x, None, backend=place.backend), x)
        assert torch.equal(upfirdn2d(x, setup_filter([1.0]).to(place.device), backend=place.backend), x)


def test_infinity_stays_under_the_filter():
    f = setup_filter([1, 3, 3, 1])
    for place in PLACES:
        x = torch.zeros(1, 2, 12, 12, device=place.device)
        x[0, 0, 6, 6] = float("inf")
        for layout in (torch.contiguous_format, torch.channels_last):
            y = upsample2d(x.contiguous(memory_format=layout), f.to(place.device), backend=place.backend)
            assert int(y.isfinite().logical_not().sum()) == 16 and y[0, 1].eq(0).all()


# The helpers


def test_setup_filter():
    four = setup_filter([1, 3, 3, 1])
    assert four.shape == (4, 4) and four.dtype == torch.float32
    torch.testing.assert_close(four, torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 3, 3, 1])) / 64)
    assert setup_filter([1] * 8).shape == (8,) and setup_filter([1] * 8, separable=False).shape == (8, 8)
    assert setup_filter(None).tolist() == [[1.0]] and setup_filter(2.0, normalize=False).tolist() == [[4.0]]
    assert setup_filter([1.0, 2], separable=True, normalize=False, flip_filter=True, gain=4).tolist() == [4.0, 2.0]
    torch.testing.assert_close(setup_filter([1, 3, 3, 1], gain=4).sum(), torch.tensor(4.0))
    for wrong in ([], [[[1.0]]]):
        with pytest.raises(ValueError, match=r"^f must"):
            setup_filter(wrong)
    with pytest.raises(ValueError, match=r"^separable"):
        setup_filter([[1.0, 2]], separable=True)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 8, 12])
def test_helpers_keep_sizes_and_brightness(taps):
    f = setup_filter([1.0] * taps)
    for place in PLACES:
        x, here = torch.ones(1, 2, 24, 32, device=place.device), f.to(place.device)
        with_backend = {"backend": place.backend}
        middle = (..., slice(11, 13), slice(15, 17))
        y = filter2d(x, here, **with_backend)
        assert y.shape == x.shape
        torch.testing.assert_close(y[middle], x[middle])
        y = downsample2d(x, here, **with_backend)
        assert y.shape == (1, 2, 12, 16)
        torch.testing.assert_close(y[..., 6, 8], x[..., 0, 0])
        y = upsample2d(x, here, up=(1, 2), **with_backend)
        assert y.shape == (1, 2, 24, 64)
        if taps % 2 == 0:  # of an odd filter the two phases differ
            torch.testing.assert_close(y[..., 11:13, 30:34], torch.ones(1, 2, 2, 4, device=place.device))
        assert upsample2d(x, here, padding=(1, 0, 2, 0), **with_backend).shape == (1, 2, 50, 65)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(3, 4, 4)}, "^x must"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "^x must"),
        ({"x": torch.zeros(2, 3, 1, 1)}, r"^x .* is smaller than f"),
        ({"f": torch.zeros(1, 2, 2)}, "^f must"),
        ({"f": torch.zeros(0)}, "^f must"),
        ({"f": torch.zeros(2, 2, dtype=torch.int64)}, "^f must"),
        ({"f": torch.zeros(2, 2, requires_grad=True)}, "^f must not require"),
        ({"f": torch.zeros(2, 2, device="meta")}, "^f is on meta"),
        ({"up": 0}, "^up must"),
        ({"up": (1, 2, 3)}, "^up must"),
        ({"down": "2"}, "^down must"),
        ({"down": (1, -1)}, "^down must"),
        ({"padding": (1, 2, 3)}, "^padding must"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_wrong_arguments(changes, message):
    good = {"x": torch.zeros(2, 3, 4, 4), "f": torch.zeros(3, 3)}
    upfirdn2d(**good)
    with pytest.raises((ValueError, TypeError), match=message):
        upfirdn2d(**good | changes)
