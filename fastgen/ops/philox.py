"""Noise that belongs to the image: Philox-4x32-10 and Box-Muller.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Key = the image's 64-bit seed;
counter = (element index within the image / 4, step, stream, 0). Image i's noise depends on its
seed and on nothing else: not on the batch, the device, the thread count or the order of calls.
The normals use only + × and sqrt, each rounded once, in an order that csrc/common/philox.h and
kernels/_philox.py share, so that every backend gets the same bits.

Legend: N images, L elements of an image, counted in logical (row-major) order whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops.registration import FusedOp


class Stream(IntEnum):
    """What a draw is for; no two purposes ever share bits. The same numbers stand in csrc/common/philox.h."""

    INITIAL = 0  # x_T, where sampling starts; step 0
    STEP = 1  # the noise of one sampling step; step = row of the coefficient table
    Q_SAMPLE = 2  # the forward diffusion; step = t
    REPARAMETERIZE = 3  # the latent of a VAE; step 0
    LABEL = 4  # a class label that was not given; step 0


def philox_normal(
    seeds: Tensor,
    shape: Sequence[int],
    step: int = 0,
    stream: int = Stream.INITIAL,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Standard normals [N, *shape], on the device of ``seeds``, an int64 [N] tensor; |z| < 5.8.

    Drawn in fp32 and then rounded to ``dtype``. ``step`` and ``stream`` are in 0 … 2³²-1.
    """
    _check(seeds, step, stream)
    return _NORMAL(seeds, list(shape), step, int(stream), dtype, backend)


def philox_bits(
    seeds: Tensor, n: int, step: int = 0, stream: int = Stream.INITIAL, backend: str | None = None
) -> Tensor:
    """The raw stream: n 32-bit words per image as int64 [N, n], each in 0 … 2³²-1, from seeds int64 [N]."""
    _check(seeds, step, stream)
    return _BITS(seeds, n, step, int(stream), backend)


def _check(seeds: Tensor, step: int, stream: int) -> None:
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be an int64 tensor [N], not {seeds.dtype} {list(seeds.shape)}")
    for name, value in (("step", step), ("stream", stream)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name} must be in 0 … 2**32 - 1, not {value}")


def philox_bits_reference(seeds: Tensor, n: int, step: int | Tensor = 0, stream: int = 0) -> Tensor:
    """The cipher in int64 arithmetic. ``step`` may also be an int64 tensor [] or [N]."""
    block = torch.arange(-(-n // 4), dtype=torch.int64, device=seeds.device).expand(len(seeds), -1)
    c0, c1 = block, torch.as_tensor(step, dtype=torch.int64, device=seeds.device).reshape(-1, 1).expand_as(block)
    c2, c3 = torch.full_like(block, stream), torch.zeros_like(block)
    k0, k1 = (seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps past 2^63; the two halves are still right
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :n]


_MASK = 0xFFFFFFFF


def philox_normal_reference(
    seeds: Tensor, shape: Sequence[int], step: int | Tensor = 0, stream: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Box-Muller over `philox_bits_reference`, in fp32, one rounding an operation."""
    length = math.prod(shape)
    bits = philox_bits_reference(seeds, -(-length // 4) * 4, step, stream) >> 8
    first, second = _box_muller(bits[:, 0::2], bits[:, 1::2])
    z = torch.stack([first, second], dim=-1).flatten(1)[:, :length]
    return z.reshape(len(seeds), *shape).to(dtype)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two 24-bit integers: radius sqrt(-2 ln((a+1) 2^-24)), angle 2 pi b 2^-24."""
    u = (a + 1).float() * 2.0**-24
    # torch's fp32 sqrt is not correctly rounded on every CPU; in fp64 and rounded once more it is.
    radius = (_log(u) * -2.0).double().sqrt().float()
    quadrant = (b + (1 << 21)) >> 22
    x = (b - (quadrant << 22)).float() * 3.7450702829239286e-7
    z = x * x
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = s * z * x + x
    c = z * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z + z * -0.5 + 1.0
    odd = (quadrant & 1).bool()
    cos, sin = torch.where(odd, s, c), torch.where(odd, c, s)
    cos = torch.where(((quadrant + 1) & 2).bool(), -cos, cos)
    sin = torch.where((quadrant & 2).bool(), -sin, sin)
    return radius * cos, radius * sin


_LOG = (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip


def _log(u: Tensor) -> Tensor:
    """ln(u) in fp32 for u in [2^-24, 1]: Cephes' logf."""
    shifted = u.view(torch.int32) - 0x3F3504F3  # the bits of sqrt(1/2)
    e = (shifted >> 23).float()
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    z = f * f
    p = torch.full_like(f, 7.0376836292e-2)
    for coefficient in _LOG:
        p = p * f + coefficient
    p = p * f * z
    p = p + e * -2.12194440e-4
    p = p + z * -0.5
    return f + p + e * 0.693359375


def _normal(seeds: Tensor, shape: list[int], step: int, stream: int, dtype: torch.dtype, backend: str | None) -> Tensor:
    backend = backends.resolve("philox_normal", seeds.device, backend)
    if backend == "reference":
        return philox_normal_reference(seeds, shape, step, stream, dtype).contiguous()
    out = torch.empty((len(seeds), *shape), dtype=dtype, device=seeds.device)
    backends.kernel("philox_normal", "philox_normal_fwd", backend)(seeds.contiguous(), step, stream, out)
    return out


def _bits(seeds: Tensor, n: int, step: int, stream: int, backend: str | None) -> Tensor:
    backend = backends.resolve("philox_bits", seeds.device, backend)
    if backend == "reference":
        return philox_bits_reference(seeds, n, step, stream).contiguous()
    out = torch.empty((len(seeds), n), dtype=torch.int64, device=seeds.device)
    backends.kernel("philox_bits", "philox_bits_fwd", backend)(seeds.contiguous(), step, stream, out)
    return out


_NORMAL = FusedOp(
    "philox_normal(Tensor seeds, SymInt[] shape, int step, int stream, ScalarType dtype, str? backend) -> Tensor",
    _normal,
    lambda seeds, shape, step, stream, dtype, backend=None: seeds.new_empty((seeds.shape[0], *shape), dtype=dtype),
)
_BITS = FusedOp(
    "philox_bits(Tensor seeds, SymInt n, int step, int stream, str? backend) -> Tensor",
    _bits,
    lambda seeds, n, step, stream, backend=None: seeds.new_empty((seeds.shape[0], n)),
)
