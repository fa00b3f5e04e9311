"""Activations of fp32 or fp64 and their derivatives, chosen at compile time by fastgen.ops' codes."""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
SILU = tl.constexpr(3)
GELU = tl.constexpr(4)
GELU_TANH = tl.constexpr(5)
TANH = tl.constexpr(6)
SIGMOID = tl.constexpr(7)

LEAK = tl.constexpr(0.01)
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi), the normal density at 0
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def sigmoid_pair(z):
    """s = sigmoid(z) and 1 - s, neither by cancellation."""
    e = tl.exp(-z)
    s = 1.0 / (1.0 + e)
    return s, tl.where(z > 0, e * s, 1.0 - s)


@triton.jit
def tanh(z):
    e = tl.exp(tl.abs(z) * -2.0)  # in (0, 1]: no overflow
    t = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0, -t, t)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z)."""
    if ACT == RELU:
        return tl.where(z <= 0, 0.0, z)  # a NaN stays a NaN
    elif ACT == LEAKY_RELU:
        return tl.where(z <= 0, z * LEAK, z)
    elif ACT == SILU:
        return z * sigmoid(z)
    elif ACT == GELU:
        return z * 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACT == GELU_TANH:  # z (1 + tanh(u)) / 2 = z sigmoid(2 u)
        return z * sigmoid((z + z * z * z * CUBIC) * TWO_SQRT_2_OVER_PI)
    elif ACT == TANH:
        return tanh(z)
    elif ACT == SIGMOID:
        return sigmoid(z)
    else:
        return z


@triton.jit
def activate_grad(z, ACT: tl.constexpr):
    """act'(z)."""
    if ACT == RELU:
        return tl.where(z > 0, tl.full(z.shape, 1.0, z.dtype), 0.0)
    elif ACT == LEAKY_RELU:
        return tl.where(z > 0, tl.full(z.shape, 1.0, z.dtype), LEAK)
    elif ACT == SILU:
        s, rest = sigmoid_pair(z)
        return s * (1.0 + z * rest)
    elif ACT == GELU:
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * DENSITY_0 * tl.exp(z * z * -0.5)
    elif ACT == GELU_TANH:
        s, rest = sigmoid_pair((z + z * z * z * CUBIC) * TWO_SQRT_2_OVER_PI)
        return s + z * s * rest * (1.0 + z * z * CUBIC * 3.0) * TWO_SQRT_2_OVER_PI
    elif ACT == TANH:
        s, rest = sigmoid_pair(z * 2.0)
        return s * rest * 4.0  # 1 - tanh² would cancel
    elif ACT == SIGMOID:
        s, rest = sigmoid_pair(z)
        return s * rest
    else:
        return tl.full(z.shape, 1.0, z.dtype)
