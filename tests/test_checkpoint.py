"""Checkpoints: what is saved comes back bit for bit; what is damaged, foreign or missing is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastgen
from fastgen import checkpoint
from fastgen.checkpoint import atomic_directory, checkpoints_of, describe_models, resolve, shipped_models, verify
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
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


def edit_config(folder: Path, *, keep_manifest: bool = False, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    if not keep_manifest:
        remake_manifest(folder)


def remake_manifest(folder: Path) -> None:
    names = ["config.json", "model.safetensors"]
    (folder / "manifest.json").write_text(json.dumps({name: checkpoint.sha256(folder / name) for name in names}))


def refused(folder: Path | str, words: str) -> None:
    """One line that begins with the argument and holds ``words``."""
    with pytest.raises(fastgen.UsageError) as caught:
        fastgen.load(folder)
    message = str(caught.value)
    assert message.startswith("model: ") and words in message and "\n" not in message, message


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

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="No space"):
        fastgen.save(model, saved)
    assert {name: (saved / name).read_bytes() for name in FILES} == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_failing_rename_keeps_the_old(model: UNet, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target) == saved and not self.name.endswith("-old"):
            raise OSError("rename failed")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
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


def test_bit_flipped(saved: Path) -> None:
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    refused(saved, "model.safetensors differs from its SHA-256")


def test_truncated(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(saved, "model.safetensors differs from its SHA-256")
    remake_manifest(saved)
    refused(saved, "is not a whole safetensors file")


def test_edited_config(saved: Path) -> None:
    edit_config(saved, keep_manifest=True, preset="other")
    refused(saved, "config.json differs from its SHA-256")


@pytest.mark.parametrize("name", FILES)
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refused(saved, "no config.json" if name == "config.json" else f"{name} is missing")


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


# Foreign


def test_foreign_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "hidden_size": 768}))
    refused(tmp_path, "is not a fastgen checkpoint")


@pytest.mark.parametrize("family", ["transformer", None, 3, ["unet"]])
def test_wrong_family(saved: Path, family: object) -> None:
    edit_config(saved, family=family)
    refused(saved, "known: unet")


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


def test_incomplete_diffusers_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "in_channels": 3}))
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    refused(tmp_path, "config.json")


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
    (tmp_path / "weights.pt").write_bytes(b"x")
    refused(tmp_path / "weights.pt", "is a file; a checkpoint is a folder")


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
