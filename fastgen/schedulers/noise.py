"""Noise from torch's generators, drawn as diffusers draws it: its users' seeds give the images that they know.

All else in this package takes its noise from the seeds of the images (`ops.philox_normal`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.errors import UsageError

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw(like: Tensor, generator: Generators, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal noise, [N, *] as ``like``, on its device, in ``dtype`` or its own.

    generator: torch's own for None; one for the whole batch; or a sequence of one for each image. Noise from a
    generator of the CPU is drawn there, then moved. Raises UsageError for another device, or too few generators.
    """
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    n, dtype = len(like), dtype or like.dtype
    if len(generators) not in (1, n):
        raise UsageError(f"generator: give one, or one for each of the {n} images; {len(generators)} were given")
    shape = like.shape if len(generators) == 1 else (1, *like.shape[1:])
    parts = []
    for one in generators:
        device = like.device if one is None else one.device
        if device.type not in ("cpu", like.device.type):
            raise UsageError(f"generator: is of {device}, and the images are on {like.device}; make one there")
        device = like.device if device.type == like.device.type else device
        parts.append(torch.randn(shape, generator=one, device=device, dtype=dtype).to(like.device))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
