"""The C++ kernels for every instruction set that this CPU has: parity, and the same noise to the bit.

The choice is made once a process, so each has a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgen import backends

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(backends.library_error("cpu") is not None, reason=str(backends.library_error("cpu")))

PROGRAM = """
import json
import torch
from suite import CPP, Place, errors
from fastgen import ops, testing

torch.set_num_threads(2)
wrong, place = [], Place("cpp", "cpu")
for op in CPP:
    for case in testing.cases(op):
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True) if case.images else (False,):
                for error in errors(case, place, dtype, channels_last):
                    wrong.append(f"{op} {case} {dtype} channels_last={channels_last}: {error}")
normals = ops.philox_normal(torch.tensor([-5, 2**40]), (200_001,), 3, 1, backend="cpp")
print(json.dumps({
    "isa": torch.ops.fastgen_cpp.isa(), "wrong": wrong,
    "same": torch.equal(normals, ops.philox_normal_reference(torch.tensor([-5, 2**40]), (200_001,), 3, 1)),
}))
"""


def run(program: str, isa: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"FASTGEN_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent / "ops")}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)


@functools.cache
def report(isa: str) -> dict:
    done = run(PROGRAM, isa)
    if f"this CPU has no {isa}" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_parity(isa):
    if isa == torch.ops.fastgen_cpp.isa():
        pytest.skip("the one that every other test here runs on")
    assert report(isa)["isa"] == isa
    assert not report(isa)["wrong"]


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_noise_has_the_same_bits(isa):
    if isa == torch.ops.fastgen_cpp.isa():
        pytest.skip("test_noise.py runs on it")
    assert report(isa)["same"]


def test_unknown_name_is_an_error_that_lists_the_choices():
    program = "import torch; from fastgen import ops; ops.to_uint8(torch.zeros(1, 3, 2, 2), backend='cpp')"
    done = run(program, "mmx")
    assert done.returncode != 0
    assert "FASTGEN_CPU_ISA=mmx is unknown (choices: generic, avx2, avx512)" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda p: p.stem)
def test_compiles_where_there_is_no_x86(source):
    """The generic path alone, for a processor without any of the instruction sets that functions name."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("aarch64-linux-gnu-g++ is not installed (Debian: g++-aarch64-linux-gnu)")
    flags = re.search(r"^CXX_FLAGS = \[(.*?)^\]", (ROOT / "setup.py").read_text(), re.M | re.S).group(1)
    given = [f for f in re.findall(r'"(-[^"]+)"', flags) if "visibility" not in f]
    folders = [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    command = [
        compiler,
        *given,
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-Werror",
        "-fsyntax-only",
        *folders,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
