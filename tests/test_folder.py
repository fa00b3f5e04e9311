"""fastgen.sample_to_folder: a PNG each, whole or not at all; stopped anywhere, it goes on; and nothing is mixed."""

from __future__ import annotations

import errno
import io
import os
import weakref
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

import fastgen
from fastgen import folder as module
from fastgen.diffusion.samplers import DDIM, SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.folder import Written, image_name, sample_to_folder
from fastgen.models.unet import PRESETS, UNet
from fastgen.recipe import CHUNK, read_recipe


class Stub(nn.Module):
    """Stands where a network does and computes each image by itself, so that it is the same to the bit in any batch.

    ``batches`` lists the size of the batch of each call; call number ``stop`` is interrupted.
    """

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.config = replace(PRESETS["tiny"], image_size=8, channels=(16,), attention=(False,))
        self.diffusion, self.sampling = DiffusionConfig("cosine", 100), SamplingDefaults("ddim", 2, 1.0)
        self.weight = nn.Parameter(torch.tensor(weight))
        self.batches: list[int] = []
        self.stop: int | None = None

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt
        self.batches.append(len(x))
        return x * self.weight + (labels / 10).to(x.dtype)[:, None, None, None]


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.iterdir())}


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.iterdir()}


def names(n: int) -> list[str]:
    return [f"{i:06d}.png" for i in range(n)]


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = pixels(folder), pixels(other)
    assert list(ours) == list(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def refused(words: str, *args: Any, **arguments: Any) -> str:
    with pytest.raises(fastgen.UsageError) as caught:
        sample_to_folder(*args, **arguments)
    message = str(caught.value)
    assert message.startswith("output: ") and words in message and "\n" not in message and len(message) < 500, message
    return message


# What is written


def test_each_is_the_image_of_sample_with_its_recipe(stub: Stub, out: Path) -> None:
    arguments = {"seed": 7, "guidance": 3.0, "sampler": "ddpm", "batch_size": 2}
    assert fastgen.sample_to_folder(out, stub, 5, **arguments) == Written(out, made=5, found=0)
    expected = fastgen.sample(stub, 5, **arguments)
    assert sorted(os.listdir(out)) == names(5) and len({e.numpy().tobytes() for e in expected.images}) == 5
    for i, name in enumerate(names(5)):
        picture, recipe = read_recipe(out / name)
        assert np.array_equal(np.asarray(picture), expected.images[i, 0])
        assert recipe == expected[i].recipe
        assert (recipe.seeds, recipe.labels) == ([7 + i], [expected.labels[i].item()])
        assert (recipe.index, recipe.batch) == ([0, 1, 0, 1, 0][i], [2, 2, 2, 2, 1][i])
        assert fastgen.replay(out / name, model=stub).exact


def test_a_network_of_convolutions(out: Path) -> None:
    """The same batches as in `sample`, and so the same pixels; three channels."""
    torch.manual_seed(0)
    network = replace(PRESETS["tiny"], in_channels=3, out_channels=3)
    model = UNet(network, DiffusionConfig("cosine", 100), SamplingDefaults("ddim", 2)).eval()
    sample_to_folder(out, model, 3, batch_size=2)
    expected = fastgen.sample(model, 3, batch_size=2).images.permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(found, e) for found, e in zip(pixels(out).values(), expected, strict=True))


def test_a_sequence_of_seeds_needs_no_n(stub: Stub, out: Path) -> None:
    assert sample_to_folder(str(out), stub, seed=[5, 3], labels=[1, 2]).made == 2
    assert [read_recipe(out / name)[1].seeds for name in names(2)] == [[5], [3]]


def test_names_sort_as_numbers() -> None:
    assert [image_name(i) for i in (0, 42, 999_999, 1_000_000)] == [
        "000000.png", "000042.png", "999999.png", "1000000.png",
    ]  # fmt: skip


def test_ordinary_permissions(stub: Stub, out: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    sample_to_folder(out, stub, 1)
    assert (out / "000000.png").stat().st_mode & 0o777 == 0o666 & ~mask


# Again


def test_again_makes_nothing(stub: Stub, out: Path) -> None:
    sample_to_folder(out, stub, 5, batch_size=2)
    before, stub.batches[:] = state(out), []
    assert sample_to_folder(out, stub, 5, batch_size=3) == Written(out, made=0, found=5)
    assert state(out) == before and not stub.batches, "the network was called for nothing"


def test_more_and_fewer(stub: Stub, out: Path, tmp_path: Path) -> None:
    """A larger n adds, a smaller one leaves what is there."""
    sample_to_folder(out, stub, 3)
    before, stub.batches[:] = state(out), []
    assert sample_to_folder(out, stub, 5) == Written(out, made=2, found=3)
    assert stub.batches == [2, 2] and state(out).items() > before.items()
    assert sample_to_folder(out, stub, 2) == Written(out, made=0, found=2) and sorted(os.listdir(out)) == names(5)
    sample_to_folder(tmp_path / "whole", stub, 5)
    assert_same(out, tmp_path / "whole")


def test_makes_just_what_is_missing(stub: Stub, out: Path) -> None:
    sample_to_folder(out, stub, 7, labels=[3, 1, 4, 1, 5, 9, 2])
    expected, stub.batches[:] = pixels(out), []
    for i in (1, 2, 5):
        (out / names(7)[i]).unlink()
    assert sample_to_folder(out, stub, 7, labels=[3, 1, 4, 1, 5, 9, 2], batch_size=2) == Written(out, made=3, found=4)
    assert stub.batches == [2, 2, 1, 1] and all(np.array_equal(v, expected[k]) for k, v in pixels(out).items())
    assert [read_recipe(out / names(7)[i])[1].seeds for i in (1, 2, 5)] == [[1], [2], [5]]


def test_an_empty_file_is_made_again(stub: Stub, out: Path) -> None:
    """What a machine that lost power leaves."""
    sample_to_folder(out, stub, 3)
    expected = pixels(out)
    (out / "000001.png").write_bytes(b"")
    assert sample_to_folder(out, stub, 3) == Written(out, made=1, found=2)
    assert all(np.array_equal(v, expected[k]) for k, v in pixels(out).items())


def test_what_changes_no_pixel_may_change(stub: Stub, out: Path, tmp_path: Path) -> None:
    """The batch, the backend, and where the same weights lie."""
    torch.manual_seed(0)
    model = UNet(PRESETS["tiny"], DiffusionConfig("cosine", 100), SamplingDefaults("ddim", 2))
    for place in ("a", "b"):
        fastgen.save(model, tmp_path / place)
    sample_to_folder(out, tmp_path / "a", 2)
    assert sample_to_folder(out, tmp_path / "b", 2, batch_size=1, backend="reference", progress=False).found == 2


# Interrupted


@pytest.mark.parametrize(("call", "finished"), [(0, 0), (1, 0), (2, 3), (5, 6), (7, 9)])
def test_interrupted_in_the_network(stub: Stub, out: Path, tmp_path: Path, call: int, finished: int) -> None:
    """Ten images in batches of three, two calls each: what was finished stays, and the next run goes on."""
    stub.stop = call
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(out, stub, 10, batch_size=3, guidance=2.0)
    assert sorted(os.listdir(out)) == names(finished)
    stub.stop = None
    assert sample_to_folder(out, stub, 10, batch_size=3, guidance=2.0) == Written(out, 10 - finished, finished)
    sample_to_folder(tmp_path / "whole", stub, 10, batch_size=3, guidance=2.0)
    assert_same(out, tmp_path / "whole")


def test_interrupted_in_the_callback(stub: Stub, out: Path) -> None:
    seen = []

    def stop(row: int, x_t: Tensor, x0_hat: Tensor) -> None:
        seen.append(len(x_t))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(out, stub, 4, batch_size=2, callback=stop)
    assert seen == [2, 2, 2] and sorted(os.listdir(out)) == names(2)


def stop_while_saving(monkeypatch: pytest.MonkeyPatch, image: int, error: BaseException) -> None:
    """Image number ``image`` is half-written when ``error`` is raised."""
    real, count = Image.Image.save, []

    def save(self: Image.Image, f: Any, *args: Any, **kwargs: Any) -> None:
        count.append(f)
        if len(count) - 1 == image:
            Path(f).write_bytes(b"half")
            raise error
        real(self, f, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)


def test_interrupted_while_a_file_is_written(stub: Stub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_while_saving(patch, 4, KeyboardInterrupt())
        sample_to_folder(out, stub, 6, batch_size=3)
    assert sorted(os.listdir(out)) == names(4), "no half of a file, under whatever name"
    assert sample_to_folder(out, stub, 6, batch_size=3) == Written(out, made=2, found=4)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(stub: Stub, out: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with monkeypatch.context() as patch:
        stop_while_saving(patch, 2, OSError(code, os.strerror(code)))
        refused("no room for 000002.png", out, stub, 6, batch_size=3)
    assert sorted(os.listdir(out)) == names(2)
    assert sample_to_folder(out, stub, 6) == Written(out, made=4, found=2)


def test_leftovers_of_a_killed_run_are_no_images(stub: Stub, out: Path) -> None:
    """Nor is anything else that lies there; it is left alone."""
    sample_to_folder(out, stub, 2)
    strays = {".000002-x7k.png": b"half", "notes.txt": b"mine", "2.png": b""}
    for name, content in strays.items():
        (out / name).write_bytes(content)
    assert sample_to_folder(out, stub, 3) == Written(out, made=1, found=2)
    assert {name: (out / name).read_bytes() for name in strays} == strays


# Other settings


def unclipped(stub: Stub) -> Stub:
    """The same weights, read in another way."""
    stub.diffusion = replace(stub.diffusion, clip=None)
    return stub


START = Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8))
BASE: dict[str, Any] = {"seed": 3, "labels": [1, 2, 3], "steps": 3, "guidance": 2.0, "sampler": DDIM(0.5)}
OTHER: list[tuple[dict[str, Any], str]] = [
    ({"steps": 2}, "steps 3 there, 2 now"),
    ({"seed": 4}, "seeds [4] there, [5] now"),
    ({"seed": [3, 4, 9]}, "seeds [5] there, [9] now"),
    ({"labels": [1, 2, 4]}, "labels [3] there, [4] now"),
    ({"labels": None}, "labels "),
    ({"guidance": 2.5}, "guidance 2.0 there, 2.5 now"),
    ({"guidance_interval": (0.2, 0.8)}, "guidance_interval [0.0, 1.0] there, [0.2, 0.8] now"),
    ({"guidance_rescale": 0.5}, "guidance_rescale 0.0 there, 0.5 now"),
    ({"sampler": "ddpm"}, "sampler 'ddim' there, 'ddpm' now"),
    ({"sampler": DDIM(0.25)}, "options {'eta': 0.5"),
    ({"sampler": DDIM(0.5, spacing="leading")}, "'spacing': 'leading'"),
    ({"dtype": torch.float64}, "dtype 'float32' there, 'float64' now"),
    ({"image": START}, "strength None there, 0.8 now; another start image"),
    ({"model": Stub(0.25)}, "sha256 "),
    ({"model": unclipped(Stub())}, "settings_sha256 "),
]


@pytest.mark.parametrize(("change", "words"), OTHER, ids=[f"{i}_{next(iter(c))}" for i, (c, _) in enumerate(OTHER)])
def test_other_settings_are_refused(stub: Stub, out: Path, change: dict[str, Any], words: str) -> None:
    """Even where only the last image differs and the first is missing: before any work, and nothing is written."""
    sample_to_folder(out, stub, 3, **BASE)
    (out / "000000.png").unlink()
    before, stub.batches[:] = state(out), []
    model = change.get("model", stub)
    message = refused(words, out, model, 3, **{k: v for k, v in (BASE | change).items() if k != "model"})
    assert "was made with other settings" in message and "give another folder" in message
    assert state(out) == before and not stub.batches and not getattr(model, "batches", [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strength": 0.25}, "strength 0.5 there, 0.25 now"),
        ({"image": START.transpose(Image.Transpose.ROTATE_90)}, "(another start image)"),
        ({"image": None, "strength": None}, "strength 0.5 there, None now; another start image"),
    ],
)
def test_other_start_images_are_refused(stub: Stub, out: Path, change: dict[str, Any], words: str) -> None:
    start = {"image": START, "strength": 0.5}
    sample_to_folder(out, stub, 2, steps=4, **start)
    refused(words, out, stub, 2, steps=4, **(start | change))
    assert sample_to_folder(out, stub, 2, steps=4, **start).found == 2


@dataclass(frozen=True)
class OwnSampler:
    """Of no name that a recipe could give."""

    eta: float

    def plan(self, config: Any, steps: int) -> Any:
        return DDIM(self.eta).plan(config, steps)


def test_another_sampler_of_ones_own_is_refused(stub: Stub, out: Path) -> None:
    sample_to_folder(out, stub, 2, sampler=OwnSampler(0.5))
    refused("settings_sha256 ", out, stub, 3, sampler=OwnSampler(0.25))
    assert sample_to_folder(out, stub, 3, sampler=OwnSampler(0.5)) == Written(out, made=1, found=2)


def test_a_start_image_each(stub: Stub, out: Path) -> None:
    """Each is compared with its own."""
    starts = torch.from_numpy(np.random.default_rng(1).integers(256, size=(3, 1, 8, 8), dtype=np.uint8))
    sample_to_folder(out, stub, 3, image=starts)
    assert sample_to_folder(out, stub, 3, image=starts).found == 3
    starts[2, 0, 0, 0] ^= 1
    assert "000002.png" in refused("another start image", out, stub, 3, image=starts)


# In the way


def png(text: str | None, chunk: str = CHUNK) -> bytes:
    """A picture with ``text`` where the recipe belongs."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if text is not None:
        info.add_text(chunk, text, zip=True)
    START.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


HUGE = bytearray(png(None))
HUGE[16:24] = (60_000).to_bytes(4, "big") * 2  # its width and height
HUGE[29:33] = zlib.crc32(HUGE[12:29]).to_bytes(4, "big")

FOREIGN = {
    "text": b"not a picture",
    "no recipe": png(None),
    "long text": png("x" * 3_000_000, "comment"),  # more than Pillow unpacks
    "huge": bytes(HUGE),  # more than Pillow opens
    "folder": None,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused(stub: Stub, out: Path, kind: str) -> None:
    """Before any work, though there was something to do before it came to that file."""
    out.mkdir()
    file, content = out / "000002.png", FOREIGN[kind]
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert str(file) in refused("is in the way and was not written by fastgen", out, stub, 3)
    assert os.listdir(out) == [file.name] and not stub.batches and (content is None or file.read_bytes() == content)
    assert sample_to_folder(out, stub, 2).made == 2, "it is in nobody's way here"


@pytest.mark.parametrize("kind", ["half", "no JSON", "newer", "a list"])
def test_damaged_files_are_refused(stub: Stub, out: Path, kind: str) -> None:
    sample_to_folder(out, stub, 2)
    file = out / "000001.png"
    half = file.read_bytes()[:-40]
    file.write_bytes({"half": half, "no JSON": png("{"), "newer": png('{"format": 99}'), "a list": png("[]")}[kind])
    before = state(out)
    message = refused("delete it, or give another folder", out, stub, 3)
    assert str(file) in message and "path:" not in message and state(out) == before


# The folder


def test_the_folder_is_made_in_its_parent(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample_to_folder("out/", stub, 1).folder == Path("out") and os.listdir("out") == names(1)
    assert sample_to_folder(".", stub, 1).made == 1 and sorted(os.listdir()) == [*names(1), "out"]


def test_a_folder_that_cannot_be(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused("missing, in which out is to be, does not exist; create it first", tmp_path / "missing" / "out", stub)
    refused("file is a file; give a folder", tmp_path / "file", stub)
    refused("does not exist", tmp_path / "file" / "out", stub)
    assert os.listdir(tmp_path) == ["file"] and not stub.batches


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_cannot_be_written(stub: Stub, out: Path, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may write anywhere, so the system's answer is put in its mouth."""
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((Path(path), mode)))
    if there:
        out.mkdir()
    refused(f"the folder {out} is not writable", out, stub)
    assert asked == [(out if there else out.parent, os.W_OK)] and not stub.batches and out.exists() == there


def test_wrong_arguments_leave_nothing(stub: Stub, out: Path) -> None:
    for wrong in ({"n": 0}, {"steps": 0}, {"labels": 10}, {"batch_size": 0}, {"strength": 0.5}):
        with pytest.raises(fastgen.UsageError):
            sample_to_folder(out, stub, **wrong)
    assert not out.exists() and not stub.batches


def test_memory_does_not_grow_with_n(stub: Stub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is made, all but the one before it are gone."""
    seen: list[weakref.ref] = []
    real = module.run

    def watched(*args: Any) -> Any:
        for samples in real(*args):
            seen.append(weakref.ref(samples))
            yield samples
            del samples
            assert sum(ref() is not None for ref in seen) <= 1

    monkeypatch.setattr(module, "run", watched)
    sample_to_folder(out, stub, 12, batch_size=2)
    assert len(seen) == 6 and len(os.listdir(out)) == 12
