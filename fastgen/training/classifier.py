"""The recipe of the classifier in whose features `fastgen.metrics` measures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.errors import UsageError
from fastgen.models import FAMILIES
from fastgen.training.config import TrainConfig
from fastgen.training.data import DIGITS, random_affine, random_flip
from fastgen.training.recipes import network_and_data

LABEL_SMOOTHING = 0.05  # Szegedy et al. 2016, section 7


class ClassifierRecipe:
    """Cross-entropy with smoothed labels on images turned, scaled and shifted at random."""

    name, family, preset = "classifier", "classifier", "digits"

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        network, self.data, self.held_out = network_and_data(self.family, config)
        if network.num_classes is None:
            raise UsageError(
                f"data: {config.data} has no classes, which a classifier learns; give it folders of images"
            )
        torch.manual_seed(config.seed)
        self.model = FAMILIES[self.family].network(network).to(device=device, memory_format=torch.channels_last)

    def augment(self, images: Tensor) -> Tensor:
        """Everything is moved; what is no digit is also flipped half of the time."""
        moved = random_affine(images, degrees=10, scale=0.1, pixels=2, p=1)
        return moved if self.data.name in DIGITS else random_flip(moved)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(network(images).float(), labels, label_smoothing=LABEL_SMOOTHING)

    def grid(self, network: nn.Module) -> None:
        """A classifier draws nothing."""
