"""The loop of sampling: a batch from its noise through the rows of a plan, kernel by kernel or over CUDA graphs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import finite, graphs, ops
from fastgen.diffusion.samplers import SamplingPlan
from fastgen.images import Samples
from fastgen.ops.philox import Stream
from fastgen.recipe import Recipe, encode_picture, environment

Callback = Callable[[int, Tensor, Tensor], Any]


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


@dataclass
class Batch:
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
    def of(cls, job: Job, index: Tensor) -> Batch:
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

    def clone(self) -> Batch:
        return Batch(*(t if t is None else t.clone() for t in self._tensors()))

    def take(self, other: Batch) -> None:
        """Copies every tensor of ``other``, in place."""
        for own, new in zip(self._tensors(), other._tensors(), strict=True):
            if own is not None:
                own.copy_(new)

    def _tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


def denoise(job: Job, index: Tensor, bar: tqdm, recording: Recording | None) -> Tensor:
    """x_0 [B, C, H, W] fp32 of the images at ``index``, each from its own noise, by the plan's rows."""
    batch, shown = Batch.of(job, index), bar.n
    if recording is not None and not recording.off and len(batch.timesteps):
        try:
            return recording.denoise(batch, bar)
        except graphs.CaptureError as error:
            bar.update(shown - bar.n)
            recording.give_up(str(error))
    return _all_rows(job, batch, bar)


def _all_rows(job: Job, batch: Batch, bar: tqdm | None = None) -> Tensor:
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
    job: Job, batch: Batch, x: Tensor, kept: Tensor | None, row: Tensor, t: Tensor, guided: bool
) -> tuple[Tensor, Tensor | None]:
    """x and kept after the row; row: int64, one number; t: [], its timestep."""
    model_out, scale = _predict(job, batch, x, t, guided)
    history = batch.kept is not None
    return ops.diffusion_step(
        x, model_out, batch.coefficients, row, guidance=scale, clip=job.network.diffusion.clip,
        history=kept if history else None, keep="x0" if history or job.callback else None,
        seeds=batch.seeds if job.plan.noisy else None,
    )  # fmt: skip


class Recording:
    """The loop of a job over CUDA graphs: the same rows, on tensors that stay where they are. A last, smaller batch has
    graphs of its own: filled up to the others' size, its images might sum in another order than without graphs."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.graphs = graphs.Graphs(device)
        self.batches: dict[int, Batch] = {}  # by size: the tensors that its graphs read and write
        self.footing: tuple = ()
        self.off = False

    def denoise(self, batch: Batch, bar: tqdm) -> Tensor:
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

    def _steps(self, size: int, batch: Batch, bar: tqdm) -> None:
        """A graph for guided rows and one for the others; the first row of each kind warms up for it."""
        for guided in self.job.guided:
            self.graphs.run((size, guided), functools.partial(_advance, self.job, self.batches[size], guided))
            bar.update()

    def _loop(self, size: int, batch: Batch, bar: tqdm) -> None:
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


def _advance(job: Job, batch: Batch, guided: bool) -> None:
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
def recorded(job: Job, device: torch.device) -> Iterator[Recording | None]:
    """What records the job, if anything does; its graphs are freed at the end."""
    reason = _why_no_graph(job, device)
    if reason is not None and job.graph:
        _warn_of(reason)
    if reason is not None or job.graph is False:
        yield None
        return
    recording = Recording(job, device)
    try:
        yield recording
    finally:
        recording.clear()


def not_finite(job: Job, index: Tensor, x: Tensor) -> FloatingPointError:
    """The error for images x [B, C, H, W] that are not finite: draws them again, looking at what every module gives."""
    bad = job.seeds[index][~x.isfinite().flatten(1).all(dim=1).cpu()].tolist()
    seeds = f"seed{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:3]))}{', …' if len(bad) > 3 else ''}"
    said = f"{len(bad)} of {len(x)} images ({seeds}) hold NaN or infinity"
    job, batch = replace(job, callback=None, compile=False), Batch.of(job, index)
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


def _predict(job: Job, batch: Batch, x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
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
