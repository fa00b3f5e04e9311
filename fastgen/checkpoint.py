"""Checkpoints: a directory of `model.safetensors`, `config.json` and a SHA-256 `manifest.json`.

A directory is written beside its final place, synced, and renamed (fastgen.atomic): it is there whole or not at
all. Loading verifies every file against the manifest. Nothing is ever a pickle. Directories
written by diffusers (`UNet2DModel`, `DDPMPipeline`) load too.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen.atomic import OURS, aside, atomic_directory, umask
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.errors import UsageError
from fastgen.models import FAMILIES
from fastgen.version import __version__

FORMAT = 1
WEIGHTS = Path(__file__).parent / "weights"
STEP_PREFIX = "step-"
TRAINING_STATE = "training.safetensors"  # of a run's checkpoint: what it goes on from
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
NO_PICKLES = "which is never read, since a pickle can run code; save it again as safetensors"


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
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, directory / name)
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number) if code else str(error), str(directory / name)) from None
        (directory / name).chmod(0o666 & ~umask())
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    manifest = {name: sha256(directory / name) for name in sorted([*files, "config.json"])}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def save(model: nn.Module, path: str | Path, *, preset: str = "custom") -> None:
    """Saves a model of fastgen.models so that `load` reads it back: weights, configuration, manifest; atomically.
    Raises UsageError for a module of another class.
    """
    family = next((name for name, known in FAMILIES.items() if type(model) is known.network), None)
    if family is None:
        raise UsageError(f"model: {type(model).__name__} is no network of fastgen.models ({', '.join(FAMILIES)})")
    with atomic_directory(Path(path)) as directory:
        write_checkpoint(directory, model, family=family, preset=preset)


def load(
    path_or_name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    ema: float | None = None,
) -> nn.Module:
    """A model in eval mode, from a shipped name, a checkpoint, a training run or a diffusers directory.

    A generator has ``forward(x, t, class_labels=None)`` and carries ``config``, ``diffusion``
    (how it was trained) and ``sampling`` (its defaults); the classifier, ``config`` alone.
    ``ema``: which of a training run's averages of the weights, by its decay; None is the first.
    Raises UsageError, a ValueError, that says what is wrong: unknown name (with
    the nearest ones), files missing, altered or foreign.
    """
    directory = resolve(path_or_name)
    config = read_json(directory / "config.json")
    if "_class_name" in config:
        if ema is not None:
            raise UsageError("ema: averages are chosen from training runs, and this is a diffusers directory")
        model = _load_diffusers(directory, config)
    else:
        model = _load_fastgen(directory, config, ema)
    model.source = directory.name if directory.parent == WEIGHTS else str(directory)
    return model.to(device=device, dtype=dtype, memory_format=torch.channels_last).eval()


def resolve(path_or_name: str | Path) -> Path:
    """The directory that a name or path stands for; a training run means its newest checkpoint.

    A directory that a killed process had moved aside to replace it is found there.
    """
    name = str(path_or_name)
    if name in shipped_models():
        return WEIGHTS / name
    path = Path(name).expanduser()
    if path.name and not path.exists() and (aside(path) / "manifest.json").is_file():
        path = aside(path)
    if path.is_dir():
        if steps := checkpoints_of(path):
            return steps[-1]
        for candidate in (path, path / "unet"):
            if (candidate / "config.json").is_file():
                return candidate
        if any(file.suffix in PICKLES for file in path.iterdir()):
            raise UsageError(f"model: {name} holds pickled weights only, {NO_PICKLES}")
        raise UsageError(f"model: {name} holds no checkpoint (no config.json and no {STEP_PREFIX}* folder in it)")
    if path.suffix in PICKLES and path.exists():
        raise UsageError(f"model: {name} is a pickle, {NO_PICKLES}")
    if path.exists():
        raise UsageError(f"model: {name} is a file; a checkpoint is a folder with config.json and model.safetensors")
    near = difflib.get_close_matches(name, shipped_models(), n=3, cutoff=0.4)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(shipped_models()) or 'none shipped'}"
    )
    raise UsageError(f"model: no model or folder named {name!r}; {hint} (`fastgen models` lists them)")


def checkpoints_of(run: Path) -> list[Path]:
    """The whole checkpoints of a training run, oldest first; one that a killed process had moved aside, there."""
    found = {p.name: p for p in run.glob(f"{STEP_PREFIX}*")}
    for moved in run.glob(aside(run / f"{STEP_PREFIX}*").name):
        found.setdefault(OURS.fullmatch(moved.name)[2], moved)
    return [found[name] for name in sorted(found) if (found[name] / "manifest.json").is_file()]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"model: {path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"model: {path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"model: {path} does not hold a JSON object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UsageError(f"model: {path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"model: {path} is not a whole safetensors file ({error})") from None


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


def _load_fastgen(directory: Path, config: dict[str, Any], ema: float | None) -> nn.Module:
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
    verify(directory)
    file = directory / "config.json"
    parts = [_dataclass(family.config, config["config"], file)]
    if family.samples:
        parts.append(_dataclass(DiffusionConfig, config.get("diffusion", {}), file))
        parts.append(_dataclass(SamplingDefaults, config.get("sampling", {}), file))
    model = family.network(*parts)
    weights = {k: v.float() for k, v in read_tensors(directory / "model.safetensors").items()}
    if ema is not None:
        weights |= _average(directory, config, ema)
    _load_weights(model, weights, directory)
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


def _dataclass(cls: type, values: dict[str, Any], file: Path) -> Any:
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model: {file}: {error}") from None


def _load_weights(model: nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise UsageError(f"model: the weights in {directory} do not fit their configuration: {detail}") from None


DIFFUSERS_LEGACY_KEYS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _load_diffusers(directory: Path, config: dict[str, Any]) -> nn.Module:
    """`UNet2DModel` from a diffusers directory, with the scheduler's configuration where it is beside it."""
    if config["_class_name"] != "UNet2DModel":
        raise UsageError(f"model: {directory} holds a diffusers {config['_class_name']}; only UNet2DModel is read")
    file = directory / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        raise UsageError(
            f"model: {file} is missing (pickled .bin weights are not read: save with safe_serialization=True)"
        )
    weights = read_tensors(file)
    for old, new in DIFFUSERS_LEGACY_KEYS.items():
        weights = {k.replace(old, new): v for k, v in weights.items()}
    scheduler = next(
        (
            f
            for f in (directory / "scheduler_config.json", directory.parent / "scheduler" / "scheduler_config.json")
            if f.is_file()
        ),
        None,
    )
    family = FAMILIES["unet"]
    try:
        network = _unet_from_diffusers(config)
    except KeyError as error:
        raise UsageError(f"model: {directory / 'config.json'} has no {error} in it") from None
    model = family.network(
        _dataclass(family.config, network, directory / "config.json"),
        _diffusion_from_diffusers(scheduler) if scheduler else DiffusionConfig(),
    )
    _load_weights(model, weights, directory)
    return model


def _unet_from_diffusers(config: dict[str, Any]) -> dict[str, Any]:
    """diffusers' UNet2DModel configuration in our terms; UsageError for what has no equal here."""
    down, up = config["down_block_types"], config["up_block_types"]
    kinds = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}
    attention = [kinds.get(k) for k in down]
    only = {
        "act_fn": "silu", "time_embedding_type": "positional", "mid_block_scale_factor": 1,
        "center_input_sample": False,
        "downsample_type": "conv", "upsample_type": "conv", "class_embed_type": None, "attn_norm_num_groups": None,
        "num_class_embeds": None,
    }  # fmt: skip
    foreign = [f"{k}={config[k]!r}" for k, v in only.items() if config.get(k, v) != v]
    if None in attention or attention != [kinds.get(k) for k in reversed(up)]:
        foreign.append(f"down_block_types={down!r} with up_block_types={up!r}")
    if foreign:
        raise UsageError(f"model: this UNet2DModel uses what fastgen's U-Net has not: {'; '.join(foreign)}")
    return {
        "image_size": config.get("sample_size") or 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "channels": tuple(config["block_out_channels"]),
        "layers_per_block": config["layers_per_block"],
        "attention": tuple(attention),
        "mid_attention": config.get("add_attention", True),
        "head_dim": config.get("attention_head_dim", 8),
        "num_groups": config.get("norm_num_groups", 32),
        "norm_eps": config.get("norm_eps", 1e-5),
        "dropout": config.get("dropout", 0.0),
        "time_scale_shift": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "downsample_padding": config.get("downsample_padding", 1),
        "flip_sin_to_cos": config.get("flip_sin_to_cos", True),
        "freq_shift": config.get("freq_shift", 0),
    }


def _diffusion_from_diffusers(file: Path) -> DiffusionConfig:
    config = read_json(file)
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    predictions = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if schedule not in names or prediction not in predictions:
        raise UsageError(
            f"model: scheduler with beta_schedule={schedule!r}, prediction_type={prediction!r} is not known here"
        )
    values = {
        "schedule": names[schedule],
        "timesteps": config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
        "prediction": predictions[prediction],
        "clip": config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None,
        "zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
    }
    return _dataclass(DiffusionConfig, values, file)
