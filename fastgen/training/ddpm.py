"""The recipe of a class-conditional DDPM (Ho et al. 2020) with classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import ops
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig, forward_table, training_target
from fastgen.models import FAMILIES
from fastgen.training.data import load_images, random_affine
from fastgen.training.loop import TrainConfig, network_of

LABEL_DROPOUT = 0.1  # how often the class is hidden, so that guidance has an unconditional model


class DDPMRecipe:
    """Cosine schedule, velocity prediction: loss = mean |v(x_t, t) - v_theta(x_t, t, c)|²."""

    family = "unet"

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        network = network_of(self.family, config)
        self.images, self.labels = load_images(config.data, config.preset, network, device)
        torch.manual_seed(config.seed)
        self.model = (
            FAMILIES[self.family]
            .network(
                network,
                DiffusionConfig(schedule="cosine", prediction="v"),
                SamplingDefaults(sampler="dpmpp_2m", steps=20, guidance=1.5),
            )
            .to(device=device, memory_format=torch.channels_last)
        )
        self.table = forward_table(self.model.diffusion).to(device)

    def loss(self, step: int) -> Tensor:
        """The loss [] of one batch; all randomness comes from the global generator, seeded by the loop."""
        n, device = self.config.batch_size, self.images.device
        index = torch.randint(len(self.images), (n,), device=device)
        x0, labels = random_affine(self.images[index]), self.labels[index]
        hidden = torch.rand(n, device=device) < LABEL_DROPOUT
        labels = labels.masked_fill(hidden, self.model.config.num_classes)
        t = torch.randint(self.model.diffusion.timesteps, (n,), device=device)
        noise = torch.randn_like(x0)
        x_t, _ = ops.q_sample(x0, t, self.table, noise=noise)
        target = training_target(x0, noise, t, self.table, self.model.diffusion.prediction)
        return F.mse_loss(self.model(x_t, t, labels).float(), target)
