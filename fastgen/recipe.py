"""The recipe of an image: everything that `replay` needs to make it again, kept in the PNG itself.

It is JSON in a compressed text chunk named "fastgen", and if it is long in "fastgen-1", … too.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict, dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import PIL
import torch
from PIL import Image, PngImagePlugin

from fastgen import backends
from fastgen.errors import UsageError
from fastgen.version import __version__

CHUNK = "fastgen"
FORMAT = 1
PART = 2**20  # Pillow opens no PNG with a longer text chunk
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for a bad picture


@dataclass(frozen=True)
class Recipe:
    """What made some images. ``model`` is a shipped name or a path ("" for a module without one), ``sha256`` the
    fingerprint of its weights, ``sampler`` a name and its options. ``images``: the start images as base64 PNGs, one
    for all or one each. ``batch`` is how many images were computed at once and ``index`` the place among them of the
    one in this file (None: the file shows them all). ``environment``: versions and hardware. ``settings_sha256``: of
    the model's configuration and diffusion and, for a sampler without a name, of its table."""

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
    settings_sha256: str = ""

    def to_json(self) -> str:
        """JSON in ASCII; numbers of NumPy among a sampler's options become plain ones."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"), default=float)


def environment(device: torch.device) -> dict[str, Any]:
    """What, beside the recipe, the last bits of an image depend on."""
    cpu = device.type == "cpu"
    return {
        "fastgen": __version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,  # it draws the labels of a grid
        "device": device.type,
        "hardware": torch.backends.cpu.get_cpu_capability() if cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if cpu else None,
        "kernels": {op: _chosen(op, device) for op in ("group_norm_act", "diffusion_step")},
    }


def _chosen(op: str, device: torch.device) -> str | None:
    """The backend that an op runs on here, `use_backend` and FASTGEN_BACKEND included; None where it cannot."""
    try:
        return backends.resolve(op, device)
    except backends.BackendError:
        return None


def png_info(recipe: Recipe) -> PngImagePlugin.PngInfo:
    """The text chunks that carry ``recipe``."""
    info, text = PngImagePlugin.PngInfo(), recipe.to_json()
    for i in range(-(-len(text) // PART)):
        info.add_text(_chunk(i), text[i * PART : (i + 1) * PART], zip=True)
    return info


def _chunk(i: int) -> str:
    return f"{CHUNK}-{i}" if i else CHUNK


def read_recipe(path: str | Path) -> tuple[Image.Image, Recipe]:
    """The picture in a PNG file and its recipe; UsageError where it is no picture or carries none."""
    path = Path(path)
    try:
        with Image.open(path) as opened:
            opened.load()
            text = "".join(takewhile(lambda part: part is not None, (opened.info.get(_chunk(i)) for i in count())))
            picture = opened.copy()
    except FileNotFoundError:
        raise UsageError(f"path: there is no file {path}") from None
    except UNREADABLE as error:
        raise UsageError(f"path: {path} cannot be read as a picture ({error})") from None
    if not text:
        raise UsageError(
            f"path: {path} carries no recipe: fastgen did not write it, or a program that edited it cut it out"
        )
    return picture, _parse(text, path)


def _parse(text: str, path: Path) -> Recipe:
    """The recipe in a chunk's text; UsageError where it is not whole."""
    damaged = f"path: the recipe in {path} is damaged"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{damaged} ({error})") from None
    if not isinstance(values, dict) or not _fits(values.get("format"), int):
        raise UsageError(f"{damaged} (no format)")
    if values["format"] > FORMAT:
        raise UsageError(f"path: the recipe in {path} was written by a newer fastgen; upgrade this one")
    kinds = get_type_hints(Recipe)
    if wrong := [name for name, kind in kinds.items() if not _fits(values.get(name), kind)]:
        raise UsageError(f"{damaged} ({', '.join(wrong)})")
    recipe = Recipe(**{name: values.get(name) for name in kinds})
    if not isinstance(getattr(torch, recipe.dtype, None), torch.dtype):
        raise UsageError(f"{damaged} (dtype)")
    if recipe.index is not None and not (0 <= recipe.index < recipe.batch and len(recipe.seeds) == 1):
        raise UsageError(f"{damaged} (index)")
    return replace(recipe, guidance_interval=tuple(recipe.guidance_interval))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON, which has lists for tuples, is of the kind that `Recipe` says."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(value, k) for k in inner)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is list:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    return isinstance(value, int | float if kind is float else origin or kind) and not isinstance(value, bool)


def encode_picture(picture: Image.Image) -> str:
    """A picture as the base64 text of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode_picture(text: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    picture.load()
    return picture
