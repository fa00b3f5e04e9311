"""fastgen.accelerate on what diffusers does with its models: pipelines, files, gradient checkpoints, autocast."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen import schedulers
from fastgen.acceleration.accelerating import ATTRIBUTE
from fastgen.tolerance import frobenius_error

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:.*fastgen.*:UserWarning"),  # that a call runs as it was written, say
]


def unet(seed: int = 0) -> nn.Module:
    """Images [N, 3, 8, 8], with attention, norms and biases that are not 1 and 0."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def ran(module: nn.Module) -> int:
    """The places of the captures of a module, which ran in its last call."""
    owner = module.__dict__[ATTRIBUTE]
    assert any(run.executed for run in owner.runs.values())
    return sum(len(found.places) for found in owner.found)


# Pipelines


def images(model: nn.Module, scheduler: object) -> np.ndarray:
    pipe = diffusers.DDPMPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(2, torch.Generator().manual_seed(3), num_inference_steps=3, output_type="np").images


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[nn.Module, nn.Module]]:
    """As it was written, and accelerated: captured once for all pipelines."""
    yield unet().eval(), fastgen.accelerate(unet().eval())
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """In the place of that for all tests: captures of ``models`` outlive one."""


@pytest.mark.parametrize("ours", [False, True], ids=["ddpm", "fastgen-ddim"])
def test_a_pipeline_makes_the_same_images(models: tuple[nn.Module, nn.Module], ours: bool) -> None:
    theirs = diffusers.DDPMScheduler(beta_end=0.03)
    scheduler = schedulers.DDIMScheduler.from_config(theirs.config) if ours else theirs
    expected = images(models[0], diffusers.DDIMScheduler.from_config(theirs.config) if ours else theirs)
    made = images(models[1], scheduler)
    assert np.abs(made - expected).max() <= 1e-3 and expected.std() > 0.05 and ran(models[1]) > 10


def test_a_pipeline_is_saved_and_opened(models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    scheduler = schedulers.DDIMScheduler(beta_end=0.03)
    made = images(models[1], scheduler)
    diffusers.DDPMPipeline(models[1], scheduler).save_pretrained(tmp_path)
    opened = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(opened.unet) is diffusers.UNet2DModel and ATTRIBUTE not in opened.unet.__dict__
    assert np.abs(images(opened.unet, schedulers.DDIMScheduler(beta_end=0.03)) - made).max() <= 1e-3


# Files


def test_save_pretrained_and_from_pretrained(models: tuple[nn.Module, nn.Module], x: Tensor, tmp_path: Path) -> None:
    """The accelerated model's folder is that of the model as it was written."""
    plain, ours = models
    with torch.no_grad():
        expected = ours(x, 10).sample
    plain.save_pretrained(tmp_path / "plain"), ours.save_pretrained(tmp_path / "ours")
    files = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("plain", "ours")]
    assert files[0] == files[1]
    first, second = ((tmp_path / d / "config.json").read_text() for d in ("plain", "ours"))
    assert first == second and "fastgen" not in second and json.loads(second)["_class_name"] == "UNet2DModel"
    opened = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    state = ours.state_dict()
    assert list(opened.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in opened.state_dict().items())
    assert ATTRIBUTE not in opened.__dict__ and opened._compiled_call_impl is None
    with torch.no_grad():
        assert frobenius_error(opened(x, 10).sample, expected) <= 1e-5
        assert frobenius_error(fastgen.accelerate(opened)(x, 10).sample, expected) <= 1e-5 and ran(opened) > 10


# The autoencoder


def test_encode_and_decode_go_through_the_children(x: Tensor) -> None:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    plain = shaken(diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **kinds)).eval()
    ours = fastgen.accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        a, b = ours.encode(x).latent_dist, plain.encode(x).latent_dist
        assert type(a) is type(b) and frobenius_error(a.mean, b.mean) <= 1e-5 and frobenius_error(a.std, b.std) <= 1e-5
        assert ran(ours.encoder) > 3 and not ours.__dict__[ATTRIBUTE].runs
        c, d = ours.decode(b.mean), plain.decode(b.mean)
        assert type(c) is type(d) and frobenius_error(c.sample, d.sample) <= 1e-5 and ran(ours.decoder) > 3
        ours.enable_slicing()
        assert frobenius_error(ours.decode(b.mean).sample, d.sample) <= 1e-5


# Training


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model.train()(x, torch.tensor([10, 700])).sample.sub(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def saved(model: nn.Module, x: Tensor) -> int:
    """Values kept for the backward pass, parameters left out."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model.train()(x, torch.tensor([10, 700])).sample
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_gradient_checkpointing(x: Tensor) -> None:
    """Switched on and off between calls."""
    plain, ours = unet(), fastgen.accelerate(unet())
    expected = gradients(plain, x)
    scale = torch.cat([g.flatten() for g in expected]).norm().item()
    plain.enable_gradient_checkpointing()
    kept = {}
    for checkpointing in (True, False):
        getattr(ours, f"{'enable' if checkpointing else 'disable'}_gradient_checkpointing")()
        assert ours.is_gradient_checkpointing == checkpointing
        kept[checkpointing] = saved(ours, x)
        for g, e in zip(gradients(ours, x), expected, strict=True):
            # A bias before a norm has no gradient but rounding.
            assert (g - e).norm() <= 1e-3 * max(e.norm().item(), 1e-4 * scale)
        assert ran(ours) > 10
    assert kept[True] < kept[False] and kept[True] <= saved(plain, x)


def test_autocast_with_a_scaler(x: Tensor) -> None:
    """Three steps of mixed precision: as close to those in fp32 as they were."""

    def steps(model: nn.Module, mixed: bool) -> Tensor:
        optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
        scaler = torch.amp.GradScaler("cpu", enabled=mixed)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                output = model(x, torch.tensor([10, 700])).sample
                loss = (output.float() - x).square().mean()
            assert output.dtype == (torch.bfloat16 if mixed else torch.float32)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert not mixed or scaler.get_scale() == 65536  # no step was left out
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    start = torch.cat([p.detach().flatten() for p in unet().parameters()])
    exact, plain = steps(unet(), False), steps(unet(), True)
    ours = fastgen.accelerate(unet())
    mixed = steps(ours, True)
    assert mixed.isfinite().all() and ran(ours) > 10
    assert (mixed - exact).norm() <= 2 * (plain - exact).norm() <= 0.1 * (exact - start).norm()
