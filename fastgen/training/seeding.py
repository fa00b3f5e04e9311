"""All randomness of a run is a function of its seed and the step: a resumed run needs no generator's state."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*path: object) -> int:
    """A seed in 0 … 2^63 - 1 for each path, such as (seed, "step", 7): unrelated for different paths."""
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*path: object) -> None:
    """Seeds torch's generators on every device, and Python's and NumPy's, which a recipe's augmentation may use."""
    seed = derive_seed(*path)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # without the note, with a stack trace, that torch.manual_seed leaves for a GPU that may yet come
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
