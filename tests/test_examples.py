"""Each example runs as a user runs it, with and without its one line, and leaves a picture."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINE = "model = fastgen.accelerate(model)  # the one added line"
# As small as they get; the width and height of the picture.
TINY = {
    "dcgan": (["--steps", "3", "--batch", "4", "--width", "4"], (256, 128)),
    "diffusers_ddpm": (["--steps", "2", "--batch", "2", "--sampling-steps", "2"], (256, 128)),
    "vae": (["--steps", "3", "--batch", "4", "--width", "4"], (256, 128)),
}


def run(example: Path, *options: str) -> str:
    needs = ["mlxtend"] + ["diffusers"] * (example.stem == "diffusers_ddpm")
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, str(example), *options], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("step ")]


def check_picture(path: Path, size: tuple[int, int]) -> None:
    with Image.open(path) as picture:
        assert picture.size == size and picture.mode == "L"
        low, high = picture.getextrema()
    assert high > low


def test_there_is_a_test_of_each() -> None:
    assert {e.stem for e in EXAMPLES} == set(TINY)
    readme = (ROOT / "examples" / "README.md").read_text()
    assert LINE in readme and all(f"]({e.name})" in readme for e in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.stem)
def test_one_line_of_ours(example: Path) -> None:
    """All else is what a stranger writes: nothing more of fastgen is imported or called."""
    text = example.read_text()
    assert text.count(LINE) == 1 and ast.get_docstring(ast.parse(text))
    code = re.sub(r'^""".*?"""', "", text, flags=re.DOTALL)
    flag = 'parser.add_argument("--plain", action="store_true", help="without fastgen")'
    assert [line.strip() for line in re.findall(r".*\bfastgen\b.*", code)] == ["import fastgen", flag, LINE]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.stem)
def test_runs_plain_and_with_the_line(example: Path, tmp_path: Path) -> None:
    """Both draw a picture, and the losses are the same to the digits that are printed but the last."""
    options, size = TINY[example.stem]
    numbers = []
    for name, more in (("plain", ["--plain"]), ("fast", [])):
        output = run(example, *options, "--seed", "3", *more, "--out", str(tmp_path / f"{name}.png"))
        check_picture(tmp_path / f"{name}.png", size)
        assert re.search(rf"{name}\.png: .* trained at [\d.]+ images/s", output.splitlines()[-1])
        numbers.append([float(x) for x in re.findall(r"-?\d+\.\d+", " ".join(losses(output)))])
    assert len(numbers[0]) == len(numbers[1]) > 0
    assert all(abs(a - b) <= 1e-2 * max(1.0, abs(a)) for a, b in zip(*numbers, strict=True)), numbers


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.stem)
def test_other_seeds_other_losses(example: Path, tmp_path: Path) -> None:
    options, _ = TINY[example.stem]
    out = ("--plain", "--out", str(tmp_path / "x.png"))
    assert losses(run(example, *options, "--seed", "1", *out)) != losses(run(example, *options, "--seed", "2", *out))
