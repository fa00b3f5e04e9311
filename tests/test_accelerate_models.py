"""fastgen.accelerate on models that other people wrote: the same results, gradients, buffers and training."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from benchmarks.drop_in_models import TINY, Foreign, train
from fastgen.acceleration.accelerating import ATTRIBUTE
from fastgen.acceleration.observing import gradients, tensors
from fastgen.tolerance import frobenius_error

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:.*fastgen.*:UserWarning"),  # that a call runs as it was written, say
]
OUTPUT, GRADIENT, LOSS = 1e-4, 1e-3, 1e-4  # relative, tensors in the Frobenius norm
BOTH = {"conv_transpose2d_norm_act": 2, "conv2d_norm_act": 2, "conv2d": 1, "reparameterize": 1}
# What is replaced in training, and where it is another in evaluation without gradients, that. A place that is lost
# shows here and nowhere else: the model would compute the same, only slower. Strided convolutions count in training.
PLACES: dict[str, tuple[dict[str, int], ...]] = {
    "unet2d-cifar10": (
        {"norm_act_conv2d": 25, "conv2d": 9, "group_norm_act": 6, "attention": 6},
        {"norm_act_conv2d": 25, "conv2d": 8, "group_norm_act": 6, "attention": 6},
    ),
    "unet2d-attention": (
        {"norm_act_conv2d": 17, "conv2d": 7, "group_norm_act": 6, "attention": 7},
        {"norm_act_conv2d": 17, "conv2d": 6, "group_norm_act": 6, "attention": 7},
    ),
    "unet2d-dropout": (
        {"norm_act_conv2d": 10, "conv2d": 15, "group_norm_act": 13, "attention": 4},
        {"norm_act_conv2d": 19, "conv2d": 5, "group_norm_act": 4, "attention": 4},
    ),
    "unet2d-condition": (
        {"norm_act_conv2d": 21, "conv2d": 11, "attention": 8},
        {"norm_act_conv2d": 21, "conv2d": 10, "attention": 8},
    ),
    "autoencoder-kl": (
        {"norm_act_conv2d": 22, "conv2d": 4, "group_norm_act": 2, "attention": 2, "reparameterize": 1},
        {"norm_act_conv2d": 22, "conv2d": 3, "group_norm_act": 2, "attention": 2, "reparameterize": 1},
    ),
    "autoencoder-kl-decode": ({"norm_act_conv2d": 13, "conv2d": 2, "group_norm_act": 1, "attention": 1},),
    "denoising-diffusion-pytorch": ({"conv2d": 33, "attention": 3},),
    "dcgan-generator": ({"conv_transpose2d_norm_act": 4}, {"conv_transpose2d_norm_act": 5}),
    "dcgan-discriminator": ({"conv2d_norm_act": 3},),
    "cyclegan-instance": (
        {"group_norm_act": 9, "conv2d": 5},
        {"group_norm_act": 9, "conv2d": 4, "conv_transpose2d_norm_act": 2},
    ),
    "cyclegan-batch": ({"conv2d_norm_act": 7, "conv_transpose2d_norm_act": 2},),
    "vae": (BOTH,),
}
NETWORKS = [name for name in TINY if not TINY[name].gan]


@dataclass
class Pair:
    """A model as it was written, and the same accelerated: one for all tests of a name, for each capture takes
    seconds."""

    foreign: Foreign
    plain: nn.Module
    ours: nn.Module

    def states(self) -> list[tuple[bool, bool]]:
        """(training, with gradients). All four only where training is another computation than evaluation."""
        both = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) or getattr(m, "p", 0) > 0 for m in self.plain.modules()
        )
        return [(True, True), (False, False), *([(True, False), (False, True)] if both else [])]


def installed(name: str) -> Foreign:
    foreign = TINY[name]
    if not foreign.installed():
        pytest.skip(f"{foreign.package} is not installed")
    return foreign


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    foreign = installed(request.param)
    yield Pair(foreign, foreign.build(), fastgen.accelerate(foreign.build()))
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """In the place of that for all tests: here captures outlive one, until `pair` is done with its model."""


class Float32Randomness(TorchDispatchMode):
    """An fp64 model draws the random numbers of the fp32 one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "randn" in func.name() and kwargs.get("dtype") != torch.float32:
            like = [a.float() if isinstance(a, Tensor) else a for a in args]
            return func(*like, **kwargs | {"dtype": torch.float32}).double()
        if func.name() == "aten::bernoulli_.float":
            x, *rest = args
            return x.copy_(func(x.to(torch.float32), *rest, **kwargs))
        return func(*args, **kwargs)


def in_fp64(model: nn.Module) -> nn.Module:
    """A copy. Embeddings of the time, which some models compute in fp32 whatever they are, are cast."""
    exact = copy.deepcopy(model).double()
    for m in exact.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype), *args[1:]))
    return exact


@dataclass
class Outcome:
    """What one call returned, the gradients by name (None: none), and the buffers after it."""

    output: Any
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def outcome(model: nn.Module, foreign: Foreign, grad: bool) -> Outcome:
    """Of a call with images and texts that want gradients, too; buffers are put back."""
    before = {n: b.clone() for n, b in model.named_buffers()}
    args, kwargs = foreign.inputs(model)
    wanted: dict[str, Tensor] = dict(model.named_parameters())
    for key, x in [*enumerate(args), *kwargs.items()]:
        if isinstance(x, Tensor) and x.is_floating_point():
            wanted[f"input {key}"] = x.requires_grad_(grad)
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        output = model(*args, **kwargs)
    found = gradients(output, list(wanted.values())) if grad else []
    after = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        for n, b in model.named_buffers():
            b.copy_(before[n])
    return Outcome(output, dict(zip(wanted, found, strict=True)) if grad else {}, after)


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).norm().item()


def gradient_shares(ours: Outcome, plain: Outcome, exact: Outcome) -> dict[str, float]:
    """The error of each gradient against fp64, as a share of what is allowed: 1e-3 of it, or where it is zero but for
    rounding, as that of a bias before a norm, four times the model's own error."""
    assert [n for n, g in ours.grads.items() if g is None] == [n for n, g in plain.grads.items() if g is None]
    shares = {}
    for name, g in ours.grads.items():
        if g is None:
            continue
        right = exact.grads[name]
        allowed = max(GRADIENT * right.norm().item(), 4 * distance(plain.grads[name], right))
        shares[name] = distance(g, right) / allowed
        assert g.shape == right.shape and g.dtype == plain.grads[name].dtype, name
    return shares


def signature(output: Any) -> Any:
    """Types all the way down, shapes, dtypes and strides."""
    if isinstance(output, Tensor):
        return output.shape, output.dtype, output.stride()
    leaves = output.items() if hasattr(output, "items") else enumerate(output) if isinstance(output, tuple) else ()
    return type(output), [(k, signature(v)) for k, v in leaves]


def check_same(ours: Outcome, plain: Outcome) -> None:
    assert signature(ours.output) == signature(plain.output)
    for a, b in zip(tensors(ours.output), tensors(plain.output), strict=True):
        assert frobenius_error(a, b) <= OUTPUT
    assert list(ours.buffers) == list(plain.buffers)
    for name, b in plain.buffers.items():
        a = ours.buffers[name]
        assert a.dtype == b.dtype and frobenius_error(a.double(), b.double()) <= 1e-5, name


def test_calls(pair: Pair) -> None:
    """Outputs, buffers, and every gradient of a parameter or an input, in training and evaluation."""
    exact = in_fp64(pair.plain)
    for training, grad in pair.states():
        for model in (pair.ours, pair.plain, exact):
            model.train(training)
        ours, plain = outcome(pair.ours, pair.foreign, grad), outcome(pair.plain, pair.foreign, grad)
        check_same(ours, plain)
        with Float32Randomness():
            right = outcome(exact, pair.foreign, grad)
        assert all(
            frobenius_error(a, b) <= OUTPUT for a, b in zip(tensors(plain.output), tensors(right.output), strict=True)
        ), "the reference in fp64 is of another computation"
        shares = gradient_shares(ours, plain, right)
        assert bool(shares) == grad and not {n: s for n, s in shares.items() if s > 1}


def replaced(model: nn.Module, training: bool, grad: bool) -> Counter[str]:
    """Of the captures that a model has, that of one state: how often each operation stands in it."""
    owner = model.__dict__[ATTRIBUTE]
    order = [(state[0], state[1]) for state in owner.runs]
    assert all(run.captures == 1 for run in owner.runs.values())
    return Counter(p.op for p in owner.found[order.index((training, grad))].places)


def test_what_is_replaced(pair: Pair) -> None:
    expected = PLACES[pair.foreign.name]
    for training, grad in ((True, True), (False, False)):
        if (training, grad) not in [state[:2] for state in pair.ours.__dict__[ATTRIBUTE].runs]:
            pair.ours.train(training)
            outcome(pair.ours, pair.foreign, grad)
        assert replaced(pair.ours, training, grad) == expected[0 if training else -1]


def perturbed(model: nn.Module) -> nn.Module:
    """The same with other rounding: every weight changed by about 1e-6 of it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator))
    return model


def check_training(foreign: Foreign, accelerated: nn.Module, *networks: nn.Module) -> None:
    """Twenty steps give the losses that they gave: within 1e-4, or where training is chaotic, within four times the
    way that rounding alone takes it off by then. The last call of each of ``networks`` ran what was captured."""
    plain = foreign.build()
    expected, losses = train(plain, foreign, 20, batch=2), train(accelerated, foreign, 20, batch=2)
    errors = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    if max(errors) > LOSS:
        drifted, drift = train(perturbed(foreign.build()), foreign, 20, batch=2), 0.0
        for i, (error, b, c) in enumerate(zip(errors, expected, drifted, strict=True)):
            drift = max(drift, abs(c - b) / abs(b))
            assert error <= max(LOSS, min(4 * drift, 0.05)), (i, error, drift)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
    state, theirs = accelerated.state_dict(), plain.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in state.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]
    for network in networks:
        assert any(run.executed for s, run in network.__dict__[ATTRIBUTE].runs.items() if s[:2] == (True, True))


def wanting(foreign: Foreign) -> Foreign:
    """The same, whose inputs want gradients: calls that `test_calls` captured, where that takes long."""

    def draw(batch: int, size: tuple[int, int]) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = foreign.draw(batch, size)
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_()
        return args, kwargs

    return replace(foreign, draw=draw) if foreign.package else foreign


def test_training(pair: Pair) -> None:
    pair.ours.load_state_dict(pair.foreign.build().state_dict())
    for run in pair.ours.__dict__[ATTRIBUTE].runs.values():
        run.executed = 0
    check_training(wanting(pair.foreign), pair.ours, pair.ours)


def test_training_of_two_networks() -> None:
    foreign = installed("dcgan")
    model = fastgen.accelerate(foreign.build())
    check_training(foreign, model, *model.values())
    torch._dynamo.reset()
