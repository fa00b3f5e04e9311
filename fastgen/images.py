"""`Samples`: generated images with their seeds, labels and recipe; and writing them, whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgen.atomic import atomic_file
from fastgen.errors import UsageError
from fastgen.recipe import Recipe, png_info

CAPTION_HEIGHT = 16
CELL = 84  # a grid shows small images enlarged, by whole factors, up to about this many pixels


@dataclass(frozen=True)
class Samples:
    """Images and what made them. images: uint8 [N, C, H, W]; seeds: int64 [N]; labels: int64 [N] or None;
    recipe: what `save` puts into a PNG, for `fastgen.replay`."""

    images: Tensor
    seeds: Tensor
    labels: Tensor | None = None
    recipe: Recipe | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int | slice) -> Samples:
        """The i-th image alone, with its own recipe, or several. Raises IndexError, ValueError where none is."""
        if isinstance(i, slice):
            places = range(len(self))[i]
            if not places:
                raise ValueError(f"{i} takes none of the {len(self)} images")
            return concatenate([self[k] for k in places])
        i = range(len(self))[i]
        one = slice(i, i + 1)
        labels = None if self.labels is None else self.labels[one]
        return Samples(self.images[one], self.seeds[one], labels, self._recipe_of(i))

    def _recipe_of(self, i: int) -> Recipe | None:
        whole = self.recipe
        if whole is None or whole.index is not None:
            return whole
        start = i - i % whole.batch  # of the batch in which it was computed
        return replace(
            whole,
            seeds=whole.seeds[i : i + 1],
            labels=None if whole.labels is None else whole.labels[i : i + 1],
            images=whole.images if len(whole.images) <= 1 else whole.images[i : i + 1],
            batch=min(whole.batch, len(self) - start),
            index=i - start,
        )

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

    def picture(self) -> Image.Image:
        """What `save` writes: the image itself for one, a labelled grid for more."""
        return self.to_pil()[0] if len(self) == 1 else self.grid()

    def save(self, path: str | Path) -> Path:
        """Writes one picture: the image itself for one, a labelled grid for more. Whole or not at all.

        A PNG carries the recipe; other formats do not. Raises UsageError for a path that cannot be
        written or a disk without room.
        """
        path = check_output(path)
        one = self[0] if len(self) == 1 else self
        kind = Image.registered_extensions()[path.suffix.lower()]
        options = {"pnginfo": png_info(one.recipe)} if kind == "PNG" and one.recipe else {}
        picture = self.picture()
        with writing(path) as work:
            picture.save(work, format=kind, **options)
        return path


def concatenate(batches: Sequence[Samples]) -> Samples:
    """Batches that were computed one after the other, as one; all but the last are of the same size."""
    first = batches[0]
    labels = None if first.labels is None else torch.cat([b.labels for b in batches])
    recipe = first.recipe and replace(
        first.recipe,
        index=None,
        seeds=[s for b in batches for s in b.recipe.seeds],
        labels=None if labels is None else labels.tolist(),
        images=first.recipe.images if len(first.recipe.images) <= 1 else [i for b in batches for i in b.recipe.images],
    )
    return Samples(torch.cat([b.images for b in batches]), torch.cat([b.seeds for b in batches]), labels, recipe)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path``, for a file that takes its place when the block succeeds.

    Nothing is left of one that fails. A full disk is a UsageError.
    """
    try:
        with atomic_file(path, sync=False) as work:  # a picture can be made again from its seeds
            yield work
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(
            f"output: no room for {path.name} on the disk of {path.parent}; free some space and run it again"
        ) from None


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
