"""The rules of the house, read from the source: docs/design.md says why each of them is there."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fastgen import backends, ops
from fastgen.testing import CASES, EAGER

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS, CSRC = ROOT / "fastgen", ROOT / "kernels", ROOT / "csrc"
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)
KERNEL_FILES = sorted(KERNELS.glob("*.py"))
# An op's file is one that defines <stem>_reference, or has kernels.
HELPERS = {
    "__init__",
    "activations",
    "conv2d_arguments",
    "convolution",
    "convolution_gpu",
    "patches",
    "registration",
    "transposed",
    "vendor",
    "weights",
}
OP_FILES = sorted(p for p in (PACKAGE / "ops").glob("*.py") if p.stem not in HELPERS)
STEMS = sorted(set(backends.STEMS.values()))

# Imports point down: a file may import from its own layer (the first part of the name after fastgen) and from what
# stands below it. Files side by side in one set do not import one another.
LAYERS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"folder", "metrics", "replaying"},
    {"tuning"},
    {"training"},
    {"testing", "diagnosis", "sampling"},
    {"denoising"},
    {"arguments", "finite", "graphs"},
    {"images"},
    {"checkpoint", "recipe", "acceleration"},
    {"diffusers_format", "hub"},
    {"models", "model_files", "schedulers"},
    {"diffusion"},
    {"nn"},
    {"ops"},
    {"backends"},
    {"tuned"},
    {"atomic", "errors", "version", "tolerance", "kernels"},
]
# The package itself, fastgen/__init__.py, loads everything on first use, and itself imports only:
ROOT_IMPORTS = {"version"}

# Functions of the package itself.
PUBLIC = {
    "accelerate", "doctor", "explain", "load", "replay", "restore", "sample", "sample_to_folder", "save", "stream",
    "use_backend",
}  # fmt: skip

OP_LINES, KERNEL_LINES, FUNCTION_LINES = 260, 400, 40
# Functions that are longer, and why.
LONG_FUNCTIONS: dict[str, str] = {}
# Files longer than their kind allows, and why.
LONG_FILES: dict[str, str] = {}


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


@cache
def code_lines(file: Path) -> frozenset[int]:
    """The numbers of the lines that hold code: no blank lines, comments or docstrings."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return frozenset(lines)


def functions(file: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Qualified name and node of every function."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{prefix}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    yield inner[:-1], child
            yield from visit(child, inner)

    return visit(tree(file), "")


def imports(file: Path) -> Iterator[str]:
    """The full names that a file imports, wherever in it; of `from a import b`, a.b if that is a module, else a."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or file.parent == KERNELS, f"{name(file)}: relative imports are for kernels/"
            if node.level:
                yield f"kernels.{node.module or ''}"
                continue
            for alias in node.names:
                path = ROOT / f"{node.module}.{alias.name}".replace(".", "/")
                module = path.is_dir() or path.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if module else node.module


def part(module: str) -> str:
    """fastgen.ops.philox -> ops; fastgen itself -> ''."""
    return [*module.split("."), ""][1]


def rank(layer: str) -> int:
    found = [i for i, layers in enumerate(LAYERS) if layer in layers]
    assert found, f"{layer} stands in no layer of {Path(__file__).name}"
    return found[0]


# Imports


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_imports_point_down(file: Path) -> None:
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        top = [n for n in tree(file).body if isinstance(n, ast.ImportFrom) and n.module.startswith("fastgen")]
        assert {part(n.module) for n in top} <= ROOT_IMPORTS
        return
    wrong = [
        module for module in imports(file)
        if module.split(".")[0] == "fastgen" and part(module) != own
        and (part(module) == "" or rank(part(module)) <= rank(own))
    ]  # fmt: skip
    assert not wrong, f"{name(file)} is in the layer of {own} and imports {wrong}"


def test_nothing_imports_by_name_what_it_may_not() -> None:
    """importlib.import_module("fastgen…") is how kernels and the package's own names are loaded, and nothing else."""
    found = {name(f) for f in SOURCES if re.search(r"import_module\(", f.read_text())}
    assert found <= {"fastgen/__init__.py", "fastgen/backends.py"}


@pytest.mark.parametrize("file", KERNEL_FILES, ids=name)
def test_kernels_import_torch_triton_and_themselves(file: Path) -> None:
    allowed = {"__future__", "torch", "triton", "kernels", "math", "typing", "contextlib", "collections", "functools"}
    assert {module.split(".")[0] for module in imports(file)} <= allowed


def test_light_files_import_no_torch() -> None:
    """`import fastgen` and `fastgen --help` are instant because of these."""
    for stem in ("__init__", "__main__", "atomic", "cli", "errors", "version"):
        top = [n for n in tree(PACKAGE / f"{stem}.py").body if isinstance(n, ast.Import | ast.ImportFrom)]
        modules = {a.name for n in top if isinstance(n, ast.Import) for a in n.names} | {
            n.module for n in top if isinstance(n, ast.ImportFrom)
        }
        assert not {m.split(".")[0] for m in modules} & {"torch", "triton", "numpy", "PIL", "safetensors"}, stem


# One stem everywhere


def test_every_op_file_has_its_stem() -> None:
    assert {p.stem for p in OP_FILES} == set(STEMS)


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_everywhere(stem: str) -> None:
    """The op, its kernels, its test, its cases and its benchmark. A C++ kernel may come before its Triton counterpart;
    until then auto takes the vendor's on a GPU."""
    own = [op for op, s in backends.STEMS.items() if s == stem]
    assert (PACKAGE / "ops" / f"{stem}.py").is_file()
    triton = KERNELS / f"{stem}.py"
    for op in own:
        cpp = CSRC / "cpu" / f"{backends.STEMS[backends.LAUNCHERS.get(op, op)]}.cpp"
        assert cpp.is_file(), f"no {name(cpp)}"
    if not triton.is_file():
        assert all(backends.AUTO["cuda"].get(op) == ("reference",) for op in own)
    assert (ROOT / "tests" / "ops" / f"test_{stem}.py").is_file(), f"no tests/ops/test_{stem}.py"
    assert any(CASES.get(op) for op in own), f"no OpCase of {own}"
    benchmark = ROOT / "benchmarks"
    assert (benchmark / "ops.py").is_file() or (benchmark / "ops" / f"{stem}.py").is_file(), f"no benchmark of {stem}"


def test_no_kernel_without_an_op() -> None:
    """What begins with an underscore is shared; what is common to all of csrc/cpu has no stem. ema.cpp works in place
    and has no gradient: `fastgen.training.ema` calls it, and no op does."""
    assert {f.stem for f in KERNEL_FILES if not f.stem.startswith("_")} <= set(STEMS)
    parts = {f"{stem}_{part}" for stem in STEMS for part in ("bwd", "weights")}
    assert {f.stem for f in (CSRC / "cpu").glob("*.cpp")} <= {*STEMS, *parts, "activations", "ema", "isa", "noise"}
    assert {f.stem for f in (CSRC / "cuda").glob("*.cu")} <= set(STEMS)


def test_every_case_has_an_op_and_a_yardstick() -> None:
    assert set(CASES) == set(EAGER) and set(CASES) <= set(backends.STEMS)
    for op, listed in CASES.items():
        assert {case.op for case in listed} == {op}
        labels = [case.label for case in listed]
        assert len(labels) == len(set(labels)), f"two cases of {op} have one name"
        assert any(case.bench for case in listed) and not all(case.bench for case in listed)


def test_every_op_is_public_with_its_reference() -> None:
    for op in backends.STEMS:
        assert callable(getattr(ops, op)) and callable(getattr(ops, f"{op}_reference"))
        assert {op, f"{op}_reference"} <= set(ops.__all__)


@pytest.mark.parametrize("file", OP_FILES, ids=name)
def test_op_file(file: Path) -> None:
    """Docstring with an equation, the source and a legend; the public function; then its reference."""
    doc = ast.get_docstring(tree(file))
    assert doc and re.search(r"=|·|softmax\(", doc) and "Legend:" in doc, (
        f"{name(file)} begins with an equation and a legend"
    )
    order = [n.name for n in tree(file).body if isinstance(n, ast.FunctionDef)]
    own = [op for op, stem in backends.STEMS.items() if stem == file.stem]
    for op in own:
        assert order.index(op) < order.index(f"{op}_reference")
    public = [n for n in order if not n.startswith("_")]
    assert order[0] in own, f"{name(file)} begins with {order[0]}, not with an op"
    assert set(own) <= set(public)


def test_references_take_the_arguments_of_their_ops() -> None:
    def arguments(function: ast.FunctionDef) -> list[str]:
        return [a.arg for a in [*function.args.args, *function.args.kwonlyargs] if a.arg != "backend"]

    for file in OP_FILES:
        found = {n.name: n for n in tree(file).body if isinstance(n, ast.FunctionDef)}
        for op in found.keys() & backends.STEMS.keys():
            got, expected = arguments(found[f"{op}_reference"]), arguments(found[op])
            assert got == expected, f"{op}_reference{tuple(got)} stands beside {op}{tuple(expected)}"


# Words


def is_public(qualified: str) -> bool:
    return not any(p.startswith("_") for p in qualified.split("."))


def needs_words(qualified: str, function: ast.FunctionDef, file: Path) -> bool:
    """Public functions; not methods whose contract stands on the class, and not what is short: its name and its types
    say it. In ops/ every function that is exported, and no *_kernel, which repeats the shapes beside its pointers."""
    if not is_public(qualified) or qualified.endswith("_kernel"):
        return False
    if file.parent.name == "ops" or qualified in PUBLIC:
        return "." not in qualified
    return count(function, file) > (6 if file.parent == KERNELS else 12) or qualified.endswith(("_fwd", "_bwd"))


@pytest.mark.parametrize("file", [*SOURCES, *KERNEL_FILES], ids=name)
def test_docstrings(file: Path) -> None:
    """Every file, and every public class and function of it, says what it is."""
    assert ast.get_docstring(tree(file)) or file.stem == "__main__", name(file)
    classes = [n for n in tree(file).body if isinstance(n, ast.ClassDef) and is_public(n.name)]
    silent = [n.name for n in classes if not ast.get_docstring(n)]
    silent += [q for q, f in functions(file) if needs_words(q, f, file) and not ast.get_docstring(f)]
    assert not silent, f"{name(file)}: no docstring on {silent}"


@pytest.mark.parametrize("file", KERNEL_FILES, ids=name)
def test_kernels_tell_the_shapes_of_their_pointers(file: Path) -> None:
    lines = file.read_text().splitlines()
    for q, f in functions(file):
        if q.endswith("_kernel"):
            pointers = [a for a in f.args.args if a.arg.endswith("_ptr")]
            silent = [a.arg for a in pointers if "# [" not in lines[a.lineno - 1]]
            assert pointers and not silent, f"{name(file)}:{q}: no shape beside {silent}"


def count(node: ast.FunctionDef, file: Path) -> int:
    """Lines of code in the body of a function, its signature aside."""
    return sum(node.body[0].lineno <= line <= node.end_lineno for line in code_lines(file))


@pytest.mark.parametrize("file", [*SOURCES, *KERNEL_FILES], ids=name)
def test_functions_are_short(file: Path) -> None:
    found = {f"{name(file)}:{q}": count(f, file) for q, f in functions(file)}
    long = {q: n for q, n in found.items() if n > FUNCTION_LINES and q not in LONG_FUNCTIONS}
    assert not long, f"longer than {FUNCTION_LINES} lines: {long}"
    needless = [q for q in LONG_FUNCTIONS if q.startswith(f"{name(file)}:") and found.get(q, 0) <= FUNCTION_LINES]
    assert not needless, f"no longer an exception: {needless}"


@pytest.mark.parametrize("file", [*(PACKAGE / "ops").glob("*.py"), *KERNEL_FILES], ids=name)
def test_files_are_short(file: Path) -> None:
    limit = KERNEL_LINES if file.parent == KERNELS else OP_LINES
    assert len(code_lines(file)) <= limit or name(file) in LONG_FILES, (
        f"{name(file)}: {len(code_lines(file))} lines of code"
    )


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project, by name; not this one, which holds the words it looks for."""
    kinds = {".py", ".h", ".cpp", ".cu", ".md", ".toml", ".txt", ".in", ".cfg", ".yml", ".yaml"}
    folders = ("fastgen", "kernels", "csrc", "tests", "benchmarks", "docs", "examples", ".ci")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
    for f in [*files, *(f for f in ROOT.iterdir() if f.is_file())]:
        if (f.suffix in kinds or f.name in ("Makefile", "run")) and f != Path(__file__) and "results" not in f.parts:
            yield name(f), f.read_text()


def test_nothing_is_left_to_do() -> None:
    found = [f"{n}: {m}" for n, text in texts() for m in re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b.*", text)]
    assert not found


def test_no_pickles() -> None:
    """Nothing in the package reads or writes one: safetensors and JSON only."""
    for file in SOURCES:
        modules = {m.split(".")[0] for m in imports(file)}
        assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, name(file)
        assert not re.search(
            r"\btorch\.(load|save)\(|allow_pickle|\beval\(|\bexec\(", re.sub(r"\.eval\(\)", "", file.read_text())
        ), name(file)


def test_no_randomness_of_its_own() -> None:
    """Sampling draws from the images' seeds: torch's generators appear in training and in test inputs only, and where
    a variational autoencoder that is trained elsewhere draws its latents; acceleration looks for them, and seeds
    the calls that it compares."""
    drawing = re.compile(
        r"torch\.(randn?|randint|randperm|rand_like|randn_like|manual_seed|Generator)\b|\bimport random\b|np\.random"
    )
    found = {name(f) for f in SOURCES if drawing.search(f.read_text())}
    allowed = {
        "fastgen/nn/gaussian.py",  # takes a caller's generator
        "fastgen/schedulers/noise.py",  # the same, as diffusers does
        "fastgen/testing.py",
    }
    assert {f for f in found if not f.startswith(("fastgen/training/", "fastgen/acceleration/"))} <= allowed


def test_no_address_of_a_package_index() -> None:
    """Where packages come from is the business of whoever installs them. Also nobody's home folder."""
    hosts = re.compile(
        r"https?://[^\s\"'>)]*(?:pypi|pythonhosted|/simple\b|/whl\b|index-url|artifactory|nexus|mirror)", re.IGNORECASE
    )
    options = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host|PIP_(?:EXTRA_)?INDEX_URL")
    homes = re.compile(r"/(?:home|Users)/\w+|/root/\w+|/tmp/\w+")
    for pattern in (hosts, options, homes):
        assert not [f"{n}: {m}" for n, text in texts() for m in pattern.findall(text)]


def test_links_in_the_documents_lead_somewhere() -> None:
    for file in [*ROOT.glob("*.md"), *(f for d in ("docs", "examples") for f in (ROOT / d).rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)", file.read_text()):
            if not re.match(r"[a-z]+:", target):
                assert (file.parent / target).exists(), f"{name(file)} links to {target}"
