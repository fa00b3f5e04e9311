"""`fastgen.sample` and `fastgen.stream`: images from a model, the same ones at any batch size.

Everything random about an image (where it starts, the noise of each step, a label not given) is
drawn from its own seed alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import finite, ops
from fastgen.arguments import (
    StartImage,
    check_batch_size,
    check_flag,
    check_graph,
    check_guidance,
    check_module,
    check_strength,
    labels_of,
    seeds_of,
    start_images,
)
from fastgen.backends import check_backend, check_device, default_device, use_backend
from fastgen.checkpoint import fingerprint, load
from fastgen.denoising import Callback, Job, denoise, not_finite, recorded
from fastgen.diffusion.samplers import Sampler, SamplingPlan, describe_sampler, get_sampler
from fastgen.errors import OUT_OF_MEMORY, UsageError
from fastgen.images import Samples, concatenate
from fastgen.ops.weights import unchanging
from fastgen.recipe import Recipe, environment

BATCH_SIZE = 64


def sample(
    model: str | Path | nn.Module,
    n: int | None = None,
    *,
    seed: int | Sequence[int] = 0,
    labels: int | Sequence[int] | Tensor | None = None,
    steps: int | None = None,
    sampler: str | Sampler | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float | None = None,
    image: StartImage | None = None,
    strength: float | None = None,
    callback: Callback | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    progress: bool | None = None,
    graph: Literal["step", "loop", False] | None = None,
    compile: bool = False,
    check_finite: bool = True,
) -> Samples:
    """n images from a model: `Samples` with uint8 images [n, C, H, W], seeds [n] and labels [n] or None.

    model: a shipped name, a checkpoint folder, or a module from `load`. n: 1, or as many as seeds.
    seed: a number, image i then has the seed ``seed + i``, or one for each image; an image is the same at any
    batch size and in any order. labels: one class, or one for each image, in 0 … num_classes-1; None draws
    each from its image's seed. steps, sampler (a name in `diffusion.samplers.SAMPLERS` or an
    object from there) and guidance (1 is none) default to what the model was shipped with.

    guidance_interval: where guidance applies, as shares of the training steps: 0 is the clean image, 1 pure
    noise (Kynkäänniemi et al. 2024); outside it half the work is saved. guidance_rescale: phi in 0 … 1, how far
    the guided output is brought back to the deviation of the unguided (Lin et al. 2024, eq. 14 to 16).
    image: a picture, a file of one, or uint8 [C, H, W] or [n, C, H, W], to start from instead of noise;
    strength: in 0 … 1, the share of the steps that is then taken (0 gives the image back; 0.8 if not given).
    callback: called as callback(row, x_t, x0_hat) after each call of the network, with the state it saw and
    the image it predicted, fp32 [B, C, H, W] in [-1, 1], for each batch of B images in turn; it must not change them.

    device: "cuda" where there is one, else "cpu", for a model given by name; a module stays where it is.
    dtype: of the network; the image itself is kept in fp32. backend: of every op, see `use_backend`.
    progress: a bar; None shows one on a terminal only.

    graph: how a GPU is given its work; no image depends on it. "step" records the launches of a step once for each
    size of batch, as a CUDA graph that every further step replays; "loop" records all steps in one graph, which every
    batch replays, and pays where there are many batches. False launches every kernel by itself. None is "step" on a
    GPU, unless there is a callback or a module with hooks. What cannot be recorded runs as with False, with a warning.
    compile: whether torch.compile makes kernels of what lies between fastgen's in the network. The first batch of each
    size then takes a minute or so, once a process; last bits of an image may change.
    check_finite: looks once, when a batch is done, whether it is finite.

    Raises UsageError, a ValueError, that names the argument and the way out; FloatingPointError, with the module, the
    row and the timestep that it began at, where an image is not finite.
    """
    arguments = locals()
    with _unchanging(callback):
        return concatenate(list(stream(**arguments)))


def stream(model: str | Path | nn.Module, n: int | None = None, **arguments: Any) -> Iterator[Samples]:
    """The images of `sample`, batch by batch as they are made, so that memory does not grow with n.

    Takes the arguments of `sample`, checks them at once, and yields `Samples` of up to batch_size images.
    """
    job = prepare(model, n, **arguments)
    size = job.batch_size
    return run(job, [range(i, min(i + size, len(job.seeds))) for i in range(0, len(job.seeds), size)])


def prepare(
    model: str | Path | nn.Module, n: int | None = None, *, seed: int | Sequence[int] = 0, labels: Any = None,
    steps: int | None = None, sampler: str | Sampler | None = None, guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None, guidance_rescale: float | None = None,
    image: StartImage | None = None, strength: float | None = None, callback: Callback | None = None,
    batch_size: int | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    backend: str | None = None, progress: bool | None = None, graph: Any = None, compile: bool = False,
    check_finite: bool = True,
) -> Job:  # fmt: skip
    """Checks the arguments of `sample` and loads the model. Raises UsageError."""
    seeds = seeds_of(seed, n)
    check_batch_size(batch_size)
    check_backend(backend)
    check_graph(graph)
    check_flag("compile", compile)
    check_flag("check_finite", check_finite)
    if callback is not None and not callable(callback):
        raise UsageError(f"callback: must be a function of (row, x_t, x0_hat), not {callback!r}")
    strength = check_strength(strength, image)
    network = _network(model, device, dtype)
    defaults, T = network.sampling, network.diffusion.timesteps
    chosen = get_sampler(defaults.sampler if sampler is None else sampler)
    steps = min(defaults.steps, T) if steps is None else steps
    plan = chosen.plan(network.diffusion, steps)
    scale, interval, rescale = check_guidance(network, guidance, guidance_interval, guidance_rescale)
    start = start_images(network, image, len(seeds))
    if start is not None:
        if plan.abar is None:
            raise UsageError("image: this sampler's plan has no abar, which a start image needs; leave the image out")
        plan = plan.tail(round(strength * steps))
    described = describe_sampler(chosen)
    parameter = next(network.parameters())
    size = batch_size or BATCH_SIZE
    recipe = Recipe(
        model=getattr(network, "source", ""), sha256=fingerprint(network), seeds=[], labels=None,
        sampler=described and described["sampler"], options=described["options"] if described else {}, steps=steps,
        guidance=scale, guidance_interval=interval, guidance_rescale=rescale, strength=strength, images=[],
        dtype=str(parameter.dtype).removeprefix("torch."), backend=backend, batch=size,
        settings_sha256=_settings(network, None if described else plan),
    )  # fmt: skip
    return Job(
        network, plan, seeds, labels_of(network, labels, seeds), scale, interval, rescale, start, callback, size,
        backend, progress, graph, compile, check_finite, recipe,
    )  # fmt: skip


def _settings(network: nn.Module, plan: SamplingPlan | None) -> str:
    """The SHA-256 of what else decides an image: how the network is configured, and the table of an unnamed sampler."""
    parts = [asdict(p) if is_dataclass(p) else vars(p) for p in (network.config, network.diffusion)]
    digest = hashlib.sha256(json.dumps(parts, default=str).encode())
    if plan is not None:
        digest.update(json.dumps([plan.timesteps.tolist(), plan.coefficients.tolist()]).encode())
    return digest.hexdigest()


def run(job: Job, batches: Sequence[Sequence[int]]) -> Iterator[Samples]:
    """Draws the images whose places in the job each batch lists, one batch after the other."""
    place = next(job.network.parameters()).device
    total = sum(map(len, batches))
    with _bar(len(batches) * len(job.plan.timesteps), job.progress) as bar, recorded(job, place) as recording:
        done = 0
        for batch in batches:
            # Entered anew for each batch: a block around the yield would reach into the caller's code.
            with (
                torch.inference_mode(), _backend(job.backend), _evaluating(job.network), _memory(len(batch)),
                _unchanging(job.callback),
            ):  # fmt: skip
                index = torch.tensor(batch)
                x = denoise(job, index, bar, recording)
                if job.check_finite and not finite.finite(x):
                    raise not_finite(job, index, x)
                images = ops.to_uint8(x).permute(0, 3, 1, 2).contiguous().cpu()
                recipe = replace(job.recipe_of(batch), environment=_environment(job, place))
            done += len(batch)
            held = f", graphs {recording.bytes >> 20} MB" if recording and recording.bytes else ""
            bar.set_postfix_str(f"{done}/{total} images{held}")
            labels = None if recipe.labels is None else torch.tensor(recipe.labels)
            yield Samples(images.clone(), torch.tensor(recipe.seeds), labels, recipe)


def _environment(job: Job, device: torch.device) -> dict[str, Any]:
    return environment(device) | ({"compiled": True} if job.compile else {})


def _backend(backend: str | None) -> Any:
    return use_backend(backend) if backend else nullcontext()


def _unchanging(callback: Callback | None) -> Any:
    """Weights are checked and prepared once, unless there is a callback, which may change them in any way."""
    return unchanging() if callback is None else nullcontext()


def _network(model: str | Path | nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype: must be a floating torch.dtype such as torch.bfloat16, not {dtype!r}")
    if not isinstance(model, nn.Module):
        model = load(model, device=device or default_device(), dtype=dtype)
    check_module(model)
    return _placed(model, device, dtype)


def _placed(model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """The module itself if it is where and what was asked for, else a copy: the caller's stays as it is."""
    now = next(model.parameters())
    there = torch.device(device) if device is not None else now.device
    if there.type == now.device.type and there.index in (None, now.device.index) and dtype in (None, now.dtype):
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


@contextmanager
def _memory(images: int) -> Iterator[None]:
    """Turns the many ways in which memory runs out into one message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = any(words in str(error) for words in OUT_OF_MEMORY)
        if not said and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        advice = (
            f"batch_size: give a smaller one, such as {images // 2}" if images > 1 else "model: it needs more memory"
        )
        raise UsageError(f"{advice}; memory ran out with {images} at once") from None


def _bar(total: int, progress: bool | None) -> tqdm:
    terminal = sys.stderr.isatty()
    quiet = not terminal if progress is None else not progress
    return tqdm(total=total, unit="step", desc="sampling", disable=quiet, mininterval=0.1 if terminal else 5.0)
