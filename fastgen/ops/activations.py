"""The activations that fused ops take, by name.

The codes are those of csrc/common/activations.h and kernels/_activations.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NEGATIVE_SLOPE = 0.01  # of leaky_relu, on every op that takes ``act``

ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "none": (0, lambda x: x),
    "relu": (1, F.relu),
    "leaky_relu": (2, lambda x: F.leaky_relu(x, NEGATIVE_SLOPE)),
    "silu": (3, F.silu),
    "gelu": (4, F.gelu),
    "gelu_tanh": (5, lambda x: F.gelu(x, approximate="tanh")),
    "tanh": (6, torch.tanh),
    "sigmoid": (7, torch.sigmoid),
}


def check_act(act: str, name: str = "act") -> None:
    """Raises ValueError, with the names there are, for an unknown activation."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, not {act!r}")
