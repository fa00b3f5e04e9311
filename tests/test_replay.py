"""Recipes and fastgen.replay: a PNG says how it was made, and is made again to the pixel; or one learns why not."""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

import fastgen
from fastgen import Samples, replay, sample, use_backend
from fastgen import recipe as recipes
from fastgen.checkpoint import fingerprint
from fastgen.diffusion.samplers import DDIM, SAMPLERS, DPMSolverMultistep, Heun, SamplingDefaults, SamplingPlan
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models.unet import PRESETS, UNet
from fastgen.recipe import CHUNK, PART, Recipe, decode_picture, read_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

GREYS = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
STARTS = torch.stack([GREYS, GREYS.flip(1), 255 - GREYS, GREYS.flip(2)])


def tiny(num_classes: int | None = 10, seed: int = 0, channels: int = 1) -> UNet:
    torch.manual_seed(seed)
    network = replace(PRESETS["tiny"], num_classes=num_classes, in_channels=channels, out_channels=channels)
    return UNet(network, DiffusionConfig("cosine", 100, prediction="v"), SamplingDefaults("ddim", 4, 1.0)).eval()


@pytest.fixture(scope="module")
def model() -> UNet:
    return tiny()


@pytest.fixture
def folder(model: UNet, tmp_path: Path) -> Path:
    fastgen.save(model, tmp_path / "tiny", preset="tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def drawn(model: UNet) -> Samples:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = sample(model, 3, seed=5)
    torch.set_num_threads(before)
    return made


@pytest.fixture
def one(drawn: Samples, tmp_path: Path) -> Path:
    """The second of three images."""
    return drawn[1].save(tmp_path / "one.png")


def rewrite(file: Path, picture: Image.Image | None = None, text: str | None = None, **changes: Any) -> Path:
    """The PNG once more, with another picture, or another text for a recipe, or changes to the recipe it has."""
    old, recipe = read_recipe(file)
    info = PngInfo()
    text = json.dumps({**json.loads(recipe.to_json()), **changes}) if text is None else text
    info.add_text(CHUNK, text, zip=True)
    (picture or old).save(file, pnginfo=info)
    return file


def edited(file: Path, by: int = 9) -> Path:
    """One pixel of the picture changed, as in a program that keeps the text."""
    picture = read_recipe(file)[0]
    value = picture.getpixel((3, 4))
    picture.putpixel((3, 4), value + by if value < 128 else value - by)
    return rewrite(file, picture)


def refused(file: str | Path, words: str, **arguments: Any) -> None:
    with pytest.raises(fastgen.UsageError, match=f"^{words}") as caught:
        replay(file, **arguments)
    assert "\n" not in str(caught.value)


# The recipe


@dataclass(frozen=True)
class Case:
    """Arguments of `sample`, and what its recipe then says of them."""

    arguments: dict[str, Any]
    fields: dict[str, Any]


CASES = {
    "plain": Case({"seed": 7}, {"seeds": [7, 8, 9, 10], "sampler": "ddim", "steps": 4, "guidance": 1.0, "batch": 4}),
    "seeds": Case({"seed": [9, -(2**63), 9, 2**63 - 1]}, {"seeds": [9, -(2**63), 9, 2**63 - 1]}),
    "labels": Case({"labels": [3, 1, 4, 1]}, {"labels": [3, 1, 4, 1]}),
    "batches": Case({"batch_size": 3}, {"batch": 3, "index": None}),
    "guidance": Case(
        {"guidance": 3, "guidance_interval": (0.2, 0.9), "guidance_rescale": 0.4},
        {"guidance": 3.0, "guidance_interval": (0.2, 0.9), "guidance_rescale": 0.4},
    ),
    "options": Case(
        {"sampler": DDIM(0.3, "leading", False), "steps": 5},
        {"sampler": "ddim", "steps": 5}
        | {"options": {"eta": 0.3, "spacing": "leading", "use_clipped_model_output": False}},
    ),
    "numpy": Case({"sampler": DDIM(np.float32(0.5))}, {"options": asdict(DDIM(0.5))}),
    "karras": Case({"sampler": DPMSolverMultistep(True, "karras")}, {"options": {"sde": True, "spacing": "karras"}}),
    "start": Case({"image": GREYS, "sampler": "ddpm"}, {"strength": 0.8}),
    "starts": Case({"image": STARTS, "strength": 0.5, "batch_size": 3}, {"strength": 0.5}),
    "nothing": Case({"image": STARTS, "strength": 0}, {"strength": 0.0}),
    "bfloat16": Case({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
    "reference": Case({"backend": "reference", "sampler": "ddpm"}, {"backend": "reference"}),
    **{name: Case({"sampler": name}, {"sampler": name, "options": asdict(SAMPLERS[name])}) for name in SAMPLERS},
}


@pytest.mark.parametrize("name", CASES)
def test_replay_is_exact(model: UNet, tmp_path: Path, name: str) -> None:
    """A grid, and each of its images alone; and the recipe comes out of the file as it went in."""
    arguments, fields = CASES[name].arguments, CASES[name].fields
    made = sample(model, 4, **arguments)
    for picture in (made, *made):
        file = picture.save(tmp_path / "picture.png")
        recipe = read_recipe(file)[1]
        assert recipe == picture.recipe
        again = replay(file, model=model)
        assert again.exact and again.largest == again.share == 0 and again.reasons == [], str(again)
        assert str(again) == "exact: every pixel is as recorded"
        assert torch.equal(again.samples.seeds, picture.seeds) and torch.equal(again.samples.labels, picture.labels)
        assert torch.equal(again.samples.images, picture.images)
    assert {key: getattr(made.recipe, key) for key in fields} == fields


def test_every_field(folder: Path, tmp_path: Path) -> None:
    """What the recipe of a single image says, none of it by default."""
    made = sample(
        folder, 5, seed=3, labels=[1, 2, 3, 4, 5], sampler="euler", steps=7, guidance=2, guidance_interval=(0, 0.5),
        guidance_rescale=1, image=torch.cat([STARTS, STARTS[:1]]), strength=0.6, batch_size=3, dtype=torch.bfloat16,
        backend="reference", device="cpu",
    )  # fmt: skip
    found = read_recipe(made[4].save(tmp_path / "one.png"))[1]
    weights = fingerprint(fastgen.load(folder, dtype=torch.bfloat16))
    assert weights != fingerprint(fastgen.load(folder)) and len(weights) == 64
    environment = {
        "fastgen": fastgen.__version__, "torch": torch.__version__, "pillow": PIL.__version__, "device": "cpu",
        "hardware": torch.backends.cpu.get_cpu_capability(), "threads": 1,
        "kernels": {"group_norm_act": "reference", "diffusion_step": "reference"},
    }  # fmt: skip
    assert len(found.settings_sha256) == 64
    assert replace(found, images=[], settings_sha256="") == Recipe(
        model=str(folder), sha256=weights, seeds=[7], labels=[5], sampler="euler", options={"spacing": "trailing"},
        steps=7, guidance=2.0, guidance_interval=(0.0, 0.5), guidance_rescale=1.0, strength=0.6, images=[],
        dtype="bfloat16", backend="reference", batch=2, index=1, environment=environment,
    )  # fmt: skip
    assert [np.array(decode_picture(text)).tolist() for text in found.images] == [GREYS[0].tolist()]


def test_start_images_once_or_one_each(model: UNet) -> None:
    shared, each = (sample(model, 4, image=image, strength=0, batch_size=3) for image in (GREYS, STARTS))
    assert len(shared.recipe.images) == 1 and shared[3].recipe.images == shared.recipe.images
    assert len(set(each.recipe.images)) == 4 and each[3].recipe.images == each.recipe.images[3:]


def test_an_image_drawn_in_a_stream_or_job(model: UNet, tmp_path: Path) -> None:
    for batch in fastgen.stream(model, 5, batch_size=2, sampler="ddpm"):
        for picture in (batch, *batch):
            assert replay(picture.save(tmp_path / "a.png"), model=model).exact


def test_an_unconditional_model(tmp_path: Path) -> None:
    model = tiny(None, channels=3)
    made = sample(model, 3, image=Image.new("RGB", (16, 16), "red"), strength=0.7, sampler="ddpm")
    assert made.recipe.labels is None
    for picture in (made, made[1]):
        assert replay(picture.save(tmp_path / "a.png"), model=model).exact


def test_recipes_longer_than_a_chunk(model: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses to open a PNG with a text chunk of more than a mebibyte: it is cut in parts."""
    recipe = replace(sample(model).recipe, seeds=list(range(10**18, 10**18 + 60_000)), labels=None)
    assert len(recipe.to_json()) > PART
    Image.new("L", (16, 16)).save(tmp_path / "long.png", pnginfo=recipes.png_info(recipe))
    assert read_recipe(tmp_path / "long.png")[1] == recipe
    recipe = replace(recipe, seeds=[1])
    length = len(recipe.to_json())
    for part in (length - 1, length, length + 1, length // 3):
        monkeypatch.setattr(recipes, "PART", part)
        info = recipes.png_info(recipe)
        assert len(info.chunks) == -(-length // part)
        Image.new("L", (16, 16)).save(tmp_path / "cut.png", pnginfo=info)
        assert read_recipe(tmp_path / "cut.png")[1] == recipe


def test_a_recipe_behind_the_pixels(one: Path) -> None:
    """Where some programs put the text that they found before them."""
    whole, recipe = one.read_bytes(), read_recipe(one)[1]
    start = whole.index(b"zTXt") - 4
    end = start + int.from_bytes(whole[start : start + 4], "big") + 12
    one.write_bytes(whole[:start] + whole[end:-12] + whole[start:end] + whole[-12:])
    assert read_recipe(one)[1] == recipe


# Which model and sampler


def test_a_model_by_its_name(folder: Path, tmp_path: Path) -> None:
    """The recipe holds it, whether sample was given a path or what load made of it."""
    for source in (folder, str(folder), fastgen.load(folder)):
        file = sample(source, 2, device="cpu")[1].save(tmp_path / "a.png")
        assert read_recipe(file)[1].model == str(folder) and replay(file).exact
        assert replay(str(file), device="cpu").exact
    shutil.rmtree(folder)
    refused(file, f"model: no model or folder named '{folder}'")
    assert replay(file, model=tiny()).exact


def test_a_shipped_model(tmp_path: Path) -> None:
    file = sample("ddpm-mnist", 3, steps=2, device="cpu")[2].save(tmp_path / "digit.png")
    assert read_recipe(file)[1].model == "ddpm-mnist" and replay(file).exact


def test_a_module_has_no_name(one: Path, model: UNet) -> None:
    refused(one, f"model: {one} was made from a module without a name; give the model")
    assert replay(one, model=model).exact


@dataclass(frozen=True)
class Mine:
    """A sampler that fastgen does not know."""

    eta: float

    def plan(self, config: DiffusionConfig, steps: int) -> SamplingPlan:
        return DDIM(self.eta).plan(config, steps)


class Derived(DDIM):
    """Nor this one, though it is derived from one that it does."""


@pytest.mark.parametrize("sampler", [Mine(0.5), Derived(0.5)])
def test_a_sampler_of_ones_own(model: UNet, tmp_path: Path, sampler: Any) -> None:
    file = sample(model, 2, sampler=sampler).save(tmp_path / "a.png")
    assert read_recipe(file)[1].sampler is None
    refused(file, f"sampler: {file} was made with a sampler of its own kind.*pass it", model=model)
    assert replay(file, model=model, sampler=sampler).exact
    assert not replay(file, model=model, sampler=Mine(0.0)).exact


class Crowded(nn.Module):
    """A network whose answer depends on the batch: on its size and on the place in it; not at all with ``much`` 0."""

    def __init__(self, much: float = 0.05) -> None:
        super().__init__()
        like = tiny()
        self.config, self.diffusion, self.sampling = like.config, like.diffusion, like.sampling
        self.weight, self.much = nn.Parameter(torch.zeros(1)), much
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.batches.append(len(x))
        crowd = self.much * (len(x) + 2 * torch.arange(len(x)))
        return 0.3 * x + (crowd + 0.02 * labels)[:, None, None, None]


@pytest.mark.parametrize("arguments", [{}, {"image": torch.cat([STARTS, STARTS]), "strength": 0.5}])
def test_an_image_that_only_its_batch_gives(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """It is drawn alone first, then in as many and at the place where it was."""
    model = Crowded()
    made = sample(model, 8, labels=[7, 0, 7, 1, 9, 2, 8, 3], batch_size=3, steps=2, **arguments)
    steps = len(model.batches) // 3
    for i, picture in enumerate(made):
        model.batches.clear()
        again = replay(picture.save(tmp_path / "a.png"), model=model)
        assert again.exact and model.batches == [1] * steps + [3 if i < 6 else 2] * steps
        assert again.samples.seeds.tolist() == [i] and again.samples.labels.equal(picture.labels)
        assert replay(again.samples.save(tmp_path / "again.png"), model=model).exact
    assert replay(made.save(tmp_path / "grid.png"), model=model).exact


def test_once_is_enough(tmp_path: Path) -> None:
    """For an image that comes out the same alone, and for one that was drawn alone."""
    for much, size, change in ((0.0, 3, lambda file: file), (0.05, 1, edited)):
        model = Crowded(much)
        file = change(sample(model, 3, batch_size=size, steps=2)[1].save(tmp_path / "a.png"))
        model.batches.clear()
        assert replay(file, model=model).exact == (change is not edited) and model.batches == [1, 1]


# What differs


def test_a_changed_pixel(one: Path, model: UNet) -> None:
    found = replay(edited(one, by=9), model=model)
    assert not found.exact and found.largest == 9 and found.share == 1 / 256
    assert found.reasons == ["nothing that was recorded differs, so the picture was probably changed after it was made"]
    assert str(found) == f"off by up to 9 grey levels, in 0.39% of the values: {found.reasons[0]}"
    assert str(replay(edited(one, by=8), model=model)).startswith("off by up to 1 grey level, in 0.39%")
    report = found.as_dict()
    assert json.loads(json.dumps(report)) | {"recipe": 0} == {
        "exact": False, "largest": 9, "share": 1 / 256, "reasons": found.reasons, "recipe": 0,
    }  # fmt: skip
    assert report["recipe"]["seeds"] == [6]


def test_a_changed_grid(model: UNet, tmp_path: Path) -> None:
    file = sample(model, 4).save(tmp_path / "grid.png")
    picture = read_recipe(file)[0]
    picture.paste((255, 0, 0), (0, 0, 2, 1))
    found = replay(rewrite(file, picture), model=model)
    assert found.largest == 255 and found.share == 4 / (picture.width * picture.height * 3)


def test_the_same_pixels_in_another_mode(one: Path, model: UNet) -> None:
    picture = read_recipe(one)[0]
    for mode in ("RGB", "RGBA", "P"):
        rewrite(one, picture.convert(mode))
        assert Image.open(one).mode == mode and replay(one, model=model).exact


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fastgen", "0.0.1"),
        ("torch", "1.13.0"),
        ("pillow", "9.0"),
        ("threads", 96),
        ("hardware", "NEON"),
        ("kernels", {"group_norm_act": "triton"}),
        ("weather", "rain"),
    ],
)
def test_another_environment(one: Path, model: UNet, name: str, value: Any) -> None:
    """Named if the pixels differ, and not if they do not."""
    before = read_recipe(one)[1].environment
    rewrite(one, environment={**before, name: value})
    assert replay(one, model=model).reasons == []
    assert replay(edited(one), model=model).reasons == [f"{name} {value} then, {before.get(name)} now"]


def test_several_reasons(one: Path, model: UNet) -> None:
    environment = {**read_recipe(one)[1].environment, "torch": "1.13.0"}
    del environment["pillow"]
    found = replay(edited(rewrite(one, environment=environment)), model=model, backend="reference")
    kernels = "kernels {'group_norm_act': 'cpp', 'diffusion_step': 'cpp'} then, {"
    assert [r[: len(kernels)] for r in found.reasons][:2] == ["backend auto then, reference now", kernels]
    assert found.reasons[2:] == [
        f"pillow None then, {PIL.__version__} now",
        f"torch 1.13.0 then, {torch.__version__} now",
    ]
    assert all(reason in str(found) for reason in found.reasons)


def test_a_backend_chosen_around_the_call(model: UNet, tmp_path: Path) -> None:
    with use_backend("reference"):
        file = sample(model).save(tmp_path / "a.png")
        assert replay(edited(file), model=model).reasons[0].startswith("nothing that was recorded")
    assert [r.split()[0] for r in replay(edited(file), model=model).reasons] == ["kernels"]
    with use_backend("cuda"):
        kernels = recipes.environment(torch.device("cpu"))["kernels"]
    assert kernels == {"group_norm_act": None, "diffusion_step": None}, "what cannot run says so when it is run"


def test_other_weights(one: Path, model: UNet) -> None:
    other = tiny(seed=1)
    found = replay(one, model=other)
    then, now = fingerprint(model), fingerprint(other)
    assert not found.exact
    assert found.reasons == [f"the weights differ (SHA-256 {then[:12]}… then, {now[:12]}… now)"]


def test_another_configuration(model: UNet, tmp_path: Path) -> None:
    """The same weights, read in another way."""
    other = tiny()
    other.diffusion = replace(other.diffusion, clip=0.5)
    file = sample(model, 2, steps=3).save(tmp_path / "a.png")
    found = replay(file, model=other)
    assert not found.exact and found.reasons == ["the model's configuration, or the table of the sampler, differs"]


def test_another_sampler(one: Path, model: UNet) -> None:
    for sampler, words in ((Heun(), "heun {'spacing': 'karras'} now"), (DDIM(1.0), "now")):
        found = replay(one, model=model, sampler=sampler)
        assert not found.exact and len(found.reasons) == 1
        assert found.reasons[0].startswith("sampler ddim {'eta': 0.0, ") and found.reasons[0].endswith(words)


# Files that cannot be replayed


def test_a_resized_picture(one: Path, model: UNet) -> None:
    rewrite(one, read_recipe(one)[0].resize((32, 8)))
    refused(one, f"path: {one} is 32×8, but its recipe makes 16×16: it was resized", model=model)


def test_files_that_are_no_pictures(one: Path, tmp_path: Path) -> None:
    refused(tmp_path / "gone.png", "path: there is no file .*gone.png")
    refused(str(tmp_path), f"path: {tmp_path} cannot be read as a picture")
    refused("a\0b", "path: .*cannot be read as a picture")
    whole = one.read_bytes()
    for content in (b"", b"text", whole[:10], whole[:40], whole[: len(whole) // 2], whole[len(whole) // 2 :]):
        one.write_bytes(content)
        refused(one, f"path: {one} cannot be read as a picture")
    one.write_bytes(whole[:-100])
    refused(one, f"path: {one} ")


def test_pictures_without_a_recipe(one: Path, tmp_path: Path) -> None:
    picture = Image.open(one)
    for name in ("plain.png", "plain.jpg"):
        picture.save(tmp_path / name)
        refused(tmp_path / name, f"path: {tmp_path / name} carries no recipe")


DAMAGED = r"path: the recipe in .* is damaged \("


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", DAMAGED),
        ('{"format": 1, "model": "tiny"', DAMAGED),
        ("[]", DAMAGED),
        ("null", DAMAGED),
        ("7", DAMAGED),
        ("{}", DAMAGED),
        ('{"format": "1"}', DAMAGED),
        ('{"format": 1}', DAMAGED + "model, sha256, seeds"),
        ("[" * 100_000, DAMAGED),
        (f'{{"format": {"9" * 5000}}}', DAMAGED),
        ('{"format": 2}', "path: the recipe in .* was written by a newer fastgen; upgrade"),
    ],
    ids=range(11),
)
def test_text_that_is_no_recipe(one: Path, model: UNet, text: str, words: str) -> None:
    refused(rewrite(one, text=text), words, model=model)


PICTURES = [
    recipes.encode_picture(Image.new(mode, size)) for mode, size in (("L", (16, 16)), ("L", (8, 8)), ("RGB", (16, 16)))
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": "123"}, DAMAGED + "seeds"),
        ({"seeds": [1.5]}, DAMAGED + "seeds"),
        ({"seeds": [True]}, DAMAGED + "seeds"),
        ({"seeds": [1, 2]}, DAMAGED + "index"),
        ({"seeds": [2**70]}, "seed: "),
        ({"labels": "1"}, DAMAGED + "labels"),
        ({"labels": [1, 2]}, "labels: "),
        ({"labels": [99]}, "labels: "),
        ({"index": 3}, DAMAGED + "index"),
        ({"index": -1}, DAMAGED + "index"),
        ({"index": "0"}, DAMAGED + "index"),
        ({"batch": None}, DAMAGED + "batch"),
        ({"batch": 0, "index": None}, "batch_size: "),
        ({"dtype": "load"}, DAMAGED + "dtype"),
        ({"dtype": "float99"}, DAMAGED + "dtype"),
        ({"dtype": "int32"}, "dtype: "),
        ({"steps": "4"}, DAMAGED + "steps"),
        ({"steps": 0}, "steps: "),
        ({"steps": 4.0, "model": 7}, DAMAGED + "model, steps"),
        ({"guidance": "1"}, DAMAGED + "guidance"),
        ({"guidance_interval": [0.1]}, DAMAGED + "guidance_interval"),
        ({"guidance_interval": ["0", "1"]}, DAMAGED + "guidance_interval"),
        ({"environment": []}, DAMAGED + "environment"),
        ({"environment": {"device": "quantum"}}, "device: "),
        ({"backend": "opencl"}, "backend: "),
        ({"options": None}, DAMAGED + "options"),
        ({"options": {"etaa": 1}}, "etaa: DDIM has no etaa"),
        ({"sampler": "eular"}, "sampler: unknown sampler 'eular'"),
        ({"images": [1]}, DAMAGED + "images"),
        ({"images": ["%%%"], "strength": 0.5}, "path: the start image in the recipe of .* is damaged"),
        ({"images": ["aGVsbG8="], "strength": 0.5}, "path: the start image in the recipe of .* is damaged"),
        ({"images": PICTURES[:2], "strength": 0.5}, "path: the start image in the recipe of .* is damaged"),
        ({"images": PICTURES[1:2], "strength": 0.5}, "image: must have the model's shape"),
        ({"strength": 0.5}, "strength: "),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_damaged_recipe(one: Path, model: UNet, changes: dict[str, Any], words: str) -> None:
    refused(rewrite(one, **changes), words, model=model)


def test_unknown_fields_are_left_alone(one: Path, model: UNet) -> None:
    assert replay(rewrite(one, remark="made on a Sunday"), model=model).exact


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(one: Path, model: UNet) -> None:
    rewrite(one, environment={**read_recipe(one)[1].environment, "device": "cuda", "threads": None})
    refused(one, "device: cuda is not visible", model=model, device="cuda")
    assert replay(one, model=model).exact
    rewrite(one, backend="cuda")
    reasons = replay(edited(one), model=model).reasons
    assert "device cuda then, cpu now" in reasons and "backend cuda then, auto now" in reasons


class Touch:
    """A pickle of this makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_recipe_is_never_executed(one: Path, model: UNet, tmp_path: Path) -> None:
    """Nothing it says is run, imported or unpickled."""
    trap, sprung = tmp_path / "trap.pt", tmp_path / "sprung"
    trap.write_bytes(pickle.dumps(Touch(sprung)))
    (tmp_path / "folder").mkdir()
    shutil.copy(trap, tmp_path / "folder" / "pytorch_model.bin")
    whole = one.read_bytes()
    code = f"__import__('pathlib').Path('{sprung}').touch()"
    for changes, words in (
        ({"model": str(trap)}, "model: .*pickle"),
        ({"model": str(tmp_path / "folder")}, "model: .*pickle"),
        ({"model": code}, "model: "),
        ({"model": "ddpm-mnist", "sampler": code}, "sampler: "),
        ({"model": "ddpm-mnist", "sampler": "__class__"}, "sampler: "),
        ({"dtype": code}, DAMAGED),
        ({"model": "ddpm-mnist", "options": {code: 1}}, ".* has no "),
        ({"text": pickle.dumps(Touch(sprung)).decode("latin-1")}, DAMAGED),
        ({"text": code}, DAMAGED),
    ):
        one.write_bytes(whole)
        refused(rewrite(one, **changes), words)
    assert not sprung.exists()


def test_any_byte_may_be_wrong(one: Path, tmp_path: Path) -> None:
    """A damaged file gives its picture and recipe as they were, or a UsageError."""
    whole, expected = one.read_bytes(), read_recipe(one)[1]
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(400):
        content = bytearray(whole)
        content[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        one.write_bytes(content)
        try:
            outcomes.add(read_recipe(one)[1] == expected)
        except fastgen.UsageError as error:
            assert str(error).startswith("path: ") and "\n" not in str(error)
            outcomes.add(None)
    assert outcomes == {True, None}


def test_encoded_pictures() -> None:
    for mode in ("L", "RGB"):
        picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode)
        text = recipes.encode_picture(picture)
        assert text.isascii() and np.array_equal(np.array(decode_picture(text)), np.array(picture))
        assert Image.open(io.BytesIO(base64.b64decode(text))).format == "PNG"
