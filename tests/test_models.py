"""The networks: shapes, gradients, conditioning, and the equality with diffusers whose checkpoints they read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastgen
from fastgen.checkpoint import DIFFUSERS_LEGACY_KEYS
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models import FAMILIES
from fastgen.models.classifier import Classifier, ClassifierConfig
from fastgen.models.unet import PRESETS, UNet, UNetConfig, timestep_embedding

pytestmark = pytest.mark.usefixtures("one_thread")

# Family, preset, parameters. Adding a model: one row.
MODELS = [
    ("unet", "tiny", 178_209),
    ("unet", "mnist", 1_217_732),
    ("unet", "cifar10", 35_746_307),
    ("classifier", "digits", 295_786),
    ("classifier", "digits-tiny", 4_642),
]
SMALL_MODELS = [m[:2] for m in MODELS if m[2] < 10_000_000]

# google/ddpm-cifar10-32, as it is on the hub. `small` keeps everything but the widths.
GOOGLE: dict[str, Any] = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "center_input_sample": False,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "norm_num_groups": 32,
    "attention_head_dim": None, "act_fn": "silu", "mid_block_scale_factor": 1, "time_embedding_type": "positional",
}  # fmt: skip
SMALL = {**GOOGLE, "block_out_channels": (32, 64, 64, 64), "sample_size": 16}


def build(family: str, preset: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family].network(FAMILIES[family].presets[preset]).eval()


def inputs(model: nn.Module, n: int = 2) -> tuple[Tensor, ...]:
    """x [n, C, H, W] and, for a generator, t [n] and labels [n] or None, the last the null class."""
    c, generator = model.config, torch.Generator().manual_seed(1)
    x = torch.randn(n, c.in_channels, c.image_size, c.image_size, generator=generator)
    if isinstance(model, Classifier):
        return (x,)
    labels = None if c.num_classes is None else torch.arange(c.num_classes, c.num_classes - n, -1)
    return x, torch.arange(n) * 400 + 17, labels


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_every_preset_has_its_row() -> None:
    assert {(f, p) for f, p, _ in MODELS} == {(name, p) for name, family in FAMILIES.items() for p in family.presets}


@pytest.mark.parametrize(("family", "preset", "parameters"), MODELS)
def test_model(family: str, preset: str, parameters: int) -> None:
    model = build(family, preset)
    assert sum(p.numel() for p in model.parameters()) == parameters
    x, *rest = inputs(model, 1 if parameters > 10_000_000 else 2)
    y = model(x, *rest)
    shape = [model.config.out_channels, *x.shape[2:]] if FAMILIES[family].samples else [model.config.num_classes]
    assert list(y.shape) == [len(x), *shape] and y.dtype == torch.float32
    assert torch.isfinite(y).all() and y.std() > 1e-3
    y.square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead, f"no gradient reaches {dead}"
    if len(x) > 1:
        with torch.no_grad():
            assert torch.equal(model(x, *rest), y), "not deterministic"


@pytest.mark.parametrize(("family", "preset"), SMALL_MODELS)
def test_layouts_agree(family: str, preset: str) -> None:
    model = build(family, preset)
    x, *rest = inputs(model)
    with torch.no_grad():
        expected = model(x, *rest)
        turned = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), *rest)
    assert relative(turned, expected) < 1e-5


@pytest.mark.parametrize(("family", "preset"), SMALL_MODELS)
def test_kernels_agree_with_reference(family: str, preset: str) -> None:
    """Output within 1e-4, each gradient within 1e-3 of plain PyTorch."""
    model = build(family, preset)
    x, *rest = inputs(model)
    found = {}
    for backend in ("reference", "cpp"):
        model.zero_grad()
        with fastgen.use_backend(backend):
            y = model(x.clone(), *rest)
            y.square().mean().backward()
        found[backend] = y.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}
    assert relative(found["cpp"][0], found["reference"][0]) < 1e-4
    for name, expected in found["reference"][1].items():
        if name.endswith("to_k.bias"):
            continue  # the same number added to every score changes no softmax: this gradient is rounding error
        assert relative(found["cpp"][1][name], expected) < 1e-3, name


@pytest.mark.parametrize(("family", "preset"), SMALL_MODELS)
def test_one_image_does_not_depend_on_its_neighbours(family: str, preset: str) -> None:
    model = build(family, preset)
    given = inputs(model, 3)
    with torch.no_grad():
        assert relative(model(*(a[1:2] for a in given)), model(*given)[1:2]) < 1e-5


def test_step_as_a_number_or_a_tensor() -> None:
    model = build("unet", "tiny")
    x, _, labels = inputs(model)
    with torch.no_grad():
        expected = model(x, torch.tensor([7, 7]), labels)
        assert torch.equal(model(x, 7, labels), expected)
        assert torch.equal(model(x, torch.tensor(7), labels), expected)
        assert not torch.equal(model(x, 8, labels), expected)


def test_class_conditioning() -> None:
    model = build("unet", "tiny")
    x, t, _ = inputs(model)
    with torch.no_grad():
        three, four = model(x, t, torch.tensor([3, 3])), model(x, t, torch.tensor([4, 3]))
        assert torch.equal(three[1], four[1]) and relative(four[0], three[0]) > 1e-3
        null = torch.full((2,), model.config.num_classes)
        assert torch.equal(model(x, t, null), model(x, t)), "no labels mean the null class"
        assert relative(model(x, t), three) > 1e-3


def test_unconditional_model_has_no_class_embedding() -> None:
    model = UNet(replace(PRESETS["tiny"], num_classes=None))
    assert not [k for k in model.state_dict() if "class" in k]
    with pytest.raises(ValueError, match="class_labels"):
        model(*inputs(model)[:2], torch.tensor([1, 2]))


def test_scale_shift_and_bias_conditioning() -> None:
    """Both kinds answer to the step; scale and shift need twice the projection's width."""
    torch.manual_seed(0)
    for scale_shift, factor in ((True, 2), (False, 1)):
        model = UNet(replace(PRESETS["tiny"], time_scale_shift=scale_shift)).eval()
        block = model.down_blocks[0].resnets[0]
        assert block.time_emb_proj.out_features == 16 * factor
        emb, x = torch.randn(2, 64), torch.randn(2, 16, 8, 8)
        h = block.conv1(nn.functional.silu(block.norm1(x)))
        e = block.time_emb_proj(emb)[:, :, None, None]
        if scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = block.norm2(h) * (1 + scale) + shift
        else:
            h = block.norm2(h + e)
        expected = x + block.conv2(nn.functional.silu(h))
        assert relative(block(x, emb), expected) < 1e-5


def test_timestep_embedding() -> None:
    t = torch.tensor([0, 1, 999])
    e = timestep_embedding(t, 8, flip_sin_to_cos=False, freq_shift=1.0)
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 3)
    angle = t[:, None] * frequencies
    torch.testing.assert_close(e.double(), torch.cat([angle.sin(), angle.cos()], 1), atol=1e-4, rtol=0)
    assert torch.equal(timestep_embedding(t, 8, freq_shift=1.0), torch.cat([e[:, 4:], e[:, :4]], 1))
    assert timestep_embedding(t, 7).shape == (3, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention": (True,)}, "attention"),
        ({"channels": (16, 30)}, "num_groups"),
        ({"head_dim": 5}, "head_dim"),
        ({"image_size": 15}, "image_size"),
    ],
)
def test_wrong_configuration(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(PRESETS["tiny"], **change)


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [
        ((2, 3, 16, 16), None, r"x must be \[N, 1, H, W\]"),
        ((2, 1, 15, 16), None, "x must be.*multiples of 2"),
        ((2, 1, 16, 15), None, "x must be.*multiples of 2"),
        ((1, 16, 16), None, "x must be"),
        ((2, 1, 16, 16), torch.tensor([1]), r"class_labels must be int64 \[2\]"),
        ((2, 1, 16, 16), torch.tensor([[1], [2]]), r"class_labels must be int64 \[2\]"),
        ((2, 1, 16, 16), torch.tensor([1.0, 2.0]), "class_labels must be int64"),
    ],
)
def test_wrong_inputs(shape: tuple[int, ...], labels: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build("unet", "tiny")(torch.zeros(shape), 5, labels)


def test_step_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"\bt\b"):
        build("unet", "tiny")(torch.zeros(2, 1, 16, 16), torch.tensor([1, 2, 3]))


def test_other_sizes_than_the_configured_one() -> None:
    model = build("unet", "tiny")
    with torch.no_grad():
        assert model(torch.randn(1, 1, 8, 24), 5).shape == (1, 1, 8, 24)


# The classifier


def test_classifier_is_its_formula() -> None:
    """Written out in plain PyTorch: two convolutions a stage, the first of all but one stage of stride 2."""
    model = build("classifier", "digits-tiny")
    (x,) = inputs(model)
    h = x
    for i, stage in enumerate(model.stages):
        h = F.conv2d(h, stage.conv.weight, stride=2 if i == 2 else 1, padding=1)
        h = F.silu(F.group_norm(h, 8, stage.norm.weight, stage.norm.bias))
    assert h.shape == (2, 16, 14, 14)
    features = F.silu(F.linear(h.mean(dim=(2, 3)), model.hidden.weight, model.hidden.bias))
    logits = F.linear(features, model.output.weight, model.output.bias)
    with torch.no_grad():
        assert relative(model.features(x), features) < 1e-5 and relative(model(x), logits) < 1e-5
        assert torch.equal(model.classify(model.features(x)), model(x))


def test_classifier_drops_out_in_training_only() -> None:
    model = build("classifier", "digits-tiny")
    (x,) = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x)) and torch.equal(model.features(x), model.features(x))


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (1, 28, 28), (1, 1, 28), (2, 28, 28, 1)])
def test_classifier_takes_images_only(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^x must be \[N, 1, H, W\], not "):
        build("classifier", "digits-tiny")(torch.zeros(shape))


def test_classifier_config_is_frozen_and_checked() -> None:
    config = ClassifierConfig(channels=[8, 16])
    assert config.channels == (8, 16) and hash(config)
    with pytest.raises(ValueError, match=r"channels \[12, 20\] are not divisible by num_groups=8"):
        ClassifierConfig(channels=(8, 12, 16, 20))


# diffusers


def saved_by_diffusers(folder: Path, **config: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    theirs = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():  # norms that do something
        for name, p in theirs.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(folder)
    return theirs


def assert_equal_to(ours: nn.Module, theirs: nn.Module, size: int, steps: tuple[int, ...] = (3, 981)) -> None:
    torch.manual_seed(4)
    x, t = torch.randn(len(steps), 3, size, size), torch.tensor(steps)
    with torch.no_grad():
        assert relative(ours(x, t), theirs(x, t).sample) < 1e-4


def test_cifar10_is_that_of_google(tmp_path: Path) -> None:
    theirs = saved_by_diffusers(tmp_path, **GOOGLE)
    ours = fastgen.load(tmp_path)
    assert ours.config == PRESETS["cifar10"]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 35_746_307
    assert_equal_to(ours, theirs, 32, steps=(981,))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_head_dim": 8},
        {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0},
        {"resnet_time_scale_shift": "scale_shift", "norm_eps": 1e-5, "add_attention": False},
        {"norm_num_groups": 16},
        {"layers_per_block": 1, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    ],
    ids=["google", "heads", "padding-embedding", "scale-shift", "groups", "two-levels"],
)  # fmt: skip
def test_reads_diffusers(change: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_by_diffusers(tmp_path, **{**SMALL, **change})
    assert_equal_to(fastgen.load(tmp_path), theirs, 16)


def test_reads_legacy_keys(tmp_path: Path) -> None:
    theirs = saved_by_diffusers(tmp_path, **SMALL)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for old, new in DIFFUSERS_LEGACY_KEYS.items():
        weights = {k.replace(new, old): v for k, v in weights.items()}
    assert any(".query." in k for k in weights) and any(".proj_attn." in k for k in weights)
    save_file(weights, file)
    assert_equal_to(fastgen.load(tmp_path), theirs, 16)


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
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), SCHEDULERS, ids=["default", "scaled_linear", "cosine"])
def test_reads_a_pipeline(change: dict[str, Any], expected: DiffusionConfig, tmp_path: Path) -> None:
    theirs = saved_by_diffusers(tmp_path / "unet", **SMALL)
    from diffusers import DDPMScheduler

    DDPMScheduler(**change).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    ours = fastgen.load(tmp_path)
    assert ours.diffusion == expected
    assert_equal_to(ours, theirs, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act_fn": "mish"}, "act_fn"),
        ({"downsample_type": "resnet"}, "downsample_type"),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, "SkipDownBlock2D"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    ],
)
def test_refuses_what_it_has_not(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved_by_diffusers(tmp_path, **{**SMALL, "layers_per_block": 1})
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(fastgen.UsageError, match=words):
        fastgen.load(tmp_path)


def test_refuses_an_unknown_scheduler(tmp_path: Path) -> None:
    saved_by_diffusers(tmp_path, **{**SMALL, "layers_per_block": 1})
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"beta_schedule": "sigmoid"}))
    with pytest.raises(fastgen.UsageError, match="beta_schedule='sigmoid'"):
        fastgen.load(tmp_path)


def test_config_is_frozen_and_normalised() -> None:
    config = UNetConfig(channels=[32, 64], attention=[False, True])  # as JSON gives them
    assert config.channels == (32, 64) and config.attention == (False, True) and hash(config)
    with pytest.raises(AttributeError):
        config.image_size = 64
