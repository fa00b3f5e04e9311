"""Which kernel runs: the order of the four ways to say so, the reasons when it cannot, the one warning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from suite import CPP, DEVICES, NATIVE, Recorder, call, dispatch

from fastgen import backends, ops, testing, use_backend
from fastgen.backends import BackendError, resolve, why_not
from fastgen.errors import UsageError

CPU = torch.device("cpu")
OPS = ("philox_bits", *NATIVE)
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.fixture
def missing(monkeypatch):
    """missing("cpp"): that backend cannot run anything, for the reason "gone"."""
    real, gone = backends._why_not, set()

    def fake(op, backend, device, interpreted):
        return "gone" if backend in gone else real(op, backend, device, interpreted)

    monkeypatch.setattr(backends, "_why_not", fake)
    backends._auto.cache_clear()
    yield lambda *names: gone.update(names)
    backends._auto.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """The (function, backend) of every kernel that is asked for."""
    real, seen = backends.kernel, []

    def watch(op, function, backend):
        seen.append((function, backend))
        return real(op, function, backend)

    monkeypatch.setattr(backends, "kernel", watch)
    return seen


def require(*names: str) -> None:
    """Skips the test on a machine where one of the backends cannot run on the CPU."""
    for name in names:
        reason = why_not("to_uint8", name, "cpu")
        if reason is not None:
            pytest.skip(f"{name}: {reason}")


# What must be there, so that no comparison of the suite is silently left out


@pytest.mark.parametrize("op", ("philox_bits", *CPP))
def test_cpp_is_available(op):
    if COMPILER is None:
        pytest.skip("no C++ compiler (g++, or CXX)")
    assert why_not(op, "cpp", "cpu") is None


@pytest.mark.parametrize("op", (*OPS, "conv2d", *backends.LAUNCHERS))
def test_triton_is_available(op):
    pytest.importorskip("triton", reason="triton is not installed")
    assert why_not(op, "triton", DEVICES[-1]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_a_gpu_runs_the_reference_too(op):
    assert why_not(op, "reference", "cuda") is None


# Precedence


def test_precedence(monkeypatch, launched):
    require("cpp", "triton")
    x = torch.zeros(1, 3, 2, 2)

    def backend_of(**kwargs) -> str:
        launched.clear()
        ops.to_uint8(x, **kwargs)
        return launched[-1][1] if launched else "reference"

    assert backend_of() == backends.preferred("to_uint8", "cpu")
    monkeypatch.setenv("FASTGEN_BACKEND", "reference")
    assert backend_of() == "reference"
    with use_backend("cpp"):
        assert backend_of() == "cpp"
        assert backend_of(backend="reference") == "reference"
        with use_backend("triton"):
            assert backend_of() == "triton"
        assert backend_of() == "cpp"
    assert backend_of() == "reference"
    monkeypatch.setenv("FASTGEN_BACKEND", "triton")
    assert backend_of() == "triton"
    monkeypatch.setenv("FASTGEN_BACKEND", "")
    assert backend_of() == backends.preferred("to_uint8", "cpu")


def test_context_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        assert resolve("to_uint8", CPU) == "reference"
        _ = 1 / 0
    assert resolve("to_uint8", CPU) == backends.preferred("to_uint8", "cpu")


def test_context_belongs_to_its_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolve("to_uint8", CPU)))
        thread.start(), thread.join()
    assert seen == [backends.preferred("to_uint8", "cpu")]


def test_ordered_list(missing, monkeypatch):
    require("cpp")
    with use_backend("cuda", "cpp", "reference"):
        assert resolve("to_uint8", CPU) == "cpp"
    with use_backend(" cuda , reference "):
        assert resolve("to_uint8", CPU) == "reference"
    missing("cpp")
    monkeypatch.setenv("FASTGEN_BACKEND", "cuda,cpp,reference")
    assert resolve("to_uint8", CPU) == "reference"


# Errors


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"backend: unknown backend 'fast'; choose from reference, cpp, triton, cuda"):
        resolve("to_uint8", CPU, "fast")
    with pytest.raises(ValueError, match="use_backend: unknown backend 'fast'"), use_backend("cpp,fast"):
        pass
    with pytest.raises(ValueError, match="use_backend"), use_backend():
        pass
    monkeypatch.setenv("FASTGEN_BACKEND", "fast")
    with pytest.raises(UsageError, match="FASTGEN_BACKEND: unknown backend 'fast'"):
        ops.to_uint8(torch.zeros(1, 3, 2, 2))
    with pytest.raises(KeyError, match="to_uint9"):
        why_not("to_uint9", "cpp", "cpu")


def test_one_that_cannot_run_says_why(missing, monkeypatch):
    missing("cpp", "triton")
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(BackendError, match=r"backend=cpp: to_uint8 cannot run on cpu with it; cpp: gone"):
        ops.to_uint8(x, backend="cpp")
    with (
        pytest.raises(BackendError, match=r"use_backend=cuda,cpp: .*cuda: it is for cuda tensors; cpp: gone"),
        use_backend("cuda,cpp"),
    ):
        ops.to_uint8(x)
    monkeypatch.setenv("FASTGEN_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"FASTGEN_BACKEND=triton: .*triton: gone"):
        ops.to_uint8(x)


def test_reasons(monkeypatch):
    assert why_not("to_uint8", "reference", "cpu") is None
    assert "cuda" in why_not("to_uint8", "cuda", "cpu")
    monkeypatch.setitem(backends.STEMS, "unwritten", "unwritten")
    assert "no such kernel" in why_not("unwritten", "triton", DEVICES[-1])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in why_not("to_uint8", "triton", "cpu")


def test_reference_needs_no_gpu_and_cuda_does():
    if "cuda" in DEVICES:
        pytest.skip("there is a GPU")
    for backend in ("cuda", "triton", "reference"):
        assert "GPU" in why_not("to_uint8", backend, "cuda")


# Auto


def test_auto_warns_once_an_op_when_there_is_no_kernel(missing):
    missing("cpp")
    x = torch.zeros(1, 3, 2, 2)
    with pytest.warns(UserWarning, match=r"to_uint8 runs on plain PyTorch \(cpp: gone\)") as caught:
        ops.to_uint8(x)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.to_uint8(x)  # said already
    with pytest.warns(UserWarning, match="group_norm_act"):
        ops.group_norm_act(torch.zeros(1, 2, 2, 2), 1)


def test_auto_is_silent_when_all_is_well():
    require("cpp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in CPP:
            assert resolve(op, CPU) == "cpp"


# Backward


@pytest.mark.parametrize("op", ["group_norm_act", "reparameterize", "attention"])
@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
@pytest.mark.parametrize("path", ["bypass", "dispatcher"])
def test_backward_takes_the_choice_of_forward(op, backend, path, launched):
    """Also where the context has ended by then, or says something else."""
    require("cpp", backend)
    if why_not(op, backend, "cpu") is not None:
        pytest.skip(f"{op} has no kernel there")
    inputs = testing.cases(op)[0].inputs()
    other = "reference" if backend == "cpp" else "cpp"
    with use_backend(backend):
        y = (call if path == "bypass" else dispatch)(op, inputs)[0]
    with use_backend(other), Recorder() as recorder:
        y.sum().backward()
    (args,) = [args for f, args in recorder.calls if f.name() == f"fastgen::{op}_bwd"]
    assert args[-1] == backend
    wanted = [] if backend == "reference" else [(f"{op}_fwd", backend), (f"{op}_bwd", backend)]
    assert launched == wanted


# Without Triton


NO_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, fastgen
from fastgen import backends, ops
x = torch.randn(2, 4, 3, 3, requires_grad=True)
ops.group_norm_act(x, 2).sum().backward()
assert x.grad.isfinite().all()
ops.to_uint8(ops.philox_normal(torch.arange(2), (3, 4, 4)))
print(backends.why_not("to_uint8", "triton", "cpu"))
try:
    ops.to_uint8(torch.zeros(1, 3, 2, 2), backend="triton")
except backends.BackendError as error:
    print(error)
"""


def test_everything_works_without_triton():
    done = subprocess.run([sys.executable, "-W", "error", "-c", NO_TRITON], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reason, error = done.stdout.splitlines()
    assert reason == "triton is not installed"
    assert error.startswith("backend=triton: to_uint8 cannot run on cpu with it; triton: triton is not installed")
