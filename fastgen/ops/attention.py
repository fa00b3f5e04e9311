"""Scaled dot-product attention: softmax(q·kᵀ·scale)·v (Vaswani et al. 2017, eq. 1).

Legend: N batch, h heads, L queries, S keys, D head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    """softmax(q·kᵀ·scale)·v, [N,h,L,D] from q [N,h,L,D] and k, v [N,h,S,D].

    ``scale`` defaults to 1/sqrt(D); ``causal`` lets query i see keys 0 … i only.
    Runs PyTorch's scaled_dot_product_attention on every device; it has no kernel of its own yet.
    """
    return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    """The equation, written out, with the softmax in at least fp32. Same arguments as `attention`."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)
