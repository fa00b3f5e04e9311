"""The autoencoder of latent diffusion: images to and from a Gaussian latent of an eighth of their size.

Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.1 and appendix G:
an encoder E, a decoder D and, between them,

    mean, logvar = split(quant_conv(E(x)))      q(z | x) = N(mean, exp(logvar) I)
    x^ = D(post_quant_conv(z))

Parameter names are those of diffusers' `AutoencoderKL`, so its checkpoints load as they are.

Legend: N batch, C image channels, H W image size, Z latent channels, f = 2^(levels - 1) how much smaller the latent is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

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
from fastgen.nn.gaussian import DiagonalGaussian
from fastgen.ops.registration import layout

EPS = 1e-6  # of every norm


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The network's shape. ``channels`` has one entry a level; each level but the last halves the resolution.

    ``image_size`` is what it was trained on; it takes any. ``mid_attention``: attention, of a single head, at the
    lowest resolution of both halves. ``quant_conv`` and ``post_quant_conv``: the 1×1 convolutions around the latent.
    ``scaling_factor``, ``shift_factor``, ``latents_mean`` and ``latents_std`` do nothing here: they say how a diffusion
    model on the latents wants them, (z - shift_factor) · scaling_factor for one.
    """

    image_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    num_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "latents_mean", "latents_std"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if bad := [c for c in self.channels if c % self.num_groups]:
            raise ValueError(f"channels {bad} are not divisible by num_groups={self.num_groups}")
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.latent_channels:
                raise ValueError(f"{name} needs one entry per latent channel, {self.latent_channels}, not {len(value)}")

    @property
    def factor(self) -> int:
        """How many times smaller the latent is, each way."""
        return 2 ** (len(self.channels) - 1)


PRESETS: dict[str, AutoencoderKLConfig] = {
    # For tests and tutorials: trains a step in milliseconds.
    "tiny": AutoencoderKLConfig(channels=(16, 32), num_groups=8),
    # The 83.7 M network of Stable Diffusion 1 and 2.
    "sd": AutoencoderKLConfig(image_size=512, channels=(128, 256, 512, 512), layers_per_block=2),
}


def _mid_block(config: AutoencoderKLConfig) -> MidBlock:
    c, norm = config.channels[-1], {"groups": config.num_groups, "eps": EPS}
    blocks = [ResnetBlock(c, c, **norm) for _ in range(2)]
    return MidBlock(blocks, [AttentionBlock(c, head_dim=None, **norm)] if config.mid_attention else [])


def _level(config: AutoencoderKLConfig, inputs: int, outputs: int, blocks: int) -> Level:
    norm = {"groups": config.num_groups, "eps": EPS}
    return Level([ResnetBlock(inputs if i == 0 else outputs, outputs, **norm) for i in range(blocks)], [])


class Encoder(nn.Module):
    """x [N,C,H,W] -> [N,2Z,H/f,W/f], the mean and the logvar before `quant_conv`."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels, last = config.channels, len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairwise([channels[0], *channels])):
            down = _level(config, inputs, outputs, config.layers_per_block)
            down.downsamplers = nn.ModuleList([Downsample(outputs, padding=0)] if i < last else [])
            self.down_blocks.append(down)
        self.mid_block = _mid_block(config)
        self.conv_norm_out = nn.GroupNorm(config.num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = conv2d(self.conv_in, x).contiguous(memory_format=torch.channels_last)  # from here on every op keeps it
        for down in self.down_blocks:
            for i in range(len(down.resnets)):
                x = down.block(i, x)
            for sample in down.downsamplers:
                x = sample(x)
        return norm_act_conv(self.conv_norm_out, self.conv_out, self.mid_block(x), self.conv_out.bias)


class Decoder(nn.Module):
    """z [N,Z,H/f,W/f], after `post_quant_conv`, -> [N,C,H,W]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _mid_block(config)
        self.up_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairwise([channels[0], *channels])):
            up = _level(config, inputs, outputs, config.layers_per_block + 1)
            up.upsamplers = nn.ModuleList([Upsample(outputs)] if i < len(channels) - 1 else [])
            self.up_blocks.append(up)
        self.conv_norm_out = nn.GroupNorm(config.num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = conv2d(self.conv_in, z).contiguous(memory_format=torch.channels_last)
        x = self.mid_block(x)
        for up in self.up_blocks:
            for i in range(len(up.resnets)):
                x = up.block(i, x)
            for sample in up.upsamplers:
                x = sample(x)
        return norm_act_conv(self.conv_norm_out, self.conv_out, x, self.conv_out.bias)


class AutoencoderKL(nn.Module):
    """forward(x [N,C,H,W] in [-1,1]) -> reconstructions; `encode` -> a Gaussian over latents, `decode` -> images."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config, Z = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * Z, 2 * Z, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(Z, Z, 1) if config.post_quant_conv else None

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z | x) of the latents [N,Z,H/f,W/f], from x [N,C,H,W] in [-1,1]; H and W that f does not divide are
        rounded down. Raises ValueError where x is something else."""
        C, f = self.config.in_channels, self.config.factor
        if x.ndim != 4 or x.shape[1] != C or min(x.shape[2:]) < f:
            raise ValueError(f"x must be [N, {C}, H, W] with H and W of at least {f}, not {list(x.shape)}")
        h = self.encoder(x)
        h = h if self.quant_conv is None else conv2d(self.quant_conv, h)
        return DiagonalGaussian(h.contiguous(memory_format=layout(x)))

    def decode(self, z: Tensor) -> Tensor:
        """The images [N,C,f·h,f·w] of latents z [N,Z,h,w], about in [-1,1]. Raises ValueError where z is something
        else."""
        Z = self.config.latent_channels
        if z.ndim != 4 or z.shape[1] != Z:
            raise ValueError(f"z must be [N, {Z}, h, w], not {list(z.shape)}")
        h = z if self.post_quant_conv is None else conv2d(self.post_quant_conv, z)
        return self.decoder(h).contiguous(memory_format=layout(z))

    def forward(self, x: Tensor, sample: bool = False, seeds: Tensor | None = None) -> Tensor:
        """The reconstruction [N,C,H,W] from the most likely latent, or with ``sample`` from a drawn one, ``seeds``
        int64 [N] as in `DiagonalGaussian.sample`."""
        latents = self.encode(x)
        z = latents.sample(seeds=seeds) if sample else latents.mode()
        return self.decode(z.contiguous(memory_format=layout(x)))
