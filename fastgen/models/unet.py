"""The U-Net of diffusion models: residual blocks with time and class embedding, attention at chosen levels.

The architecture is that of Ho et al. 2020 (DDPM) with the options of Nichol & Dhariwal 2021 and
an optional patch (space-to-depth) at the entrance. Parameter names are those of diffusers'
`UNet2DModel`, so its checkpoints load as they are.

Legend: N batch, C channels, H W image size, E = 4·channels[0] the embedding's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.ops.registration import layout


@dataclass(frozen=True)
class UNetConfig:
    """The network's shape. ``channels`` has one entry a level; each level halves the resolution.

    ``num_classes`` adds a class embedding with one more row, the null class of classifier-free
    guidance. ``time_scale_shift`` conditions by scale and shift after the second norm instead of
    a bias before it. ``patch_size`` p folds p×p pixels into channels at the entrance and back at
    the exit. ``head_dim`` None means a single head. ``downsample_padding`` 0 pads right and
    bottom only, as the original DDPM code did.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "attention", tuple(self.attention))
        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention needs one entry per level, {len(self.channels)}, not {len(self.attention)}")
        bad = [c for c in self.channels if c % self.num_groups or c % (self.head_dim or 1)]
        if bad:
            raise ValueError(
                f"channels {bad} are not divisible by num_groups={self.num_groups} and head_dim={self.head_dim}"
            )
        if self.image_size % self.multiple:
            raise ValueError(f"image_size must be a multiple of {self.multiple}, not {self.image_size}")

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


class ResnetBlock(nn.Module):
    """x [N,C,H,W] (with skip [N,C2,H,W] read as a second source) and emb [N,E] -> [N,K,H,W]."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        groups, eps = config.num_groups, config.norm_eps
        self.scale_shift = config.time_scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb_act: Tensor, skip: Tensor | None = None) -> Tensor:
        """emb_act: the activated embedding; skip: a second source behind x's channels, not copied."""
        emb, scale, shift = self.time_emb_proj(emb_act), None, None
        bias = self.conv1.bias
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
        else:
            bias = bias + emb  # one for each image
        h = _norm_act_conv(self.norm1, self.conv1, x, bias, skip=skip)
        if self.conv_shortcut is not None:
            x = _conv(self.conv_shortcut, x, skip=skip)
        elif skip is not None:
            x = torch.cat([x, skip], dim=1)
        if self.training and self.dropout.p > 0:
            h = self.dropout(_norm_act(self.norm2, h, scale=scale, shift=shift))
            return _conv(self.conv2, h, residual=x)
        return _norm_act_conv(self.norm2, self.conv2, h, self.conv2.bias, scale=scale, shift=shift, residual=x)


def _norm_act(norm: nn.GroupNorm, x: Tensor, act: str = "silu", **kwargs: Tensor | None) -> Tensor:
    return ops.group_norm_act(x, norm.num_groups, norm.weight, norm.bias, norm.eps, act, **kwargs)


def _norm_act_conv(
    norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, bias: Tensor | None, **kwargs: Tensor | None
) -> Tensor:
    return ops.norm_act_conv2d(
        x, conv.weight, bias, conv.stride, conv.padding, num_groups=norm.num_groups, norm_weight=norm.weight,
        norm_bias=norm.bias, eps=norm.eps, **kwargs,
    )  # fmt: skip


def _conv(conv: nn.Conv2d, x: Tensor, padding: tuple[int, ...] | None = None, **kwargs: Any) -> Tensor:
    return ops.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding if padding is None else padding, **kwargs)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, x [N,C,H,W] -> x + Attention(GroupNorm(x))."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = channels // (config.head_dim or channels)
        self.group_norm = nn.GroupNorm(config.num_groups, channels, config.norm_eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list only for diffusers' key "to_out.0"

    def forward(self, x: Tensor) -> Tensor:
        N, C, H, W = x.shape
        tokens = _norm_act(self.group_norm, x, act="none").permute(0, 2, 3, 1).reshape(N, H * W, C)
        q, k, v = (
            p(tokens).view(N, H * W, self.heads, C // self.heads).transpose(1, 2)
            for p in (self.to_q, self.to_k, self.to_v)
        )
        out = ops.attention(q, k, v).transpose(1, 2).reshape(N, H * W, C)
        out, last = out.view(N, H, W, C).permute(0, 3, 1, 2), self.to_out[0]
        return ops.conv2d(out, last.weight[:, :, None, None], last.bias, residual=x)


class Downsample(nn.Module):
    """x [N,C,H,W] -> [N,C,H/2,W/2] by a 3×3 convolution of stride 2."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return _conv(self.conv, x, None if self.conv.padding[0] else (0, 1, 0, 1))


class Upsample(nn.Module):
    """x [N,C,H,W] -> [N,C,2H,2W]: nearest, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _conv(self.conv, x, upsample=2)


class TimeEmbedding(nn.Module):
    """The sinusoids [N, channels] -> [N, E] by two layers."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each where asked, and the change of size."""

    def __init__(self, blocks: list[ResnetBlock], attentions: list[AttentionBlock]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions) if attentions else None

    def block(self, i: int, x: Tensor, emb_act: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.resnets[i](x, emb_act, skip)
        return x if self.attentions is None else self.attentions[i](x)


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
        self.class_embedding = None if config.num_classes is None else nn.Embedding(config.num_classes + 1, E)
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, channels[0], 3, padding=1)

        def level(inputs: list[int], c: int, attention: bool) -> Level:
            blocks = [ResnetBlock(config, i, c, E) for i in inputs]
            return Level(blocks, [AttentionBlock(config, c) for _ in inputs] if attention else [])

        skips, width = [channels[0]], channels[0]
        self.down_blocks = nn.ModuleList()
        for i, c in enumerate(channels):
            down = level([width] + [c] * (config.layers_per_block - 1), c, config.attention[i])
            down.downsamplers = nn.ModuleList([Downsample(c, config.downsample_padding)] if i < levels - 1 else [])
            self.down_blocks.append(down)
            skips += [c] * (config.layers_per_block + len(down.downsamplers))
            width = c
        self.mid_block = level([width, width], width, False)
        if config.mid_attention:
            self.mid_block.attentions = nn.ModuleList([AttentionBlock(config, width)])
        self.up_blocks = nn.ModuleList()
        for i, c in reversed(list(enumerate(channels))):
            inputs = [(width if j == 0 else c) + skips.pop() for j in range(config.layers_per_block + 1)]
            up = level(inputs, c, config.attention[i])
            up.upsamplers = nn.ModuleList([Upsample(c)] if i > 0 else [])
            self.up_blocks.append(up)
            width = c
        self.conv_norm_out = nn.GroupNorm(config.num_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels * config.patch_size**2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """x: [N,C,H,W], the noisy image; t: a number, or a tensor [] or [N], the step in 0 … T-1 (fractions too);
        class_labels: int64 [N] in 0 … num_classes, where num_classes is the null class (None: all null).

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
        x = _conv(self.conv_in, F.pixel_unshuffle(x, config.patch_size) if config.patch_size > 1 else x)
        x = x.contiguous(memory_format=torch.channels_last)  # from here on every op keeps it
        skips = [x]
        for down in self.down_blocks:
            for i in range(len(down.resnets)):
                x = down.block(i, x, emb_act)
                skips.append(x)
            for sample in down.downsamplers:
                x = sample(x)
                skips.append(x)
        x = self.mid_block.resnets[0](x, emb_act)
        for attention in self.mid_block.attentions or ():
            x = attention(x)
        x = self.mid_block.resnets[1](x, emb_act)
        for up in self.up_blocks:
            for i in range(len(up.resnets)):
                x = up.block(i, x, emb_act, skips.pop())
            for sample in up.upsamplers:
                x = sample(x)
        x = _norm_act_conv(self.conv_norm_out, self.conv_out, x, self.conv_out.bias)
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
        if class_labels is not None:
            if config.num_classes is None:
                raise ValueError("class_labels were given, but this model is unconditional (num_classes is None)")
            if class_labels.shape != x.shape[:1] or class_labels.dtype != torch.int64:
                raise ValueError(
                    f"class_labels must be int64 [{x.shape[0]}], not {class_labels.dtype} {list(class_labels.shape)}"
                )
