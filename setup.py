"""Builds the two compiled libraries of fastgen; everything else about the package is in pyproject.toml.

    fastgen/libfastgen_cpu.so    csrc/*.cpp and csrc/cpu/*.cpp, wherever a C++20 compiler works
    fastgen/libfastgen_cuda.so   csrc/cuda/*.cu and *.cpp, where an nvcc is found

Both use LibTorch's stable ABI only, so one binary serves every torch >= 2.11 and every Python: the wheel's
tag is py3-none-<platform>. Neither is a Python module; `torch.ops.load_library` loads them.

Environment:
    CXX                 the C++ compiler (default: the first of g++, c++, clang++ that is on the path)
    NVCC, CUDA_HOME     where nvcc is (default: the path, then /usr/local/cuda)
    FASTGEN_CUDA        1: the CUDA library must be built, any failure is an error; 0: it is not built;
                        unset: it is built if an nvcc is found and works
    FASTGEN_CUDA_ARCHS  compute capabilities, e.g. "90" or "80,90" (default: 80,90,100 as far as nvcc knows
                        them); the last one is also kept as PTX
    MAX_JOBS            compilers running at once (default: the number of cores)

Whether a GPU is visible plays no part: machines that build are often not the machines that run.
What was built, with what, and why something was not, goes into fastgen/_build_info.json.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1, good enough for `make gpu`
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OLDEST_TORCH = (2, 11)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # major 2, minor 11: torch/csrc/stable/version.h
DEFAULT_ARCHS = ("80", "90", "100")

# No -march and no -ffast-math: functions carry their own instruction sets (csrc/cpu/isa.h), and noise is
# promised bit for bit, hence no contraction. The last two let loops over sqrt and comparisons vectorise.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wno-psabi"),
    *("-ffp-contract=off", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI),
]
# The host compiler under nvcc takes no -Wall: nvcc's own generated code does not pass it.
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-DUSE_CUDA", STABLE_ABI, "--expt-relaxed-constexpr"),
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-ffp-contract=off",
]

# What the sources need of a compiler: C++20, and on x86-64 the instruction set levels by name.
PROBE = """
#include <concepts>
#include <span>
template <std::integral T> T first(std::span<const T> s) { return s.empty() ? T{} : s[0]; }
#if defined(__x86_64__)
__attribute__((target("arch=x86-64-v4"), flatten)) int v4(std::span<const int> s) { return first(s); }
int probe(std::span<const int> s) { return __builtin_cpu_supports("x86-64-v4") ? v4(s) : first(s); }
#else
int probe(std::span<const int> s) { return first(s); }
#endif
"""


def run(command):
    """Run a command; return (worked, its output)."""
    try:
        done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout


def library_name(stem):
    return f"lib{stem}.dylib" if sys.platform == "darwin" else f"lib{stem}.so"


def find_compiler():
    """(command, "g++ 12.2.0") of a working C++20 compiler, or (None, the reason why there is none)."""
    if sys.platform == "win32":
        return None, "on Windows the C++ kernels are not built (they need GCC or Clang)"
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
    else:
        command = [name for name in ("g++", "c++", "clang++") if shutil.which(name)][:1]
        if not command:
            return None, "no C++ compiler found (looked for g++, c++ and clang++; CXX names another)"
    if shutil.which(command[0]) is None:
        return None, f"no C++ compiler found: CXX={os.environ['CXX']} is not a program"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        worked, output = run([*command, *CXX_FLAGS, *link_flags(), source, "-o", Path(folder) / library_name("probe")])
    if not worked:
        return None, f"{shlex.join(command)} cannot compile C++20 (GCC >= 12 or Clang >= 18): {last_lines(output)}"
    version = run([*command, "-dumpfullversion", "-dumpversion"])[1].strip()
    return command, f"{Path(command[0]).name} {version}"


def link_flags():
    return ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


def first_lines(text, count=40):
    lines = text.splitlines()
    return "\n".join([*lines[:count], *([f"... and {len(lines) - count} more lines"] if len(lines) > count else [])])


def last_lines(text, count=3):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return " | ".join((errors or lines)[-count:])


def find_torch():
    """(folder, version) of torch. Not imported: that takes seconds, and its headers are all we need."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupError(
            "fastgen: torch is not installed in the environment that builds. Install torch >= 2.11 first, "
            "or build without --no-build-isolation, so that pip fetches it."
        )
    folder = Path(spec.origin).parent
    version = re.search(r"__version__ = ['\"]([^'\"]+)", (folder / "version.py").read_text()).group(1)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise SetupError(f"fastgen: torch {version} is too old to build with; 2.11 or later is needed.")
    return folder, version


def find_nvcc():
    """(path, "13.0") of nvcc, or (None, the reason why there is none)."""
    if os.environ.get("NVCC"):
        places, looked = [os.environ["NVCC"]], f"NVCC={os.environ['NVCC']} is not a program"
    else:
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
        looked = "looked at CUDA_HOME, the path and /usr/local/cuda; NVCC names another"
    nvcc = next((found for found in map(shutil.which, places) if found), None)
    if nvcc is None:
        return None, f"nvcc not found ({looked})"
    worked, output = run([nvcc, "--version"])
    version = re.search(r"release ([\d.]+)", output)
    if not worked or version is None:
        return None, f"{nvcc} does not work: {last_lines(output)}"
    return nvcc, version.group(1)


def cuda_archs(nvcc):
    """Compute capabilities to build for, lowest first: as asked, or those of ours that this nvcc knows."""
    asked = re.findall(r"\d+[af]?", os.environ.get("FASTGEN_CUDA_ARCHS", "").replace(".", ""))
    if asked:
        return sorted(asked, key=lambda arch: int(arch.rstrip("af")))
    known = run([nvcc, "--list-gpu-code"])[1].split()
    return [arch for arch in DEFAULT_ARCHS if f"sm_{arch}" in known]


def cuda_command(nvcc, archs, compiler, torch):
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    ptx = f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    return [nvcc, "-ccbin", compiler[0], *NVCC_FLAGS, *codes, ptx, f"-I{CSRC}", "-isystem", torch / "include"]


def cxx_command(compiler, torch):
    return [*compiler, *CXX_FLAGS, f"-I{CSRC}", "-isystem", torch / "include"]


def compile_all(jobs, folder):
    """Compile [(command, source)] in a pool; return the objects. What is newer than its source and every
    header is kept; `folder` must be another one for other commands."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = max((f.stat().st_mtime for f in CSRC.rglob("*") if f.suffix in (".h", ".cuh")), default=0.0)

    def compile_one(job):
        command, source = job
        target = folder / (str(source.relative_to(CSRC)).replace(os.sep, "-") + ".o")
        if target.exists() and target.stat().st_mtime > max(headers, source.stat().st_mtime):
            return target
        part = target.with_suffix(f".{os.getpid()}.o")  # renamed when complete: an interrupted one never counts
        worked, output = run([*command, "-c", source, "-o", part])
        if not worked:
            part.unlink(missing_ok=True)
            raise CompileError(f"fastgen: {source.relative_to(ROOT)} does not compile:\n{first_lines(output)}")
        if output.strip():
            print(first_lines(output), file=sys.stderr)
        part.replace(target)
        return target

    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(1, min(workers, len(jobs)))) as pool:
        return list(pool.map(compile_one, jobs))


def link(command, objects, flags, target):
    """Link into `target`, which appears whole: a process that has the old library loaded keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}-{target.name}")
    worked, output = run([*command, *objects, *flags, "-o", part])
    if not worked:
        part.unlink(missing_ok=True)
        raise CompileError(f"fastgen: {target.name} does not link:\n{output}")
    part.replace(target)


def object_folder(*what):
    """A folder for the objects of one way to compile: other flags, compilers or headers have another one."""
    key = hashlib.sha256(json.dumps([str(part) for part in what]).encode()).hexdigest()[:12]
    return ROOT / "build" / f"objects-{platform.machine()}-{key}"


def build_cpu(package, compiler, version, torch, torch_version):
    command = cxx_command(compiler, torch)
    sources = [*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]
    sources.sort(key=lambda source: (-source.stat().st_size, source))  # the longest to compile go first
    objects = compile_all([(command, source) for source in sources], object_folder(version, torch_version, *command))
    flags = [*link_flags(), "-L", torch / "lib", "-ltorch_cpu", "-ltorch", "-lc10"]
    if sys.platform != "darwin":
        flags.append("-Wl,-z,defs")  # an op that was declared and never defined fails here, not at the user's
    link(compiler, objects, flags, package / library_name("fastgen_cpu"))
    return {"built": True, "compiler": version, "torch": torch_version}


def build_cuda(package, compiler, version, torch, torch_version):
    nvcc, nvcc_version = find_nvcc()
    if nvcc is None:
        return {"built": False, "reason": nvcc_version}
    archs = cuda_archs(nvcc)
    if not archs:
        return {"built": False, "reason": f"nvcc {nvcc_version} knows none of sm_{', sm_'.join(DEFAULT_ARCHS)}"}
    device = cuda_command(nvcc, archs, compiler, torch)
    host = [*cxx_command(compiler, torch), "-DUSE_CUDA", f"-I{Path(nvcc).resolve().parent.parent / 'include'}"]
    jobs = [(device, source) for source in sorted((CSRC / "cuda").glob("*.cu"))]
    jobs += [(host, source) for source in sorted((CSRC / "cuda").glob("*.cpp"))]
    objects = compile_all(jobs, object_folder(version, nvcc_version, torch_version, *device))
    link_cuda(nvcc, compiler, torch, objects, package / library_name("fastgen_cuda"))
    return {"built": True, "nvcc": nvcc_version, "compiler": version, "torch": torch_version, "archs": archs}


def link_cuda(nvcc, compiler, torch, objects, target):
    # The runtime goes in statically, so the library does not care which CUDA torch was built with. A CPU-only
    # torch serves for building: the symbols of libtorch_cuda are found on loading, through libtorch, which
    # needs it in every CUDA build. Hence libtorch must stay, though nothing in it is called.
    flags = ["-shared", "--cudart=static", "-ccbin", compiler[0], "-L", torch / "lib", "-Xlinker=--no-as-needed"]
    flags += ["-ltorch_cpu", "-ltorch", "-lc10"]
    link([nvcc], objects, flags, target)


def ptxas_records(source, output):
    """What nvcc -Xptxas=-v said about a source: one record per kernel and architecture, with its file, arch, kernel
    (mangled), registers, spill_stores and spill_loads (bytes)."""
    found = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        output,
        flags=re.DOTALL,
    )
    return [
        dict(
            file=source.name,
            arch=arch,
            kernel=kernel,
            registers=int(registers),
            spill_stores=int(stores),
            spill_loads=int(loads),
        )
        for kernel, arch, stores, loads, registers in found
    ]


def ptxas_report(folder, archs=None):
    """Compile every .cu for each architecture; return ptxas_records of all, for tuning."""
    compiler, version = find_compiler()
    nvcc, nvcc_version = find_nvcc()
    if compiler is None or nvcc is None:
        raise SetupError(f"fastgen: {nvcc_version if nvcc is None else version}")
    command = cuda_command(nvcc, archs or cuda_archs(nvcc), compiler, find_torch()[0])
    records = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        worked, output = run([*command, "-Xptxas=-v", "-c", source, "-o", Path(folder) / f"{source.stem}.o"])
        if not worked:
            raise CompileError(f"fastgen: {source.relative_to(ROOT)} does not compile:\n{output}")
        records += ptxas_records(source, output)
    return records


def write_info(package, cpu, cuda):
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps({"cpu": cpu, "cuda": cuda}, indent=2) + "\n")
    for stem, info in (("fastgen_cpu", cpu), ("fastgen_cuda", cuda)):
        if not info["built"]:  # an older library left here would be loaded with newer Python around it
            (package / library_name(stem)).unlink(missing_ok=True)
            if "FASTGEN_CUDA=0" not in info["reason"]:
                print(f"fastgen: {library_name(stem)} not built: {info['reason']}", file=sys.stderr)


def nothing_built():
    missing = {"built": False, "reason": COMPILER[1]}
    return missing, missing


class BuildLibraries(build_ext):
    """Compile csrc/ into the package: into the build folder for a wheel, in place for an editable install."""

    def run(self):
        package = ROOT / "fastgen" if self.inplace else Path(self.build_lib) / "fastgen"
        if COMPILER[0] is None:  # asked for by name; an install does not come here
            return write_info(package, *nothing_built())
        tools = (*COMPILER, *find_torch())
        cpu = build_cpu(package, *tools)
        write_info(package, cpu, self.cuda(package, tools))

    @staticmethod
    def cuda(package, tools):
        wish = os.environ.get("FASTGEN_CUDA", "")
        if wish == "0":
            return {"built": False, "reason": "FASTGEN_CUDA=0 when it was installed"}
        try:
            info = build_cuda(package, *tools)
        except CompileError as error:
            if wish == "1":
                raise
            print(error, file=sys.stderr)
            info = {"built": False, "reason": last_lines(str(error))}
        if wish == "1" and not info["built"]:
            raise SetupError(f"fastgen: FASTGEN_CUDA=1, but {info['reason']}.")
        return info

    def get_outputs(self):
        return []  # in neither sense an extension module; the install copies the whole build folder

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()]


class BuildPython(build_py):
    """Without a compiler there is nothing but Python to install, and `fastgen doctor` must still know why."""

    def run(self):
        super().run()
        if not self.distribution.ext_modules:
            package = ROOT / "fastgen" if self.editable_mode else Path(self.build_lib) / "fastgen"
            write_info(package, *nothing_built())


class Wheel(bdist_wheel):
    """Compiled, but bound to no Python version: the libraries do not touch Python."""

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.ext_modules else tag


if __name__ == "__main__":
    COMPILER = find_compiler()
    if COMPILER[0] is None and os.environ.get("FASTGEN_CUDA") == "1":
        raise SetupError(f"fastgen: FASTGEN_CUDA=1, but {COMPILER[1]}.")
    setup(
        packages=[*find_packages(include=["fastgen", "fastgen.*"], exclude=["fastgen.kernels*"]), "fastgen.kernels"],
        # The folder is `kernels/` in the checkout and `fastgen.kernels` when installed: at the top level of
        # site-packages the name belongs to another project.
        package_dir={"fastgen.kernels": "kernels"},
        # setuptools compiles nothing itself; an entry here is what makes it call build_ext and a platform wheel.
        ext_modules=[Extension("fastgen._libraries", [])] if COMPILER[0] else [],
        cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython, "bdist_wheel": Wheel},
    )
