"""Noise that belongs to the image, inside a kernel: Philox-4x32-10 and Box-Muller.

The same steps in the same order as csrc/common/philox.h and fastgen/ops/philox.py, so the same
bits, provided that the kernel is launched with ``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32_10(c0, c1, c2, c3, seed):
    """Four uint32 words from the uint32 counter (c0, c1, c2, c3) and the int64 key ``seed``."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    a = tl.full([], 0xD2511F53, tl.uint32)
    b = tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, a)
        high1 = tl.umulhi(c2, b)
        low0 = tl.mul(c0, a, sanitize_overflow=False)  # wraps on purpose: without it TRITON_DEBUG=1 would stop here
        low1 = tl.mul(c2, b, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, tl.full([], 0x9E3779B9, tl.uint32), sanitize_overflow=False)
        k1 = tl.add(k1, tl.full([], 0xBB67AE85, tl.uint32), sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def interleave4(a, b, c, d):
    """a0 b0 c0 d0 a1 b1 …: [M] four times -> [4 M]."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def philox_words(seed, first, step, stream, BLOCK: tl.constexpr):
    """Four uint32 [BLOCK / 4]: the words of elements first … first + BLOCK - 1 of an image; 4 divides first."""
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros_like(block)
    c1 = zero + tl.full([], step, tl.uint32)
    c2 = zero + tl.full([], stream, tl.uint32)
    return philox4x32_10(block, c1, c2, zero, seed)


@triton.jit
def philox_normals(seed, first, step, stream, BLOCK: tl.constexpr):
    """Standard normals fp32 [BLOCK] for elements first … first + BLOCK - 1 of the image with this seed."""
    a, b, c, d = philox_words(seed, first, step, stream, BLOCK)
    z0, z1 = box_muller(a, b)
    z2, z3 = box_muller(c, d)
    return interleave4(z0, z1, z2, z3)


@triton.jit
def box_muller(a, b):
    """Two normals from two words: radius sqrt(-2 ln(((a >> 8) + 1) 2^-24)), angle 2 pi (b >> 8) 2^-24."""
    u = ((a >> 8) + 1).to(tl.float32) * 5.9604644775390625e-8
    radius = tl.sqrt_rn(_log(u) * -2.0)
    k = (b >> 8).to(tl.int32)
    quadrant = (k + (1 << 21)) >> 22  # 0 … 4; the rest of the angle is in [-pi/4, pi/4]
    x = (k - (quadrant << 22)).to(tl.float32) * 3.7450702829239286e-7  # pi/2 2^-22
    z = x * x
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = s * z * x + x
    c = z * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z + z * -0.5 + 1.0
    odd = (quadrant & 1) != 0
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    # Times -1 and not minus: Triton's minus is 0 - x, which loses the sign of a zero.
    cos = tl.where(((quadrant + 1) & 2) != 0, cos * -1.0, cos)
    sin = tl.where((quadrant & 2) != 0, sin * -1.0, sin)
    return radius * cos, radius * sin


@triton.jit
def _log(u):
    """ln(u) in fp32 for u in [2^-24, 1]: Cephes' logf."""
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of sqrt(1/2)
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    p = p * f * z
    p = p + e * -2.12194440e-4
    p = p + z * -0.5
    return f + p + e * 0.693359375
