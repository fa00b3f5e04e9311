"""A small convolutional classifier: the feature network of `fastgen.metrics`.

Three stages of two 3×3 convolutions with GroupNorm and SiLU, each stage at half the resolution of
the one before; the mean over the map; two linear layers.

Legend: N batch, C channels, H W image size, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops


@dataclass(frozen=True)
class ClassifierConfig:
    """``channels`` has one entry a stage; ``features`` is the width of what the metrics see."""

    image_size: int = 28
    in_channels: int = 1
    channels: tuple[int, ...] = (32, 64, 128)
    features: int = 64
    num_groups: int = 8
    dropout: float = 0.3
    num_classes: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if bad := [c for c in self.channels if c % self.num_groups]:
            raise ValueError(f"channels {bad} are not divisible by num_groups={self.num_groups}")


PRESETS: dict[str, ClassifierConfig] = {
    "digits": ClassifierConfig(),
    # For tests: trains a step in milliseconds.
    "digits-tiny": ClassifierConfig(channels=(8, 16), features=16),
}


class ConvNormAct(nn.Module):
    """x [N,C,H,W] -> SiLU(GroupNorm(conv 3×3)) [N,K,H/stride,W/stride]."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return ops.group_norm_act(self.conv(x), norm.num_groups, norm.weight, norm.bias, norm.eps, "silu")


class Classifier(nn.Module):
    """forward(x [N,C,H,W] in [-1,1]) -> logits [N,K]; `features` -> [N,F], `classify` -> logits from those."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.in_channels, *config.channels]
        self.stages = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            self.stages.append(ConvNormAct(inputs, outputs, config.num_groups, stride=1 if i == 0 else 2))
            self.stages.append(ConvNormAct(outputs, outputs, config.num_groups, stride=1))
        self.hidden = nn.Linear(widths[-1], config.features)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.features, config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The activations before the last layer, [N,F]. Raises ValueError where x is not [N,C,H,W]."""
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x must be [N, {self.config.in_channels}, H, W], not {list(x.shape)}")
        for stage in self.stages:
            x = stage(x)
        return F.silu(self.hidden(x.mean(dim=(2, 3))))

    def classify(self, features: Tensor) -> Tensor:
        return self.output(self.dropout(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))
