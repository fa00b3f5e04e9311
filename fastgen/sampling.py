"""`fastgen.sample`: images from a model, the same ones at any batch size.

Image i has the seed ``seed + i``, and everything random about it (where it starts, the noise of
each step, a label not given) is drawn from that seed alone.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import ops
from fastgen.backends import check_backend, check_device, use_backend
from fastgen.checkpoint import load, umask
from fastgen.diffusion.samplers import Sampler, get_sampler
from fastgen.errors import UsageError
from fastgen.ops.philox import Stream

BATCH_SIZE = 64
CAPTION_HEIGHT = 16
CELL = 84  # a grid shows small images enlarged, by whole factors, up to about this many pixels


@dataclass(frozen=True)
class Samples:
    """Images and what made them. images: uint8 [N, C, H, W]; seeds: int64 [N]; labels: int64 [N] or None."""

    images: Tensor
    seeds: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to_pil(self) -> list[Image.Image]:
        """One PIL image each: greyscale for one channel, RGB for three. Raises ValueError for other counts."""
        channels = self.images.shape[1]
        if channels not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels to become pictures, not {channels}")
        pixels = self.images.permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(p[:, :, 0] if channels == 1 else p) for p in pixels]

    def grid(self) -> Image.Image:
        """All images on one sheet, row by row, each with its label beneath."""
        pictures = self.to_pil()
        columns = min(len(pictures), 10 if len(pictures) % 10 == 0 else max(1, round(len(pictures) ** 0.5 + 0.49)))
        zoom = max(1, CELL // max(pictures[0].size))
        width, height = (side * zoom for side in pictures[0].size)
        caption = 0 if self.labels is None else CAPTION_HEIGHT
        rows = -(-len(pictures) // columns)
        sheet = Image.new("RGB", (columns * (width + 2) + 2, rows * (height + caption + 2) + 2), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(CAPTION_HEIGHT - 4)
        for i, picture in enumerate(pictures):
            x, y = 2 + i % columns * (width + 2), 2 + i // columns * (height + caption + 2)
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
            if self.labels is not None:
                draw.text((x + width // 2, y + height + 1), str(self.labels[i].item()), "black", font, anchor="ma")
        return sheet

    def save(self, path: str | Path) -> Path:
        """Writes one picture: the image itself for one, a labelled grid for more. Whole or not at all."""
        path = check_output(path)
        picture = self.to_pil()[0] if len(self) == 1 else self.grid()
        descriptor, work = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        try:
            with os.fdopen(descriptor, "wb") as f:
                picture.save(f, format=Image.registered_extensions()[path.suffix.lower()])
            os.chmod(work, 0o666 & ~umask())
            os.replace(work, path)
        except BaseException:
            Path(work).unlink(missing_ok=True)
            raise
        return path


def check_output(path: str | Path) -> Path:
    """The path of a picture to be written; UsageError where its folder or its format does not exist."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"output: {path} is a folder; give a file name, such as {path / 'samples.png'}")
    if not path.parent.is_dir():
        raise UsageError(f"output: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"output: the folder {path.parent} is not writable")
    extensions = Image.registered_extensions()
    if path.suffix.lower() not in extensions or extensions[path.suffix.lower()] not in Image.SAVE:
        raise UsageError(f"output: cannot write {path.suffix or 'a file without an ending'!r}; use .png, .jpg or .webp")
    return path


def sample(
    model: str | Path | nn.Module,
    n: int = 1,
    *,
    seed: int = 0,
    labels: int | Sequence[int] | Tensor | None = None,
    steps: int | None = None,
    sampler: str | Sampler | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    progress: bool | None = None,
) -> Samples:
    """n images from a model: `Samples` with uint8 images [n, C, H, W], seeds [n] and labels [n] or None.

    model: a shipped name, a checkpoint folder, or a module from `load`. Image i has the seed
    ``seed + i`` and is the same at any batch size. labels: one class, or one for each image, in
    0 … num_classes-1; None draws each from its image's seed. steps, sampler ("ddim", "ddpm" or an
    object from `diffusion.samplers`) and guidance (1 is none) default to what the model was
    shipped with. device: "cuda" where there is one, else "cpu", for a model given by name; a
    module stays where it is. dtype: of the network; the image itself is kept in fp32. backend: of
    every op, see `use_backend`. progress: a bar; None shows one on a terminal only.

    Raises UsageError, a ValueError, that names the argument and the way out.
    """
    _check_counts(n, seed, batch_size)
    check_device(device)
    check_backend(backend)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype: must be a floating torch.dtype such as torch.bfloat16, not {dtype!r}")
    if isinstance(model, nn.Module):
        _check_module(model)
        network = _placed(model, device, dtype)
    else:
        network = load(model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype=dtype)
    defaults = network.sampling
    plan = get_sampler(defaults.sampler if sampler is None else sampler).plan(
        network.diffusion, min(defaults.steps, network.diffusion.timesteps) if steps is None else steps
    )
    guidance = _check_guidance(network, defaults.guidance if guidance is None else guidance, asked=guidance is not None)
    seeds = torch.arange(n, dtype=torch.int64) + seed
    chosen = _labels(network, labels, seeds)
    size = batch_size or BATCH_SIZE
    batches = [slice(i, min(i + size, n)) for i in range(0, n, size)]
    pieces = []
    with (
        torch.inference_mode(),
        use_backend(backend) if backend else nullcontext(),
        _evaluating(network),
        _bar(len(batches) * len(plan.timesteps), progress) as bar,
    ):
        place = next(network.parameters()).device
        for batch in batches:
            wanted = None if chosen is None else chosen[batch].to(place)
            x = _denoise(network, plan, seeds[batch].to(place), wanted, guidance, bar)
            pieces.append(ops.to_uint8(x).permute(0, 3, 1, 2).contiguous().cpu())
    return Samples(torch.cat(pieces), seeds, chosen)


def _denoise(network: nn.Module, plan, seeds: Tensor, labels: Tensor | None, guidance: float, bar: tqdm) -> Tensor:
    """x_0 [N, C, H, W] fp32, from each image's own noise, by the plan's steps."""
    config, device = network.config, seeds.device
    dtype = next(network.parameters()).dtype
    x = ops.philox_normal(seeds, (config.in_channels, config.image_size, config.image_size), stream=Stream.INITIAL)
    x = x.contiguous(memory_format=torch.channels_last)
    coefficients = plan.coefficients.to(device)
    rows, timesteps = torch.arange(len(coefficients), device=device), plan.timesteps.to(device)
    scale = None
    if guidance != 1:
        scale = torch.tensor(guidance, device=device)
        labels = torch.cat([torch.full_like(labels, config.num_classes), labels])
    for row, t in zip(rows.unbind(), timesteps.unbind(), strict=True):  # tensors: nothing waits for the device
        inputs = (x if scale is None else torch.cat([x, x])).to(dtype)
        x, _ = ops.diffusion_step(
            x, network(inputs, t, labels), coefficients, row,
            guidance=scale, clip=network.diffusion.clip, seeds=seeds if plan.noisy else None,
        )  # fmt: skip
        bar.update()
    return x


def _check_counts(n: int, seed: int, batch_size: int | None) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UsageError(f"n: must be a whole number of at least 1, not {n!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed <= 2**63 - n:
        raise UsageError(f"seed: must be a whole number that fits in 64 bits with n added, not {seed!r}")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise UsageError(f"batch_size: must be a whole number of at least 1, not {batch_size!r}")


def _check_module(model: nn.Module) -> None:
    missing = [name for name in ("config", "diffusion", "sampling") if not hasattr(model, name)]
    if missing:
        raise UsageError(
            f"model: a module must come from fastgen.load or fastgen.models; "
            f"this {type(model).__name__} has no {', '.join(missing)}"
        )


def _placed(model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """The module itself if it is where and what was asked for, else a copy: the caller's stays as it is."""
    now = next(model.parameters())
    there = torch.device(device) if device is not None else now.device
    if there.type == now.device.type and there.index in (None, now.device.index) and dtype in (None, now.dtype):
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def _check_guidance(network: nn.Module, guidance: float, *, asked: bool) -> float:
    if network.config.num_classes is None:
        if asked and guidance != 1:
            raise UsageError("guidance: this model is unconditional, so there is nothing to guide to; leave it out")
        return 1.0
    if not isinstance(guidance, int | float) or not 0 <= guidance < float("inf"):
        raise UsageError(f"guidance: must be a number of at least 0 (1 is none), not {guidance!r}")
    return float(guidance)


def _labels(network: nn.Module, labels: int | Sequence[int] | Tensor | None, seeds: Tensor) -> Tensor | None:
    """The class of each image, int64 [n]; drawn from the image's own seed where none is given."""
    classes = network.config.num_classes
    if classes is None:
        if labels is not None:
            raise UsageError("labels: this model is unconditional; leave them out")
        return None
    if labels is None:
        return (ops.philox_bits(seeds, 1, stream=Stream.LABEL)[:, 0] * classes) >> 32
    try:
        chosen = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0, 0)
    if chosen.ndim > 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise UsageError(f"labels: must be a class or a sequence of classes, not {labels!r}")
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


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


def _bar(total: int, progress: bool | None) -> tqdm:
    terminal = sys.stderr.isatty()
    quiet = not terminal if progress is None else not progress
    return tqdm(total=total, unit="step", desc="sampling", disable=quiet, mininterval=0.1 if terminal else 5.0)
