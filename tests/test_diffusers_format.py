"""Directories of diffusers and names on the hub: what is read, and what is written, equals diffusers' own networks."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastgen
from fastgen import model_files
from fastgen.checkpoint import fingerprint
from fastgen.diffusers_format import AUTOENCODER, UNET
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models.autoencoder_kl import AutoencoderKLConfig
from fastgen.models.classifier import PRESETS as CLASSIFIERS
from fastgen.models.classifier import Classifier
from fastgen.models.unet import PRESETS, UNet

diffusers = pytest.importorskip("diffusers")
huggingface_hub = pytest.importorskip("huggingface_hub")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

WEIGHTS = "diffusion_pytorch_model.safetensors"
# google/ddpm-cifar10-32, as it is on the hub.
GOOGLE: dict[str, Any] = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "center_input_sample": False,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "norm_num_groups": 32,
    "attention_head_dim": None, "act_fn": "silu", "mid_block_scale_factor": 1, "time_embedding_type": "positional",
}  # fmt: skip
# Small, with what diffusers does where it is not told: heads of 8, attention in the middle, padding 1, …
SMALL: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
NO_ATTENTION = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "small": {},
    "google": {**GOOGLE, "block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8, "layers_per_block": 1},
    "one-head": {"attention_head_dim": None},
    "heads-of-4": {"attention_head_dim": 4},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},  # which has no norm before the attention in the middle
    "scale-shift-norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "groups": {"attn_norm_num_groups": 16, "norm_num_groups": 4, "norm_eps": 1e-3},
    "no-attention": {**NO_ATTENTION, "add_attention": False},
    "attention-in-the-middle": NO_ATTENTION,
    "attention-down-only": {**NO_ATTENTION, "down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
    "attention-up-only": {**NO_ATTENTION, "up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
    "old-names-of-blocks": {"down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D")},
    "embedding": {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
    "centred": {"center_input_sample": True, "act_fn": "Swish"},
    "classes": {"num_class_embeds": 5},
    "channels": {"in_channels": 4, "out_channels": 2, "dropout": 0.3},
    "three-levels": {
        "block_out_channels": (8, 24, 16), "layers_per_block": 2, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "one-level": {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
}  # fmt: skip


def unet(**config: Any) -> nn.Module:
    """diffusers' own, with norms and biases that do something."""
    torch.manual_seed(3)
    theirs = diffusers.UNet2DModel(**{**SMALL, **config}).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.1)
    return theirs


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The directory of a small network of diffusers."""
    unet().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def inputs(config: Any) -> tuple[Tensor, ...]:
    """x [2, C, H, W], t [2], and labels [2] where there are classes; the size is what the network was made for."""
    torch.manual_seed(4)
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
    labels = [torch.tensor([1, config.num_class_embeds - 1])] if config.num_class_embeds else []
    return x, torch.tensor([3, 981]), *labels


def assert_equal(ours: nn.Module, theirs: nn.Module, gradients: bool = False) -> None:
    """Outputs within 1e-4, and the gradients of the input and of every parameter within 1e-3."""
    x, *rest = inputs(theirs.config)
    found = []
    for model in (ours, theirs):
        model.zero_grad()
        given = x.clone().requires_grad_()
        y = model(given, *rest)
        y = y if isinstance(y, Tensor) else y.sample
        y.square().mean().backward()
        found.append((y.detach(), given.grad, {k: p.grad for k, p in model.named_parameters()}))
    (y, dx, grads), (expected, expected_dx, expected_grads) = found
    assert y.shape == expected.shape and relative(y, expected) < 1e-4
    assert grads.keys() == expected_grads.keys()
    if gradients:
        assert relative(dx, expected_dx) < 1e-3
        for name, expected in expected_grads.items():
            if not name.endswith("to_k.bias"):  # the same added to every score changes no softmax: rounding error
                assert relative(grads[name], expected) < 1e-3, name


def refused(place: Path | str, words: str) -> str:
    with pytest.raises(fastgen.UsageError) as caught:
        fastgen.load(place)
    message = str(caught.value)
    assert message.startswith("model: ") and words in message and "\n" not in message, message
    return message


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Reading


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_and_writes(name: str, tmp_path: Path) -> None:
    """Outputs and gradients are those of diffusers; written back, diffusers reads the same network, and so do we."""
    theirs = unet(**CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastgen.load(tmp_path / "theirs")
    assert isinstance(ours, UNet) and not ours.training and ours.config.dropout == theirs.config.dropout
    assert_equal(ours, theirs, gradients=True)
    fastgen.save(ours, tmp_path / "ours", format="diffusers")
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", subfolder="unet")
    sent, there = theirs.state_dict(), back.state_dict()
    assert sent.keys() == there.keys() and all(torch.equal(there[k], v) for k, v in sent.items())
    differing = {k for k in UNET if _plain(back.config[k]) != _plain(theirs.config[k])}
    assert differing <= {"attn_norm_num_groups", "act_fn", "down_block_types"}, "words for the same"
    with torch.no_grad():
        x = inputs(theirs.config)
        assert torch.equal(back.eval()(*x).sample, theirs(*x).sample)
    again = fastgen.load(tmp_path / "ours")
    assert again.config == ours.config and fingerprint(again) == fingerprint(ours)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_cifar10_is_that_of_google(tmp_path: Path) -> None:
    theirs = diffusers.UNet2DModel(**GOOGLE).eval()
    theirs.save_pretrained(tmp_path)
    ours = fastgen.load(tmp_path)
    assert ours.config == PRESETS["cifar10"]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 35_746_307
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([981])
    with torch.no_grad():
        assert relative(ours(x, t), theirs(x, t).sample) < 1e-4


def test_dropout_is_there_in_training(tmp_path: Path) -> None:
    unet(dropout=0.5).save_pretrained(tmp_path)
    ours = fastgen.load(tmp_path).train()
    x, t = inputs(SimpleNamespace(in_channels=3, sample_size=8, num_class_embeds=None))
    with torch.no_grad():
        assert not torch.equal(ours(x, t), ours(x, t)) and torch.equal(ours.eval()(x, t), ours(x, t))


def test_settings_left_out_are_those_of_diffusers(small: Path) -> None:
    """Old configurations lack what came later."""
    file = small / "config.json"
    config = json.loads(file.read_text())
    given = {k: v for k, v in config.items() if k in SMALL or k == "_class_name"}
    file.write_text(json.dumps(given))
    assert_equal(fastgen.load(small), unet())
    file.write_text(json.dumps({k: v for k, v in given.items() if k != "block_out_channels"}))
    refused(small, "block_out_channels=[224, 448, 672, 896]")


def defaults(kind: type) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}


def test_defaults_are_those_of_diffusers() -> None:
    for settings, kind in ((UNET, diffusers.UNet2DModel), (AUTOENCODER, diffusers.AutoencoderKL)):
        theirs = defaults(kind)
        assert settings == {name: theirs[name] for name in settings}
    theirs, config = defaults(diffusers.AutoencoderKL), AutoencoderKLConfig()
    shared = [name for name in AUTOENCODER if hasattr(config, name)]
    assert len(shared) == 8 and all(getattr(config, name) == theirs[name] for name in shared)


def test_settings_of_an_average_are_passed_over(small: Path) -> None:
    """EMAModel writes its own beside those of the network."""
    edit(small / "config.json", decay=0.9999, inv_gamma=1.0, optimization_step=10, power=0.75, use_ema_warmup=True)
    fastgen.load(small)


@pytest.mark.parametrize(("size", "expected"), [(16, 16), ([16, 16], 16), (None, 32)])
def test_sample_size(small: Path, size: Any, expected: int) -> None:
    edit(small / "config.json", sample_size=size)
    assert fastgen.load(small).config.image_size == expected


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_keys(file: Path) -> None:
    """The names of attention before diffusers 0.15, which Google's networks and the first autoencoders have."""
    weights = load_file(file)
    for new, old in OLD.items():
        weights = {k.replace(f".{new}.", f".{old}."): v for k, v in weights.items()}
    assert sum(".query." in k for k in weights) == sum(".proj_attn." in k for k in weights) >= 2
    save_file(weights, file)


def test_reads_old_keys(small: Path) -> None:
    old_keys(small / WEIGHTS)
    theirs = diffusers.UNet2DModel.from_pretrained(small).eval()
    ours = fastgen.load(small)
    sent, there = theirs.state_dict(), ours.state_dict()
    assert sent.keys() == there.keys() and all(torch.equal(there[k], v) for k, v in sent.items())


def test_reads_shards(small: Path) -> None:
    theirs = unet()
    (small / WEIGHTS).unlink()
    theirs.save_pretrained(small, max_shard_size="30KB")
    shards = sorted(small.glob("*-of-*.safetensors"))
    assert len(shards) > 2 and not (small / WEIGHTS).exists()
    assert_equal(fastgen.load(small), theirs)
    shards[1].unlink()
    refused(small, f"{shards[1]} is missing")


@pytest.mark.parametrize("listed", [{}, None, [1], {"a": "../secret.safetensors"}, {"a": "weights.bin"}])
def test_an_index_lists_files_beside_it(small: Path, listed: Any) -> None:
    (small / WEIGHTS).unlink()
    (small / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": listed}))
    refused(small, "does not list the safetensors files beside it")


@pytest.mark.parametrize("shards", [False, True])
def test_reads_a_variant(small: Path, shards: bool) -> None:
    """Half precision, where there is nothing else: the numbers are kept, the network is fp32."""
    theirs = unet().half()
    (small / WEIGHTS).unlink()
    theirs.save_pretrained(small, variant="fp16", max_shard_size="30KB" if shards else "1GB")
    assert bool(list(small.glob("*.index.fp16.json"))) == shards
    ours = fastgen.load(small)
    sent = theirs.state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(v, sent[k].float()) for k, v in ours.state_dict().items())
    if not shards:
        (small / WEIGHTS.replace(".safe", ".bf16.safe")).write_bytes(b"")
        refused(small, "holds several variants, diffusion_pytorch_model.bf16.safetensors, diffusion_pytorch_model.fp16")
        unet().save_pretrained(small)
        assert_equal(fastgen.load(small), unet())  # the one without a variant comes first


# Pipelines


SCHEDULERS = [
    ({}, DiffusionConfig()),
    (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
         "prediction_type": "v_prediction", "clip_sample": False},
        DiffusionConfig("scaled_linear", 1000, 0.00085, 0.012, "v", None),
    ),
    (
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400,
         "prediction_type": "sample", "clip_sample_range": 2.0},
        DiffusionConfig("cosine", 400, prediction="x0", clip=2.0),
    ),
    ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
     DiffusionConfig(prediction="v", zero_terminal_snr=True)),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
@pytest.mark.parametrize(("change", "expected"), SCHEDULERS)
def test_reads_and_writes_a_pipeline(
    kind: str, change: dict[str, Any], expected: DiffusionConfig, tmp_path: Path
) -> None:
    theirs = getattr(diffusers, f"{kind}Pipeline")(unet(), getattr(diffusers, f"{kind}Scheduler")(**change))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastgen.load(tmp_path / "theirs")
    assert ours.diffusion == expected
    assert_equal(ours, theirs.unet)
    ours.sampling = SamplingDefaults(kind.lower(), 7, 1.0)
    fastgen.save(ours, tmp_path / "ours", format="diffusers")
    again, back = fastgen.load(tmp_path / "ours"), diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert (again.config, again.diffusion, again.sampling) == (ours.config, ours.diffusion, ours.sampling)
    assert type(back).__name__ == f"{kind}Pipeline" and type(back.scheduler).__name__ == f"{kind}Scheduler"
    assert_equal(again, back.unet)
    shared = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "clip_sample")
    more = ("clip_sample_range", "rescale_betas_zero_snr")
    assert all(back.scheduler.config[k] == theirs.scheduler.config[k] for k in shared + more)
    assert torch.equal(back.scheduler.betas, theirs.scheduler.betas)


def test_reads_a_flat_pipeline(tmp_path: Path) -> None:
    """All in one folder, as google/ddpm-cifar10-32 is."""
    theirs = unet()
    theirs.save_pretrained(tmp_path)
    diffusers.DDPMScheduler(num_train_timesteps=77).save_pretrained(tmp_path)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **parts}))
    ours = fastgen.load(tmp_path)
    assert ours.diffusion.timesteps == 77
    assert_equal(ours, theirs)


def test_reads_the_unet_of_a_pipeline_with_its_scheduler(tmp_path: Path) -> None:
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(num_train_timesteps=77)).save_pretrained(tmp_path)
    ours = fastgen.load(tmp_path)
    assert ours.source == str(tmp_path / "unet") and fastgen.load(ours.source).diffusion.timesteps == 77


def test_a_written_pipeline_draws_our_images(tmp_path: Path) -> None:
    """diffusers' scheduler and network, loaded from what we wrote, give the pixels of `fastgen.sample`."""
    torch.manual_seed(5)
    config = replace(PRESETS["tiny"], num_classes=None, image_size=8, time_scale_shift=False)
    model = UNet(config, DiffusionConfig("cosine", 100, prediction="v"), SamplingDefaults("ddim", 5)).eval()
    fastgen.save(model, tmp_path, format="diffusers")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    x = fastgen.ops.philox_normal(torch.arange(3), (1, 8, 8), stream=fastgen.ops.Stream.INITIAL)
    pipeline.scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            out = pipeline.unet(x, t).sample
            x = pipeline.scheduler.step(out, t, x, use_clipped_model_output=True).prev_sample
    ours = fastgen.sample(model, 3).images.int()
    assert ours.float().std() > 20 and (ours - (x * 127.5 + 127.5).round().clamp(0, 255).int()).abs().max() <= 1


def test_other_schedulers(small: Path) -> None:
    """Those that know nothing of clipping clip nothing; where one says nothing of betas, it is none of ours."""
    file = small / "scheduler_config.json"
    diffusers.PNDMScheduler(num_train_timesteps=50).save_pretrained(small)
    assert fastgen.load(small).diffusion == DiffusionConfig(timesteps=50, clip=None)
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}))
    refused(small, "is of a FlowMatchEulerDiscreteScheduler, which fastgen does not know (it has no beta_end, beta_sch")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"prediction_type": "flow"}, "prediction_type='flow'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas=[0.1, 0.2]"),
        ({"thresholding": True}, "thresholding=True"),
        ({"rescale_betas_zero_snr": True}, "zero_terminal_snr needs prediction v or x0"),
        ({"num_train_timesteps": 0}, "timesteps must be at least 1"),
    ],
)
def test_refuses_a_scheduler(small: Path, change: dict[str, Any], words: str) -> None:
    diffusers.DDPMScheduler().save_pretrained(small)
    edit(small / "scheduler_config.json", **change)
    assert str(small / "scheduler_config.json") in refused(small, words)


def test_refuses_a_pipeline_with_other_parts(tmp_path: Path) -> None:
    """A U-Net of latents would draw no images; what could be read by itself is named."""
    unet().save_pretrained(tmp_path / "unet")
    diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
    parts = {"unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"], "safety": [None, None]}
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps({"_class_name": "LatentPipeline", "tokenizer": ["transformers", "T"], **parts}))
    words = "is a diffusers LatentPipeline, which has more parts than unet and scheduler: tokenizer, vae; "
    message = refused(tmp_path, f"{words}use diffusers' own model with fastgen.accelerate(model) (")
    assert message.endswith(f": {tmp_path / 'vae'})")
    assert type(fastgen.load(tmp_path / "vae")).__name__ == "AutoencoderKL"


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act_fn": "mish"}, "act_fn='mish'"),
        ({"downsample_type": "resnet"}, "downsample_type='resnet'"),
        ({"upsample_type": "resnet"}, "upsample_type='resnet'"),
        ({"downsample_padding": 2}, "downsample_padding=2"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"time_embedding_dim": 99}, "time_embedding_dim=99"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"mid_block_scale_factor": 2**0.5, "act_fn": "gelu"}, "act_fn='gelu', mid_block_scale_factor=1.414"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
        (
            {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]},
            "down_block_types=['DownBlock2D', 'SkipDownBlock2D']",
        ),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types=['UpBlock2D']"),
        ({"sample_size": [8, 16]}, "sample_size=[8, 16], which is not square"),
        ({"encoder_hid_dim": 768}, "encoder_hid_dim=768"),
        ({"_class_name": "UNet2DConditionModel"}, "a diffusers UNet2DConditionModel; fastgen reads UNet2DModel and"),
    ],
)
def test_refuses_what_it_has_not(small: Path, change: dict[str, Any], words: str) -> None:
    """The setting, its value, and the way out."""
    edit(small / "config.json", **change)
    message = refused(small, words)
    assert message.endswith("; use diffusers' own model with fastgen.accelerate(model)")
    with pytest.raises(fastgen.UsageError, match=r"^ema: averages are chosen from training runs"):
        fastgen.load(small, ema=0.5)


def test_settings_that_are_off_are_passed_over(small: Path) -> None:
    """What a newer diffusers may have added."""
    edit(small / "config.json", new_attention=False, new_norm=None)
    fastgen.load(small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_out_channels": 32}, "config.json"),
        ({"block_out_channels": []}, "config.json"),
        ({"down_block_types": None}, "config.json"),
        ({"norm_num_groups": None}, "config.json"),
        ({"num_class_embeds": "ten"}, "config.json"),
        ({"num_class_embeds": -3}, "config.json"),
        ({"_fastgen": 3}, "config.json"),
        ({"_fastgen": {"sampling": {"stepz": 3}}}, "stepz"),
        ({"block_out_channels": [16, 30]}, "channels [30] are not divisible by num_groups=8"),
        ({"sample_size": 9}, "image_size must be a multiple of 2, not 9"),
        ({"in_channels": 4}, "do not fit their configuration"),
        ({"attention_head_dim": 5}, "head_dim=5"),
    ],
)
def test_refuses_a_damaged_configuration(small: Path, change: dict[str, Any], words: str) -> None:
    edit(small / "config.json", **change)
    refused(small, words)


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b"", lambda b: pickle.dumps([1.0] * 99)])
def test_damaged_weights(small: Path, damage: Callable[[bytes], bytes]) -> None:
    file = small / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    refused(small, f"{file} is not a whole safetensors file")


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_pickles_are_never_opened(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    (small / WEIGHTS).unlink()
    (small / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(
        small, f"{small / WEIGHTS} is missing (pickled .bin weights are not read: save with safe_serialization=True)"
    )
    assert not (small / "exploded").exists()


# Sampling


def test_a_network_of_classes_without_a_null_class(tmp_path: Path) -> None:
    """diffusers' have none: labels are drawn or given, and there is nothing to guide away from."""
    unet(num_class_embeds=5, in_channels=1, out_channels=1).save_pretrained(tmp_path)
    ours = fastgen.load(tmp_path)
    assert (ours.config.num_classes, ours.config.null_class) == (5, False)
    assert fastgen.sample(ours, 2, labels=[0, 4], steps=2).images.shape == (2, 1, 8, 8)
    assert set(fastgen.sample(ours, 9, steps=1).labels.tolist()) <= set(range(5))
    with pytest.raises(fastgen.UsageError, match=r"^guidance: this model has no null class .*give 1, or leave it out$"):
        fastgen.sample(ours, guidance=2.0)
    with pytest.raises(fastgen.UsageError, match=r"^labels: classes are 0 to 4; 5 is not one$"):
        fastgen.sample(ours, labels=5)


def test_a_network_that_gives_other_channels_draws_nothing(tmp_path: Path) -> None:
    unet(out_channels=6).save_pretrained(tmp_path)
    with pytest.raises(fastgen.UsageError, match=r"^model: gives 6 channels for 3; an image is drawn from as many$"):
        fastgen.sample(tmp_path)


# Writing


def test_a_null_class_survives(tmp_path: Path) -> None:
    """diffusers sees one class more, which is the null class; our own settings it passes over."""
    torch.manual_seed(0)
    model = UNet(PRESETS["tiny"], sampling=SamplingDefaults("heun", 9, 2.5)).eval()
    fastgen.save(model, tmp_path / "m", format="diffusers")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "m" / "unet").eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 60])
    with torch.no_grad():
        for labels in (torch.tensor([3, 9]), torch.tensor([10, 10])):
            assert relative(theirs(x, t, labels).sample, model(x, t, labels)) < 1e-4
        assert relative(theirs(x, t, torch.tensor([10, 10])).sample, model(x, t)) < 1e-4
    theirs.save_pretrained(tmp_path / "again")  # by diffusers itself, which keeps what is private
    for again in (fastgen.load(tmp_path / "m"), fastgen.load(tmp_path / "again")):
        assert (again.config, again.sampling) == (model.config, model.sampling)
        assert fingerprint(again) == fingerprint(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 2}, "patch_size=2"),
        ({"mid_attention_groups": 0, "time_scale_shift": False}, "mid_attention_groups=0 without time_scale_shift"),
    ],
)
def test_refuses_to_write_what_diffusers_has_not(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = UNet(replace(PRESETS["tiny"], **change))
    with pytest.raises(
        fastgen.UsageError, match=f"^format: diffusers' UNet2DModel has nothing like {words}; save it as"
    ):
        fastgen.save(model, tmp_path / "m", format="diffusers")
    with pytest.raises(fastgen.UsageError, match=r"^format: diffusers has no Classifier; save it as format='fastgen'$"):
        fastgen.save(Classifier(CLASSIFIERS["digits-tiny"]), tmp_path / "m", format="diffusers")
    with pytest.raises(fastgen.UsageError, match=r"^format: must be 'fastgen' or 'diffusers', not 'onnx'$"):
        fastgen.save(model, tmp_path / "m", format="onnx")
    with pytest.raises(fastgen.UsageError, match=r"^model: Linear is no network of fastgen.models"):
        fastgen.save(nn.Linear(1, 1), tmp_path / "m", format="diffusers")
    assert os.listdir(tmp_path) == []


def test_writing_is_whole_or_not_at_all(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, place = fastgen.load(small), small.parent / "written"
    fastgen.save(model, place, format="diffusers")
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    assert {str(file.relative_to(place)) for file in before} == {
        "model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"
    }  # fmt: skip
    mask = os.umask(0)
    os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in before} == {0o666 & ~mask}

    def broken(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(model_files, "save_file", broken)
    with pytest.raises(OSError, match="No space"):
        fastgen.save(model, place, format="diffusers")
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before
    assert sorted(os.listdir(small.parent)) == ["small", "written"]


# The hub


class Hub:
    """A hub of the folders in ``root``, that downloads as huggingface_hub does: what matches, into a cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache, self.calls = root, root / "cache", []

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((repo_id, revision, allow_patterns))
        source = self.root / repo_id
        for file in source.rglob("*"):
            relative = file.relative_to(source)
            if file.is_file() and any(
                relative.match(p) or re.fullmatch(_regex(p), str(relative)) for p in allow_patterns
            ):
                target = self.cache / repo_id / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        return str(self.cache / repo_id)


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", ".*")  # as fnmatch, whose * goes over slashes


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def downloaded(hub: Hub) -> set[str]:
    return {str(file.relative_to(hub.cache)) for file in hub.cache.rglob("*") if file.is_file()}


def test_a_model_of_the_hub(hub: Hub) -> None:
    """Settings first, then weights; pickles never. Its name is what a recipe gets."""
    theirs = unet()
    theirs.save_pretrained(hub.root / "google" / "ddpm")
    (hub.root / "google" / "ddpm" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    ours = fastgen.load("google/ddpm")
    assert_equal(ours, theirs)
    assert ours.source == "google/ddpm" and [call[:2] for call in hub.calls] == [("google/ddpm", None)] * 2
    assert [call[2] for call in hub.calls] == [["*.json"], ["*.json", "*.safetensors"]]
    assert downloaded(hub) == {"google/ddpm/config.json", f"google/ddpm/{WEIGHTS}"}
    assert fastgen.load("google/ddpm@v1.0/b").source == "google/ddpm@v1.0/b"
    assert hub.calls[-1][:2] == ("google/ddpm", "v1.0/b")
    picture = fastgen.sample("google/ddpm", steps=1)
    assert picture.recipe.model == "google/ddpm"


def test_a_pipeline_of_the_hub(hub: Hub) -> None:
    theirs = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(num_train_timesteps=50))
    theirs.save_pretrained(hub.root / "me" / "pipe")
    ours = fastgen.load("me/pipe")
    assert ours.diffusion.timesteps == 50 and hub.calls[-1][2] == ["*.json", "unet/*.safetensors"]
    assert_equal(ours, theirs.unet)


def test_a_model_of_ours_on_the_hub(hub: Hub) -> None:
    model = Classifier(CLASSIFIERS["digits-tiny"])
    fastgen.save(model, hub.root / "me" / "digits")
    assert fingerprint(fastgen.load("me/digits")) == fingerprint(model)


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", None])
def test_weights_that_could_not_be_read_are_not_downloaded(hub: Hub, kind: str | None) -> None:
    unet().save_pretrained(hub.root / "me" / "m")
    file = hub.root / "me" / "m" / "config.json"
    file.write_text(json.dumps({"_class_name": kind} if kind else {"architectures": ["BertModel"]}))
    refused("me/m", kind or "is not a fastgen checkpoint")
    assert downloaded(hub) == {"me/m/config.json"} and len(hub.calls) == 1


def test_a_directory_comes_before_the_hub(hub: Hub, tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "google" / "ddpm")
    assert fastgen.load("google/ddpm").source == "google/ddpm"
    (tmp_path / "google" / "empty").mkdir()
    refused("google/empty", "google/empty holds no checkpoint")
    (tmp_path / "google" / "file").write_bytes(b"x")
    refused("google/file", "google/file is a file")
    refused(Path("google/other"), "no model or folder named 'google/other'")
    for name in ("google", "a/b/c", "./google", "../google/ddpm2", "/a/b", "a/weights.pt", "a/w.safetensors", "a b/c"):
        refused(name, "")
    assert not hub.calls


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = "'google/ddpm' on the hub needs huggingface_hub: `pip install 'fastgen-kernels[hub]'`, or give a local"
    refused("google/ddpm", f"{words} directory; there is none named 'google/ddpm'")


@pytest.mark.parametrize("error", [OSError("no\n\nroute"), ValueError("bad name"), RuntimeError("httpx")])
def test_what_the_hub_says(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    said = f"({type(error).__name__}: {' '.join(str(error).split())})"
    refused(
        "google/ddpm", f"'google/ddpm' did not come from the hub {said}; give a local directory; there is none named"
    )


def test_the_cache_of_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, without a network: a model in its cache loads, another is one clear error."""
    cache, commit = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub._snapshot_download.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refused("google/ddpm", "'google/ddpm' did not come from the hub (LocalEntryNotFoundError: ")
    theirs = unet()
    repository = cache / "models--google--ddpm"
    theirs.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("google/ddpm", "google/ddpm@main", f"google/ddpm@{commit}"):
        assert_equal(fastgen.load(name), theirs)
    refused("google/ddpm@v2", "'google/ddpm@v2' did not come from the hub")
    (repository / "snapshots" / commit / WEIGHTS).unlink()
    refused("google/ddpm", f"{WEIGHTS} is missing")
