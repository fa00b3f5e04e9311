"""The recipe of an image: everything that `replay` needs to make it again, kept in the PNG itself.

It is JSON in a compressed text chunk named "fastgen".
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from fastgen import backends
from fastgen.errors import UsageError
from fastgen.version import __version__

CHUNK = "fastgen"
FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """What made some images. ``model`` is a shipped name or a path ("" for a module without one), ``sha256`` the
    fingerprint of its weights, ``sampler`` a name and its options. ``images``: the start images as base64 PNGs, one
    for all or one each. ``batch`` is how many images were computed at once and ``index`` the place among them of the
    one in this file (None: the file shows them all). ``environment``: versions and hardware."""

    model: str
    sha256: str
    seeds: list[int]
    labels: list[int] | None
    sampler: str | None
    options: dict[str, Any]
    steps: int
    guidance: float
    guidance_interval: tuple[float, float]
    guidance_rescale: float
    strength: float | None
    images: list[str]
    dtype: str
    backend: str | None
    batch: int
    index: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))


def environment(device: torch.device) -> dict[str, Any]:
    """What, beside the recipe, the last bits of an image depend on."""
    cpu = device.type == "cpu"
    return {
        "fastgen": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "hardware": torch.backends.cpu.get_cpu_capability() if cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if cpu else None,
        "kernels": {op: backends.preferred(op, device.type) for op in ("group_norm_act", "diffusion_step")},
    }


def png_info(recipe: Recipe) -> PngImagePlugin.PngInfo:
    """The text chunk that carries ``recipe``."""
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, recipe.to_json(), zip=True)
    return info


def read_recipe(path: str | Path) -> tuple[Image.Image, Recipe]:
    """The picture in a PNG file and its recipe; UsageError where it is no picture or carries none."""
    path = Path(path)
    try:
        with Image.open(path) as opened:
            opened.load()
            text = opened.info.get(CHUNK)
            picture = opened.copy()
    except FileNotFoundError:
        raise UsageError(f"path: there is no file {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"path: {path} cannot be read as a picture ({error})") from None
    if text is None:
        raise UsageError(
            f"path: {path} carries no recipe: fastgen did not write it, or a program that edited it cut it out"
        )
    try:
        values = json.loads(text)
        if values.pop("format") > FORMAT:
            raise UsageError(f"path: the recipe in {path} was written by a newer fastgen; upgrade this one")
        known = {f.name for f in fields(Recipe)}
        return picture, Recipe(**{k: v for k, v in values.items() if k in known})
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"path: the recipe in {path} is damaged ({error})") from None


def encode_picture(picture: Image.Image) -> str:
    """A picture as the base64 text of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode_picture(text: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    picture.load()
    return picture
