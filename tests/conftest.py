"""What every test stands on: Triton's interpreter where there is no GPU, filled memory, two threads, the mark `gpu`."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# Of `make gpu`: when that many seconds are over, what is left is skipped, and counted.
SECONDS = float(os.environ["FASTGEN_TEST_SECONDS"]) if "FASTGEN_TEST_SECONDS" in os.environ else None
STARTED = time.monotonic()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # its cache on disk does not know our fake kernels
for _name in ("FASTGEN_BACKEND", "FASTGEN_CPU_ISA", "FASTGEN_WEIGHT_CACHE"):
    os.environ.pop(_name, None)


def _assert_on_overflow() -> None:
    """Puts Triton's interpreter in debug mode: an int32 sum, difference or product that overflows is an error."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)


if not HAS_GPU:
    _assert_on_overflow()

sys.path.insert(0, str(Path(__file__).parent / "ops"))  # suite.py, for the tests that stand outside ops/
pytest.register_assert_rewrite("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SECONDS is not None:
        # What only a GPU shows comes first, then some of everything: each op's kernels take long to compile.
        items.sort(key=lambda i: (i.path.parent.name == "ops", hashlib.sha256(i.nodeid.encode()).digest()))
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU, and PyTorch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if SECONDS is not None and time.monotonic() - STARTED > SECONDS:
        pytest.skip(f"FASTGEN_TEST_SECONDS: {SECONDS:g} s are over")


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def one_thread():
    """Networks and tables this small are faster on one: on a busy machine two mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def filled_memory():
    """torch.empty gives NaN, and the largest value of an integer type: an output that was not written shows.

    PyTorch does that in its deterministic mode, below Python, so for C++ callers too.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No compiled code outlives its test, so that recompile limits and dynamic shapes do not leak."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
