"""Checkpoints: a directory of `model.safetensors`, `config.json` and a SHA-256 `manifest.json`.

A directory is written beside its final place, synced, and renamed (fastgen.atomic): it is there whole or not at
all. Loading verifies every file against the manifest. Nothing is ever a pickle. Directories of diffusers are read
and written too (fastgen.diffusers_format).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen import diffusers_format, hub
from fastgen.atomic import OURS, aside, atomic_directory
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.errors import UsageError
from fastgen.model_files import (
    NO_PICKLES,
    PICKLES,
    load_weights,
    made,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from fastgen.models import FAMILIES, Family
from fastgen.version import __version__

FORMAT = 1
WEIGHTS = Path(__file__).parent / "weights"
STEP_PREFIX = "step-"
TRAINING_STATE = "training.safetensors"  # of a run's checkpoint: what it goes on from


def shipped_models() -> list[str]:
    """The names of the models in the package, sorted."""
    return sorted(p.parent.name for p in WEIGHTS.glob("*/config.json"))


def describe_models() -> list[dict[str, Any]]:
    """What `fastgen models` shows: name, summary, megabytes and the configuration of each shipped model."""
    described = []
    for name in shipped_models():
        config = read_json(WEIGHTS / name / "config.json")
        megabytes = (WEIGHTS / name / "model.safetensors").stat().st_size / 1e6
        network, sampling = config["config"], config.get("sampling")
        classes = f", {network['num_classes']} classes" if network.get("num_classes") else ""
        size = f"{network['image_size']}x{network['image_size']}x{network['in_channels']}"
        defaults = "measures the others (fastgen.metrics), draws nothing"
        if sampling:
            defaults = f"{sampling['steps']} {sampling['sampler']} steps, guidance {sampling['guidance']:g}"
        summary = f"{config['family']}/{config['preset']}: {size}{classes}, {megabytes:.1f} MB; {defaults}"
        described.append({"name": name, "summary": summary, "megabytes": round(megabytes, 2), **config})
    return described


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of a model's weights, whatever file they came from: names, dtypes, shapes and values, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(
    directory: Path,
    model: nn.Module,
    *,
    family: str,
    preset: str,
    weights: dict[str, Tensor] | None = None,
    extra_config: dict[str, Any] | None = None,
    extra_files: dict[str, dict[str, Tensor]] | None = None,
) -> None:
    """Writes a checkpoint into the existing, empty ``directory`` (use `atomic_directory`).

    ``weights`` replaces the model's own state_dict (an EMA, say); ``extra_files`` are further
    safetensors files, such as the state of a training run. The manifest is written last. Raises OSError.
    """
    config = {
        "format": FORMAT,
        "fastgen": __version__,
        "family": family,
        "preset": preset,
        "config": asdict(model.config),
        **{part: asdict(getattr(model, part)) for part in ("diffusion", "sampling") if FAMILIES[family].samples},
        **(extra_config or {}),
    }
    files = {"model.safetensors": weights if weights is not None else model.state_dict(), **(extra_files or {})}
    for name, tensors in files.items():
        write_tensors(directory / name, tensors)
    write_json(directory / "config.json", config)
    write_json(
        directory / "manifest.json", {name: sha256(directory / name) for name in sorted([*files, "config.json"])}
    )


def save(
    model: nn.Module,
    path: str | Path,
    *,
    preset: str = "custom",
    format: Literal["fastgen", "diffusers"] = "fastgen",
) -> None:
    """Saves a model of fastgen.models so that `load` reads it back: weights, configuration, manifest; atomically.

    ``format`` "diffusers" writes what diffusers' from_pretrained loads instead, with equal outputs: a pipeline with its
    scheduler for a U-Net (DDIMPipeline if that is how the model samples, else DDPMPipeline), a model's folder for an
    autoencoder. ``preset`` is a word of fastgen's own format. Raises UsageError for a module of another class, and for
    a setting that diffusers has not.
    """
    family = next((name for name, known in FAMILIES.items() if type(model) is known.network), None)
    if family is None:
        raise UsageError(f"model: {type(model).__name__} is no network of fastgen.models ({', '.join(FAMILIES)})")
    if format not in ("fastgen", "diffusers"):
        raise UsageError(f"format: must be 'fastgen' or 'diffusers', not {format!r}")
    files = diffusers_format.files_of(model) if format == "diffusers" else {}
    with atomic_directory(Path(path)) as directory:
        if format == "diffusers":
            diffusers_format.write(directory, files)
        else:
            write_checkpoint(directory, model, family=family, preset=preset)


def load(
    path_or_name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    ema: float | None = None,
) -> nn.Module:
    """A model in eval mode, from a shipped name, a checkpoint, a training run, a diffusers directory or the hub.

    Of diffusers: `UNet2DModel`, alone or in a pipeline with a scheduler, and `AutoencoderKL`, with safetensors weights.
    "owner/name" or "owner/name@revision", where that is no directory, comes from the Hugging Face hub.
    A generator has ``forward(x, t, class_labels=None)`` and carries ``config``, ``diffusion``
    (how it was trained) and ``sampling`` (its defaults); the classifier and the autoencoder, ``config`` alone.
    ``ema``: which of a training run's averages of the weights, by its decay; None is the first.
    Raises UsageError, a ValueError, that says what is wrong: unknown name (with
    the nearest ones), files missing, altered or foreign, a setting that fastgen's network has not.
    """
    directory = resolve(path_or_name)
    config = read_json(directory / "config.json")
    if "_class_name" in config:
        if ema is not None:
            raise UsageError("ema: averages are chosen from training runs, and this is a diffusers directory")
        model = diffusers_format.load(directory, config)
    else:
        model = _load_fastgen(directory, config, ema)
    model.source = directory.name if directory.parent == WEIGHTS else str(directory)
    if _on_hub(path_or_name):
        model.source = str(path_or_name)
    return model.to(device=device, dtype=dtype, memory_format=torch.channels_last).eval()


def resolve(path_or_name: str | Path) -> Path:
    """The directory that a name or path stands for; a training run means its newest checkpoint, a pipeline its U-Net.

    A directory that a killed process had moved aside to replace it is found there. What the hub has is downloaded.
    """
    name = str(path_or_name)
    if name in shipped_models():
        return WEIGHTS / name
    if _on_hub(path_or_name):
        return _from_hub(name)
    path = _standing(name)
    if path.is_dir():
        return _inside(path, name)
    if path.suffix in PICKLES and path.exists():
        raise UsageError(f"model: {name} is a pickle, {NO_PICKLES}")
    if path.exists():
        raise UsageError(f"model: {name} is a file; a checkpoint is a folder with config.json and model.safetensors")
    near = difflib.get_close_matches(name, shipped_models(), n=3, cutoff=0.4)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(shipped_models()) or 'none shipped'}"
    )
    raise UsageError(f"model: no model or folder named {name!r}; {hint} (`fastgen models` lists them)")


def _standing(name: str) -> Path:
    """The path of a name, or where it is while a writer that was killed had moved it aside."""
    path = Path(name).expanduser()
    moved = path.name and not path.exists() and (aside(path) / "manifest.json").is_file()
    return aside(path) if moved else path


def _inside(path: Path, name: str) -> Path:
    """The directory of config.json in the directory ``path``; UsageError, with the ``name`` of that, without one."""
    if steps := checkpoints_of(path):
        return steps[-1]
    for candidate in (diffusers_format.unet_of(path), path, path / "unet"):
        if (candidate / "config.json").is_file():
            return candidate
    if any(file.suffix in PICKLES for file in path.iterdir()):
        raise UsageError(f"model: {name} holds pickled weights only, {NO_PICKLES}")
    raise UsageError(f"model: {name} holds no checkpoint (no config.json and no {STEP_PREFIX}* folder in it)")


def _on_hub(path_or_name: str | Path) -> bool:
    """Whether a name is looked for on the hub: it has the form, and nothing of that name is here."""
    return isinstance(path_or_name, str) and hub.is_id(path_or_name) and not _standing(path_or_name).exists()


def _from_hub(name: str) -> Path:
    """The directory of config.json of a model on the hub. Its settings come first: gigabytes that could not be read
    are never downloaded."""
    folder = hub.fetch(name, ["*.json"])
    directory = _inside(folder, name)
    config = read_json(directory / "config.json")
    if "_class_name" in config:
        diffusers_format.check(directory, config)
    else:
        _family(directory, config)
    inside = "" if directory == folder else f"{directory.name}/"
    hub.fetch(name, ["*.json", f"{inside}*.safetensors"])
    return directory


def checkpoints_of(run: Path) -> list[Path]:
    """The whole checkpoints of a training run, oldest first; one that a killed process had moved aside, there."""
    found = {p.name: p for p in run.glob(f"{STEP_PREFIX}*")}
    for moved in run.glob(aside(run / f"{STEP_PREFIX}*").name):
        found.setdefault(OURS.fullmatch(moved.name)[2], moved)
    return [found[name] for name in sorted(found) if (found[name] / "manifest.json").is_file()]


def verify(directory: Path) -> None:
    """Compares every file with the manifest; raises UsageError that names the first that differs."""
    manifest = read_json(directory / "manifest.json")
    if unlisted := {"model.safetensors", "config.json"} - manifest.keys():
        raise UsageError(f"model: {directory / 'manifest.json'} does not list {', '.join(sorted(unlisted))}")
    for name, expected in manifest.items():
        file = directory / name
        if not file.is_file():
            raise UsageError(f"model: {file} is missing, though the manifest lists it; copy the whole folder again")
        if sha256(file) != expected:
            raise UsageError(f"model: {file} {_damage(file)}; copy the whole folder again")


def _damage(file: Path) -> str:
    """What is wrong with a file that differs from its manifest: cut off, another file, or changed in place."""
    changed = "differs from its SHA-256 in manifest.json: it was edited, or bits of it flipped"
    if file.suffix != ".safetensors":
        return changed
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = f.read(length) if size >= 8 and length < 100_000_000 else b""
    if 8 <= size < 8 + length and header.startswith(b"{"):
        return f"is truncated: {size} bytes, fewer than its own header has"
    try:
        entries = json.loads(header)
        expected = 8 + length + max(entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__")
    except (ValueError, TypeError, KeyError, AttributeError):
        if header.startswith(b'{"'):
            return changed
        return f"is {'truncated to nothing' if size < 8 else 'foreign: it is not a safetensors file'}"
    if size < expected:
        return f"is truncated: {size} of {expected} bytes are there"
    return changed if size == expected else f"is too long: {size} bytes instead of {expected}"


def _family(directory: Path, config: dict[str, Any]) -> Family:
    """The family of the checkpoint in ``directory``; UsageError where this is none, or none for this version."""
    if "settings" in config:
        raise UsageError(f"model: the training run in {directory} has no checkpoint yet")
    family = FAMILIES.get(str(config.get("family")))
    if family is None or not isinstance(config.get("config"), dict):
        raise UsageError(
            f"model: {directory / 'config.json'} is not a fastgen checkpoint (family {config.get('family')!r}; "
            f"known: {', '.join(FAMILIES)}), nor a diffusers one"
        )
    if not isinstance(config.get("format"), int) or config["format"] > FORMAT:
        raise UsageError(
            f"model: {directory} has format {config.get('format')!r}; this fastgen reads up to {FORMAT}: upgrade it"
        )
    return family


def _load_fastgen(directory: Path, config: dict[str, Any], ema: float | None) -> nn.Module:
    family = _family(directory, config)
    verify(directory)
    file = directory / "config.json"
    parts = [made(family.config, config["config"], file)]
    if family.samples:
        parts.append(made(DiffusionConfig, config.get("diffusion", {}), file))
        parts.append(made(SamplingDefaults, config.get("sampling", {}), file))
    model = family.network(*parts)
    weights = {k: v.float() for k, v in read_tensors(directory / "model.safetensors").items()}
    if ema is not None:
        weights |= _average(directory, config, ema)
    load_weights(model, weights, directory)
    return model


def _average(directory: Path, config: dict[str, Any], decay: float) -> dict[str, Tensor]:
    """The average of this decay, unless it is the first, which model.safetensors holds; UsageError if there is none."""
    decays = config.get("training", {}).get("ema_decay", [])
    if decay not in decays:
        there = f"there are {', '.join(map(str, decays))}" if decays else "this is no checkpoint of a training run"
        raise UsageError(f"ema: {directory} has no average of decay {decay}; {there}")
    prefix = f"ema.{decay}."
    state = read_tensors(directory / TRAINING_STATE) if decay != decays[0] else {}
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
