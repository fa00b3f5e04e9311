"""Checkpoints: what is saved comes back bit for bit; what is damaged, foreign or missing is refused in one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastgen
from fastgen import atomic, checkpoint, model_files
from fastgen.checkpoint import (
    atomic_directory,
    checkpoints_of,
    describe_models,
    fingerprint,
    resolve,
    shipped_models,
    verify,
)
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models.classifier import PRESETS as CLASSIFIERS
from fastgen.models.classifier import Classifier
from fastgen.models.unet import PRESETS, UNet

FILES = ["config.json", "manifest.json", "model.safetensors"]


@pytest.fixture
def model() -> UNet:
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], channels=(8, 16), head_dim=8)
    return UNet(config, DiffusionConfig("cosine", 200, prediction="v", clip=None), SamplingDefaults("ddpm", 7, 2.5))


@pytest.fixture
def saved(model: UNet, tmp_path: Path) -> Path:
    fastgen.save(model, tmp_path / "model")
    return tmp_path / "model"


def exchanges(folder: Path) -> bool:
    """Whether names in ``folder`` can be exchanged in one call."""
    one, other = folder / ".one", folder / ".other"
    one.mkdir(), other.mkdir()
    try:
        return atomic._exchange(one, other)
    finally:
        one.rmdir(), other.rmdir()


def edit_config(folder: Path, *, keep_manifest: bool = False, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    if not keep_manifest:
        remake_manifest(folder)


def remake_manifest(folder: Path) -> None:
    names = ["config.json", "model.safetensors"]
    (folder / "manifest.json").write_text(json.dumps({name: checkpoint.sha256(folder / name) for name in names}))


def refused(folder: Path | str, words: str) -> str:
    """One line that begins with the argument and holds ``words``."""
    with pytest.raises(fastgen.UsageError) as caught:
        fastgen.load(folder)
    message = str(caught.value)
    assert message.startswith("model: ") and words in message and "\n" not in message, message
    return message


def test_roundtrip(model: UNet, saved: Path) -> None:
    assert sorted(os.listdir(saved)) == FILES
    again = fastgen.load(saved)
    assert (again.config, again.diffusion, again.sampling) == (model.config, model.diffusion, model.sampling)
    assert not again.training and model.training, "loaded in eval mode; saving leaves the caller's mode"
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    x = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, 3), again(x, 3), rtol=1e-5, atol=1e-6)


def test_saves_other_layouts_and_dtypes(model: UNet, tmp_path: Path) -> None:
    expected = {k: v.half() for k, v in model.state_dict().items()}
    fastgen.save(model.half().to(memory_format=torch.channels_last), tmp_path / "half")
    assert {v.dtype for v in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    again = fastgen.load(tmp_path / "half").state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(v, expected[k].float()) for k, v in again.items())


def test_load_dtype_and_device(saved: Path) -> None:
    model = fastgen.load(saved, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_files_have_ordinary_permissions(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert saved.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {(saved / name).stat().st_mode & 0o777 for name in FILES} == {0o666 & ~mask}


def test_manifest_lists_every_other_file(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert sorted(manifest) == ["config.json", "model.safetensors"]
    assert manifest["config.json"] == checkpoint.sha256(saved / "config.json")
    verify(saved)


# Atomic


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "new") as work:
        (work / "half").write_text("x")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_failure_keeps_the_old(model: UNet, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (saved / name).read_bytes() for name in FILES}

    def broken(*args: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(model_files, "save_file", broken)
    with pytest.raises(OSError, match="No space"):
        fastgen.save(model, saved)
    assert {name: (saved / name).read_bytes() for name in FILES} == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("moves", [["_exchange"], ["_exchange", "rename", "rename"]], ids=["exchanged", "moved"])
def test_an_interrupted_save_keeps_the_old(
    model: UNet, saved: Path, monkeypatch: pytest.MonkeyPatch, moves: list[str]
) -> None:
    """Ctrl-C at any file that is written, synced or moved leaves the whole of one checkpoint, and nothing beside it."""
    old = {name: (saved / name).read_bytes() for name in FILES}
    with torch.no_grad():
        next(model.parameters()).add_(1)
    calls: list[str] = []
    stop = -1

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == stop:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    if len(moves) > 1:  # a system that exchanges no names
        monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    elif not exchanges(saved.parent):
        pytest.skip("no names are exchanged here")
    places = (
        (model_files, "save_file"),
        (Path, "write_text"),
        (atomic, "_fsync"),
        (atomic, "_exchange"),
        (os, "rename"),
    )
    for holder, name in places:
        monkeypatch.setattr(holder, name, counted(name, getattr(holder, name)))
    steps = ["save_file", *["write_text"] * 2, *["_fsync"] * 4, *moves, "_fsync"]
    for stop in range(len(steps)):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            fastgen.save(model, saved)
        back = [name for name in steps[7:stop] if name == moves[-1]]  # what had been moved
        assert calls == steps[: stop + 1] + back and {name: (saved / name).read_bytes() for name in FILES} == old
        assert os.listdir(saved.parent) == [saved.name]


def test_a_full_disk_is_an_error_of_the_system(model: UNet, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has an exception of its own for it; the command line knows a full disk by its number."""

    def full(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model_files, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        fastgen.save(model, saved)
    assert caught.value.errno == errno.ENOSPC and os.listdir(saved.parent) == [saved.name]
    fastgen.load(saved)


def test_a_failing_rename_keeps_the_old(model: UNet, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(target) == saved and source != atomic.aside(saved):
            raise OSError("rename failed")
        real(source, target)

    monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="rename failed"):
        fastgen.save(model, saved)
    fastgen.load(saved)
    assert os.listdir(saved.parent) == [saved.name]


def test_replaces_the_old(model: UNet, saved: Path) -> None:
    (saved / "stray").write_text("x")
    with torch.no_grad():
        next(model.parameters()).fill_(7)
    fastgen.save(model, saved)
    assert sorted(os.listdir(saved)) == FILES and os.listdir(saved.parent) == [saved.name]
    assert (next(fastgen.load(saved).parameters()) == 7).all()


# Damage


CHANGED = "differs from its SHA-256 in manifest.json: it was edited, or bits of it flipped"
# What was done to model.safetensors, of the size `n` with a header that ends at `h`, and what is said of it.
DAMAGE: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "emptied": (lambda b, h: b"", "is truncated to nothing"),
    "cut in the length": (lambda b, h: b[:7], "is truncated to nothing"),
    "cut in the header": (lambda b, h: b[: h // 2], "is truncated: {size} bytes, fewer than its own header has"),
    "cut after the header": (lambda b, h: b[:h], "is truncated: {size} of {n} bytes are there"),
    "cut in the data": (lambda b, h: b[: (h + len(b)) // 2], "is truncated: {size} of {n} bytes are there"),
    "cut by one byte": (lambda b, h: b[:-1], "is truncated: {size} of {n} bytes are there"),
    "a bit of the data": (lambda b, h: flipped(b, len(b) - 5, 0), CHANGED),
    "a bit of a name": (lambda b, h: flipped(b, b.index(b"conv_in"), 1), CHANGED),
    "a bit of a quotation mark": (lambda b, h: flipped(b, b.index(b'":{"dtype"'), 4), CHANGED),
    "a bit that is no UTF-8": (lambda b, h: flipped(b, b.index(b"conv_in"), 7), CHANGED),
    "another of the same size": (lambda b, h: b[:h] + bytes(len(b) - h), CHANGED),
    "foreign": (lambda b, h: b"PK\x03\x04" + bytes(range(256)) * 9, "is foreign: it is not a safetensors file"),
    "text": (lambda b, h: b"Not Found, and so we have a page of HTML", "is foreign: it is not a safetensors file"),
    "a pickle": (lambda b, h: pickle.dumps({"weights": [1.0] * 99}), "is foreign: it is not a safetensors file"),
    "empty JSON": (lambda b, h: (2).to_bytes(8, "little") + b"{}", "is foreign: it is not a safetensors file"),
    "a byte more": (lambda b, h: b + b"x", "is too long: {size} bytes instead of {n}"),
    "twice": (lambda b, h: b + b, "is too long: {size} bytes instead of {n}"),
}


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights(saved: Path, kind: str) -> None:
    """Cut off, changed in place, another file, too long: each says so, and what to do."""
    file, (damage, words) = saved / "model.safetensors", DAMAGE[kind]
    content = file.read_bytes()
    damaged = damage(content, 8 + int.from_bytes(content[:8], "little"))
    file.write_bytes(damaged)
    message = refused(saved, f"{file} {words.format(size=len(damaged), n=len(content))}; copy the whole folder again")
    assert sum(word in message for word in ("truncated", "bits of it flipped", "foreign", "too long")) == 1


def test_truncated_with_its_manifest(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    remake_manifest(saved)
    refused(saved, "is not a whole safetensors file")


def test_a_bit_of_the_configuration(saved: Path) -> None:
    file = saved / "config.json"
    content = file.read_bytes()
    file.write_bytes(flipped(content, content.index(b"custom"), 0))
    refused(saved, f"{file} {CHANGED}; copy the whole folder again")


def test_half_a_hash_is_none(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["model.safetensors"] = manifest["model.safetensors"][:-1]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    refused(saved, f"model.safetensors {CHANGED}")


def test_edited_config(saved: Path) -> None:
    edit_config(saved, keep_manifest=True, preset="other")
    refused(saved, "config.json differs from its SHA-256")


@pytest.mark.parametrize("name", FILES)
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    words = {
        "config.json": "holds no checkpoint (no config.json and no step-* folder in it)",
        "manifest.json": f"{saved / name} is missing",
        "model.safetensors": f"{saved / name} is missing, though the manifest lists it; copy the whole folder again",
    }
    refused(saved, words[name])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null"])
def test_broken_config(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    refused(saved, "config.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"model.safetensors": 3}', "{}"])
def test_broken_manifest(saved: Path, content: str) -> None:
    (saved / "manifest.json").write_text(content)
    refused(saved, "")


def test_manifest_that_leaves_the_weights_out(saved: Path) -> None:
    """Otherwise an emptied manifest would verify anything."""
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["model.safetensors"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    refused(saved, "manifest")


# Fingerprint and source


def test_fingerprint_is_of_the_weights_alone(model: UNet, saved: Path, tmp_path: Path) -> None:
    """Not of the file, the preset, the defaults, the memory layout or the mode."""
    expected = fingerprint(model)
    assert re.fullmatch("[0-9a-f]{64}", expected) and fingerprint(model.train()) == expected
    assert fingerprint(fastgen.load(saved)) == expected
    other = UNet(model.config, DiffusionConfig("linear", 50), SamplingDefaults("ddim", 9))
    other.load_state_dict(model.state_dict())
    assert fingerprint(other.to(memory_format=torch.channels_last).requires_grad_(False)) == expected
    fastgen.save(model, tmp_path / "again", preset="other")
    assert fingerprint(fastgen.load(tmp_path / "again")) == expected
    assert (tmp_path / "again" / "config.json").read_bytes() != (saved / "config.json").read_bytes()


def test_fingerprint_of_every_weight(model: UNet) -> None:
    """The last bit of any weight changes it."""
    seen = {fingerprint(model)}
    for p in model.parameters():
        bits = p.data.view(torch.int32).flatten()
        bits[-1] ^= 1
        seen.add(fingerprint(model))
        bits[-1] ^= 1
    assert len(seen) == 1 + len(list(model.parameters())) and fingerprint(model) in seen


def test_fingerprint_of_names_shapes_and_dtypes() -> None:
    """The same bytes under other names, in other shapes or of other dtypes are other weights; their order is none."""

    class Named(nn.Module):
        def __init__(self, **tensors: Tensor) -> None:
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

    a, b = torch.arange(6, dtype=torch.float32).reshape(2, 3), torch.zeros(())
    others = [
        Named(a=a, b=b), Named(a=a, c=b), Named(a=b, b=a), Named(a=a.T.contiguous(), b=b), Named(a=a.flatten(), b=b),
        Named(a=a.view(torch.int32), b=b), Named(a=a.double(), b=b), Named(a=a.bfloat16(), b=b), Named(a=a),
        Named(a=a, b=b, c=torch.zeros(0)), Named(),
    ]  # fmt: skip
    assert len({fingerprint(model) for model in others}) == len(others)
    assert fingerprint(Named(b=b, a=a)) == fingerprint(Named(a=a.T.contiguous().T, b=b)) == fingerprint(others[0])


def test_source(model: UNet, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe names: the shipped name, or the folder of the weights themselves."""
    assert not hasattr(model, "source")
    assert fastgen.load("digits-classifier").source == "digits-classifier"
    assert fastgen.load(saved).source == str(saved)
    monkeypatch.chdir(tmp_path)
    assert fastgen.load("model").source == "model"
    step = Path("run", f"{checkpoint.STEP_PREFIX}00000007")
    fastgen.save(model, step)
    assert fastgen.load("run").source == str(step), "of a run the checkpoint, for its newest will be another"
    assert fastgen.load(fastgen.load("run").source).source == str(step)


def test_a_classifier_comes_back(tmp_path: Path) -> None:
    """A family without sampling: its configuration has neither diffusion nor defaults."""
    torch.manual_seed(0)
    model = Classifier(replace(CLASSIFIERS["digits-tiny"], num_classes=7)).eval()
    fastgen.save(model, tmp_path / "classifier", preset="mine")
    config = json.loads((tmp_path / "classifier" / "config.json").read_text())
    assert (config["family"], config["preset"]) == ("classifier", "mine")
    assert not {"diffusion", "sampling"} & config.keys()
    again = fastgen.load(tmp_path / "classifier")
    assert isinstance(again, Classifier) and again.config == model.config and not again.training
    assert fingerprint(again) == fingerprint(model)
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)
    edit_config(tmp_path / "classifier", config={"channels": [8, 12]})
    refused(tmp_path / "classifier", "channels [12] are not divisible by num_groups=8")


def test_a_module_of_another_class_is_not_saved(tmp_path: Path) -> None:
    """Nor one of a class derived from ours, which `load` could not make again."""

    class Other(Classifier):
        pass

    for module, name in ((nn.Linear(1, 1), "Linear"), (Other(CLASSIFIERS["digits-tiny"]), "Other")):
        with pytest.raises(fastgen.UsageError, match=f"^model: {name} is no network of fastgen.models"):
            fastgen.save(module, tmp_path / "m")
    assert os.listdir(tmp_path) == []


# Foreign


def test_foreign_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "hidden_size": 768}))
    refused(tmp_path, "is not a fastgen checkpoint")


@pytest.mark.parametrize("family", ["transformer", None, 3, ["unet"]])
def test_wrong_family(saved: Path, family: object) -> None:
    edit_config(saved, family=family)
    refused(saved, "known: unet, classifier")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"image_size": 16, "depth": 3}}, "depth"),
        ({"config": {"image_size": 15}}, "image_size"),
        ({"diffusion": {"schedule": "sigmoid"}}, "schedule"),
        ({"sampling": {"stepz": 3}}, "stepz"),
        ({"diffusion": None}, "config.json"),
    ],
)
def test_wrong_configuration(saved: Path, changes: dict[str, object], words: str) -> None:
    edit_config(saved, **changes)
    refused(saved, words)


def test_newer_format(saved: Path) -> None:
    edit_config(saved, format=checkpoint.FORMAT + 1)
    refused(saved, f"has format {checkpoint.FORMAT + 1}")


def test_format_that_is_no_number(saved: Path) -> None:
    edit_config(saved, format="two")
    refused(saved, "format")


def test_weights_of_another_shape(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["conv_in.weight"] = weights["conv_in.weight"][:4].contiguous()
    save_file(weights, saved / "model.safetensors")
    remake_manifest(saved)
    refused(saved, "conv_in.weight")


def test_weights_that_are_not_all_there(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["conv_out.bias"]
    save_file(weights, saved / "model.safetensors")
    remake_manifest(saved)
    refused(saved, "conv_out.bias")


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pickled"
    folder.mkdir()
    config = {"_class_name": "UNet2DModel", "block_out_channels": [32], "down_block_types": ["DownBlock2D"]}
    (folder / "config.json").write_text(json.dumps({**config, "up_block_types": ["UpBlock2D"]}))
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "pickled .bin weights are not read")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "is not a whole safetensors file")
    assert os.listdir(tmp_path) == ["pickled"]


def test_a_pickle_in_place_of_the_weights(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    remake_manifest(saved)
    refused(saved, "is not a whole safetensors file")
    assert os.listdir(saved.parent) == [saved.name]


# Names


def test_unknown_name_gives_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "shipped_models", lambda: ["ddpm-mnist", "vae-faces"])
    refused("ddpm-minst", "did you mean ddpm-mnist?")
    refused("zzzzzzzz", "there are: ddpm-mnist, vae-faces")


def test_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "holds no checkpoint")
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    refused(tmp_path / "weights.safetensors", "is a file; a checkpoint is a folder")


@pytest.mark.parametrize("ending", [".bin", ".ckpt", ".pkl", ".pt", ".pth"])
def test_pickles_by_their_names(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, and a folder with nothing else: refused by name, never opened."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights" / f"model{ending}"
    file.parent.mkdir()
    file.write_bytes(pickle.dumps(Bomb()))
    refused(file, f"{file} is a pickle, which is never read, since a pickle can run code; save it again as safetensors")
    refused(file.parent, "weights holds pickled weights only, which is never read")
    (file.parent / "config.json").write_text("{}")
    refused(file.parent, "is not a fastgen checkpoint")
    refused(tmp_path / f"missing{ending}", "no model or folder named")
    assert os.listdir(tmp_path) == ["weights"]


def test_a_run_stands_for_its_newest_whole_checkpoint(model: UNet, tmp_path: Path) -> None:
    for step in (900, 1000, 20000):
        fastgen.save(model, tmp_path / f"{checkpoint.STEP_PREFIX}{step:08d}")
    (tmp_path / f"{checkpoint.STEP_PREFIX}00030000").mkdir()  # without a manifest: not a checkpoint
    assert [p.name for p in checkpoints_of(tmp_path)] == ["step-00000900", "step-00001000", "step-00020000"]
    assert resolve(tmp_path).name == "step-00020000"
    assert isinstance(fastgen.load(tmp_path), UNet)


# The models in the package


def test_shipped_models() -> None:
    assert "ddpm-mnist" in shipped_models()
    for name in shipped_models():
        folder = checkpoint.WEIGHTS / name
        verify(folder)
        config = fastgen.load(name).config
        assert config.num_classes == 10 and config.in_channels == 1 and config.image_size in (28, 32)
    assert [entry["name"] for entry in describe_models()] == shipped_models()


def test_shipped_weights_are_small() -> None:
    sizes = {p.parent.name: p.stat().st_size / 1e6 for p in checkpoint.WEIGHTS.glob("*/model.safetensors")}
    assert sizes["ddpm-mnist"] <= 8 and sum(sizes.values()) <= 40
