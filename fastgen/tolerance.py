"""How far a result may be from the right one: the rule that tests, benchmarks and `accelerate(verify=...)` share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WINOGRAD = 1e-5  # relative, in the Frobenius norm: where Winograd's algorithm regroups sums


def tolerance(reference: Tensor, eager_error: float, dtype: torch.dtype) -> float:
    """The rule: 2 × eager PyTorch's error in the same dtype + 4·u·max|ref|, u half the dtype's eps."""
    scale = reference.abs().max().item() if reference.numel() else 0.0
    return 2 * eager_error + 4 * torch.finfo(dtype).eps / 2 * scale


def max_error(actual: Tensor, reference: Tensor) -> float:
    """max |actual - reference| in fp64; inf where one is NaN and the other is not, or where shapes differ."""
    if actual.shape != reference.shape:
        return math.inf
    a, r = actual.double(), reference.double()
    if not torch.equal(a.isnan(), r.isnan()):
        return math.inf
    return (a - r).nan_to_num(0.0).abs().max().item() if a.numel() else 0.0


def frobenius_error(actual: Tensor, reference: Tensor) -> float:
    """|actual - reference| / |reference| in the Frobenius norm, in fp64; inf where `max_error` is. For Winograd's
    algorithm, whose rounding errors do not belong to single elements: at most max(1e-5, 2 × eager's) in fp32."""
    worst = max_error(actual, reference)
    if worst in (0.0, math.inf):
        return worst
    a, r = actual.double().nan_to_num(0.0), reference.double().nan_to_num(0.0)
    return ((a - r).norm() / r.norm().clamp_min(1e-300)).item()
