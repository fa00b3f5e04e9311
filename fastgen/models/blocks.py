"""The blocks that the U-Net and the autoencoder are made of: residual, attention, and the changes of size.

Parameter names are those of diffusers. Every convolution and norm runs on `fastgen.ops`.

Legend: N batch, C channels, H W image size, E the width of the time embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen import ops


def norm_act(norm: nn.GroupNorm, x: Tensor, act: str = "silu", **kwargs: Tensor | None) -> Tensor:
    return ops.group_norm_act(x, norm.num_groups, norm.weight, norm.bias, norm.eps, act, **kwargs)


def norm_act_conv(
    norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, bias: Tensor | None, **kwargs: Tensor | None
) -> Tensor:
    return ops.norm_act_conv2d(
        x, conv.weight, bias, conv.stride, conv.padding, num_groups=norm.num_groups, norm_weight=norm.weight,
        norm_bias=norm.bias, eps=norm.eps, **kwargs,
    )  # fmt: skip


def conv2d(conv: nn.Conv2d, x: Tensor, padding: tuple[int, ...] | None = None, **kwargs: Any) -> Tensor:
    return ops.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding if padding is None else padding, **kwargs)


class ResnetBlock(nn.Module):
    """x [N,C,H,W] (with skip [N,C2,H,W] read as a second source) and emb [N,E] -> [N,K,H,W].

    ``embedding`` is E, None for a block without a step; ``scale_shift`` as `UNetConfig.time_scale_shift`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, embedding: int | None = None,
        scale_shift: bool = False, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        width = out_channels * (2 if scale_shift else 1)
        self.time_emb_proj = None if embedding is None else nn.Linear(embedding, width)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb_act: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """emb_act: the activated embedding; skip: a second source behind x's channels, not copied."""
        bias, scale, shift = self.conv1.bias, None, None
        if self.time_emb_proj is not None:
            emb = self.time_emb_proj(emb_act)
            if self.scale_shift:
                scale, shift = emb.chunk(2, dim=1)
            else:
                bias = bias + emb  # one for each image
        h = norm_act_conv(self.norm1, self.conv1, x, bias, skip=skip)
        if self.conv_shortcut is not None:
            x = conv2d(self.conv_shortcut, x, skip=skip)
        elif skip is not None:
            x = torch.cat([x, skip], dim=1)
        if self.training and self.dropout.p > 0:
            h = self.dropout(norm_act(self.norm2, h, scale=scale, shift=shift))
            return conv2d(self.conv2, h, residual=x)
        return norm_act_conv(self.norm2, self.conv2, h, self.conv2.bias, scale=scale, shift=shift, residual=x)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, x [N,C,H,W] -> x + Attention(GroupNorm(x)).

    ``head_dim`` None is a single head; ``groups`` None leaves out the norm.
    """

    def __init__(self, channels: int, *, head_dim: int | None, groups: int | None, eps: float) -> None:
        super().__init__()
        self.heads = channels // (head_dim or channels)
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list only for diffusers' key "to_out.0"

    def forward(self, x: Tensor) -> Tensor:
        N, C, H, W = x.shape
        normed = x if self.group_norm is None else norm_act(self.group_norm, x, act="none")
        tokens = normed.permute(0, 2, 3, 1).reshape(N, H * W, C)
        q, k, v = (
            p(tokens).view(N, H * W, self.heads, C // self.heads).transpose(1, 2)
            for p in (self.to_q, self.to_k, self.to_v)
        )
        out = ops.attention(q, k, v).transpose(1, 2).reshape(N, H * W, C)
        out, last = out.view(N, H, W, C).permute(0, 3, 1, 2), self.to_out[0]
        return ops.conv2d(out, last.weight[:, :, None, None], last.bias, residual=x)


class Downsample(nn.Module):
    """x [N,C,H,W] -> [N,C,H/2,W/2] by a 3×3 convolution of stride 2; ``padding`` 0 pads right and bottom only."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(self.conv, x, None if self.conv.padding[0] else (0, 1, 0, 1))


class Upsample(nn.Module):
    """x [N,C,H,W] -> [N,C,2H,2W]: nearest, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(self.conv, x, upsample=2)


class Level(nn.Module):
    """One resolution: residual blocks, and attention after each where there are as many."""

    def __init__(self, blocks: list[ResnetBlock], attentions: list[AttentionBlock]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions) if attentions else None

    def block(self, i: int, x: Tensor, emb_act: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        x = self.resnets[i](x, emb_act, skip)
        return x if self.attentions is None else self.attentions[i](x)


class MidBlock(Level):
    """The lowest resolution: a residual block, attention where there is any, and another residual block."""

    def forward(self, x: Tensor, emb_act: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, emb_act)
        for attention in self.attentions or ():
            x = attention(x)
        return self.resnets[1](x, emb_act)
