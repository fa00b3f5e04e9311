"""`fastgen.sample` and `fastgen.stream`: images from a model, the same ones at any batch size.

Everything random about an image (where it starts, the noise of each step, a label not given) is
drawn from its own seed alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import ops
from fastgen.arguments import (
    StartImage,
    check_batch_size,
    check_guidance,
    check_module,
    check_strength,
    labels_of,
    seeds_of,
    start_images,
)
from fastgen.backends import check_backend, check_device, default_device, use_backend
from fastgen.checkpoint import fingerprint, load
from fastgen.diffusion.samplers import Sampler, SamplingPlan, describe_sampler, get_sampler
from fastgen.errors import OUT_OF_MEMORY, UsageError
from fastgen.images import Samples, concatenate
from fastgen.ops.philox import Stream
from fastgen.ops.weights import unchanging
from fastgen.recipe import Recipe, encode_picture, environment

BATCH_SIZE = 64

Callback = Callable[[int, Tensor, Tensor], Any]


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

    Raises UsageError, a ValueError, that names the argument and the way out.
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


@dataclass(frozen=True)
class Job:
    """The checked arguments of `sample`: what to draw and how. seeds: int64 [n]; labels: int64 [n] or None;
    start: uint8 [1 or n, C, H, W] or None."""

    network: nn.Module
    plan: SamplingPlan
    seeds: Tensor
    labels: Tensor | None
    guidance: float
    interval: tuple[float, float]
    rescale: float
    start: Tensor | None
    callback: Callback | None
    batch_size: int
    backend: str | None
    progress: bool | None
    recipe: Recipe  # without seeds, labels and start images: see recipe_of

    def recipe_of(self, places: Sequence[int]) -> Recipe:
        """The recipe of the images at these places, computed together."""
        labels, start = self.labels, self.start
        if start is not None and start.shape[1] not in (1, 3):
            start = None  # such images are no pictures, and no PNG will ask for the recipe
        if start is not None and len(start) > 1:
            start = start[list(places)]
        return replace(
            self.recipe,
            seeds=[self.seeds[i].item() for i in places],
            labels=None if labels is None else [labels[i].item() for i in places],
            images=[] if start is None else [encode_picture(p) for p in Samples(start, self.seeds).to_pil()],
            batch=len(places),
        )


def prepare(
    model: str | Path | nn.Module, n: int | None = None, *, seed: int | Sequence[int] = 0, labels: Any = None,
    steps: int | None = None, sampler: str | Sampler | None = None, guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None, guidance_rescale: float | None = None,
    image: StartImage | None = None, strength: float | None = None, callback: Callback | None = None,
    batch_size: int | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    backend: str | None = None, progress: bool | None = None,
) -> Job:  # fmt: skip
    """Checks the arguments of `sample` and loads the model. Raises UsageError."""
    seeds = seeds_of(seed, n)
    check_batch_size(batch_size)
    check_backend(backend)
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
        backend, progress, recipe,
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
    with _bar(len(batches) * len(job.plan.timesteps), job.progress) as bar:
        done = 0
        for batch in batches:
            # Entered anew for each batch: a block around the yield would reach into the caller's code.
            with (
                torch.inference_mode(), _backend(job.backend), _evaluating(job.network), _memory(len(batch)),
                _unchanging(job.callback),
            ):  # fmt: skip
                x = _denoise(job, torch.tensor(batch), place, bar)
                images = ops.to_uint8(x).permute(0, 3, 1, 2).contiguous().cpu()
                recipe = replace(job.recipe_of(batch), environment=environment(place))
            done += len(batch)
            bar.set_postfix_str(f"{done}/{total} images")
            labels = None if recipe.labels is None else torch.tensor(recipe.labels)
            yield Samples(images.clone(), torch.tensor(recipe.seeds), labels, recipe)


def _backend(backend: str | None) -> Any:
    return use_backend(backend) if backend else nullcontext()


def _unchanging(callback: Callback | None) -> Any:
    """Weights are checked and prepared once, unless there is a callback, which may change them in any way."""
    return unchanging() if callback is None else nullcontext()


def _denoise(job: Job, index: Tensor, device: torch.device, bar: tqdm) -> Tensor:
    """x_0 [B, C, H, W] fp32 of the images at ``index``, each from its own noise, by the plan's rows."""
    network, plan, seeds = job.network, job.plan, job.seeds[index].to(device)
    labels = None if job.labels is None else job.labels[index].to(device)
    guide = None
    if job.guidance != 1:
        null = torch.full_like(labels, network.config.num_classes)
        guide = torch.tensor(job.guidance, device=device), torch.cat([null, labels])
    x, coefficients = _start(job, index, seeds), plan.coefficients.to(device)
    rows, timesteps = torch.arange(len(coefficients), device=device), plan.timesteps.to(device)
    keep = "x0" if plan.history or job.callback else None
    kept = None
    # tensors, so that nothing waits for the device
    for i, (row, t) in enumerate(zip(rows.unbind(), timesteps.unbind(), strict=True)):
        model_out, scale = _predict(job, x, t, labels, guide if _guided(job, i) else None)
        x_next, kept = ops.diffusion_step(
            x, model_out, coefficients, row, guidance=scale, clip=network.diffusion.clip,
            history=kept if plan.history else None, keep=keep, seeds=seeds if plan.noisy else None,
        )  # fmt: skip
        if job.callback:
            job.callback(i, x, kept)
        x = x_next
        bar.update()
    return x


def _start(job: Job, index: Tensor, seeds: Tensor) -> Tensor:
    """Where the images begin, fp32 [B, C, H, W]: noise, or the noised start image (the image itself for no rows)."""
    config = job.network.config
    x = ops.philox_normal(seeds, (config.in_channels, config.image_size, config.image_size), stream=Stream.INITIAL)
    if job.start is not None:
        picked = job.start if len(job.start) == 1 else job.start[index]
        image = picked.to(x.device).float() / 127.5 - 1
        abar = job.plan.abar[0].item() if len(job.plan.timesteps) else 1.0
        x = abar**0.5 * image + (1 - abar) ** 0.5 * x
    return x.contiguous(memory_format=torch.channels_last)


def _guided(job: Job, row: int) -> bool:
    """Whether guidance applies at a row: its timestep lies in the interval, a share of T - 1."""
    share = job.plan.timesteps[row].item() / max(1, job.network.diffusion.timesteps - 1)
    return job.interval[0] <= share <= job.interval[1]


def _predict(
    job: Job, x: Tensor, t: Tensor, labels: Tensor | None, guide: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """The network's output, and the guidance that `diffusion_step` still has to apply to it, or None.

    guide: the scale [] and the labels [2B] of a doubled batch, the null class first; None for a single one.
    """
    network = job.network
    dtype = next(network.parameters()).dtype
    if guide is None:
        return network(x.to(dtype), t, labels), None
    scale, doubled = guide
    both = network(torch.cat([x, x]).to(dtype), t, doubled)
    if not job.rescale:
        return both, scale
    uncond, cond = both.float().chunk(2)
    guided = uncond + scale * (cond - uncond)
    deviation = cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (job.rescale * deviation + (1 - job.rescale)), None


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
