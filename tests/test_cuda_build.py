"""Every .cu by the real nvcc, with setup.py's own flags: compiled for each architecture, without spills, and linked."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from compiling import CSRC, build_script, compile_cached

SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHS = ("80", "90", "100")
pytestmark = pytest.mark.timeout(1800)  # the compiler's, on a busy machine


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, Any]:
    """source -> (object, what ptxas said), and the tools. About a minute on two cores, once for each state of csrc."""
    build = build_script()
    compiler, nvcc = build.find_compiler(), build.find_nvcc()
    if compiler[0] is None or nvcc[0] is None:
        pytest.skip(f"needs nvcc and a C++ compiler: {nvcc[1] if nvcc[0] is None else compiler[1]}")
    missing = [a for a in ARCHS if f"sm_{a}" not in build.run([nvcc[0], "--list-gpu-code"])[1].split()]
    if missing:
        pytest.skip(f"nvcc {nvcc[1]} knows no sm_{', sm_'.join(missing)}")
    torch, torch_version = build.find_torch()
    command = [*build.cuda_command(nvcc[0], ARCHS, compiler[0], torch), "-Xptxas=-v"]
    headers = [h for h in CSRC.rglob("*") if h.suffix in (".h", ".cuh") and h.parent.name != "cpu"]
    folder = Path(request.config.cache.mkdir("nvcc"))
    objects = compile_cached(command, SOURCES, headers, folder, f"{nvcc[1]} {compiler[1]} {torch_version}")
    return {"objects": objects, "nvcc": nvcc[0], "compiler": compiler[0], "torch": torch}


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_no_spills(compiled: dict[str, Any], source: Path) -> None:
    _, said = compiled["objects"][source]
    records = build_script().ptxas_records(source, said)
    kernels = {arch: {r["kernel"] for r in records if r["arch"] == arch} for arch in ARCHS}
    assert kernels["80"] and all(found == kernels["80"] for found in kernels.values())
    assert not [r for r in records if r["spill_stores"] or r["spill_loads"]]
    assert "warning" not in said, said


def test_noise_is_not_contracted(compiled: dict[str, Any]) -> None:
    """The PTX that draws noise has no fused multiply-add; all of it is one function for every kernel that draws."""
    (philox,) = (source for source in SOURCES if source.stem == "philox")
    build = build_script()
    command = build.cuda_command(compiled["nvcc"], ["90"], compiled["compiler"], compiled["torch"])
    command = [str(c) for c in command if not str(c).startswith("-gencode")]
    done = subprocess.run(
        [*command, "-arch=compute_90", "-ptx", str(philox), "-o", "-"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\bmul\.rn\.f32", done.stdout)) > 50 and "sqrt.rn.f32" in done.stdout
    assert not re.findall(r"\bfma\S*|\bmad\.\S*f32|\b(?:mul|add|sub)\.f32", done.stdout)


def test_links(compiled: dict[str, Any], tmp_path: Path) -> None:
    """Whole: what it leaves open is the C library's, the C++ library's and LibTorch's stable ABI."""
    build = build_script()
    target = tmp_path / build.library_name("fastgen_cuda")
    objects = [o for o, _ in compiled["objects"].values()]
    build.link_cuda(compiled["nvcc"], compiled["compiler"], compiled["torch"], objects, target)
    said = build.run(["nm", "-D", "--undefined-only", "-C", target])[1]
    assert "aoti_torch_get_current_cuda_stream" in said
    assert not re.search(r"\b(fastgen|at|c10|torch::jit)::", said)
