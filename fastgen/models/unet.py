"""The U-Net of diffusion models: residual blocks with time and class embedding, attention at chosen levels.

The architecture is that of Ho et al. 2020 (DDPM) with the options of Nichol & Dhariwal 2021 and
an optional patch (space-to-depth) at the entrance. Parameter names are those of diffusers'
`UNet2DModel`, so its checkpoints load as they are.

Legend: N batch, C channels, H W image size, E = 4·channels[0] the embedding's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models.blocks import (
    AttentionBlock,
    Downsample,
    Level,
    MidBlock,
    ResnetBlock,
    Upsample,
    conv2d,
    norm_act_conv,
)
from fastgen.ops.registration import layout


@dataclass(frozen=True)
class UNetConfig:
    """The network's shape. ``channels`` has one entry a level; each level halves the resolution.

    ``num_classes`` adds a class embedding with one more row, the null class of classifier-free
    guidance, unless ``null_class`` is False. ``time_scale_shift`` conditions by scale and shift after
    the second norm instead of a bias before it. ``patch_size`` p folds p×p pixels into channels at the
    entrance and back at the exit. ``head_dim`` None means a single head. ``downsample_padding`` 0 pads
    right and bottom only, as the original DDPM code did. ``up_attention``: attention on the way up, by
    level like ``attention``, which None repeats. ``mid_attention_groups``: of the norm before the
    attention in the middle; None is ``num_groups``, 0 no norm. ``center_input``: takes images in [0, 1]
    and makes 2x - 1 of them.
    """

    image_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (False, True, False, False)
    mid_attention: bool = True
    head_dim: int | None = None
    num_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    num_classes: int | None = None
    time_scale_shift: bool = False
    patch_size: int = 1
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    up_attention: tuple[bool, ...] | None = None
    mid_attention_groups: int | None = None
    null_class: bool = True
    center_input: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "attention", tuple(self.attention))
        if self.up_attention is not None:  # the same as attention has one spelling
            up = tuple(self.up_attention)
            object.__setattr__(self, "up_attention", None if up == self.attention else up)
        for name, levels in (("attention", self.attention), ("up_attention", self.upwards)):
            if len(levels) != len(self.channels):
                raise ValueError(f"{name} needs one entry per level, {len(self.channels)}, not {len(levels)}")
        last = [False] * (len(self.channels) - 1) + [self.mid_attention]
        attended = [any(levels) for levels in zip(self.attention, self.upwards, last)]
        heads = [(self.head_dim or 1) if attends else 1 for attends in attended]
        if bad := [c for c, head in zip(self.channels, heads) if c % self.num_groups or c % head]:
            raise ValueError(
                f"channels {bad} are not divisible by num_groups={self.num_groups} and head_dim={self.head_dim}"
            )
        if not self.mid_attention or self.mid_attention_groups == self.num_groups:
            object.__setattr__(self, "mid_attention_groups", None)
        if self.channels[-1] % (self.mid_attention_groups or 1):
            raise ValueError(f"mid_attention_groups={self.mid_attention_groups} do not divide {self.channels[-1]}")
        if self.image_size % self.multiple:
            raise ValueError(f"image_size must be a multiple of {self.multiple}, not {self.image_size}")

    @property
    def upwards(self) -> tuple[bool, ...]:
        """Attention on the way up, by level."""
        return self.attention if self.up_attention is None else self.up_attention

    @property
    def class_embeddings(self) -> int | None:
        """The rows of the class embedding."""
        return None if self.num_classes is None else self.num_classes + self.null_class

    @property
    def multiple(self) -> int:
        """Heights and widths must be multiples of this: the patch times every halving."""
        return self.patch_size * 2 ** (len(self.channels) - 1)


PRESETS: dict[str, UNetConfig] = {
    # For tests and tutorials: trains a step in milliseconds.
    "tiny": UNetConfig(
        image_size=16, in_channels=1, out_channels=1, channels=(16, 32), layers_per_block=1,
        attention=(False, False), head_dim=16, num_groups=8, num_classes=10, time_scale_shift=True,
    ),
    # 28×28 digits, 1.2 M parameters, 0.19 GFLOP an image: the patch keeps the first level at 14×14.
    "mnist": UNetConfig(
        image_size=28, in_channels=1, out_channels=1, channels=(64, 64), layers_per_block=1,
        attention=(False, False), head_dim=32, num_groups=8, dropout=0.1, num_classes=10,
        time_scale_shift=True, patch_size=2,
    ),
    # The 35.7 M network of google/ddpm-cifar10-32.
    "cifar10": UNetConfig(norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1.0),
}  # fmt: skip


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """Sinusoids of the step, fp32 [N, dim] from t [N] (Vaswani et al. 2017, section 3.5).

    Frequencies exp(-ln(10000) · i / (dim/2 - freq_shift)), sines first unless ``flip_sin_to_cos``.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angle = t[:, None].float() * exponent.exp()[None]
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    """The sinusoids [N, channels] -> [N, E] by two layers."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """Predicts noise, image or velocity from a noisy image: forward(x [N,C,H,W], t, class_labels) -> [N,C,H,W]."""

    def __init__(
        self,
        config: UNetConfig,
        diffusion: DiffusionConfig = DiffusionConfig(),
        sampling: SamplingDefaults = SamplingDefaults(),
    ) -> None:
        super().__init__()
        self.config, self.diffusion, self.sampling = config, diffusion, sampling
        channels, levels, E = config.channels, len(config.channels), 4 * config.channels[0]
        self.time_embedding = TimeEmbedding(channels[0], E)
        self.class_embedding = None if config.num_classes is None else nn.Embedding(config.class_embeddings, E)
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, channels[0], 3, padding=1)

        norm = {"groups": config.num_groups, "eps": config.norm_eps}
        given = {"embedding": E, "scale_shift": config.time_scale_shift, "dropout": config.dropout, **norm}

        def level(inputs: list[int], c: int, attention: bool) -> Level:
            blocks = [ResnetBlock(i, c, **given) for i in inputs]
            return Level(blocks, [AttentionBlock(c, head_dim=config.head_dim, **norm) for _ in inputs if attention])

        skips, width = [channels[0]], channels[0]
        self.down_blocks = nn.ModuleList()
        for i, c in enumerate(channels):
            down = level([width] + [c] * (config.layers_per_block - 1), c, config.attention[i])
            down.downsamplers = nn.ModuleList([Downsample(c, config.downsample_padding)] if i < levels - 1 else [])
            self.down_blocks.append(down)
            skips += [c] * (config.layers_per_block + len(down.downsamplers))
            width = c
        middle, groups = [ResnetBlock(width, width, **given) for _ in range(2)], config.mid_attention_groups
        mid_norm = norm if groups is None else {**norm, "groups": groups or None}
        attention = [AttentionBlock(width, head_dim=config.head_dim, **mid_norm)] if config.mid_attention else []
        self.mid_block = MidBlock(middle, attention)
        self.up_blocks = nn.ModuleList()
        for i, c in reversed(list(enumerate(channels))):
            inputs = [(width if j == 0 else c) + skips.pop() for j in range(config.layers_per_block + 1)]
            up = level(inputs, c, config.upwards[i])
            up.upsamplers = nn.ModuleList([Upsample(c)] if i > 0 else [])
            self.up_blocks.append(up)
            width = c
        self.conv_norm_out = nn.GroupNorm(config.num_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels * config.patch_size**2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """x: [N,C,H,W], the noisy image; t: a number, or a tensor [] or [N], the step in 0 … T-1 (fractions too);
        class_labels: int64 [N] in 0 … num_classes, where num_classes is the null class (None: all null), if the
        configuration has one.

        Raises ValueError where the shape or the labels do not fit the configuration.
        """
        config, t = self.config, torch.as_tensor(t, device=x.device)
        self._check(x, t, class_labels)
        t = t.expand(x.shape[0])
        sinusoids = timestep_embedding(
            t, config.channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        emb = self.time_embedding(sinusoids.to(self.conv_in.weight.dtype))
        if self.class_embedding is not None:
            labels = (
                t.new_full((x.shape[0],), config.num_classes, dtype=torch.int64)
                if class_labels is None
                else class_labels
            )
            emb = emb + self.class_embedding(labels)
        emb_act = F.silu(emb)

        given = layout(x)
        x = 2 * x - 1 if config.center_input else x
        x = conv2d(self.conv_in, F.pixel_unshuffle(x, config.patch_size) if config.patch_size > 1 else x)
        x = x.contiguous(memory_format=torch.channels_last)  # from here on every op keeps it
        skips = [x]
        for down in self.down_blocks:
            for i in range(len(down.resnets)):
                x = down.block(i, x, emb_act)
                skips.append(x)
            for sample in down.downsamplers:
                x = sample(x)
                skips.append(x)
        x = self.mid_block(x, emb_act)
        for up in self.up_blocks:
            for i in range(len(up.resnets)):
                x = up.block(i, x, emb_act, skips.pop())
            for sample in up.upsamplers:
                x = sample(x)
        x = norm_act_conv(self.conv_norm_out, self.conv_out, x, self.conv_out.bias)
        x = F.pixel_shuffle(x, config.patch_size) if config.patch_size > 1 else x
        return x.contiguous(memory_format=given)

    def _check(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> None:
        config = self.config
        if (
            x.ndim != 4
            or x.shape[1] != config.in_channels
            or x.shape[2] % config.multiple
            or x.shape[3] % config.multiple
        ):
            raise ValueError(
                f"x must be [N, {config.in_channels}, H, W] with H and W multiples of {config.multiple}, "
                f"not {list(x.shape)}"
            )
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, x.shape[0])):
            raise ValueError(f"t must be a step, or int64 [{x.shape[0]}], not {list(t.shape)}")
        if class_labels is None and config.num_classes is not None and not config.null_class:
            raise ValueError("class_labels must be given: this model has no null class")
        if class_labels is not None:
            if config.num_classes is None:
                raise ValueError("class_labels were given, but this model is unconditional (num_classes is None)")
            if class_labels.shape != x.shape[:1] or class_labels.dtype != torch.int64:
                raise ValueError(
                    f"class_labels must be int64 [{x.shape[0]}], not {class_labels.dtype} {list(class_labels.shape)}"
                )
