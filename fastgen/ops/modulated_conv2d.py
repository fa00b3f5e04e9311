"""A convolution whose weights each image scales, and normalises again: the layer of StyleGAN2 and 3.

    w'_k  = w_k / sqrt(mean w_k²);   s' = s / sqrt(mean s²)
    d_nk  = 1 / sqrt(Σ_c s'_nc² Σ_ij w'_kcij² + 1e-8)
    y_n   = conv(x_n, d_nk · w'_kc · s'_nc · input_gain_nc) = d_n ⊙ conv((s'_n · input_gain_n) ⊙ x_n, w')

(Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", section 2.2, with the scaling of Karras et
al. 2021; mean s² runs over the batch). Without demodulation d = 1, w' = w, s' = s. The right side is what is computed:
scaling activations costs two passes over maps, while weights for every image are N times the weights in memory and a
convolution in N groups, without Winograd's algorithm or large matrices. There is no kernel of its own: the CPU's
convolution can multiply its input by a number for each image and channel as it reads it (as `norm_act_conv2d` does),
and so it goes where no gradient is recorded. Recorded, it is a product, `conv2d` and a product, with their derivatives.
On an H200 (4.8 TB/s, 790 TFLOP/s) 8 bf16 maps of 512 channels and 64 · 64 pixels take 195 µs of arithmetic for K = 512,
and the two products 28 µs of memory traffic. Legend: N batch, C input, K output channels, H W input, H' W' output size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops import convolution
from fastgen.ops.conv2d import ENGINES, conv2d
from fastgen.ops.conv2d_arguments import Pair, four, pair
from fastgen.ops.convolution import Geometry, Prologue
from fastgen.ops.registration import FusedOp, layout, wide

EPS = 1e-8


def modulated_conv2d(
    x: Tensor, w: Tensor, s: Tensor, demodulate: bool = True, padding: Pair = 0, input_gain: Tensor | None = None, *,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The convolution of each image by weights of its own, [N, K, H', W'] in x's dtype and layout.

    x: [N, C, H, W]; w: [K, C, kh, kw]; s: [N, C], the style; demodulate: whether weights are normalised;
    padding: an int or a pair (height, width); input_gain: [], [C] or [N, C] or None. w, s and input_gain of
    any floating dtype; scales are computed in fp32 (fp64 for fp64). Differentiable in every tensor, twice
    too. Raises ValueError that names the argument at fault.
    """
    _check(x, w, s, padding, input_gain)
    norm, pre, post = _scales(x, w, s, demodulate, input_gain)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, s, input_gain))
    # Without a better algorithm for the sums PyTorch's convolution is the faster one, products and all.
    left = backends.left_to_pytorch("modulated_conv2d", x, backend)
    if recorded or (left and convolution.plain(x, w, None, Geometry(padding=four(padding)))):
        w = w.to(pre.dtype) if norm is None else w.to(pre.dtype) * norm[:, None, None, None]
        y = _convolve(x * pre.to(x.dtype)[:, :, None, None], w.to(x.dtype), padding, backend)
        return y if post is None else y * post.to(x.dtype)[:, :, None, None]
    return _OP(x, w, norm, pre, post, list(pair(padding)), backend)


def _check(x: Tensor, w: Tensor, s: Tensor, padding: Pair, input_gain: Tensor | None) -> None:
    if x.ndim != 4 or not x.is_floating_point() or x.shape[1] == 0:
        raise ValueError(f"x must be a floating tensor [N, C, H, W] with C > 0, not {x.dtype} {list(x.shape)}")
    n, c = x.shape[:2]
    if w.ndim != 4 or w.shape[1] != c or 0 in w.shape or not w.is_floating_point():
        raise ValueError(f"w must be a floating tensor [K, {c}, kh, kw], not {w.dtype} {list(w.shape)}")
    if s.shape != (n, c) or not s.is_floating_point():
        raise ValueError(f"s must be a floating tensor {[n, c]}, not {s.dtype} {list(s.shape)}")
    if input_gain is not None and (
        not input_gain.is_floating_point() or input_gain.shape not in [(), (c,), (1, c), (n, 1), (n, c)]
    ):
        raise ValueError(f"input_gain must be floating [], {[c]} or {[n, c]}, not {list(input_gain.shape)}")
    for name, t in (("w", w), ("s", s), ("input_gain", input_gain)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}; move one of them")
    height, width = pair(padding)
    if min(height, width) < 0:
        raise ValueError(f"padding must be 0 or more, not {padding!r}")
    if x.shape[2] + 2 * height < w.shape[2] or x.shape[3] + 2 * width < w.shape[3]:
        raise ValueError(f"x {list(x.shape)} is too small for the kernel {list(w.shape[2:])} and the padding")


def _scales(
    x: Tensor, w: Tensor, s: Tensor, demodulate: bool, input_gain: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """norm [K], pre [N, C], post [N, K] of y = post ⊙ (norm · conv(pre ⊙ x, w)), in at least fp32; None for ones."""
    pre, norm, post = s.to(wide(x.dtype)), None, None
    if demodulate:
        squares = w.to(pre.dtype).square().sum((2, 3))
        norm = (squares.sum(1) / w[0].numel()).rsqrt()
        pre = pre * pre.square().mean().rsqrt()
        post = (pre.square() @ (squares * norm.square()[:, None]).t() + EPS).rsqrt()
    return norm, pre if input_gain is None else pre * input_gain.to(pre.dtype), post


def modulated_conv2d_reference(
    x: Tensor, w: Tensor, s: Tensor, demodulate: bool = True, padding: Pair = 0, input_gain: Tensor | None = None
) -> Tensor:
    """The left side of the equation in plain PyTorch, weights for every image, in at least fp32."""
    dtype = wide(x.dtype)
    w, s = w.to(dtype), s.to(dtype)
    if demodulate:
        w = w * w.square().mean((1, 2, 3), keepdim=True).rsqrt()
        s = s * s.square().mean().rsqrt()
    each = w * s[:, None, :, None, None]  # [N, K, C, kh, kw]
    if demodulate:
        each = each * (each.square().sum((2, 3, 4), keepdim=True) + EPS).rsqrt()
    if input_gain is not None:
        each = each * input_gain.to(dtype).expand(s.shape)[:, None, :, None, None]
    images = [F.conv2d(image[None], weights, padding=pair(padding)) for image, weights in zip(x.to(dtype), each)]
    return (torch.cat(images) if images else F.conv2d(x.to(dtype), w, padding=pair(padding))).to(x.dtype)


def _convolve(x: Tensor, w: Tensor, padding: Pair, backend: str | None) -> Tensor:
    """conv2d; on plain PyTorch, F.conv2d in the dtype of x. (A compiler cannot look into `resolve`.)"""
    compiling = torch.compiler.is_compiling()
    if not compiling and backends.resolve("modulated_conv2d", x.device, backend) == "reference":
        return F.conv2d(x, w, padding=pair(padding)).contiguous(memory_format=layout(x))
    return conv2d(x, w, padding=padding, backend=backend)


# The folded op: inference only, so without a gradient.


def _forward(
    x: Tensor, w: Tensor, norm: Tensor | None, pre: Tensor, post: Tensor | None, padding: Any, backend: str | None
) -> Tensor:
    backend = backends.resolve("modulated_conv2d", x.device, backend)
    fake = _fake(x, w, norm, pre, post, padding)
    if x.numel() == 0:
        return fake
    if backend == "reference":
        given = w.to(pre.dtype) if norm is None else w.to(pre.dtype) * norm[:, None, None, None]
        y = F.conv2d(x * pre.to(x.dtype)[:, :, None, None], given.to(x.dtype), padding=tuple(padding))
    else:
        prologue = Prologue(torch.zeros_like(pre), pre, None, None, None, None, "none")
        geometry, size = Geometry(padding=four(padding)), tuple(fake.shape[2:])
        given = {"prologue": prologue, "gain": norm, "kept": True}
        y = ENGINES[backend].run(x, w, geometry, convolution.FORWARD, size, **given)
    y = y if post is None else y.mul_(post[:, :, None, None])
    return y.contiguous(memory_format=layout(x))


def _fake(x: Tensor, w: Tensor, norm: Any, pre: Any, post: Any, padding: Any, *_: Any) -> Tensor:
    size = Geometry(padding=four(padding)).output(*x.shape[2:], *w.shape[2:])
    return torch.empty((len(x), len(w), *size), dtype=x.dtype, device=x.device, memory_format=layout(x))


_OP = FusedOp(
    "modulated_conv2d(Tensor x, Tensor w, Tensor? norm, Tensor pre, Tensor? post, int[] padding, str? backend) "
    "-> Tensor",
    _forward, _fake,
)  # fmt: skip
