"""What only a GPU can show, for every op and backend: streams, graphs, a checker of memory accesses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from suite import call
from torch import Tensor

from fastgen import backends, testing
from fastgen.testing import Inputs

pytestmark = pytest.mark.gpu
REPLAYS = 100
KERNELS = ("triton", "cuda")


def pairs() -> list[tuple[str, str]]:
    """Every op with a backend that has a kernel of it; without a GPU too, so that skipped tests are counted."""
    found = [(op, b) for op in testing.CASES for b in KERNELS]
    return [p for p in found if not torch.cuda.is_available() or backends.why_not(*p, "cuda") is None]


def inputs_of(op: str) -> Inputs:
    """A small case with noise from seeds where the op makes any."""
    cases = testing.cases(op)
    chosen = next((c for c in cases if "seeds" in c.label), cases[0])
    return chosen.inputs(torch.float32, "cuda")


@pytest.mark.parametrize(("op", "backend"), pairs())
def test_side_streams(op: str, backend: str) -> None:
    """A launch goes to the current stream: it sees what was queued before it there, however late that comes."""
    inputs = inputs_of(op)
    expected = call(op, inputs, backend)
    late = {n: torch.zeros_like(v) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)  # cycles: what comes next is queued long before it runs
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                late[name].copy_(value)
        results = call(op, late, backend)
    stream.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize(("op", "backend"), pairs())
def test_replays(op: str, backend: str) -> None:
    """100 replays of a captured call give the same bits, and follow what is written into its inputs."""
    inputs = inputs_of(op)
    with torch.no_grad():
        expected = call(op, inputs, backend)  # also compiles what is compiled on the first call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call(op, inputs, backend)
        for _ in range(REPLAYS):
            for result in results:
                result.fill_(77)
            graph.replay()
            for result, right in zip(results, expected, strict=True):
                assert torch.equal(result, right)
        other = {n: v.flip(0) if isinstance(v, Tensor) and v.ndim else v for n, v in inputs.items()}
        for name, value in other.items():
            if isinstance(value, Tensor):
                inputs[name].copy_(value.clone())
        graph.replay()
        for result, right in zip(results, call(op, other, backend), strict=True):
            assert torch.equal(result, right)


@pytest.mark.timeout(200)
def test_memory_checker() -> None:
    """compute-sanitizer finds no bad access in a small call of every op, forward and backward, on every backend."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    probe = [tool, sys.executable, "-c", "import torch; torch.zeros(1).cuda()"]
    if subprocess.run(probe, capture_output=True, timeout=100).returncode:
        pytest.skip("compute-sanitizer does not work on this machine: it fails on a program without kernels of ours")
    command = [tool, "--error-exitcode", "9", sys.executable, __file__]
    paths = [str(Path(__file__).parent / "ops"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=190, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def every_op() -> None:
    """What the checker watches."""
    for op, backend in pairs():
        results = call(op, inputs_of(op), backend)
        roots = [r.double().sum() for r in results if r.requires_grad]
        if roots:
            sum(roots).backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    every_op()
