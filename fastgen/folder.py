"""`fastgen.sample_to_folder`: any number of images, a PNG each, written as they are made; goes on where it stopped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from fastgen.atomic import sweep
from fastgen.errors import UsageError
from fastgen.recipe import CHUNK, UNREADABLE, Recipe, read_recipe
from fastgen.sampling import Job, prepare, run

# What decides an image. The name of the model, the batch, the backend and the machine are not among it.
DECISIVE = (
    "sha256", "settings_sha256", "seeds", "labels", "sampler", "options", "steps", "guidance", "guidance_interval",
    "guidance_rescale", "strength", "images", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Written:
    """What `sample_to_folder` did: images ``made`` now and ``found`` from an earlier run, in ``folder``."""

    folder: Path
    made: int
    found: int


def sample_to_folder(
    folder: str | Path, model: str | Path | nn.Module, n: int | None = None, **arguments: Any
) -> Written:
    """Writes n images into ``folder`` as 000000.png, 000001.png, …, each whole or not at all, with its recipe.

    Takes the arguments of `sample`. Memory does not grow with n. Images that an earlier run left there are kept and
    not made again, so after an interruption the same call goes on; with a larger n it adds to them. The folder
    is made if its parent exists. Raises UsageError before any work where the folder holds images of other settings.
    """
    folder = Path(folder)
    _check_folder(folder)
    job = prepare(model, n, **arguments)
    todo = [i for i in range(len(job.seeds)) if not _finished(folder / image_name(i), job, i)]
    folder.mkdir(exist_ok=True)
    sweep(folder)
    batches = [todo[i : i + job.batch_size] for i in range(0, len(todo), job.batch_size)]
    for batch, samples in zip(batches, run(job, batches), strict=True):
        for k, i in enumerate(batch):
            samples[k].save(folder / image_name(i))
    return Written(folder, len(todo), len(job.seeds) - len(todo))


def image_name(i: int) -> str:
    return f"{i:06d}.png"


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output: {folder} is a file; give a folder")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise UsageError(
            f"output: the folder {folder.parent}, in which {folder.name} is to be, does not exist; create it first"
        )
    if not os.access(folder if folder.exists() else folder.absolute().parent, os.W_OK):
        raise UsageError(f"output: the folder {folder} is not writable")


def _finished(file: Path, job: Job, i: int) -> bool:
    """Whether the i-th image is there; UsageError where the file is another's."""
    try:
        if not file.stat().st_size:  # a machine that lost power
            return False
    except FileNotFoundError:
        return False
    try:
        with Image.open(file) as opened:
            foreign = CHUNK not in opened.info
    except UNREADABLE:
        foreign = True
    if foreign:
        raise UsageError(f"output: {file} is in the way and was not written by fastgen; give another folder")
    try:
        found = read_recipe(file)[1]
    except UsageError as error:
        raise UsageError(f"output: {str(error).partition(': ')[2]}; delete it, or give another folder") from None
    expected = job.recipe_of([i])
    differing = [name for name in DECISIVE if _plain(found, name) != _plain(expected, name)]
    if differing:
        there = "; ".join(
            "another start image" if name == "images"
            else f"{name} {_plain(found, name)!r} there, {_plain(expected, name)!r} now"
            for name in differing
        )  # fmt: skip
        raise UsageError(f"output: {file} was made with other settings ({there}); give another folder")
    return True


def _plain(recipe: Recipe, name: str) -> Any:
    value = getattr(recipe, name)
    return list(value) if isinstance(value, tuple) else value
