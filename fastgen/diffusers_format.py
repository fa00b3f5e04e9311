"""Directories of diffusers, read and written: `UNet2DModel`, its pipelines with a scheduler, and `AutoencoderKL`.

    pipeline/model_index.json               the classes of the parts
    pipeline/unet/config.json               the network's settings, with its class; alone, in a directory of its own
    pipeline/unet/diffusion_pytorch_model.safetensors
    pipeline/scheduler/scheduler_config.json

Parameter names are the same on both sides. A setting that fastgen's network has not is refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.errors import UsageError
from fastgen.model_files import load_weights, made, read_json, read_tensors, write_json, write_tensors
from fastgen.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from fastgen.models.unet import UNet, UNetConfig

STEM = "diffusion_pytorch_model"
# One file of a variant, but none of its shards, or their index.
VARIANT = re.compile(rf"{STEM}\.[^.]+(?<!-of-\d{{5}})\.safetensors|{STEM}\.safetensors\.index\.[^.]+\.json")
OLD_KEY = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")  # before diffusers 0.15
NEW_KEY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OWN = "_fastgen"  # in a config.json: what diffusers has no setting for, and passes over
# What EMAModel writes into the configuration of the network that it averages.
AVERAGES = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}

# The settings of diffusers 0.42 with their defaults, which hold where a config.json leaves one out.
UNET: dict[str, Any] = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
    "num_train_timesteps": None,
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (64,), "layers_per_block": 1, "act_fn": "silu",
    "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": None,
    "latents_mean": None, "latents_std": None, "force_upcast": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}  # and whether they have attention
UP = {"UpBlock2D": False, "AttnUpBlock2D": True}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


# Reading


def unet_of(pipeline: Path) -> Path:
    """Where a pipeline has its U-Net, unless it is an old one that has all in one folder; a directory that is no
    pipeline, itself. Raises UsageError for a pipeline with other parts than a U-Net and a scheduler.
    """
    if not (pipeline / "model_index.json").is_file():
        return pipeline
    index = read_json(pipeline / "model_index.json")
    parts = {k for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and v[:1] not in ([], [None])}
    if more := sorted(parts - {"unet", "scheduler"}):
        folders = [str(pipeline / name) for name in more if (pipeline / name / "config.json").is_file()]
        _refuse(
            f"{pipeline} is a diffusers {index.get('_class_name')}, which has more parts than unet and scheduler: "
            f"{', '.join(more)}",
            f" (one that is a network of fastgen's is read from its own folder: {', '.join(folders)})"
            if folders
            else "",
        )
    return pipeline / "unet"


def check(directory: Path, config: dict[str, Any]) -> Callable[[], nn.Module]:
    """A function that makes the network of ``config``, directory/config.json. Raises UsageError for another class than
    fastgen reads, and for a setting that fastgen's has not."""
    file, kind = directory / "config.json", config["_class_name"]
    if kind == "UNet2DModel":
        network, sampling = _unet_config(config, file)
        diffusion = _diffusion_of(directory)
        return lambda: UNet(network, diffusion, sampling)
    if kind == "AutoencoderKL":
        autoencoder = _autoencoder_config(config, file)
        return lambda: AutoencoderKL(autoencoder)
    _refuse(f"{directory} holds a diffusers {kind}; fastgen reads UNet2DModel and AutoencoderKL")


def load(directory: Path, config: dict[str, Any]) -> nn.Module:
    """The network in a directory, with its config.json as ``config``. Raises UsageError."""
    make, weights = check(directory, config), {}
    for file in weight_files(directory):
        weights |= read_tensors(file)
    model = made(make, {}, directory / "config.json")
    load_weights(model, {OLD_KEY.sub(_new_key, name): tensor for name, tensor in weights.items()}, directory)
    return model


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a network: one, or several with an index; those of a variant ("fp16") where there are
    only such. Raises UsageError where there are none, and where several variants leave a choice."""
    names = {file.name for file in directory.iterdir()}
    for name in (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"):
        if name in names:
            return _shards(directory / name)
    variants = sorted(name for name in names if VARIANT.fullmatch(name))
    if len(variants) > 1:
        raise UsageError(f"model: {directory} holds several variants, {', '.join(variants)}; leave one of them there")
    if variants:
        return _shards(directory / variants[0])
    raise UsageError(
        f"model: {directory / STEM}.safetensors is missing (pickled .bin weights are not read: save with "
        "safe_serialization=True)"
    )


def _shards(file: Path) -> list[Path]:
    """The files that an index lists; a safetensors file itself."""
    if file.suffix != ".json":
        return [file]
    listed = read_json(file).get("weight_map")
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise UsageError(f"model: {file} does not list the safetensors files beside it")
    return [file.with_name(name) for name in names]


def _new_key(found: re.Match[str]) -> str:
    return f"{found[1]}.{NEW_KEY[found[2]]}.{found[3]}"


def _refuse(what: str, more: str = "") -> NoReturn:
    raise UsageError(f"model: {what}; use diffusers' own model with fastgen.accelerate(model){more}")


def _settings(config: dict[str, Any], defaults: dict[str, Any], file: Path) -> dict[str, Any]:
    """Every setting of ``defaults``, as config has it. Raises UsageError for others, unless they are off."""
    unknown = {k: v for k, v in config.items() if not k.startswith("_") and k not in {*defaults, *AVERAGES}}
    if foreign := [f"{k}={v!r}" for k, v in unknown.items() if v is not None and v is not False]:
        _refuse(f"{file} has settings that fastgen does not know: {', '.join(foreign)}")
    given = {k: config.get(k, default) for k, default in defaults.items()}
    return given | {"act_fn": str(given["act_fn"]).lower()}


def _only(given: dict[str, Any], allowed: dict[str, tuple[Any, ...]], file: Path) -> None:
    """Raises UsageError, with their names and values, where settings are none of the allowed values."""
    foreign = [f"{k}={given[k]!r}" for k, values in allowed.items() if given[k] not in values]
    if foreign:
        _refuse(f"{file} asks for what fastgen's network has not: {', '.join(foreign)}")


def _blocks(given: dict[str, Any], name: str, kinds: dict[str, bool], file: Path) -> list[bool]:
    """Whether each of the listed blocks has attention. Raises UsageError for other kinds."""
    listed = [str(kind).removeprefix("UNetRes") for kind in given[name]]
    if not set(listed) <= kinds.keys() or len(listed) != len(given["block_out_channels"]):
        _refuse(
            f"{file} asks for what fastgen's network has not: {name}={list(given[name])!r} "
            f"(one of {', '.join(kinds)} for each of block_out_channels={list(given['block_out_channels'])!r})"
        )
    return [kinds[kind] for kind in listed]


def _square(size: Any, file: Path) -> int | None:
    """sample_size as one number."""
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        return size[0]
    if size is not None and not isinstance(size, int):
        _refuse(f"{file} asks for what fastgen's network has not: sample_size={size!r}, which is not square")
    return size


def _unet_config(config: dict[str, Any], file: Path) -> tuple[UNetConfig, SamplingDefaults]:
    """diffusers' UNet2DModel configuration in our terms; UsageError for what has no equal here."""
    given, own = _settings(config, UNET, file), config.get(OWN) or {}
    try:
        channels = given["block_out_channels"]
        _only(given, {
            "act_fn": ("silu", "swish"), "time_embedding_type": ("positional",),
            "time_embedding_dim": (None, 4 * channels[0]), "mid_block_type": ("UNetMidBlock2D",),
            "mid_block_scale_factor": (1,), "downsample_type": ("conv", None), "upsample_type": ("conv", None),
            "downsample_padding": (0, 1), "class_embed_type": (None,),
            "resnet_time_scale_shift": ("default", "scale_shift"),
        }, file)  # fmt: skip
        attention = _blocks(given, "down_block_types", DOWN, file)
        up = _blocks(given, "up_block_types", UP, file)[::-1]
        shift, groups = given["resnet_time_scale_shift"] == "scale_shift", given["attn_norm_num_groups"]
        classes, multiple = given["num_class_embeds"], 2 ** (len(channels) - 1)
        null = bool(own.get("null_class")) and classes is not None
        values = {
            "image_size": _square(given["sample_size"], file) or -(-32 // multiple) * multiple,
            "in_channels": given["in_channels"], "out_channels": given["out_channels"], "channels": channels,
            "layers_per_block": given["layers_per_block"], "attention": attention, "up_attention": up,
            "mid_attention": given["add_attention"], "head_dim": given["attention_head_dim"],
            "mid_attention_groups": 0 if groups is None and shift else groups,
            "num_groups": given["norm_num_groups"], "norm_eps": given["norm_eps"], "dropout": given["dropout"],
            "num_classes": classes - 1 if null else classes, "null_class": null or classes is None,
            "time_scale_shift": shift, "downsample_padding": given["downsample_padding"],
            "flip_sin_to_cos": given["flip_sin_to_cos"], "freq_shift": given["freq_shift"],
            "center_input": given["center_input_sample"],
        }  # fmt: skip
        return made(UNetConfig, values, file), made(SamplingDefaults, own.get("sampling", {}), file)
    except (TypeError, IndexError, AttributeError) as error:  # of another kind than the setting is
        raise UsageError(f"model: {file}: {error}") from None


def _autoencoder_config(config: dict[str, Any], file: Path) -> AutoencoderKLConfig:
    """diffusers' AutoencoderKL configuration in our terms. force_upcast, a word to its pipelines, is left out."""
    given = _settings(config, AUTOENCODER, file)
    try:
        _only(given, {"act_fn": ("silu", "swish")}, file)
        _blocks(given, "down_block_types", {"DownEncoderBlock2D": False}, file)
        _blocks(given, "up_block_types", {"UpDecoderBlock2D": False}, file)
        same = (
            "in_channels", "out_channels", "layers_per_block", "latent_channels", "scaling_factor", "shift_factor",
            "latents_mean", "latents_std",
        )  # fmt: skip
        values = {name: given[name] for name in same} | {
            "image_size": _square(given["sample_size"], file) or 32, "channels": given["block_out_channels"],
            "num_groups": given["norm_num_groups"], "mid_attention": given["mid_block_add_attention"],
            "quant_conv": given["use_quant_conv"], "post_quant_conv": given["use_post_quant_conv"],
        }  # fmt: skip
        return made(AutoencoderKLConfig, values, file)
    except (TypeError, AttributeError) as error:
        raise UsageError(f"model: {file}: {error}") from None


def _diffusion_of(directory: Path) -> DiffusionConfig:
    """What the scheduler's configuration says, in the U-Net's directory or that of the pipeline around it."""
    places = directory / "scheduler_config.json", directory.parent / "scheduler" / "scheduler_config.json"
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return DiffusionConfig()
    config = read_json(file)
    kind = str(config.get("_class_name", "DDPMScheduler"))
    defaults = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    clips = kind.startswith(("DDPM", "DDIM"))  # the others, which know no clipping, leave defaults of their own out
    if missing := sorted(defaults.keys() - config.keys()):
        if not clips:
            _refuse(f"{file} is of a {kind}, which fastgen does not know (it has no {', '.join(missing)})")
        config = {**defaults, **config}
    given = {
        "prediction_type": "epsilon", "trained_betas": None, "thresholding": False, "clip_sample": clips,
        "rescale_betas_zero_snr": False, "clip_sample_range": 1.0, **config,
    }  # fmt: skip
    _only(given, {
        "beta_schedule": tuple(SCHEDULES), "prediction_type": tuple(PREDICTIONS), "trained_betas": (None,),
        "thresholding": (False, None),
    }, file)  # fmt: skip
    values = {
        "schedule": SCHEDULES[given["beta_schedule"]], "timesteps": given["num_train_timesteps"],
        "beta_start": given["beta_start"], "beta_end": given["beta_end"],
        "prediction": PREDICTIONS[given["prediction_type"]], "zero_terminal_snr": given["rescale_betas_zero_snr"],
        "clip": given["clip_sample_range"] if given["clip_sample"] else None,
    }  # fmt: skip
    return made(DiffusionConfig, values, file)


# Writing


def files_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The files of a network of fastgen.models as diffusers has them, by their names: JSON, or tensors by name.

    Raises UsageError, with the settings, for what diffusers cannot say.
    """
    if isinstance(model, AutoencoderKL):
        return {"config.json": _autoencoder_settings(model.config), f"{STEM}.safetensors": model.state_dict()}
    if not isinstance(model, UNet):
        raise UsageError(f"format: diffusers has no {type(model).__name__}; save it as format='fastgen'")
    kind = "DDIM" if model.sampling.sampler == "ddim" else "DDPM"
    index = {"scheduler": ["diffusers", f"{kind}Scheduler"], "unet": ["diffusers", "UNet2DModel"]}
    return {
        "model_index.json": {"_class_name": f"{kind}Pipeline", **index},
        "unet/config.json": _unet_settings(model),
        f"unet/{STEM}.safetensors": model.state_dict(),
        "scheduler/scheduler_config.json": _scheduler_settings(model.diffusion, f"{kind}Scheduler"),
    }


def write(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    """Writes `files_of` a network into the existing, empty ``directory``. Raises OSError."""
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        if file.suffix == ".safetensors":
            tensors: dict[str, Tensor] = content
            write_tensors(file, tensors, {"format": "pt"})
        else:
            write_json(file, content)


def _unet_settings(model: UNet) -> dict[str, Any]:
    config, groups, shift = model.config, model.config.mid_attention_groups, model.config.time_scale_shift
    foreign = [f"patch_size={config.patch_size}"] if config.patch_size != 1 else []
    if groups == 0 and not shift:
        foreign.append("mid_attention_groups=0 without time_scale_shift")
    if foreign:
        raise UsageError(
            f"format: diffusers' UNet2DModel has nothing like {', '.join(foreign)}; save it as format='fastgen'"
        )
    if groups is None and shift:  # where diffusers, untold, has no norm
        groups = config.num_groups
    return {
        "_class_name": "UNet2DModel",
        OWN: {"null_class": config.num_classes is not None and config.null_class, "sampling": asdict(model.sampling)},
        **UNET,
        "sample_size": config.image_size, "in_channels": config.in_channels, "out_channels": config.out_channels,
        "center_input_sample": config.center_input, "freq_shift": config.freq_shift,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in config.upwards[::-1]],
        "block_out_channels": config.channels, "layers_per_block": config.layers_per_block,
        "downsample_padding": config.downsample_padding, "dropout": config.dropout,
        "attention_head_dim": config.head_dim, "norm_num_groups": config.num_groups,
        "attn_norm_num_groups": groups or None, "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.time_scale_shift else "default",
        "add_attention": config.mid_attention, "num_class_embeds": config.class_embeddings,
    }  # fmt: skip


def _autoencoder_settings(config: AutoencoderKLConfig) -> dict[str, Any]:
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL", **AUTOENCODER,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": config.channels, "norm_num_groups": config.num_groups, "sample_size": config.image_size,
        "use_quant_conv": config.quant_conv, "use_post_quant_conv": config.post_quant_conv,
        "mid_block_add_attention": config.mid_attention,
        **{name: value for name, value in asdict(config).items() if name in AUTOENCODER},
    }  # fmt: skip


def _scheduler_settings(diffusion: DiffusionConfig, kind: str) -> dict[str, Any]:
    """The scheduler that samples as our sampler of that name does: from the last step, with the same noise."""
    back = {ours: theirs for theirs, ours in (*SCHEDULES.items(), *PREDICTIONS.items())}
    own = {"set_alpha_to_one": True} if kind == "DDIMScheduler" else {"variance_type": "fixed_small"}
    return {
        "_class_name": kind, "num_train_timesteps": diffusion.timesteps, "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end, "beta_schedule": back[diffusion.schedule], "trained_betas": None,
        "prediction_type": back[diffusion.prediction], "clip_sample": diffusion.clip is not None,
        "clip_sample_range": 1.0 if diffusion.clip is None else diffusion.clip,
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr, "thresholding": False, "timestep_spacing": "trailing",
        "steps_offset": 0, **own,
    }  # fmt: skip
