"""The models of other people run as they stand, and the same way each time: what tests of `accelerate` compare with."""

from __future__ import annotations

import math
import random
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from benchmarks.drop_in_models import MODELS, TINY, Foreign, stubs, tensor, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=list(TINY))
def foreign(request: pytest.FixtureRequest) -> Foreign:
    found = TINY[request.param]
    if not found.installed():
        pytest.skip(f"{found.package} is not installed")
    return found


def network(model: nn.Module, foreign: Foreign) -> nn.Module:
    return model["generator"] if foreign.gan else model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_build_and_inputs_repeat(foreign: Foreign) -> None:
    """Whatever was drawn before, and without drawing from the caller's generator."""
    state = torch.get_rng_state()
    first, (args, kwargs) = foreign.build(), foreign.inputs(foreign.build())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(random.randint(1, 100))
    assert same(first.state_dict(), foreign.build().state_dict())
    assert not same(first.state_dict(), foreign.build(seed=1).state_dict())
    args_again, kwargs_again = foreign.inputs(first)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    again = [x for x in (*args_again, *kwargs_again.values()) if isinstance(x, Tensor)]
    assert tensors and all(map(torch.equal, tensors, again))
    assert not torch.equal(args[0], foreign.inputs(first, seed=1)[0][0])
    assert foreign.inputs(first, batch=3)[0][0].shape[0] == 3


def test_inputs_go_where_the_model_is(foreign: Foreign) -> None:
    args, _ = foreign.inputs(foreign.build().double())
    assert args[0].dtype == torch.float64 and all(x.dtype == torch.int64 for x in args[1:])


def test_norms_and_biases_are_those_of_a_trained_model(foreign: Foreign) -> None:
    """At 1 and 0 a fused layer that forgets them would not show."""
    model = foreign.build()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert p.unique().numel() > 1 or p.numel() == 1, name
    for name, b in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert b.unique().numel() > 1 and (b > 0).all() == name.endswith("var"), name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward(foreign: Foreign, training: bool) -> None:
    model = foreign.build().train(training)
    args, kwargs = foreign.inputs(model)
    output = tensor(network(model, foreign)(*args, **kwargs))
    assert output.shape[0] == 2 and output.isfinite().all() and output.std() > 0


def test_training_repeats(foreign: Foreign) -> None:
    """Three steps, bit for bit, that move the weights; other seeds, other losses."""
    model, again = foreign.build(), foreign.build()
    losses = train(model, foreign)
    torch.rand(7)
    assert losses == train(again, foreign) and same(model.state_dict(), again.state_dict())
    assert len(losses) == (6 if foreign.gan else 3) and all(map(math.isfinite, losses))
    assert losses != train(foreign.build(), foreign, seed=1)
    untouched = [n for n, p in foreign.build().named_parameters() if torch.equal(p, model.get_parameter(n))]
    assert not untouched


def test_both_tables_name_the_same() -> None:
    assert list(TINY) == list(MODELS)
    assert all(name == f.name for table in (TINY, MODELS) for name, f in table.items())


def test_full_models_are_the_published_ones() -> None:
    """By their number of parameters: the tutorial's DCGAN, CycleGAN's nine blocks, and DDPM's 35.7 million."""

    def parameters(name: str) -> int:
        return sum(p.numel() for p in MODELS[name].build().parameters())

    assert parameters("dcgan-generator") == 3_576_704
    assert parameters("dcgan-discriminator") == 2_765_568
    assert parameters("cyclegan-instance") == 11_378_179
    if MODELS["unet2d-cifar10"].installed():
        assert parameters("unet2d-cifar10") == 35_746_307


def test_stubs_leave_nothing_behind() -> None:
    here, before = ModuleType("fastgen_test_here"), set(sys.modules)
    sys.modules["fastgen_test_here"] = here
    try:
        with stubs(("fastgen_test_here", "fastgen_test_missing")):
            from fastgen_test_missing import anything

            assert anything is not None and sys.modules["fastgen_test_here"] is not here
        assert sys.modules["fastgen_test_here"] is here
    finally:
        del sys.modules["fastgen_test_here"]
    assert set(sys.modules) == before


def test_no_stub_stays_in_place_of_a_package() -> None:
    if TINY["denoising-diffusion-pytorch"].installed():
        TINY["denoising-diffusion-pytorch"].build()
        assert all(getattr(sys.modules.get(n), "__spec__", True) for n in ("accelerate", "scipy", "torchvision"))
