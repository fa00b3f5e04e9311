"""conv2d_norm_act and conv_transpose2d_norm_act: values and gradients in training and evaluation, the folded ops."""

import copy

import pytest
import torch
from suite import Place, flat, gradients, names, outer_for, places
from torch import nn

from fastgen import ops, testing
from fastgen.ops import conv2d_norm_act, conv_transpose2d_norm_act
from fastgen.testing import EAGER, OpCase
from fastgen.tolerance import frobenius_error

OPS = ("conv2d_norm_act", "conv_transpose2d_norm_act")
CASES = [case for op in OPS for case in testing.cases(op)]
PLACES = places("conv2d_norm_act")
CPP = Place("cpp", "cpu")
STATISTICS = ("running_mean", "running_var")


def both(case: OpCase, place: Place, dtype: torch.dtype, channels_last: bool, recorded: bool) -> list[tuple]:
    """(name, ours, the fp64 reference, eager PyTorch) of output, running statistics and gradients."""
    results = []
    for fn, kind in (
        (lambda **i: getattr(ops, case.op)(**i, backend=place.backend), dtype),
        (getattr(ops, f"{case.op}_reference"), torch.float64),
        (EAGER[case.op], dtype),
    ):
        inputs = case.inputs(dtype, place.device, channels_last)
        inputs = {
            k: v.detach().to(kind).requires_grad_(v.requires_grad and recorded) if isinstance(v, torch.Tensor) else v
            for k, v in inputs.items()
        }
        outputs = flat(fn(**inputs))
        found = {"output": outputs[0].detach()} | {n: inputs[n] for n in STATISTICS}
        if recorded:
            assert names(case, inputs)
            found |= gradients(case, inputs, outputs, outer_for(outputs))
        results.append(found)
    return [(name, *(r[name] for r in results)) for name in results[0]]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "folded"])
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c}")
def test_parity(case, place, recorded):
    # Recorded in half precision the sums are rounded before the norm, and relu's kink makes a gradient of a rounding.
    half = [] if recorded else [(torch.bfloat16, 2e-3)]
    dtypes = ((torch.float32, 1e-5), *half, (torch.float64, 1e-12))
    for dtype, floor in dtypes[:1] if place.interpreted else dtypes:
        for channels_last in (recorded,) if place.interpreted else (False, True):
            for name, ours, reference, eager in both(case, place, dtype, channels_last, recorded):
                if name == "bias" and case.inputs().get("training"):
                    # The batch's mean takes the bias away again: its gradient is 0, and all there is, is rounding.
                    assert ours.abs().max() <= 1e-4
                    continue
                allowed = max(floor, 2 * frobenius_error(eager, reference))
                assert allowed < 0.1 and frobenius_error(ours, reference) <= allowed, (name, dtype, channels_last)
                if name == "output" and case.inputs()["x"].shape[2] > 1:  # one pixel is in both layouts
                    wanted = torch.channels_last if channels_last else torch.contiguous_format
                    assert ours.is_contiguous(memory_format=wanted) and ours.dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_modules_of_pytorch(training):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 9, 9)
    for conv, fn in (
        (nn.Conv2d(6, 8, 3, padding=1), conv2d_norm_act),
        (nn.Conv2d(6, 8, 4, 2, 1, bias=False), conv2d_norm_act),
        (nn.ConvTranspose2d(6, 8, 4, 2, 1, bias=False), conv_transpose2d_norm_act),
    ):
        norm = nn.BatchNorm2d(8)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias), nn.init.normal_(norm.running_mean)
        other = copy.deepcopy(norm)
        norm.train(training), other.train(training)
        for _ in range(3):
            y = fn(
                x, conv.weight, conv.bias, conv.stride, conv.padding, running_mean=other.running_mean,
                running_var=other.running_var, norm_weight=other.weight, norm_bias=other.bias, training=training,
            )  # fmt: skip
            torch.testing.assert_close(y, norm(conv(x)).relu(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.running_var, norm.running_var)
        torch.testing.assert_close(other.running_mean, norm.running_mean)


@pytest.mark.parametrize("case", [c for c in CASES if not c.inputs().get("training")], ids=lambda c: f"{c.op}-{c}")
def test_folded_op_of_the_dispatcher(case):
    """opcheck, one graph under torch.compile, and the same as eager."""
    inputs = case.inputs(channels_last=True)
    fn = getattr(ops, case.op)
    with torch.no_grad():
        expected = fn(**inputs)
        torch._dynamo.reset()
        compiled = torch.compile(lambda i: fn(**i), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(inputs), expected)
        k = expected.shape[1]
        geometry = [[inputs.get(n, d)] * 2 for n, d in (("stride", 1), ("padding", 0), ("output_padding", 0))]
        geometry = geometry if "transpose" in case.op else [geometry[0], geometry[1] * 2]
        residual = inputs.get("residual")
        args = [inputs["x"], inputs["weight"], torch.rand(k), torch.rand(k), *geometry, residual, "relu", None]
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(getattr(torch.ops.fastgen, case.op).default, args)


def test_second_derivatives():
    """A gradient penalty, as WGAN-GP has it, through both ops in evaluation and training."""
    for op in OPS:
        for case in (testing.cases(op)[0], next(c for c in testing.cases(op) if c.inputs().get("training"))):
            for place in PLACES:
                if place.interpreted and case is not CASES[0]:
                    continue
                inputs = case.inputs(torch.float64, place.device)
                fn, wanted = getattr(ops, op), ["x", "weight", "norm_weight"]

                def call(*values, fn=fn, inputs=inputs, wanted=wanted, place=place):
                    fresh = {n: inputs[n].clone() for n in STATISTICS}  # training moves them
                    given = inputs | dict(zip(wanted, values, strict=True)) | fresh | {"act": "silu"}
                    return fn(**given, backend=place.backend)

                assert torch.autograd.gradgradcheck(call, [inputs[n] for n in wanted], fast_mode=True)


def test_nan_and_infinity_spread_as_in_eager():
    x = torch.randn(2, 8, 12, 12)
    x[0, 3, 4, 5], x[1, 0, 0, 0] = float("nan"), float("inf")
    weight, statistics = torch.randn(8, 8, 4, 4), {"running_mean": torch.zeros(8), "running_var": torch.ones(8)}
    ours = conv_transpose2d_norm_act(x, weight, None, 2, 1, act="none", **statistics)
    eager = EAGER["conv_transpose2d_norm_act"](x, weight, None, 2, 1, act="none", **statistics)
    assert torch.equal(ours.isnan(), eager.isnan()) and torch.equal(ours.isposinf(), eager.isposinf())
    kernel = weight[..., :3, :3].contiguous()
    ours = conv2d_norm_act(x, kernel, None, 1, 1, act="none", **statistics)
    eager = EAGER["conv2d_norm_act"](x, kernel, None, 1, 1, act="none", **statistics)
    assert torch.equal(ours.isnan(), eager.isnan()) and torch.equal(ours.isposinf(), eager.isposinf())


@pytest.mark.parametrize("fn", [conv2d_norm_act, conv_transpose2d_norm_act])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(4)}, "^x must"),
        ({"weight": torch.zeros(5, 5, 3, 3)}, "^weight must"),
        ({"bias": torch.zeros(3)}, "^bias must"),
        ({"running_mean": torch.zeros(5)}, "^running_mean must"),
        ({"running_var": None}, "^running_var must be given"),
        ({"norm_weight": torch.zeros(2, 4)}, "^norm_weight must"),
        ({"norm_bias": torch.zeros(4, dtype=torch.int64)}, "^norm_bias must"),
        ({"residual": torch.zeros(2, 4, 1, 1)}, "^residual must"),
        ({"norm_bias": torch.zeros(4, device="meta")}, "norm_bias is on meta"),
        ({"stride": 0}, "^stride must"),
        ({"padding": -1}, "padding 0 or more"),
        ({"act": "swish"}, "act must"),
    ],
)
def test_wrong_arguments(fn, changes, message):
    good = {"x": torch.zeros(2, 4, 5, 5), "weight": torch.zeros(4, 4, 3, 3)}
    good |= {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    fn(**good)
    with pytest.raises(ValueError, match=message):
        fn(**good | changes)


def test_output_padding_must_be_less_than_stride():
    with pytest.raises(ValueError, match=r"^output_padding must"):
        conv_transpose2d_norm_act(
            torch.zeros(1, 2, 3, 3), torch.zeros(2, 2, 3, 3), None, 2, 1, 2, running_mean=torch.zeros(2),
            running_var=torch.ones(2),
        )  # fmt: skip
