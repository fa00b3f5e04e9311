"""Which of its configurations a kernel is launched with.

A launcher lists the configurations that make sense, the one for this architecture first. That one is
taken, unless `fastgen.tune` has measured another on this GPU. Only the kernel, the type and the shape of one image
decide, never the batch: an image gives the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Configuration = dict[str, int]
Key = tuple[Any, ...]

# What `fastgen.tune` found: fastgen/tuned.py fills it from its file before the first launch.
CHOSEN: dict[Key, Configuration] = {}
# Asked before all else where it is set: by `fastgen.tune`, which tries configurations, and by tests.
choosers: list[Callable[[Key, Sequence[Configuration]], Configuration]] = []


def configuration(kernel: str, options: Sequence[Configuration], *tensors: Tensor) -> Configuration:
    """One of ``options`` for a launch of ``kernel`` on ``tensors`` [N, *], of which the first gives the type."""
    if not choosers and not CHOSEN:
        return options[0]
    x = tensors[0]
    key = (kernel, str(x.dtype), *((*t.shape[1:], t.is_contiguous()) for t in tensors))
    if choosers:
        return choosers[-1](key, options)
    chosen = CHOSEN.get(key)
    return chosen if chosen in options else options[0]
