"""The recipe of a DDPM (Ho et al. 2020), with classifier-free guidance (Ho & Salimans 2022) where there are classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig, forward_table, training_target
from fastgen.images import Samples
from fastgen.models import FAMILIES
from fastgen.sampling import sample
from fastgen.training.config import TrainConfig
from fastgen.training.data import DIGITS, random_affine, random_flip
from fastgen.training.recipes import network_and_data

LABEL_DROPOUT = 0.1  # how often the class is hidden, so that guidance has an unconditional model
GRID = 40  # images in the picture that --sample-every draws


class DDPMRecipe:
    """Cosine schedule, velocity prediction: loss = mean |v(x_t, t) - v_theta(x_t, t, c)|²."""

    name, family, preset = "ddpm", "unet", "mnist"

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        network, self.data, self.held_out = network_and_data(self.family, config)
        guidance = 1.0 if network.num_classes is None else 1.5
        torch.manual_seed(config.seed)
        self.model = (
            FAMILIES[self.family]
            .network(
                network,
                DiffusionConfig(schedule="cosine", prediction="v"),
                SamplingDefaults(sampler="dpmpp_2m", steps=20, guidance=guidance),
            )
            .to(device=device, memory_format=torch.channels_last)
        )
        self.table = forward_table(self.model.diffusion).to(device)

    def augment(self, images: Tensor) -> Tensor:
        """Digits are moved a little; other images are flipped half of the time."""
        return random_affine(images) if self.data.name in DIGITS else random_flip(images)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        n, device, classes = len(images), images.device, self.model.config.num_classes
        given: tuple[Tensor, ...] = ()
        if classes is not None:
            hidden = torch.rand(n, device=device) < (LABEL_DROPOUT if network.training else 0)
            given = (labels.masked_fill(hidden, classes),)
        t = torch.randint(self.model.diffusion.timesteps, (n,), device=device)
        noise = torch.randn_like(images)
        x_t, _ = ops.q_sample(images, t, self.table, noise=noise)
        target = training_target(images, noise, t, self.table, self.model.diffusion.prediction)
        return F.mse_loss(network(x_t, t, *given).float(), target)

    def grid(self, network: nn.Module) -> Samples:
        """The classes in turn, seeds 0, 1, 2, …"""
        classes = self.model.config.num_classes
        labels = None if classes is None else [i % classes for i in range(GRID)]
        return sample(network, GRID, seed=0, labels=labels, progress=False)
