"""`fastgen.replay`: makes an image again from the recipe in its PNG, and says how near it comes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastgen.backends import check_device, why_not
from fastgen.diffusion.samplers import Sampler, get_sampler
from fastgen.errors import UsageError
from fastgen.images import Samples
from fastgen.recipe import UNREADABLE, Recipe, decode_picture, read_recipe
from fastgen.sampling import sample


@dataclass(frozen=True)
class Replay:
    """The images made again, and how they differ from the file: the ``largest`` difference in grey levels (0 … 255),
    the ``share`` of values that differ, and the ``reasons``: what is not as it was when the file was written."""

    samples: Samples
    largest: int
    share: float
    reasons: list[str]

    @property
    def exact(self) -> bool:
        return self.largest == 0

    def as_dict(self) -> dict[str, Any]:
        recipe = asdict(self.samples.recipe)
        return {
            "exact": self.exact,
            "largest": self.largest,
            "share": self.share,
            "reasons": self.reasons,
            "recipe": recipe,
        }

    def __str__(self) -> str:
        if self.exact:
            return "exact: every pixel is as recorded"
        levels = "grey level" if self.largest == 1 else "grey levels"
        return f"off by up to {self.largest} {levels}, in {self.share:.2%} of the values: {'; '.join(self.reasons)}"


def replay(
    path: str | Path,
    *,
    model: str | Path | nn.Module | None = None,
    sampler: Sampler | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    progress: bool | None = None,
) -> Replay:
    """Draws the image (or the grid) of a PNG again, from the recipe it carries, and compares every pixel.

    model, sampler, device and backend replace what the recipe says; model is needed where it was a module without a
    name, sampler where it was a class of your own. An image that was one of a batch is drawn alone first and,
    where that differs, in a batch of the same size, since a convolution may sum in another order there.
    Raises UsageError for a file without a recipe, one that was resized, or a model that is not there.
    """
    picture, recipe = read_recipe(path)
    arguments = _arguments(recipe, path, model, sampler)
    arguments |= {"device": device or _device(recipe), "progress": progress}
    check_device(arguments["device"])
    arguments["backend"] = backend or _backend(recipe, torch.device(arguments["device"]))
    seeds, labels = recipe.seeds, recipe.labels
    if recipe.index is None:
        made = sample(seed=seeds, labels=labels, batch_size=recipe.batch, **arguments)
        largest, share = _difference(made, picture, path)
    else:
        made = sample(seed=seeds, labels=labels, **arguments)[0]
        largest, share = _difference(made, picture, path)
        if largest and recipe.batch > 1:
            count = recipe.batch
            labels = None if labels is None else labels * count
            made = sample(seed=seeds * count, labels=labels, batch_size=count, **arguments)[recipe.index]
            largest, share = _difference(made, picture, path)
    return Replay(made, largest, share, _reasons(recipe, made.recipe) if largest else [])


def _device(recipe: Recipe) -> str:
    """The recipe's, or what there is: a picture from a GPU is compared on a machine without one too."""
    there = recipe.environment.get("device") != "cuda" or torch.cuda.is_available()
    return recipe.environment.get("device", "cpu") if there else "cpu"


def _backend(recipe: Recipe, device: torch.device) -> str | None:
    """The recipe's, if it can run here."""
    runs = recipe.backend and why_not("diffusion_step", recipe.backend, device.type) is None
    return recipe.backend if runs else None


def _arguments(recipe: Recipe, path: str | Path, model: Any, sampler: Sampler | None) -> dict[str, Any]:
    """The arguments of `sample` that a recipe stands for, without seeds and labels."""
    if sampler is None and recipe.sampler is None:
        raise UsageError(
            f"sampler: {path} was made with a sampler of its own kind, which the recipe cannot name; pass it"
        )
    if model is None and not recipe.model:
        raise UsageError(f"model: {path} was made from a module without a name; give the model")
    image = None
    if recipe.images:
        try:
            pixels = [np.asarray(decode_picture(text)) for text in recipe.images]
            image = torch.from_numpy(np.stack([p.reshape(*p.shape[:2], -1) for p in pixels])).permute(0, 3, 1, 2)
        except UNREADABLE as error:
            raise UsageError(f"path: the start image in the recipe of {path} is damaged ({error})") from None
    guided = recipe.labels is not None
    return {
        "model": recipe.model if model is None else model,
        "sampler": sampler or get_sampler(recipe.sampler, **recipe.options),
        "steps": recipe.steps,
        "guidance": recipe.guidance if guided else None,
        "guidance_interval": recipe.guidance_interval if guided else None,
        "guidance_rescale": recipe.guidance_rescale if guided else None,
        "image": image,
        "strength": recipe.strength,
        "dtype": getattr(torch, recipe.dtype),
    }


def _difference(made: Samples, picture: Image.Image, path: str | Path) -> tuple[int, float]:
    """The largest difference and the share of values that differ."""
    ours = made.picture()
    if ours.size != picture.size:
        sizes = [f"{w}×{h}" for w, h in (picture.size, ours.size)]
        raise UsageError(
            f"path: {path} is {sizes[0]}, but its recipe makes {sizes[1]}: it was resized after it was made"
        )
    off = np.abs(np.asarray(ours, np.int16) - np.asarray(picture.convert(ours.mode), np.int16))
    return int(off.max()), float((off > 0).mean())


def _reasons(then: Recipe, now: Recipe) -> list[str]:
    """What differs between the two recipes, of all that a pixel depends on."""
    found = []
    if then.sha256 != now.sha256:
        found.append(f"the weights differ (SHA-256 {then.sha256[:12]}… then, {now.sha256[:12]}… now)")
    elif then.settings_sha256 != now.settings_sha256:
        found.append("the model's configuration, or the table of the sampler, differs")
    if (then.sampler, then.options) != (now.sampler, now.options):
        found.append(f"sampler {then.sampler} {then.options} then, {now.sampler} {now.options} now")
    if then.backend != now.backend:
        found.append(f"backend {then.backend or 'auto'} then, {now.backend or 'auto'} now")
    for name in sorted(then.environment.keys() | now.environment.keys()):
        before, after = then.environment.get(name), now.environment.get(name)
        if before != after:
            found.append(f"{name} {before} then, {after} now")
    return found or ["nothing that was recorded differs, so the picture was probably changed after it was made"]
