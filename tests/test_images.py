"""Samples: pictures, grids and single images out of many; a file is written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen import atomic, images
from fastgen.images import Samples, check_output, concatenate, writing
from fastgen.recipe import CHUNK, Recipe, read_recipe

RECIPE = Recipe(
    model="digits", sha256="0f" * 32, seeds=[], labels=None, sampler="ddim", options={"eta": 0.5}, steps=3,
    guidance=1.5, guidance_interval=(0.25, 1.0), guidance_rescale=0.5, strength=None, images=[], dtype="float32",
    backend=None, batch=3, environment={"torch": "9"},
)  # fmt: skip


def samples(n: int, channels: int = 1, labels: bool = True, starts: int = 0) -> Samples:
    """n images in batches of three, with a recipe."""
    torch.manual_seed(0)
    pixels = torch.randint(256, (n, channels, 12, 16), dtype=torch.uint8)
    seeds = torch.arange(n) * 7 - 5
    classes = torch.arange(n) % 10 if labels else None
    recipe = replace(
        RECIPE,
        seeds=seeds.tolist(),
        labels=None if classes is None else classes.tolist(),
        images=[f"start {i}" for i in range(starts)],
    )
    return Samples(pixels, seeds, classes, recipe)


# One of many


@pytest.mark.parametrize("labels", [True, False])
def test_one_of_many(labels: bool) -> None:
    made = samples(7, labels=labels)
    for i in range(7):
        one = made[i]
        assert len(one) == 1 and torch.equal(one.images, made.images[i : i + 1])
        assert one.seeds.tolist() == one.recipe.seeds == [7 * i - 5]
        assert (one.labels.tolist() == one.recipe.labels == [i]) if labels else one.labels is one.recipe.labels is None


@pytest.mark.parametrize(("n", "starts"), [(7, 0), (7, 1), (7, 7), (6, 0), (2, 2), (1, 1)])
def test_recipe_of_one(n: int, starts: int) -> None:
    """It knows the batch in which its image was computed, of which the last may be smaller, and the place there."""
    made = samples(n, starts=starts)
    for i in range(n):
        recipe = made[i].recipe
        assert recipe.index == i % 3 and recipe.batch == min(3, n - i // 3 * 3)
        assert recipe.images == ([f"start {i}"] if starts > 1 else made.recipe.images)
        assert replace(recipe, seeds=[], labels=None, images=[], batch=3, index=None) == RECIPE
        assert made[i][0].recipe == recipe, "one of one is itself"
    assert made.recipe.index is None


def test_negative_indices_and_iteration() -> None:
    made = samples(5)
    assert made[-1].seeds.tolist() == [23] and made[-5].recipe == made[0].recipe
    assert [one.seeds.item() for one in made] == made.seeds.tolist()
    for beyond in (5, -6):
        with pytest.raises(IndexError):
            made[beyond]


def test_samples_without_a_recipe(tmp_path: Path) -> None:
    made = replace(samples(4), recipe=None)
    assert made[2].recipe is None and concatenate([made, made]).recipe is None
    assert CHUNK not in Image.open(made.save(tmp_path / "grid.png")).info


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("starts", [0, 1, 3])
def test_concatenate(labels: bool, starts: int) -> None:
    whole = samples(7, labels=labels, starts=7 if starts == 3 else starts)
    parts = []
    for places in (slice(0, 3), slice(3, 6), slice(6, 7)):
        classes = None if whole.labels is None else whole.labels[places]
        recipe = replace(
            whole.recipe,
            seeds=whole.recipe.seeds[places],
            labels=None if classes is None else classes.tolist(),
            images=whole.recipe.images[places] if starts == 3 else whole.recipe.images,
            batch=len(whole.seeds[places]),
        )
        parts.append(Samples(whole.images[places], whole.seeds[places], classes, recipe))
    again = concatenate(parts)
    assert torch.equal(again.images, whole.images) and torch.equal(again.seeds, whole.seeds)
    assert again.labels is whole.labels is None or torch.equal(again.labels, whole.labels)
    assert again.recipe == whole.recipe


# Pictures


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
    zoom, caption = images.CELL // 16, images.CAPTION_HEIGHT if labels else 0
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


@pytest.mark.parametrize("ending", [".png", ".PNG", ".apng", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".pdf"])
@pytest.mark.parametrize("n", [1, 4])
def test_every_png_carries_its_recipe(tmp_path: Path, n: int, ending: str) -> None:
    made = samples(n)
    file = made.save(tmp_path / f"picture{ending}")
    assert file.stat().st_size > 100 and os.listdir(tmp_path) == [file.name]
    if ending.lower().endswith("png"):
        picture, found = read_recipe(file)
        assert found == (made[0].recipe if n == 1 else made.recipe) and found.index == (0 if n == 1 else None)
        assert np.array_equal(np.array(picture), np.array(made.picture()))
    elif ending != ".pdf":
        assert CHUNK not in Image.open(file).info


# Writing


def fails_halfway(error: BaseException) -> Any:
    def save(self: Image.Image, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise error

    return save


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["making", "writing", "renaming"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str) -> None:
    """One line that names the argument; the old file stays as it was, and nothing half-written stays at all."""
    (tmp_path / "old.png").write_text("old")
    error = OSError(code, os.strerror(code))

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if where == "making":
        monkeypatch.setattr(atomic, "_create", fail)
    elif where == "writing":
        monkeypatch.setattr(Image.Image, "save", fails_halfway(error))
    else:
        monkeypatch.setattr(atomic.os, "replace", fail)
    for name in ("old.png", "new.png"):
        with pytest.raises(fastgen.UsageError, match=f"^output: no room for {name} .*{tmp_path}") as caught:
            samples(2).save(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["old.png"] and (tmp_path / "old.png").read_text() == "old"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), ValueError("no such mode"), KeyboardInterrupt()])
def test_another_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """It goes through as it is."""
    (tmp_path / "old.png").write_text("old")
    monkeypatch.setattr(Image.Image, "save", fails_halfway(error))
    for name in ("old.png", "new.png"):
        with pytest.raises(type(error)) as caught:
            samples(1).save(tmp_path / name)
        assert caught.value is error
    assert os.listdir(tmp_path) == ["old.png"] and (tmp_path / "old.png").read_text() == "old"


def test_writing_replaces_at_the_end(tmp_path: Path) -> None:
    """Whoever reads meanwhile sees the old file."""
    file = tmp_path / "a.png"
    file.write_text("old")
    with writing(file) as work:
        work.write_text("new")
        assert file.read_text() == "old" and work.parent == tmp_path and work.suffix == ".png"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["a.png"]


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


def test_a_folder_that_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.os, "access", lambda path, mode: (Path(path), mode) != (tmp_path, os.W_OK))
    with pytest.raises(fastgen.UsageError, match=r"^output: .*not writable"):
        check_output(tmp_path / "a.png")


def test_slices() -> None:
    """Some of the images, each with its own recipe, also out of a grid's."""
    some = samples(7)[1:6:2]
    assert len(some) == 3 and some.seeds.tolist() == some.recipe.seeds == [2, 16, 30]
    assert some.labels.tolist() == some.recipe.labels == [1, 3, 5] and some.recipe.index is None
    assert torch.equal(some.images, samples(7).images[1:6:2])
    with pytest.raises(ValueError, match="none of the 7 images"):
        samples(7)[7:]
