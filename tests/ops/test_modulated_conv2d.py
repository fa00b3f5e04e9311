"""modulated_conv2d beside weights for every image: values, first and second derivatives, the folded op, arguments."""

import pytest
import torch
from suite import Place, flat, gradients, names, outer_for, places, threads

from fastgen import testing, use_backend
from fastgen.ops import bias_act, modulated_conv2d, modulated_conv2d_reference
from fastgen.testing import EAGER, OpCase
from fastgen.tolerance import frobenius_error

CASES = testing.cases("modulated_conv2d")
PLACES = places("modulated_conv2d")
CPP = Place("cpp", "cpu")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def both(case: OpCase, place: Place, dtype: torch.dtype, channels_last: bool, recorded: bool) -> list[tuple]:
    """(name, ours, the fp64 reference, eager PyTorch) of output and gradients."""
    results = []
    for fn, kind in (
        (lambda **i: modulated_conv2d(**i, backend=place.backend), dtype),
        (modulated_conv2d_reference, torch.float64),
        (EAGER["modulated_conv2d"], dtype),
    ):
        inputs = case.inputs(dtype, place.device, channels_last)
        inputs = {
            k: v.detach().to(kind).requires_grad_(recorded) if isinstance(v, torch.Tensor) else v
            for k, v in inputs.items()
        }
        outputs = flat(fn(**inputs))
        found = {"output": outputs[0].detach()}
        if recorded:
            assert names(case, inputs)
            found |= gradients(case, inputs, outputs, outer_for(outputs))
        results.append(found)
    return [(name, *(r[name] for r in results)) for name in results[0]]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "folded"])
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, place, recorded):
    """In half precision the two sides of the equation round different products: the scales here, the weights there."""
    for dtype, floor in (
        (torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float64, 1e-12),
    ):  # fmt: skip
        if place.interpreted and dtype == torch.bfloat16:
            continue  # in which the interpreter is wrong
        for channels_last in (False, True):
            for name, ours, reference, eager in both(case, place, dtype, channels_last, recorded):
                allowed = max(floor, 2 * frobenius_error(eager, reference))
                error = frobenius_error(ours, reference)
                # One image of one channel: demodulation takes the style away again, and what is left of its gradient
                # is rounding.
                small = reference.numel() and reference.double().abs().max() < 1e-6
                assert small or error <= allowed, (name, dtype, channels_last, error, allowed)
                if name == "output":
                    wanted = torch.channels_last if channels_last else torch.contiguous_format
                    assert ours.is_contiguous(memory_format=wanted) and ours.dtype == dtype


@pytest.mark.parametrize("case", [c for c in CASES if c.inputs()["x"].numel()], ids=str)
def test_gradcheck_and_gradgradcheck(case):
    for place in PLACES:
        if place.interpreted and case is not CASES[0]:
            continue  # a minute; conv2d's own suite has the others
        inputs = case.inputs(torch.float64, place.device)
        wanted = names(case, inputs)

        def fn(*values, inputs=inputs, wanted=wanted, backend=place.backend):
            return modulated_conv2d(**inputs | dict(zip(wanted, values, strict=True)), backend=backend)

        with threads(1):
            leaves = [inputs[n] for n in wanted]
            assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)
            assert torch.autograd.gradgradcheck(fn, leaves, fast_mode=True, atol=1e-4)


def test_folded_is_what_is_recorded():
    """At a size that takes Winograd's algorithm; the weights' cache notices a change in place."""
    g = generator()
    x, w, s = torch.randn(2, 64, 20, 18, generator=g), torch.randn(48, 64, 3, 3, generator=g), torch.randn(2, 64) + 1
    for place in PLACES:
        x, w, s = (t.to(place.device) for t in (x, w, s))
        for _ in range(2):
            recorded = modulated_conv2d(x, w.requires_grad_(), s, padding=1, backend=place.backend)
            folded = modulated_conv2d(x, w.detach(), s, padding=1, backend=place.backend)
            assert recorded.requires_grad and not folded.requires_grad
            assert frobenius_error(folded, recorded.detach()) <= 1e-5
            w = w.detach()
            w.mul_(torch.rand(48, 64, 1, 1, generator=g).to(place.device))


def test_folded_op_of_the_dispatcher():
    """opcheck, one graph under torch.compile, and the same as eager."""
    for case in (CASES[0], CASES[2]):
        inputs = {
            k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in case.inputs(channels_last=True).items()
        }
        expected = modulated_conv2d(**inputs)
        torch._dynamo.reset()
        compiled = torch.compile(lambda i: modulated_conv2d(**i), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs), expected, rtol=1e-6, atol=1e-6)
        n, c, k = *inputs["x"].shape[:2], len(inputs["w"])
        args = [inputs["x"], inputs["w"], torch.rand(k), torch.rand(n, c), torch.rand(n, k), [1, 1], None]
        torch.library.opcheck(torch.ops.fastgen.modulated_conv2d.default, args)


def test_compiled_training_is_one_graph():
    inputs = CASES[0].inputs()
    wanted = [inputs[n] for n in names(CASES[0], inputs)]
    compiled = torch.compile(lambda i: modulated_conv2d(**i), fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(fn(inputs).square().sum(), wanted) for fn in (
        compiled, lambda i: modulated_conv2d(**i))]  # fmt: skip
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def test_path_length_penalty():
    """StyleGAN2's regularisation: how much the styles move the image, differentiated by the weights."""
    for place in PLACES:
        g = generator()
        x, w, s, v, b, noise = (
            torch.randn(shape, generator=g, dtype=torch.float64).to(place.device)
            for shape in ((3, 4, 6, 6), (5, 4, 3, 3), (3, 4), (2, 5, 1, 1), (5,), (3, 2, 6, 6))
        )
        results = []
        for conv, act in (
            (lambda *a, p=place, **k: modulated_conv2d(*a, **k, backend=p.backend), bias_act),
            (modulated_conv2d_reference, EAGER["bias_act"]),
        ):
            leaves = [t.clone().requires_grad_() for t in (s, w, v, b)]
            s_, w_, v_, b_ = leaves
            image = conv(act(conv(x, w_, s_, padding=1), b_, act="swish"), v_, s_.new_ones(3, 5), demodulate=False)
            (moved,) = torch.autograd.grad((image * noise).sum(), s_, create_graph=True)
            results.append(torch.autograd.grad(moved.square().sum(1).sqrt().square().mean(), leaves))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_one_gain_for_all_and_no_image_at_all():
    for place in PLACES:
        for recorded in (False, True):
            x, w, s = (torch.randn(n, device=place.device) for n in ((2, 3, 5, 5), (4, 3, 3, 3), (2, 3)))
            gain = torch.tensor(1.5, device=place.device, requires_grad=recorded)
            y = modulated_conv2d(x, w, s, input_gain=gain, backend=place.backend)
            plain = modulated_conv2d(x, w, s, backend=place.backend)
            torch.testing.assert_close(y, plain * 1.5, rtol=1e-4, atol=1e-5)
            if recorded:
                (found,) = torch.autograd.grad(y.square().sum(), gain)
                torch.testing.assert_close(found, plain.square().sum() * 3.0, rtol=1e-4, atol=1e-5)
            empty = modulated_conv2d(x[:0], w.requires_grad_(recorded), s[:0], backend=place.backend)
            assert empty.shape == modulated_conv2d_reference(x[:0], w, s[:0]).shape == (0, 4, 3, 3)


def test_thread_count():
    if CPP not in PLACES:
        pytest.skip("no C++ library")
    inputs = testing._modulated_conv2d(2, 24, 40, 33, 35, padding=1).inputs()
    results = []
    for n in (1, 2):
        with threads(n), torch.no_grad(), use_backend("cpp"):
            results.append(modulated_conv2d(**inputs))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(3, 4, 4)}, "^x must"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "^x must"),
        ({"w": torch.zeros(5, 4, 3, 3)}, "^w must"),
        ({"w": torch.zeros(5, 3, 3)}, "^w must"),
        ({"w": torch.zeros(5, 3, 7, 7)}, "^x .* is too small"),
        ({"s": torch.zeros(2, 4)}, "^s must"),
        ({"s": torch.zeros(2, 3, dtype=torch.int64)}, "^s must"),
        ({"s": torch.zeros(2, 3, device="meta")}, "^s is on meta"),
        ({"input_gain": torch.zeros(4)}, "^input_gain must"),
        ({"padding": -1}, "^padding must"),
        ({"backend": "cuda"}, "it is for cuda tensors"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_wrong_arguments(changes, message):
    good = {"x": torch.zeros(2, 3, 4, 4), "w": torch.ones(5, 3, 3, 3), "s": torch.ones(2, 3)}
    modulated_conv2d(**good)
    with pytest.raises((ValueError, RuntimeError), match=message):
        modulated_conv2d(**good | changes)
