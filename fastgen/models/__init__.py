"""The families of models. Adding one: a file here, a line in FAMILIES, a row in tests/models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastgen.models import autoencoder_kl, classifier, unet


@dataclass(frozen=True)
class Family:
    """A model family: its frozen configuration class, its network and its named configurations."""

    config: type
    network: type[nn.Module]
    presets: dict[str, Any]
    samples: bool = True  # a generator; its network also takes a DiffusionConfig and SamplingDefaults


FAMILIES: dict[str, Family] = {
    "unet": Family(unet.UNetConfig, unet.UNet, unet.PRESETS),
    "classifier": Family(classifier.ClassifierConfig, classifier.Classifier, classifier.PRESETS, samples=False),
    "autoencoder_kl": Family(
        autoencoder_kl.AutoencoderKLConfig, autoencoder_kl.AutoencoderKL, autoencoder_kl.PRESETS, samples=False
    ),
}
