"""What a family brings to the loop, and the recipes that there are."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.images import Samples
from fastgen.models import FAMILIES
from fastgen.training import data
from fastgen.training.config import TrainConfig


class Recipe(Protocol):
    """A network, its data, and the loss of one batch. ``recipe(config, device)`` makes it; all that it draws at random
    comes from torch's (Python's, NumPy's) global generators, which the loop seeds for each step."""

    name: ClassVar[str]
    family: ClassVar[str]  # of FAMILIES
    preset: ClassVar[str]  # the network where the configuration names none
    model: nn.Module
    data: data.Source
    held_out: data.Source | None  # where the configuration asks for validation

    def augment(self, images: Tensor) -> Tensor:
        """images fp32 [N,C,H,W] in [-1,1], changed at random, where the configuration asks for it."""

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss [] of images fp32 [N,C,H,W] in [-1,1] and labels int64 [N] in ``network``: the model itself,
        compiled, or an average of it, in evaluation mode to validate."""

    def grid(self, network: nn.Module) -> Samples | None:
        """A few images drawn from ``network``, the same seeds each time; None where it draws none."""


def network_and_data(family: str, config: TrainConfig) -> tuple[Any, data.Source, data.Source | None]:
    """The configuration of the network, fitted to the data (its number of classes), the data, and what is held out.

    Raises UsageError where they do not fit, or the preset is unknown.
    """
    presets = FAMILIES[family].presets
    if config.preset not in presets:
        raise UsageError(f"preset: unknown preset {config.preset!r}; choose one of {', '.join(presets)}")
    network = _changed(presets[config.preset], image_size=config.image_size, dropout=config.dropout)
    source = functools.partial(
        data.open_data, config.data, root=config.data_root, channels=network.in_channels,
        image_size=network.image_size, holdout=config.holdout, strict=config.strict,
    )  # fmt: skip
    train = source(split="train")
    if network.num_classes is not None:  # else it takes no labels, whatever the data has
        network = replace(network, num_classes=len(train.classes) if train.classes else None)
    return network, train, source(split="test") if config.validate_every else None


def _changed(network: Any, **values: Any) -> Any:
    """The network's configuration with those of the values that are not None; UsageError where it cannot have them."""
    values = {k: v for k, v in values.items() if v is not None}
    for name in values.keys() - {f.name for f in fields(network)}:
        raise UsageError(f"{name.replace('_', '-')}: this network has none")
    try:
        return replace(network, **values)
    except ValueError as error:
        raise UsageError(f"{', '.join(values).replace('_', '-')}: {error}") from None
