"""csrc/common/*.h, the maths that C++ and CUDA kernels share, compiled by itself and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.ops import ACTIVATIONS
from fastgen.ops.philox import _box_muller

COMMON = Path(__file__).parents[1] / "csrc" / "common"
COMPILER = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++, c++, clang++ or CXX)"),
    pytest.mark.skipif(not COMMON.is_dir(), reason="not a checkout: csrc/common is missing"),
]

SOURCE = r"""
#include "activations.h"
#include "diffusion_step.h"
using namespace fastgen;

template <typename T>
void activation(int code, bool grad, const T* x, T* y, long n) {
  for (long i = 0; i < n; ++i) switch (code) {
#define CASE(k) case k: y[i] = grad ? act_grad<k>(x[i]) : act<k>(x[i]); break;
      CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
    }
}

extern "C" {
void philox(const uint32_t* c, uint64_t key, uint32_t* out) {
  const Philox4 r = philox4x32_10(c[0], c[1], c[2], c[3], key);
  for (int i = 0; i < 4; ++i) out[i] = r.v[i];
}
void normals(const uint32_t* a, const uint32_t* b, float* out, long n) {
  for (long i = 0; i < n; ++i) box_muller(a[i], b[i], out[2 * i], out[2 * i + 1]);
}
void logs(const float* u, float* out, long n) { for (long i = 0; i < n; ++i) out[i] = log_rn(u[i]); }
void act32(int code, bool grad, const float* x, float* y, long n) { activation(code, grad, x, y, n); }
void act64(int code, bool grad, const double* x, double* y, long n) { activation(code, grad, x, y, n); }
void step(const double* c, const double* v, double clip, double* out) {
  StepCoefficients<double> k;
  for (int i = 0; i < 4; ++i) k.p[i] = c[i];
  for (int i = 0; i < 5; ++i) k.q[i] = c[4 + i];
  const StepResult<double> r = diffusion_step<double>(k, v[0], v[1], v[2], v[3], clip);
  out[0] = r.next, out[1] = r.x0, out[2] = r.eps;
}
float product32(float sum, float a, float b) { return add_product(sum, a, b); }
double product64(double sum, double a, double b) { return add_product(sum, a, b); }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("common")
    (folder / "common.cpp").write_text(SOURCE)
    command = [
        *COMPILER.split(),
        "-std=c++20",
        "-O2",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fPIC",
        "-shared",
    ]
    done = subprocess.run(
        [*command, f"-I{COMMON}", str(folder / "common.cpp"), "-o", str(folder / "common.so")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "common.so"))


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_known_answers(library, counter, key, expected):
    c, out = np.array(counter, np.uint32), np.zeros(4, np.uint32)
    library.philox(pointer(c), ctypes.c_uint64(key[0] | key[1] << 32), pointer(out))
    assert tuple(out.tolist()) == expected


def test_normals_are_the_references_bit_for_bit(library):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 200_000), dtype=np.uint32)
    a[:4], b[:4] = (0, 2**32 - 1, 255, 256), (0, 2**32 - 1, 2**29, 2**31)  # the ends, and the edges of quadrants
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    out = np.zeros((len(a), 2), np.float32)
    library.normals(pointer(a), pointer(b), pointer(out), len(a))
    expected = torch.stack(_box_muller(*(torch.from_numpy((w >> 8).astype(np.int64)) for w in (a, b))), dim=1)
    assert torch.equal(torch.from_numpy(out), expected)
    u, angle = ((a >> 8).astype(np.float64) + 1) / 2**24, 2 * np.pi * (b >> 8) / 2**24
    exact = np.sqrt(-2 * np.log(u))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    assert np.abs(out - exact).max() < 2e-6
    assert np.isfinite(out).all() and np.abs(out).max() < 5.8


def test_logarithm(library):
    u = np.unique(
        np.concatenate([np.arange(1, 2**14), 2**24 - np.arange(2**14), np.geomspace(1, 2**24, 9999).astype(int)])
    )
    u = (u / 2**24).astype(np.float32)
    out = np.zeros_like(u)
    library.logs(pointer(u), pointer(out), len(u))
    exact = np.log(u.astype(np.float64))
    assert (np.abs(out - exact) <= 1.5 * np.spacing(np.abs(exact).astype(np.float32)) + 1e-12).all()


def run_activation(library, name: str, grad: bool, x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, np.nan)
    function = library.act32 if x.dtype == np.float32 else library.act64
    function(ACTIVATIONS[name][0], ctypes.c_bool(grad), pointer(x), pointer(y), ctypes.c_long(len(x)))
    return y


@pytest.mark.parametrize("grad", [False, True], ids=["value", "derivative"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(library, name, grad):
    points = np.concatenate(
        [np.linspace(-120, 120, 48_001), np.linspace(-6, 6, 48_001), [0.0, 1e-30, -1e-30, 1e4, -1e4]]
    )
    for dtype in (np.float32, np.float64):
        x = points.astype(dtype)
        exact = evaluate(name, grad, torch.from_numpy(x).double()).numpy()
        scale = np.maximum(1, np.abs(exact))
        eager = np.abs(evaluate(name, grad, torch.from_numpy(x)).numpy() - exact) / scale
        error = np.abs(run_activation(library, name, grad, x) - exact) / scale
        allowed = 2 * eager.max() + 4 * np.finfo(dtype).eps / 2 if dtype == np.float32 else 1e-13
        assert error.max() <= allowed, f"at {x[error.argmax()]}"


def evaluate(name: str, grad: bool, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    y = ACTIVATIONS[name][1](x)
    return (torch.autograd.grad(y.sum(), x)[0] if grad else y).detach()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_what_is_not_finite(library, name):
    """As in PyTorch, whose fp32 gelu on CPUs alone gives NaN for infinity: hence in fp64."""
    x = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38])
    expected = ACTIVATIONS[name][1](torch.from_numpy(x)).numpy()
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(run_activation(library, name, False, x.astype(dtype)), expected.astype(dtype))


def test_diffusion_step(library):
    rng = np.random.default_rng(1)
    for clip in (0.3, np.inf):
        c, (x, m, history, noise) = rng.standard_normal(9), rng.standard_normal(4)
        out = np.zeros(3)
        library.step(pointer(c), pointer(np.array([x, m, history, noise])), ctypes.c_double(clip), pointer(out))
        x0, eps = np.clip(c[0] * x + c[1] * m, -clip, clip), c[2] * x + c[3] * m
        np.testing.assert_allclose(
            out, [c[4] * x + c[5] * x0 + c[6] * eps + c[7] * history + c[8] * noise, x0, eps], rtol=1e-13
        )


def test_products_are_rounded_before_they_are_added(library):
    """(1 + u)² - 1 - 2 u is u² by a fused multiply-add, and 0 in two roundings."""
    for function, kind, u in (
        (library.product32, ctypes.c_float, 2.0**-23),
        (library.product64, ctypes.c_double, 2.0**-52),
    ):
        function.argtypes, function.restype = [kind] * 3, kind
        assert function(-1.0 - 2 * u, 1.0 + u, 1.0 + u) == 0.0
        assert function(0.5, 3.0, -2.0) == -5.5
