"""The arguments of `fastgen.sample`, checked and completed. What is wrong is a UsageError that names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastgen import ops
from fastgen.errors import UsageError
from fastgen.images import Samples
from fastgen.ops.philox import Stream
from fastgen.recipe import UNREADABLE

LOWEST, HIGHEST = -(2**63), 2**63 - 1
STRENGTH = 0.8  # diffusers' default

StartImage = str | Path | Image.Image | Tensor | Samples


def seeds_of(seed: int | Sequence[int] | Tensor, n: int | None) -> Tensor:
    """The seed of each image, int64 [n]: seed, seed + 1, … for a number, the sequence itself otherwise."""
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise UsageError(f"n: must be a whole number of at least 1, not {n!r}")
    given, seed = seed, _plain(seed)
    if isinstance(seed, int) and not isinstance(seed, bool):
        n = 1 if n is None else n
        if not LOWEST <= seed <= HIGHEST - (n - 1):
            raise UsageError(f"seed: must be a whole number that fits in 64 bits with n added, not {seed!r}")
        return torch.arange(n, dtype=torch.int64) + seed
    try:
        numbers = [_plain(s) for s in seed]
    except TypeError:
        numbers = []
    whole = [isinstance(s, int) and not isinstance(s, bool) and LOWEST <= s <= HIGHEST for s in numbers]
    if isinstance(seed, str | bytes) or not numbers or not all(whole):
        raise UsageError(
            f"seed: must be a whole number that fits in 64 bits, or a sequence of such, not {_shown(given)}"
        )
    if n not in (None, len(numbers)):
        raise UsageError(f"seed: {len(numbers)} were given for {n} images; give one number, or one for each image")
    return torch.tensor(numbers, dtype=torch.int64)


def _plain(value: Any) -> Any:
    """Numbers and lists of Python instead of those of torch and NumPy."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _shown(value: Any) -> str:
    """A value in a message: short, and on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def labels_of(network: nn.Module, labels: int | Sequence[int] | Tensor | None, seeds: Tensor) -> Tensor | None:
    """The class of each image, int64 [n]; drawn from the image's own seed where none is given."""
    classes = network.config.num_classes
    if classes is None:
        if labels is not None:
            raise UsageError("labels: this model is unconditional; leave them out")
        return None
    if labels is None:
        return (ops.philox_bits(seeds, 1, stream=Stream.LABEL, backend="reference")[:, 0] * classes) >> 32
    try:
        chosen = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0, 0)
    if chosen.ndim > 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise UsageError(f"labels: must be a class or a sequence of classes, not {_shown(labels)}")
    chosen = chosen.long().cpu()
    chosen = chosen.expand(len(seeds)).clone() if chosen.ndim == 0 else chosen
    if len(chosen) != len(seeds):
        raise UsageError(
            f"labels: give one class, or one for each of the {len(seeds)} images; {len(chosen)} were given"
        )
    wrong = chosen[(chosen < 0) | (chosen >= classes)]
    if len(wrong):
        raise UsageError(f"labels: classes are 0 to {classes - 1}; {wrong[0].item()} is not one")
    return chosen


def check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise UsageError(f"batch_size: must be a whole number of at least 1, not {batch_size!r}")


def check_graph(graph: Any) -> None:
    if graph is not None and graph is not False and graph not in ("step", "loop"):
        raise UsageError(f"graph: must be 'step', 'loop', False or None, not {_shown(graph)}")


def check_flag(name: str, value: Any) -> None:
    """Raises UsageError where the argument ``name`` is neither True nor False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name}: must be True or False, not {_shown(value)}")


def check_module(model: nn.Module) -> None:
    """Raises UsageError for a module that does not say how to sample from it."""
    missing = [name for name in ("config", "diffusion", "sampling") if not hasattr(model, name)]
    if missing:
        raise UsageError(
            f"model: a generator from fastgen.load or fastgen.models is needed; "
            f"this {type(model).__name__} has no {', '.join(missing)}"
        )
    config = model.config
    if getattr(config, "out_channels", config.in_channels) != config.in_channels:
        raise UsageError(
            f"model: gives {config.out_channels} channels for {config.in_channels}; an image is drawn from as many"
        )


def check_guidance(
    network: nn.Module, scale: float | None, interval: tuple[float, float] | None, rescale: float | None
) -> tuple[float, tuple[float, float], float]:
    """Scale, interval and rescale, completed; without guidance where the model has no classes."""
    if network.config.num_classes is None:
        given = {"guidance": None if scale == 1 else scale, "guidance_interval": interval, "guidance_rescale": rescale}
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"{name}: this model is unconditional, so there is nothing to guide to; leave it out")
        return 1.0, (0.0, 1.0), 0.0
    scale = network.sampling.guidance if scale is None else scale
    if not _is_number(scale) or not 0 <= scale < float("inf"):
        raise UsageError(f"guidance: must be a number of at least 0 (1 is none), not {scale!r}")
    if scale != 1 and not getattr(network.config, "null_class", True):
        raise UsageError("guidance: this model has no null class to guide away from; give 1, or leave it out")
    interval = (0.0, 1.0) if interval is None else interval
    if (
        not isinstance(interval, Sequence)
        or len(interval) != 2
        or not all(map(_is_number, interval))
        or not 0 <= interval[0] <= interval[1] <= 1
    ):
        raise UsageError(f"guidance_interval: must be two rising numbers between 0 and 1, not {interval!r}")
    rescale = 0.0 if rescale is None else rescale
    if not _is_number(rescale) or not 0 <= rescale <= 1:
        raise UsageError(f"guidance_rescale: must be a number between 0 and 1, not {rescale!r}")
    return float(scale), (float(interval[0]), float(interval[1])), float(rescale)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_strength(strength: float | None, image: Any) -> float | None:
    """The strength that goes with a start image; None without one."""
    if image is None:
        if strength is not None:
            raise UsageError("strength: goes with a start image; give image too, or leave it out")
        return None
    strength = STRENGTH if strength is None else strength
    if not _is_number(strength) or not 0 <= strength <= 1:
        raise UsageError(f"strength: must be a number between 0 and 1, not {strength!r}")
    return float(strength)


def start_images(network: nn.Module, image: StartImage | None, n: int) -> Tensor | None:
    """The start images, uint8 [1 or n, C, H, W], of the size that the model draws; None where none is given."""
    if image is None:
        return None
    config = network.config
    wanted = (config.in_channels, config.image_size, config.image_size)
    if isinstance(image, str | Path):
        image = _open(image)
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":  # which Pillow would cut off at 255
            raise UsageError(f"image: must have 8 bits a channel, not mode {image.mode}; convert it first")
        pixels = np.array(image.convert({1: "L", 3: "RGB"}.get(wanted[0], image.mode)))
        image = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
    if isinstance(image, Samples):
        image = image.images
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim not in (3, 4):
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else _shown(image)
        raise UsageError(f"image: must be a picture, a file of one, or uint8 [C, H, W] or [n, C, H, W], not {found}")
    image = image[None] if image.ndim == 3 else image
    if tuple(image.shape[1:]) != wanted:
        raise UsageError(
            f"image: must have the model's shape {list(wanted)}, not {list(image.shape[1:])}; resize it first"
        )
    if len(image) not in (1, n):
        raise UsageError(f"image: give one, or one for each of the {n} images; {len(image)} were given")
    return image.cpu().contiguous()


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return opened.copy()
    except FileNotFoundError:
        raise UsageError(f"image: there is no file {path}") from None
    except UNREADABLE as error:
        raise UsageError(f"image: {path} cannot be read as a picture ({error})") from None
