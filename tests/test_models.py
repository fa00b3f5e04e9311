"""The networks: shapes, gradients and conditioning. Their equality with diffusers: test_diffusers_format.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen.models import FAMILIES
from fastgen.models.autoencoder_kl import AutoencoderKL
from fastgen.models.classifier import Classifier, ClassifierConfig
from fastgen.models.unet import PRESETS, UNet, UNetConfig, timestep_embedding

pytestmark = pytest.mark.usefixtures("one_thread")

# Family, preset, parameters. Adding a model: one row.
MODELS = [
    ("unet", "tiny", 178_209),
    ("unet", "mnist", 1_217_732),
    ("unet", "cifar10", 35_746_307),
    ("autoencoder_kl", "tiny", 167_959),
    ("autoencoder_kl", "sd", 83_653_863),
    ("classifier", "digits", 295_786),
    ("classifier", "digits-tiny", 4_642),
]
SMALL_MODELS = [m[:2] for m in MODELS if m[2] < 10_000_000]


def build(family: str, preset: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family].network(FAMILIES[family].presets[preset]).eval()


def inputs(model: nn.Module, n: int = 2) -> tuple[Tensor, ...]:
    """x [n, C, H, W] and, for a generator, t [n] and labels [n] or None, the last the null class."""
    c, generator = model.config, torch.Generator().manual_seed(1)
    size = min(c.image_size, 32)  # an autoencoder takes any
    x = torch.randn(n, c.in_channels, size, size, generator=generator)
    if isinstance(model, Classifier | AutoencoderKL):
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
    images = FAMILIES[family].samples or isinstance(model, AutoencoderKL)
    shape = [model.config.out_channels, *x.shape[2:]] if images else [model.config.num_classes]
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


def test_without_a_null_class() -> None:
    """The embedding has a row for each class, and a label must be given."""
    model = UNet(replace(PRESETS["tiny"], null_class=False)).eval()
    assert model.class_embedding.num_embeddings == 10
    x, t, _ = inputs(model)
    with torch.no_grad():
        assert model(x, t, torch.tensor([9, 0])).shape == x.shape
    with pytest.raises(ValueError, match="class_labels must be given: this model has no null class"):
        model(x, t)


def test_heads_divide_only_the_levels_with_attention() -> None:
    config = replace(PRESETS["tiny"], channels=(24, 32), num_groups=8)
    assert config.head_dim == 16 and UNet(config)(torch.zeros(1, 1, 16, 16), 3).shape == (1, 1, 16, 16)
    for change in ({"attention": (True, False)}, {"up_attention": (True, False)}):
        with pytest.raises(ValueError, match=r"channels \[24\] are not divisible by num_groups=8 and head_dim=16"):
            replace(config, **change)


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
        ({"up_attention": (True,)}, "up_attention needs one entry per level, 2, not 1"),
        ({"mid_attention_groups": 5}, "mid_attention_groups=5 do not divide 32"),
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


def test_config_is_frozen_and_normalised() -> None:
    config = UNetConfig(channels=[32, 64], attention=[False, True])  # as JSON gives them
    assert config.channels == (32, 64) and config.attention == (False, True) and hash(config)
    again = UNetConfig(channels=[32, 64], attention=[False, True], up_attention=[False, True], mid_attention_groups=32)
    assert again == config, "what says the same is equal"
    with pytest.raises(AttributeError):
        config.image_size = 64
