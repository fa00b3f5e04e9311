"""Images as bytes: clamp, scale, round and move the channels last, in one pass.

    out[n, h, w, c] = round(clamp(x[n, c, h, w], -1, 1) · 127.5 + 127.5), halves to even, NaN to 0

Legend: N images, C channels, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops.registration import FusedOp, dense, wide


def to_uint8(x: Tensor, backend: str | None = None) -> Tensor:
    """uint8 [N, H, W, C], contiguous, from x [N, C, H, W], floating, in [-1, 1] (what is outside is clamped)."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [N, C, H, W], not {x.dtype} {list(x.shape)}")
    return _FORWARD(x, backend)


def to_uint8_reference(x: Tensor) -> Tensor:
    """The equation in plain PyTorch, in at least fp32. Same arguments as `to_uint8`."""
    y = (x.to(wide(x.dtype)).clamp(-1, 1) * 127.5 + 127.5).round().nan_to_num(0.0)
    return y.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _forward(x: Tensor, backend: str | None) -> Tensor:
    backend = backends.resolve("to_uint8", x.device, backend, like=(x,))
    if backend == "reference":
        return to_uint8_reference(x)
    out = _fake(x)
    backends.kernel("to_uint8", "to_uint8_fwd", backend)(dense(x), out)
    return out


def _fake(x: Tensor, backend: Any = None) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, h, w, c), dtype=torch.uint8)


_FORWARD = FusedOp("to_uint8(Tensor x, str? backend) -> Tensor", _forward, _fake)
