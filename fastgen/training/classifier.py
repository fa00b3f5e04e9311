"""The recipe of the classifier in whose features `fastgen.metrics` measures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.models import FAMILIES
from fastgen.training.data import load_images, random_affine
from fastgen.training.loop import TrainConfig, network_of

LABEL_SMOOTHING = 0.05  # Szegedy et al. 2016, section 7


class ClassifierRecipe:
    """Cross-entropy with smoothed labels on images turned, scaled and shifted at random."""

    family = "classifier"

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        network = network_of(self.family, config)
        self.images, self.labels = load_images(config.data, config.preset, network, device)
        torch.manual_seed(config.seed)
        self.model = FAMILIES[self.family].network(network).to(device=device, memory_format=torch.channels_last)

    def loss(self, step: int) -> Tensor:
        """The loss [] of one batch; all randomness comes from the global generator, seeded by the loop."""
        index = torch.randint(len(self.images), (self.config.batch_size,), device=self.images.device)
        x = random_affine(self.images[index], degrees=10, scale=0.1, pixels=2, p=1)
        return F.cross_entropy(self.model(x).float(), self.labels[index], label_smoothing=LABEL_SMOOTHING)
