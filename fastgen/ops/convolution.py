"""How a convolution runs on the CPU's own kernels: which algorithm, on which weights, and its gradients.

Legend: N batch, C input channels (both sources), K output channels, H W input, H' W' output size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops import patches
from fastgen.ops.activations import ACTIVATIONS
from fastgen.ops.group_norm_act import group_norm_act
from fastgen.ops.registration import vjp, wide
from fastgen.ops.weights import CACHE

# csrc/cpu/conv2d.h: the sums themselves, and Winograd's F(2,3), F(4,3) and F(3,2) in both directions.
DIRECT, F23, F43, F32 = range(4)
_OUTPUTS = {DIRECT: 1, F23: 2, F43: 4, F32: 3}  # of a tile, in one direction
_NUMBERS = {F23: 16, F43: 36, F32: 16}  # that a tile is transformed to
# How weights are read: as conv2d's, as its data gradient's, as the sub-pixels of a transposed one.
FORWARD, GRADIENT, SUBPIXELS = range(3)
# What the choice weighs, of one AVX2 core: arithmetic, reading weights, passing tiles through the cache.
FLOPS, WEIGHT_BYTES, TILE_BYTES = 75e9, 14e9, 14e9
CHANNELS_LAST = torch.channels_last


class Geometry(NamedTuple):
    """padding: left, right, top, bottom, as F.pad counts. transposed: F.conv_transpose2d's. A 4×4 kernel of it with
    stride 2 and padding 1 is also what a nearest upsampling before a 3×3 kernel comes to."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    upsample: int = 1
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)

    def output(self, h: int, w: int, kh: int, kw: int) -> tuple[int, int]:
        """H', W'."""
        left, right, top, bottom = self.padding
        if self.transposed:
            h = (h - 1) * self.stride[0] - top - bottom + kh + self.output_padding[0]
            return h, (w - 1) * self.stride[1] - left - right + kw + self.output_padding[1]
        h, w = h * self.upsample, w * self.upsample
        return (
            (h + top + bottom - self.dilation[0] * (kh - 1) - 1) // self.stride[0] + 1,
            (w + left + right - self.dilation[1] * (kw - 1) - 1) // self.stride[1] + 1,
        )

    def subpixels(self, weight: Tensor) -> bool:
        """Whether the output is four interleaved maps, each by a 2×2 kernel."""
        if self.transposed:
            usual = self.stride == (2, 2) and self.padding == (1, 1, 1, 1) and self.output_padding == (0, 0)
            return usual and tuple(weight.shape[2:]) == (4, 4)
        same = self.padding == (1, 1, 1, 1) and self.stride == (1, 1) and self.dilation == (1, 1)
        return self.upsample == 2 and same and tuple(weight.shape[2:]) == (3, 3)

    def ours(self, weight: Tensor) -> bool:
        """Whether our kernels compute it; otherwise PyTorch's convolution does, between fused norm and activation."""
        if self.groups != 1 or min(self.padding) < 0:
            return False
        return self.upsample == 1 or self.subpixels(weight)


class Prologue(NamedTuple):
    """The normalisation of the input: mean, rstd [N, G]; weight, bias [C]; scale, shift [N, C]; the activation."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    act: str


@functools.cache
def choose(n: int, c: int, k: int, h: int, w: int, taps: int, passes: int = 1) -> int:
    """The algorithm for an output [n, k, h, w] of ``taps`` × ``taps`` kernels: the least of estimated times.

    Large tiles save arithmetic, but their transformed weights (36 numbers for 9) must be read, ``passes`` times; a map
    smaller than a tile wastes some of it. Whether gradients are recorded plays no part: the bits are the same.
    """
    candidates = {3: [DIRECT, F23, F43], 2: [DIRECT, F32]}.get(taps, [DIRECT])

    def seconds(algorithm: int) -> float:
        m, numbers = _OUTPUTS[algorithm], _NUMBERS.get(algorithm, 1)
        depth = c * (taps * taps if algorithm == DIRECT else 1)
        tiles = n * -(-h // m) * -(-w // m)
        reading = 4 * numbers * depth * k / WEIGHT_BYTES * passes
        passing = 0 if algorithm == DIRECT else 8 * tiles * numbers * (c + k) / TILE_BYTES
        return max(2 * tiles * numbers * depth * k / FLOPS, reading) + passing

    return min(candidates, key=seconds)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Whether F.conv2d takes these arguments and our kernels would compute the sums themselves, like it."""
    left, right, top, bottom = geometry.padding
    if geometry.upsample > 1 or (left, top) != (right, bottom) or not all(type(s) is int for s in x.shape):
        return False
    if weight.dtype != x.dtype or (bias is not None and (bias.dtype != x.dtype or bias.ndim > 1)):
        return False
    kh, kw = weight.shape[2:]
    if kh != kw or geometry._replace(padding=(0, 0, 0, 0)) != Geometry():
        return True
    return choose(x.shape[0], x.shape[1], weight.shape[0], *geometry.output(*x.shape[2:], kh, kw), kh) == DIRECT


def grow(weight: Tensor) -> Tensor:
    """The [C, K, 4, 4] kernel of the transposed convolution (stride 2, padding 1) that equals a nearest upsampling
    by 2 and the convolution (padding 1) by weight [K, C, 3, 3]: each tap falls on two neighbours of four."""
    flipped = weight.transpose(0, 1).flip(2, 3)
    rows = F.pad(flipped, (0, 0, 0, 1)) + F.pad(flipped, (0, 0, 1, 0))
    return F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))


def _packed(weight: Tensor, way: int, algorithm: int, dtype: torch.dtype, grown: bool, kept: bool) -> Tensor:
    def make() -> Tensor:
        given = (grow(weight) if grown else weight).detach().to(dtype)
        size = torch.ops.fastgen_cpp.conv2d_packed_size(given, way, algorithm)
        packed = given.new_empty(size)
        torch.ops.fastgen_cpp.conv2d_pack(given, way, algorithm, packed)
        return packed

    return CACHE.get(weight, (way, algorithm, dtype, grown), make) if kept else make()


def run(
    x: Tensor, weight: Tensor, geometry: Geometry, way: int, size: tuple[int, int], *, skip: Tensor | None = None,
    prologue: Prologue | None = None, gain: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, act: str = "none", kept: bool = False,
) -> Tensor | None:  # fmt: skip
    """act(conv(prologue([x, skip])) · gain + bias + residual), [N, K, *size], channels last.

    ``way`` tells how weight is read; ``kept``: transformed weights come from the cache. Where a sum is not finite,
    tiles have spread it to their neighbours: then all is computed again by the sums themselves, so that NaN and
    infinity stand where PyTorch's convolution has them. The weights of an upsampling are sums already, of which
    infinity times one is not the sum of its products: then None, and PyTorch's is to be used.
    """
    x, skip, residual = (None if t is None else t.contiguous(memory_format=CHANNELS_LAST) for t in (x, skip, residual))
    subpixels = way == SUBPIXELS
    k, c = (weight.shape[0], weight.shape[1]) if way == FORWARD else (weight.shape[1], weight.shape[0])
    grown = subpixels and not geometry.transposed
    if grown:
        k, c = c, k
    kh, kw = (2, 2) if subpixels else weight.shape[2:]
    gh, gw = (x.shape[2] + 1, x.shape[3] + 1) if subpixels else size
    left, _, top, _ = (1, 1, 1, 1) if subpixels else geometry.padding
    stride = (1, 1) if subpixels else geometry.stride
    square = kh == kw and stride == (1, 1) and geometry.dilation == (1, 1)
    algorithm = choose(x.shape[0], c, 4 * k if subpixels else k, gh, gw, kh) if square else DIRECT
    y = torch.empty((x.shape[0], k, *size), dtype=x.dtype, memory_format=CHANNELS_LAST)
    dtype = wide(x.dtype)
    norm = (None,) * 6 if prologue is None else tuple(_parameter(p, dtype) for p in prologue[:6])
    in_act = 0 if prologue is None else ACTIVATIONS[prologue.act][0]
    gain, bias = _parameter(gain, dtype), _parameter(bias, dtype)

    def launch(algorithm: int) -> bool:
        return torch.ops.fastgen_cpp.conv2d_fwd(
            x, skip, _packed(weight, way, algorithm, dtype, grown, kept), *norm, in_act, gain, bias, residual,
            ACTIVATIONS[act][0], kh, kw, *stride, top, left, *geometry.dilation, gh, gw, 4 if subpixels else 1,
            algorithm, y,
        )  # fmt: skip

    if not launch(algorithm):
        if grown:
            return None
        if algorithm != DIRECT:
            launch(DIRECT)
    return y


def subpixel(
    x: Tensor, weight: Tensor, geometry: Geometry, size: tuple[int, int], gain: Tensor, offset: Tensor,
    residual: Tensor | None, act: str, narrow: int,
) -> Tensor:  # fmt: skip
    """act(conv_transpose2d(x, weight [C, K, 4, 4]) · gain + offset + residual), [N, K, 2H, 2W]; no residual where
    4K <= narrow: there the sub-pixels are 4K channels of one convolution, put in their places afterwards."""
    n, k = x.shape[0], weight.shape[1]
    if 4 * k > narrow:
        return run(x, weight, geometry, SUBPIXELS, size, gain=gain, bias=offset, residual=residual, act=act, kept=True)
    # Output 2i + a takes taps 3 - a and 1 - a of the input rows i - 1 + a and i + a.
    taps = weight.detach()[:, :, [3, 1, 2, 0]][..., [3, 1, 2, 0]].reshape(-1, k, 2, 2, 2, 2)  # [C, K, a, r, b, s]
    phases = taps.permute(2, 4, 1, 0, 3, 5).reshape(4 * k, -1, 2, 2)
    h, w = x.shape[2] + 1, x.shape[3] + 1
    given = {"gain": gain.repeat(4), "bias": offset.repeat(4), "act": act}
    maps = run(x, phases, Geometry(padding=(1, 1, 1, 1)), FORWARD, (h, w), **given).view(n, 2, 2, k, h, w)
    y = x.new_empty((n, k, *size))
    for a in range(2):
        for b in range(2):
            y[:, :, a::2, b::2] = maps[:, a, b, :, a : a + h - 1, b : b + w - 1]
    return y


def _parameter(p: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return p if p is None or (p.dtype == dtype and p.is_contiguous()) else p.detach().to(dtype).contiguous()


def statistics(
    x: Tensor, skip: Tensor | None, num_groups: int, eps: float, backend: str = "cpp"
) -> tuple[Tensor, Tensor]:
    """mean and 1/sqrt(var + eps) of each group of [x, skip], [N, G]; x and skip are dense in one layout."""
    mean = x.new_empty((x.shape[0], num_groups), dtype=wide(x.dtype))
    rstd = torch.empty_like(mean)
    backends.kernel("group_norm_act", "group_norm_act_statistics", backend)(x, skip, num_groups, eps, mean, rstd)
    return mean, rstd


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, skip: Tensor | None, residual: Tensor | None,
    act: str, prologue: Prologue | None, num_groups: int, eps: float, kept: bool = False,
) -> Tensor:  # fmt: skip
    """act(conv(prologue([x, skip])) + bias + residual), [N, K, H', W'], by our kernels where they compute it."""
    way = SUBPIXELS if geometry.subpixels(weight) else FORWARD
    # With few of the sums shared by neighbours, PyTorch's convolution is the faster one.
    if geometry.ours(weight) and not (geometry.stride == (2, 2) and tuple(weight.shape[2:]) == (4, 4)):
        size = geometry.output(*x.shape[2:], *weight.shape[2:])
        y = run(
            x, weight, geometry, way, size, skip=skip, prologue=prologue, bias=bias, residual=residual, act=act,
            kept=kept,
        )  # fmt: skip
        if y is not None:
            return y
    h, padding = _padded(_normalised(x, skip, prologue, num_groups, eps), geometry)
    y = F.conv2d(h, weight.to(x.dtype), None, geometry.stride, padding, geometry.dilation, geometry.groups)
    y = y if bias is None else y + bias.to(x.dtype).reshape(-1, weight.shape[0], 1, 1)
    return ACTIVATIONS[act][1](y if residual is None else y + residual)


def _normalised(x: Tensor, skip: Tensor | None, prologue: Prologue | None, num_groups: int, eps: float) -> Tensor:
    """What the convolution reads, in memory after all: [N, C, H, W], for PyTorch's convolution."""
    if prologue is None:
        return x if skip is None else torch.cat([x, skip], dim=1)
    p = prologue
    return group_norm_act(x, num_groups, p.weight, p.bias, eps, p.act, p.scale, p.shift, skip)


def _padded(h: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, int]]:
    """h, upsampled and padded as far as F.conv2d cannot, and the padding that is left for it."""
    if geometry.upsample > 1:
        h = F.interpolate(h, scale_factor=float(geometry.upsample), mode="nearest")
    left, right, top, bottom = geometry.padding
    return (h, (top, left)) if (left, top) == (right, bottom) else (F.pad(h, geometry.padding), (0, 0))


def strided(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the weight gradient of a convolution of x is made by products of matrices, PyTorch's being slower."""
    usual = geometry.upsample == 1 and min(geometry.padding) >= 0 and not geometry.transposed
    fits = x.dtype == weight.dtype and min(weight.shape[:2]) >= patches.FEW and 1 < max(weight.shape[2:]) <= 4
    where = (geometry.stride, geometry.dilation, geometry.groups)
    return usual and fits and patches.worthwhile(x, weight.shape[0], *where)


def data_gradient(dy: Tensor, weight: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor | None:
    """The gradient of the (normalised) input, [N, C, *size], channels last; None where PyTorch's is to be used.

    Of a 4×4 convolution of stride 2 it is the transposed one, by sub-pixels.
    """
    kh, kw = weight.shape[2:]
    left, _, top, _ = geometry.padding
    plain = geometry.stride == (1, 1) and geometry.upsample == 1
    back = geometry._replace(transposed=True)
    if geometry.upsample == 1 and back.subpixels(weight) and size == back.output(*dy.shape[2:], kh, kw):
        return run(dy, weight, back, SUBPIXELS, size) if strided(dy, weight, geometry) else None
    if not plain or geometry.groups != 1 or geometry.dilation != (1, 1) or not (0 <= top < kh and 0 <= left < kw):
        return None
    back = Geometry(padding=(kw - 1 - left,) * 2 + (kh - 1 - top,) * 2)
    return run(dy, weight, back, GRADIENT, size)


def weight_gradient(
    dy: Tensor, x: Tensor, skip: Tensor | None, weight: Tensor, geometry: Geometry, prologue: Prologue | None
) -> Tensor | None:
    """The gradient of weight by Winograd's algorithm, of a strided convolution by products of matrices; None where
    PyTorch's is to be used."""
    left, _, top, _ = geometry.padding
    same = geometry._replace(padding=(0, 0, 0, 0)) == Geometry() and tuple(weight.shape[2:]) == (3, 3)
    n, k, h, w = dy.shape
    if skip is None and prologue is None and strided(x, weight, geometry):
        x, dy = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, dy))
        kernel = tuple(weight.shape[2:])
        return patches.weight_gradient(dy, x, kernel, geometry.stride, geometry.padding).to(weight.dtype)
    if not same or min(left, top) < 0 or weight.dtype not in (torch.float32, torch.float64):
        return None
    algorithm = choose(n, weight.shape[1], k, h, w, 3, 3)
    if algorithm == DIRECT:
        return None
    x, skip, dy = (None if t is None else t.contiguous(memory_format=CHANNELS_LAST) for t in (x, skip, dy))
    dtype = wide(x.dtype)
    dweight = torch.empty(weight.shape, dtype=dtype)
    norm = (None,) * 6 if prologue is None else tuple(_parameter(p, dtype) for p in prologue[:6])
    in_act = 0 if prologue is None else ACTIVATIONS[prologue.act][0]
    finite = torch.ops.fastgen_cpp.conv2d_weight_bwd(dy, x, skip, *norm, in_act, top, left, algorithm, dweight)
    return dweight.to(weight.dtype) if finite else None


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, skip: Tensor | None, prologue: Prologue | None,
    num_groups: int, eps: float, needs: list[bool], own: tuple[Callable, Callable] = (data_gradient, weight_gradient),
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(gradient of the normalised [x, skip], of weight) as far as `needs`, in the order of conv2d's tensors, asks.

    own: the data gradient and the weight gradient by kernels of ours, None where they have none.
    """
    need_h, need_weight = needs[0] or needs[3] or any(needs[5:]), needs[1]
    dh = own[0](dy, weight, geometry, tuple(x.shape[2:])) if need_h else None
    dweight = own[1](dy, x, skip, weight, geometry, prologue) if need_weight else None
    need_h, need_weight = need_h and dh is None, need_weight and dweight is None
    if need_h or need_weight:
        h = _normalised(x, skip, prologue, num_groups, eps)
        found = _vendor_gradients(dy, h, weight, geometry, need_h, need_weight)
        dh, dweight = (found[0] if need_h else dh), (found[1] if need_weight else dweight)
    return dh, dweight


def _vendor_gradients(
    dy: Tensor, h: Tensor, weight: Tensor, geometry: Geometry, need_h: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of h and weight by PyTorch's convolution."""
    backward, needs = torch.ops.aten.convolution_backward, (need_h, need_weight, False)
    if geometry.subpixels(weight):  # a quarter of the arithmetic of a convolution of the upsampled map
        grown = grow(weight).to(h.dtype)
        dh, dgrown, _ = backward(dy, h, grown, None, (2, 2), (1, 1), (1, 1), True, (0, 0), 1, needs)
        return dh, vjp(grow, (weight,), (dgrown.to(weight.dtype),))[0] if need_weight else None
    if geometry.upsample > 1:

        def vendor(h: Tensor, weight: Tensor) -> Tensor:
            h, padding = _padded(h, geometry)
            return F.conv2d(h, weight.to(h.dtype), None, geometry.stride, padding, geometry.dilation, geometry.groups)

        return vjp(vendor, (h, weight), (dy,), (need_h, need_weight))
    padded, padding = _padded(h, geometry)
    where = (geometry.stride, padding, geometry.dilation, False, (0, 0), geometry.groups)
    dh, dweight, _ = backward(dy, padded, weight.to(h.dtype), None, *where, needs)
    if need_h and padded is not h:
        dh = F.pad(dh, [-p for p in geometry.padding])
    return dh, dweight.to(weight.dtype) if need_weight else None
