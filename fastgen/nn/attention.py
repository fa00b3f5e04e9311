"""Self-attention over the pixels of an image, as diffusion models and autoencoders have it at low resolutions.

Legend: N batch, C channels, H W image size, h heads, D head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgen import ops
from fastgen.errors import UsageError
from fastgen.ops.registration import layout


class Attention2d(nn.Module):
    """x + to_out(softmax(q·kᵀ / sqrt(D))·v), where q, k, v are linear in the pixels of GroupNorm(x).

    channels: C; heads: h, or head_dim: D = C / h, one of them or neither (a single head); num_groups, eps:
    of the norm; residual: whether x is added. The keys are those of diffusers' attention in UNet2DModel and
    AutoencoderKL: group_norm, to_q, to_k, to_v (nn.Linear, with bias unless ``bias`` is False) and to_out.0.

    forward(x [N, C, H, W]) -> [N, C, H, W] in x's dtype and layout. The scores [N, h, H·W, H·W] are never in memory
    (`ops.attention`). Raises UsageError for heads that do not divide the channels, ValueError for an x of
    another shape.
    """

    def __init__(
        self, channels: int, heads: int | None = None, *, head_dim: int | None = None, num_groups: int = 32,
        eps: float = 1e-5, bias: bool = True, residual: bool = True, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads is not None and head_dim is not None:
            raise UsageError("head_dim: give heads or head_dim, not both")
        name, given = ("heads", heads) if head_dim is None else ("head_dim", head_dim)
        if given is not None and (given < 1 or channels % given):
            raise UsageError(f"{name}: {given} does not divide the {channels} channels; take a divisor")
        made = {"device": device, "dtype": dtype}
        self.heads = (heads or 1) if head_dim is None else channels // head_dim
        self.residual = residual
        self.group_norm = nn.GroupNorm(num_groups, channels, eps, **made)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias, **made) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels, **made)])  # a list only for the key "to_out.0"

    def reset_parameters(self) -> None:
        for layer in (self.group_norm, self.to_q, self.to_k, self.to_v, self.to_out[0]):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, H, W]."""
        if x.ndim != 4:
            raise UsageError(f"x: must be [N, {self.group_norm.num_channels}, H, W], not {list(x.shape)}; reshape it")
        n, c, height, width = x.shape
        norm, last, pixels = self.group_norm, self.to_out[0], height * width
        h = ops.group_norm_act(x, norm.num_groups, norm.weight, norm.bias, norm.eps, "none")
        h = h.permute(0, 2, 3, 1).reshape(n, pixels, c)
        q, k, v = (
            to(h).view(n, pixels, self.heads, c // self.heads).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        out = ops.attention(q, k, v).transpose(1, 2).reshape(n, height, width, c).permute(0, 3, 1, 2)
        out = out.to(x.dtype)  # autocast's linear layers have another
        y = ops.conv2d(out, last.weight[:, :, None, None], last.bias, residual=x if self.residual else None)
        return y.contiguous(memory_format=layout(x))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, residual={self.residual}"
