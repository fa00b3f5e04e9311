"""The table of samplers: its command, and that README, model card and record say the same of the weights that ship."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import quality
from fastgen.checkpoint import WEIGHTS, fingerprint, load

ROOT = Path(__file__).parent.parent
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*-quality-ddpm-mnist.json"))


def rows() -> list[dict]:
    return json.loads(RECORDS[-1].read_text(encoding="utf-8"))["rows"]


def shipped_row() -> dict:
    defaults = load("ddpm-mnist").sampling
    wanted = {"sampler": defaults.sampler, "steps": defaults.steps, "guidance": defaults.guidance, "n": 1000}
    found = [row for row in rows() if all(row[k] == v for k, v in wanted.items()) and row["spacing"] == "trailing"]
    assert len(found) == 1, f"the record has {len(found)} rows of the shipped defaults, {wanted}"
    return found[0]


def test_record_is_of_the_shipped_weights() -> None:
    assert {row["sha256"] for row in rows()} == {fingerprint(load("ddpm-mnist"))}


def test_shipped_defaults_are_good() -> None:
    """What is promised of ddpm-mnist, over 1,000 images of at most 50 steps."""
    row = shipped_row()
    assert row["steps"] <= 50 and row["label_accuracy"] >= 0.97 and row["held_out_accuracy"] >= 0.97
    assert row["frechet"] <= 4 * row["frechet_training"] and row["nearest_least"] >= 0.8


def test_readme_shows_the_record() -> None:
    """Every row of the table in README is one of the record, and the record is linked."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- quality -->\n(.*?)<!-- /quality -->", text, re.DOTALL)[1]
    shown = [line for line in block.splitlines() if re.match(r"\| \w+ \|.*\d", line)]
    recorded = RECORDS[-1].with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert shown and not [line for line in shown if line not in recorded]
    assert RECORDS[-1].with_suffix(".md").name in block


@pytest.mark.parametrize(
    "file", [ROOT / "README.md", WEIGHTS / "ddpm-mnist" / "README.md"], ids=lambda f: f.parent.name
)
def test_figures_of_the_shipped_defaults(file: Path) -> None:
    row, text = shipped_row(), file.read_text(encoding="utf-8")
    for figure in (
        f"{row['label_accuracy']:.1%}".replace("%", " %"),
        f"{row['frechet_ratio']:.2f}",
        f"{row['nearest_least']:.2f}",
    ):
        assert figure in text, f"{file} does not say {figure}"


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A row a sampler and spacing; run again, it measures nothing twice and keeps what there was."""
    args = ["--out", str(tmp_path), "-n", "50", "--steps", "2"]
    quality.main([*args, "--samplers", "ddim", "heun"])
    quality.main([*args, "--samplers", "euler", "--spacing", "karras"])
    (file,) = tmp_path.glob("*-quality-ddpm-mnist.json")
    measured = json.loads(file.read_text())["rows"]
    assert [(r["sampler"], r["spacing"], r["calls"]) for r in measured] == [
        ("ddim", "trailing", 2), ("heun", "karras", 3), ("euler", "karras", 2),
    ]  # fmt: skip
    table = file.with_suffix(".md").read_text()
    assert all(line in table for line in capsys.readouterr().out.splitlines())
    quality.main([*args, "--samplers", "ddim", "--spacing", "karras"])
    assert capsys.readouterr().out.startswith("left out: ddim: spacing: ")
    monkeypatch.setattr(quality, "measure", lambda *args: pytest.fail("measured again"))
    quality.main([*args, "--samplers", "heun", "ddim"])
    assert json.loads(file.read_text())["rows"] == measured
