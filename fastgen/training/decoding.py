"""From a picture in a file to what a network takes: uint8 [C, S, S], square, of one or three channels.

    resized = bicubic(centre square of the picture), with antialiasing

Every kind of picture that Pillow reads becomes 8-bit grey or RGB: the EXIF orientation is applied, 16 bits are scaled
to 8, palettes are looked up, CMYK is converted, what is transparent lies over black (-1 to a network, which is also
what `random_affine` fills in), and of an animation the first frame is taken. Colour profiles are not applied.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# Some of what else Pillow reads runs other programs (EPS), or has no pixels of its own.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
SUFFIXES = (
    "avif",
    "bmp",
    "gif",
    "jfif",
    "jp2",
    "jpeg",
    "jpg",
    "pbm",
    "pgm",
    "png",
    "ppm",
    "tga",
    "tif",
    "tiff",
    "webp",
)
REDUCING_GAP = 3.0  # Pillow: from here on the quick reduction before the last resampling is not to be seen


def decode(file: Path | str | BinaryIO, channels: int, size: int) -> np.ndarray:
    """The picture in ``file`` as uint8 [channels, size, size]. Raises what Pillow raises where it is damaged: the kinds
    of its exceptions are many, and depend on the format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bad metadata and many pixels, of which Pillow reads on
        with Image.open(file, formats=formats()) as image:
            image.draft(None, (2 * size, 2 * size))  # of a large JPEG an eighth, say, is decoded, never less than this
            return fit(image, channels, size)


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow reads."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def fit(image: Image.Image, channels: int, size: int) -> np.ndarray:
    """The picture's centre square as uint8 [channels, size, size]. Raises ValueError for a range no one knows."""
    image = flat(ImageOps.exif_transpose(image))
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize(
            (size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side), reducing_gap=REDUCING_GAP
        )
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def flat(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel and nothing transparent."""
    if image.mode.startswith(("I", "F")):
        if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
            raise ValueError(f"{image.mode} pixels, whose range is not known")
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray(((wide * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image
