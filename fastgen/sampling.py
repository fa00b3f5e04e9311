"""`fastgen.sample` and `fastgen.stream`: images from a model, the same ones at any batch size.

Everything random about an image (where it starts, the noise of each step, a label not given) is
drawn from its own seed alone.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import finite, graphs, ops
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
    graph: Literal["step", "loop", False] | None
    compile: bool
    check_finite: bool
    recipe: Recipe  # without seeds, labels and start images: see recipe_of

    @functools.cached_property
    def guided(self) -> list[bool]:
        """Whether guidance applies, for each row: where its timestep lies in the interval, a share of T - 1."""
        shares = (t / max(1, self.network.diffusion.timesteps - 1) for t in self.plan.timesteps.tolist())
        return [self.guidance != 1 and self.interval[0] <= share <= self.interval[1] for share in shares]

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
    with _bar(len(batches) * len(job.plan.timesteps), job.progress) as bar, _recording(job, place) as recording:
        done = 0
        for batch in batches:
            # Entered anew for each batch: a block around the yield would reach into the caller's code.
            with (
                torch.inference_mode(), _backend(job.backend), _evaluating(job.network), _memory(len(batch)),
                _unchanging(job.callback),
            ):  # fmt: skip
                index = torch.tensor(batch)
                x = _denoise(job, index, bar, recording)
                if job.check_finite and not finite.finite(x):
                    raise _not_finite(job, index, x)
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


@dataclass
class _Batch:
    """What the rows of a batch read. A graph goes on reading these very tensors, which a later batch fills anew.

    x: fp32 [B, C, H, W]; kept: the x0 of the row before, like x, 0 at first, or None; row: int64 [1], the one that is
    next; seeds: int64 [B]; labels: int64 [B] or None; under guidance doubled: int64 [2B], the null class first, and
    scale: fp32 []; coefficients: fp32 [S, 9]; timesteps: [S]."""

    x: Tensor
    kept: Tensor | None
    row: Tensor
    seeds: Tensor
    labels: Tensor | None
    doubled: Tensor | None
    scale: Tensor | None
    coefficients: Tensor
    timesteps: Tensor

    @classmethod
    def of(cls, job: Job, index: Tensor) -> _Batch:
        """The images at ``index``, before the first row."""
        plan, device = job.plan, next(job.network.parameters()).device
        seeds = job.seeds[index].to(device)
        labels = None if job.labels is None else job.labels[index].to(device)
        doubled = scale = None
        if job.guidance != 1:
            doubled = torch.cat([torch.full_like(labels, job.network.config.num_classes), labels])
            scale = torch.tensor(job.guidance, device=device)
        x, row = _start(job, index, seeds), torch.zeros(1, dtype=torch.int64, device=device)
        kept = torch.zeros_like(x) if plan.history else None
        table, timesteps = plan.coefficients.to(device), plan.timesteps.to(device)
        return cls(x, kept, row, seeds, labels, doubled, scale, table, timesteps)

    def clone(self) -> _Batch:
        return _Batch(*(t if t is None else t.clone() for t in self._tensors()))

    def take(self, other: _Batch) -> None:
        """Copies every tensor of ``other``, in place."""
        for own, new in zip(self._tensors(), other._tensors(), strict=True):
            if own is not None:
                own.copy_(new)

    def _tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


def _denoise(job: Job, index: Tensor, bar: tqdm, recording: _Recording | None) -> Tensor:
    """x_0 [B, C, H, W] fp32 of the images at ``index``, each from its own noise, by the plan's rows."""
    batch, shown = _Batch.of(job, index), bar.n
    if recording is not None and not recording.off and len(batch.timesteps):
        try:
            return recording.denoise(batch, bar)
        except graphs.CaptureError as error:
            bar.update(shown - bar.n)
            recording.give_up(str(error))
    return _all_rows(job, batch, bar)


def _all_rows(job: Job, batch: _Batch, bar: tqdm | None = None) -> Tensor:
    """x after the last row. Nothing waits for the device, and the tensors of ``batch`` stay as they are."""
    x, kept = batch.x, batch.kept
    rows = torch.arange(len(batch.timesteps), device=x.device)
    for i, (row, t) in enumerate(zip(rows.unbind(), batch.timesteps.unbind(), strict=True)):
        x_next, kept = _one_row(job, batch, x, kept, row, t, job.guided[i])
        if job.callback:
            job.callback(i, x, kept)
        x = x_next
        if bar is not None:
            bar.update()
    return x


def _one_row(
    job: Job, batch: _Batch, x: Tensor, kept: Tensor | None, row: Tensor, t: Tensor, guided: bool
) -> tuple[Tensor, Tensor | None]:
    """x and kept after the row; row: int64, one number; t: [], its timestep."""
    model_out, scale = _predict(job, batch, x, t, guided)
    history = batch.kept is not None
    return ops.diffusion_step(
        x, model_out, batch.coefficients, row, guidance=scale, clip=job.network.diffusion.clip,
        history=kept if history else None, keep="x0" if history or job.callback else None,
        seeds=batch.seeds if job.plan.noisy else None,
    )  # fmt: skip


class _Recording:
    """The loop of a job over CUDA graphs: the same rows, on tensors that stay where they are. A last, smaller batch has
    graphs of its own: filled up to the others' size, its images might sum in another order than without graphs."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.graphs = graphs.Graphs(device)
        self.batches: dict[int, _Batch] = {}  # by size: the tensors that its graphs read and write
        self.footing: tuple = ()
        self.off = False

    def denoise(self, batch: _Batch, bar: tqdm) -> Tensor:
        """x after the last row, valid until the next call; ``batch`` stays as it is. Raises CaptureError."""
        job, size = self.job, len(batch.x)
        reason = _why_no_graph(job, self.device)
        if reason is not None:
            raise graphs.CaptureError(reason)
        footing = graphs.footing(job.network, self.device), environment(self.device)["kernels"]
        if footing != self.footing:  # the caller of a stream may do anything between two batches
            self.clear()
            self.footing = footing
        if size in self.batches:
            self.batches[size].take(batch)
        else:
            self.batches[size] = batch.clone()
        (self._loop if job.graph == "loop" else self._steps)(size, batch, bar)
        return self.batches[size].x

    def _steps(self, size: int, batch: _Batch, bar: tqdm) -> None:
        """A graph for guided rows and one for the others; the first row of each kind warms up for it."""
        for guided in self.job.guided:
            self.graphs.run((size, guided), functools.partial(_advance, self.job, self.batches[size], guided))
            bar.update()

    def _loop(self, size: int, batch: _Batch, bar: tqdm) -> None:
        """One graph for all rows, after one row of each kind to warm up."""
        held, rows = self.batches[size], len(batch.timesteps)
        if size not in self.graphs.recorded:
            for guided in set(self.job.guided):
                self.graphs.warm(size, functools.partial(_advance, self.job, held, guided))
            held.take(batch)
            self.graphs.capture(size, lambda: held.x.copy_(_all_rows(self.job, held)))
        self.graphs.replay(size)
        bar.update(rows)

    def give_up(self, reason: str) -> None:
        """From here on the job runs as without graphs."""
        self.off = True
        self.clear()
        _warn_of(reason)

    @property
    def bytes(self) -> int:
        return self.graphs.bytes

    def clear(self) -> None:
        self.graphs.clear()
        self.batches.clear()


def _advance(job: Job, batch: _Batch, guided: bool) -> None:
    """The row that is next, in place."""
    t = batch.timesteps.index_select(0, batch.row)[0]
    x, kept = _one_row(job, batch, batch.x, batch.kept, batch.row, t, guided)
    batch.x.copy_(x)
    if batch.kept is not None:
        batch.kept.copy_(kept)
    batch.row.add_(1)


def _why_no_graph(job: Job, device: torch.device) -> str | None:
    """Why a job cannot be recorded, as far as that is known beforehand."""
    if device.type not in graphs.RECORDERS:
        return f"the network is on the {device.type}, which has none"
    if job.callback is not None:
        return "there is a callback, which no graph calls"
    hooked = graphs.hooked(job.network)
    return hooked and f"{hooked} has forward hooks, which no graph calls"


def _warn_of(reason: str) -> None:
    warnings.warn(f"graph: sampling runs without a CUDA graph ({reason}); images are the same", stacklevel=3)


@contextmanager
def _recording(job: Job, device: torch.device) -> Iterator[_Recording | None]:
    """What records the job, if anything does; its graphs are freed at the end."""
    reason = _why_no_graph(job, device)
    if reason is not None and job.graph:
        _warn_of(reason)
    if reason is not None or job.graph is False:
        yield None
        return
    recording = _Recording(job, device)
    try:
        yield recording
    finally:
        recording.clear()


def _not_finite(job: Job, index: Tensor, x: Tensor) -> FloatingPointError:
    """The error for images x [B, C, H, W] that are not finite: draws them again, looking at what every module gives."""
    bad = job.seeds[index][~x.isfinite().flatten(1).all(dim=1).cpu()].tolist()
    seeds = f"seed{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:3]))}{', …' if len(bad) > 3 else ''}"
    said = f"{len(bad)} of {len(x)} images ({seeds}) hold NaN or infinity"
    job, batch = replace(job, callback=None, compile=False), _Batch.of(job, index)
    x, kept, rows = batch.x, batch.kept, torch.arange(len(batch.timesteps), device=x.device)
    with finite.watch(job.network) as names:
        for i, (row, t) in enumerate(zip(rows.unbind(), batch.timesteps.unbind(), strict=True)):
            x, kept = _one_row(job, batch, x, kept, row, t, job.guided[i])
            if names or not finite.finite(x):
                where = finite.describe(job.network, names[0]) if names else "the sampler's step, after the network"
                return FloatingPointError(f"{said}, first at row {i} (timestep {t.item():g}) in {where}")
    return FloatingPointError(f"{said}, but not when they are drawn again without graph, compile and callback")


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


def _predict(job: Job, batch: _Batch, x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
    """The network's output, and the guidance that `diffusion_step` still has to apply to it, or None."""
    network = functools.partial(_compiled(), job.network) if job.compile else job.network
    dtype = next(job.network.parameters()).dtype
    if not guided:
        return network(x.to(dtype), t, batch.labels), None
    scale = batch.scale
    both = network(torch.cat([x, x]).to(dtype), t, batch.doubled)
    if not job.rescale:
        return both, scale
    uncond, cond = both.float().chunk(2)
    guided = uncond + scale * (cond - uncond)
    deviation = cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (job.rescale * deviation + (1 - job.rescale)), None


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """A compiled call of any network: (network, x, t, labels). Compiled anew for each kind of network and each shape;
    graphs are ours to make, around the step as well."""

    def call(network: nn.Module, *inputs: Any) -> Tensor:
        return network(*inputs)

    return torch.compile(call, dynamic=False, options={"triton.cudagraphs": False})


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
