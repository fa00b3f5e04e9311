"""The autoencoder of latent diffusion: equal to that of diffusers, whose directories it reads and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_diffusers_format import WEIGHTS, edit, old_keys, refused, relative
from torch import Tensor, nn

import fastgen
from fastgen.checkpoint import fingerprint
from fastgen.diffusers_format import AUTOENCODER
from fastgen.models.autoencoder_kl import PRESETS, AutoencoderKL, AutoencoderKLConfig
from fastgen.nn import DiagonalGaussian

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32), "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "small": {},
    "two-blocks": {"layers_per_block": 2, "latent_channels": 3, "scaling_factor": 0.13025, "sample_size": [64, 64]},
    # As of Stable Diffusion 3 and FLUX.
    "no-1x1": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "shift_factor": 0.0609},
    "no-attention": {"mid_block_add_attention": False, "act_fn": "swish"},
    "one-level": {
        "block_out_channels": (16,), "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",), "in_channels": 1, "out_channels": 2,
    },
    "four-levels": {
        "block_out_channels": (8, 16, 16, 24), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 4, "latents_mean": [0.1, 0.2, 0.3, 0.4],
        "latents_std": [1.0, 2.0, 3.0, 4.0], "force_upcast": False,
    },
}  # fmt: skip


def autoencoder(**config: Any) -> nn.Module:
    """diffusers' own, with norms and biases that do something."""
    torch.manual_seed(3)
    theirs = diffusers.AutoencoderKL(**{**SMALL, **config}).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.1)
    return theirs


@pytest.fixture
def small(tmp_path: Path) -> Path:
    autoencoder().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def images(model: nn.Module, height: int = 16, width: int = 24) -> Tensor:
    torch.manual_seed(4)
    return torch.rand(2, model.config.in_channels, height, width) * 2 - 1


def results(model: nn.Module, x: Tensor, noise: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a step of training computes: latents, their KL divergence and the image of a drawn one; and gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    found = model.encode(x)
    found = found if isinstance(found, DiagonalGaussian) else found.latent_dist
    z = found.mean + found.std * noise
    y = model.decode(z)
    y = y if isinstance(y, Tensor) else y.sample
    (y.square().mean() + 1e-3 * found.kl().mean()).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return [found.mean, found.logvar, found.std, found.mode(), found.kl(), y], {"x": x.grad, **grads}


@pytest.mark.parametrize("name", CONFIGS)
def test_is_that_of_diffusers(name: str, tmp_path: Path) -> None:
    """Latents, images and gradients; written back, diffusers reads the same network, and so do we."""
    theirs = autoencoder(**CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastgen.load(tmp_path / "theirs")
    assert isinstance(ours, AutoencoderKL) and not ours.training
    x, Z, f = images(theirs), theirs.config.latent_channels, ours.config.factor
    noise = torch.randn(2, Z, 16 // f, 24 // f)
    (values, grads), (expected, expected_grads) = results(ours, x, noise), results(theirs, x, noise)
    assert [list(v.shape) for v in values] == [list(v.shape) for v in expected]
    assert max(map(relative, values, expected)) < 1e-4
    assert grads.keys() == expected_grads.keys()
    for key, value in expected_grads.items():
        if not key.endswith("to_k.bias"):  # the same added to every score changes no softmax: rounding error
            assert relative(grads[key], value) < 1e-3, key
    fastgen.save(ours, tmp_path / "ours", format="diffusers")
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours").eval()
    sent, there = theirs.state_dict(), back.state_dict()
    assert sent.keys() == there.keys() and all(torch.equal(there[k], v) for k, v in sent.items())
    differing = {k for k in AUTOENCODER if _plain(back.config[k]) != _plain(theirs.config[k])}
    assert differing <= {"force_upcast", "act_fn", "sample_size"}
    with torch.no_grad():
        assert torch.equal(back(x).sample, theirs(x).sample) and relative(ours(x), theirs(x).sample) < 1e-4
    again = fastgen.load(tmp_path / "ours")
    assert again.config == ours.config and fingerprint(again) == fingerprint(ours)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("size", [(17, 16), (19, 31), (2, 2)])
def test_sizes_that_the_factor_does_not_divide(small: Path, size: tuple[int, int]) -> None:
    ours, theirs = fastgen.load(small), autoencoder()
    x = images(theirs, *size)
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.mean
        assert ours.encode(x).mean.shape == expected.shape == (2, 4, size[0] // 2, size[1] // 2)
        assert relative(ours.encode(x).mean, expected) < 1e-4
        assert relative(ours(x), theirs(x).sample) < 1e-4


def test_reads_old_keys(small: Path) -> None:
    old_keys(small / WEIGHTS)
    theirs, ours = diffusers.AutoencoderKL.from_pretrained(small), fastgen.load(small)
    sent, there = theirs.state_dict(), ours.state_dict()
    assert sent.keys() == there.keys() and all(torch.equal(there[k], v) for k, v in sent.items())


def test_reads_shards(small: Path) -> None:
    (small / WEIGHTS).unlink()
    theirs = autoencoder()
    theirs.save_pretrained(small, max_shard_size="100KB")
    assert len(list(small.glob("*-of-*.safetensors"))) > 2
    sent, there = theirs.state_dict(), fastgen.load(small).state_dict()
    assert sent.keys() == there.keys() and all(torch.equal(there[k], v) for k, v in sent.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types=['AttnDownEncoderBlock2D', "),
        (
            {"up_block_types": ["UpDecoderBlock2D"]},
            "up_block_types=['UpDecoderBlock2D'] (one of UpDecoderBlock2D for each",
        ),
        ({"sample_size": [32, 64]}, "sample_size=[32, 64], which is not square"),
        ({"temporal": True}, "temporal=True"),
        (
            {"_class_name": "AutoencoderTiny"},
            "a diffusers AutoencoderTiny; fastgen reads UNet2DModel and AutoencoderKL",
        ),
    ],
)
def test_refuses_what_it_has_not(small: Path, change: dict[str, Any], words: str) -> None:
    edit(small / "config.json", **change)
    assert refused(small, words).endswith("; use diffusers' own model with fastgen.accelerate(model)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_out_channels": None}, "config.json"),
        ({"latents_mean": [1.0]}, "latents_mean needs one entry per latent channel, 4, not 1"),
        ({"norm_num_groups": 5}, "channels [16, 32] are not divisible by num_groups=5"),
        ({"latent_channels": 3}, "do not fit their configuration"),
        ({"layers_per_block": "two"}, "config.json"),
    ],
)
def test_refuses_a_damaged_configuration(small: Path, change: dict[str, Any], words: str) -> None:
    edit(small / "config.json", **change)
    refused(small, words)


# By itself


def test_the_latents(tmp_path: Path) -> None:
    """Drawn from seeds, each from its own, from a generator as in diffusers, or from given noise."""
    theirs = autoencoder()
    theirs.save_pretrained(tmp_path)
    ours, x = fastgen.load(tmp_path), images(theirs)
    with torch.no_grad():
        found, expected = ours.encode(x), theirs.encode(x).latent_dist
        drawn = found.sample(generator=torch.Generator().manual_seed(7))
        assert relative(drawn, expected.sample(generator=torch.Generator().manual_seed(7))) < 1e-4
        torch.manual_seed(8)
        drawn = found.sample()
        torch.manual_seed(8)
        assert relative(drawn, expected.sample()) < 1e-4
        seeds = torch.tensor([5, 2**40])
        drawn = found.sample(seeds=seeds)
        alone = ours.encode(x[1:]).sample(seeds=seeds[1:])
        assert relative(alone, drawn[1:]) < 1e-5 and relative(drawn, found.mode()) > 1e-2
        noise = torch.randn_like(found.mean)
        assert relative(found.sample(noise=noise), found.mean + found.std * noise) < 1e-6
        assert torch.equal(ours(x, sample=True, seeds=seeds), ours.decode(drawn))
        assert torch.equal(ours(x), ours.decode(found.mode())) and not torch.equal(ours(x, sample=True), ours(x))
    with pytest.raises(ValueError, match="give one of noise, seeds and generator"):
        found.sample(noise=noise, seeds=seeds)


def test_the_gaussian_is_clamped_as_in_diffusers() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    parameters = torch.tensor([0.5, -2.0, 0.0, -100.0, 100.0, 1.0]).reshape(1, 6, 1, 1).expand(2, 6, 1, 1).contiguous()
    found, expected = DiagonalGaussian(parameters), DiagonalGaussianDistribution(parameters)
    for name in ("mean", "logvar", "std"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.logvar.min() == -30 and found.logvar.max() == 20 and found.kl().shape == (2,)
    torch.testing.assert_close(found.kl(), expected.kl())


def test_a_checkpoint_of_our_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(replace(PRESETS["tiny"], latents_mean=(0.0,) * 4)).eval()
    fastgen.save(model, tmp_path / "m", preset="mine")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["family"], config["preset"]) == ("autoencoder_kl", "mine") and "diffusion" not in config
    again = fastgen.load(tmp_path / "m")
    assert isinstance(again, AutoencoderKL) and again.config == model.config and hash(again.config)
    assert fingerprint(again) == fingerprint(model)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert relative(again(x), model(x)) < 1e-5


def test_it_draws_no_images() -> None:
    model = AutoencoderKL(PRESETS["tiny"])
    with pytest.raises(fastgen.UsageError, match=r"^model: .*this AutoencoderKL has no diffusion, sampling"):
        fastgen.sample(model)


def test_the_network_of_stable_diffusion() -> None:
    """The parameters of the VAE of Stable Diffusion 1, by name and shape."""
    with torch.device("meta"):
        ours = AutoencoderKL(PRESETS["sd"])
        theirs = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    shapes = [{k: tuple(v.shape) for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1] and sum(p.numel() for p in ours.parameters()) == 83_653_863
    assert ours.config.factor == 8 and ours.config.scaling_factor == 0.18215


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_lie_in_memory_as_the_images_do(memory_format: torch.memory_format) -> None:
    model = AutoencoderKL(PRESETS["tiny"]).eval()
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert model(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (1, 3, 8, 1), (1, 3, 8)])
def test_wrong_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^x must be \[N, 3, H, W\] with H and W of at least 2, not "):
        AutoencoderKL(PRESETS["tiny"]).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (4, 8, 8)])
def test_wrong_latents(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^z must be \[N, 4, h, w\], not "):
        AutoencoderKL(PRESETS["tiny"]).decode(torch.zeros(shape))


def test_config_is_frozen_and_checked() -> None:
    config = AutoencoderKLConfig(channels=[32, 64], latents_std=[1.0] * 4)
    assert config.channels == (32, 64) and config.latents_std == (1.0,) * 4 and hash(config)
    with pytest.raises(ValueError, match=r"channels \[12\] are not divisible by num_groups=8"):
        AutoencoderKLConfig(channels=(8, 12), num_groups=8)
