"""Samplers (coefficient tables come below)."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingDefaults:
    """What `fastgen.sample` uses where the caller does not say."""

    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 1.0
