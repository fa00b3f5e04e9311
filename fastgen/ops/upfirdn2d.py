"""Upsampling, filtering and downsampling of images in one step: the resampling of StyleGAN.

    u[i · up] = x[i], 0 in between;   p = u padded (cropped where padding is negative)
    y[o] = gain · Σ_k f[k] · p[o · down + k],   f flipped first, unless flip_filter: a convolution

in both directions, as Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", have it in their
code, and SciPy's upfirdn in one. It is linear in x, and its transpose is itself with up and down exchanged and the
filter flipped: so are its derivatives, of every order. A filter f [taps] stands for the product f[j] · f[i] of two
passes. Only the taps that meet a pixel are computed: of up · up, one. Legend: N batch, C channels, H W input, H' W'
output size. On an H200 (4.8 TB/s) a map of 64 MiB that grows to four times its size takes 70 µs: memory is the limit up
to some 100 operations a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops.registration import FusedOp, dense, layout, wide

Scaling = int | Sequence[int]


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Scaling = 1,
    down: Scaling = 1,
    padding: Scaling = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """gain · filter of the upsampled and padded x, downsampled: [N, C, H', W'] in x's dtype and layout.

    x: [N, C, H, W]; f: floating [fh, fw], or [taps] for a separable filter, or None for 1 (`setup_filter`
    makes one). up, down: an int, or (x, y). padding: zeros around the upsampled image, an int, (x, y) or
    (left, right, top, bottom); negative numbers crop. flip_filter: False is a convolution, True a
    correlation. Sums are in fp32 (fp64 for fp64). H' = (H · up + top + bottom - fh) // down + 1.
    Differentiable in x to any order, not in f. Raises ValueError that names the argument at fault.
    """
    up, down, padding = _pair(up, "up"), _pair(down, "down"), _four(padding)
    f = _filter(x, f)
    _check(x, f, up, down, padding)
    return _OP(x, f, up, down, padding, flip_filter, float(gain), backend)


def upfirdn2d_reference(
    x: Tensor, f: Tensor | None, up: Scaling = 1, down: Scaling = 1, padding: Scaling = 0, flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:  # fmt: skip
    """The equation in plain PyTorch, in at least fp32. Same arguments as `upfirdn2d`."""
    (upx, upy), (downx, downy) = _pair(up, "up"), _pair(down, "down")
    f = _filter(x, f).to(wide(x.dtype))
    f = f if flip_filter else f.flip(list(range(f.ndim)))
    n, c, h, w = x.shape
    u = F.pad(x.to(f.dtype).reshape(n * c, 1, h, 1, w, 1), [0, upx - 1, 0, 0, 0, upy - 1])
    p = F.pad(u.reshape(n * c, 1, h * upy, w * upx), _four(padding))
    if f.ndim == 2:
        y = F.conv2d(p, f[None, None] * gain, stride=(downy, downx))
    else:
        y = F.conv2d(p, f[None, None, None], stride=(1, downx))
        y = F.conv2d(y, f[None, None, :, None] * gain, stride=(downy, 1))
    return y.reshape(n, c, *y.shape[2:]).to(x.dtype)


def setup_filter(
    f: Any, device: Any = "cpu", normalize: bool = True, flip_filter: bool = False, gain: float = 1,
    separable: bool | None = None,
) -> Tensor:  # fmt: skip
    """A filter for `upfirdn2d`, fp32 [fh, fw] or [taps], on ``device``.

    f: a tensor, array or list, [fh, fw] or [taps], a number, or None for 1. normalize: its sum becomes 1.
    gain: of the whole. separable: False makes the outer product of [taps]; by default fewer than 8 taps
    do. Raises ValueError that names the argument at fault.
    """
    f = torch.as_tensor(1.0 if f is None else f, dtype=torch.float32)
    f = f.reshape(1) if f.ndim == 0 else f
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"f must have one or two dimensions and a value, not {list(f.shape)}")
    separable = f.ndim == 1 and f.numel() >= 8 if separable is None else separable
    if separable and f.ndim == 2:
        raise ValueError("separable: a filter of two dimensions is not; give its taps")
    f = f.outer(f) if f.ndim == 1 and not separable else f
    f = f / f.sum() if normalize else f
    f = f.flip(list(range(f.ndim))) if flip_filter else f
    return (f * gain ** (f.ndim / 2)).to(device)


def filter2d(
    x: Tensor, f: Tensor | None, padding: Scaling = 0, flip_filter: bool = False, gain: float = 1, *,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`upfirdn2d` that keeps the size: x [N, C, H, W] filtered, zeros outside; ``padding`` comes on top."""
    fw, fh = _size(f)
    more = (fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2)
    return upfirdn2d(x, f, padding=_added(padding, more), flip_filter=flip_filter, gain=gain, backend=backend)


def upsample2d(
    x: Tensor, f: Tensor | None, up: Scaling = 2, padding: Scaling = 0, flip_filter: bool = False, gain: float = 1, *,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`upfirdn2d` to ``up`` times the size, [N, C, H · up, W · up], of the same brightness; ``padding`` on top."""
    (fw, fh), (upx, upy) = _size(f), _pair(up, "up")
    more = ((fw + upx - 1) // 2, (fw - upx) // 2, (fh + upy - 1) // 2, (fh - upy) // 2)
    return upfirdn2d(x, f, up, 1, _added(padding, more), flip_filter, gain * upx * upy, backend=backend)


def downsample2d(
    x: Tensor, f: Tensor | None, down: Scaling = 2, padding: Scaling = 0, flip_filter: bool = False, gain: float = 1, *,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`upfirdn2d` to one part in ``down`` of the size, [N, C, H / down, W / down]; ``padding`` comes on top."""
    (fw, fh), (downx, downy) = _size(f), _pair(down, "down")
    more = ((fw - downx + 1) // 2, (fw - downx) // 2, (fh - downy + 1) // 2, (fh - downy) // 2)
    return upfirdn2d(x, f, 1, down, _added(padding, more), flip_filter, gain, backend=backend)


def _pair(value: Scaling, name: str) -> list[int]:
    """(x, y)."""
    pair = list(value) if isinstance(value, Sequence) else [value, value]
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f"{name} must be a whole number of at least 1, or two of them (x, y), not {value!r}")
    return pair


def _four(value: Scaling) -> list[int]:
    """left, right, top, bottom."""
    four = list(value) if isinstance(value, Sequence) else [value] * 4
    four = [four[0], four[0], four[1], four[1]] if len(four) == 2 else four
    if len(four) != 4 or not all(isinstance(v, int) for v in four):
        raise ValueError(f"padding must be a whole number, (x, y) or (left, right, top, bottom), not {value!r}")
    return four


def _added(padding: Scaling, more: tuple[int, ...]) -> list[int]:
    return [p + m for p, m in zip(_four(padding), more, strict=True)]


def _size(f: Tensor | None) -> tuple[int, int]:
    """Width and height."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def _filter(x: Tensor, f: Tensor | None) -> Tensor:
    return x.new_ones(1, 1, dtype=torch.float32) if f is None else f


def _check(x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int]) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [N, C, H, W], not {x.dtype} {list(x.shape)}")
    if f.ndim not in (1, 2) or 0 in f.shape or not f.is_floating_point():
        raise ValueError(f"f must be a floating tensor [fh, fw] or [taps], not {f.dtype} {list(f.shape)}")
    if f.requires_grad:
        raise ValueError("f must not require a gradient: upfirdn2d has none for its filter")
    if f.device != x.device:
        raise ValueError(f"f is on {f.device}, x on {x.device}; move one of them")
    if min(_output(x.shape[2:], f, up, down, padding)) < 1:
        raise ValueError(f"x {list(x.shape)} with up {up} and padding {padding} is smaller than f {list(f.shape)}")


def _output(size: Sequence[int], f: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int]) -> tuple:
    """H', W'."""
    fw, fh = _size(f)
    height = (size[0] * up[1] + padding[2] + padding[3] - fh) // down[1] + 1
    return height, (size[1] * up[0] + padding[0] + padding[1] - fw) // down[0] + 1


# What follows takes the schema's arguments, in its order; up and down are (x, y), padding left, right, top, bottom.


def _forward(x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, flip: bool, gain: float, backend: Any) -> Tensor:
    backend = backends.resolve("upfirdn2d", x.device, backend)
    x = dense(x)
    if backend == "reference" or x.numel() == 0:
        return upfirdn2d_reference(x, f, up, down, padding, flip, gain).contiguous(memory_format=layout(x))
    y = _fake(x, f, up, down, padding)
    launch = backends.kernel("upfirdn2d", "upfirdn2d_fwd", backend)
    launch(x, f.to(wide(x.dtype)).contiguous(), *up, *down, padding[0], padding[2], flip, gain, y)
    return y


def _fake(x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, *_: Any) -> Tensor:
    size = _output(x.shape[2:], f, up, down, padding)
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=layout(x))


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, f, ctx.up, ctx.down, ctx.padding, ctx.flip, ctx.gain, backend = inputs
    ctx.save_for_backward(f)
    ctx.size, ctx.like = x.shape[2:], layout(x)
    ctx.backend = backends.resolve("upfirdn2d", x.device, backend)


def _backward(ctx: Any, dy: Tensor | None) -> tuple:
    """The transpose: padded so that output pixel o meets the taps that met it, and as large as x."""
    if dy is None:
        return (None,) * 8
    (f,) = ctx.saved_tensors
    padding = []
    for taps, up, down, before, size, out in zip(
        _size(f), ctx.up, ctx.down, ctx.padding[::2], ctx.size[::-1], dy.shape[:1:-1], strict=True
    ):
        padding += [taps - before - 1, size * up - out * down + before - up + 1]
    dy = dy.contiguous(memory_format=ctx.like)
    dx = _OP(dy, f, ctx.down, ctx.up, padding, not ctx.flip, ctx.gain, ctx.backend)
    return dx, *[None] * 7


_OP = FusedOp(
    "upfirdn2d(Tensor x, Tensor f, int[2] up, int[2] down, SymInt[4] padding, bool flip_filter, float gain, "
    "str? backend) -> Tensor",
    _forward, _fake, _setup, _backward,
)  # fmt: skip
