"""The rows of whole models: a U-Net's forward, and sampling from start to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import DTYPES, Bench, Column, Truth, Work, errors, nbytes, run_row, truth
from benchmarks.record import Row
from fastgen import backends, ops
from fastgen.models import FAMILIES
from fastgen.testing import EAGER

UNETS = (("mnist", 16), ("cifar10", 1), ("cifar10", 4))  # preset, batch
MODEL_TOLERANCE = 1e-4  # of a whole model in fp32, relative to its largest output
IMAGES, STEPS = 16, 10
Context = Callable[[], AbstractContextManager]


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Models on what a user would write; the reference backend also keeps statistics, and is slower."""
    with ExitStack() as stack:
        for name in ("conv2d", "norm_act_conv2d", "group_norm_act", "diffusion_step", "to_uint8"):
            stack.enter_context(mock.patch.object(ops, name, EAGER[name]))
        yield


def _without_grad(context: Context) -> Context:
    def both() -> AbstractContextManager:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(context())
        return stack

    return both


def _column(
    name: str, call: Callable[[], list[Tensor]], right: Truth, context: Context = nullcontext, ours: bool = False
) -> Column:
    return Column(name, call, call, right, _without_grad(context), ours=ours)


def unet(preset: str) -> nn.Module:
    family = FAMILIES["unet"]
    torch.manual_seed(0)
    return family.network(family.presets[preset]).eval()


def unet_row(preset: str, batch: int, dtype: str, bench: Bench) -> Row:
    torch._dynamo.reset()
    kind, device = DTYPES[dtype], bench.device
    row = Row("unet", f"{preset}-batch {batch}", dtype, device, auto=backends.preferred("group_norm_act", device))
    model = unet(preset).to(device)
    generator = torch.Generator().manual_seed(0)
    size, channels = model.config.image_size, model.config.in_channels
    x = torch.randn((batch, channels, size, size), generator=generator).to(device, kind)
    t = torch.randint(1000, (batch,), generator=generator).to(device)
    with torch.no_grad(), plain_pytorch():
        reference = [copy.deepcopy(model).double()(x.double(), t)]
        model = model.to(kind)
        with FlopCounterMode(display=False) as counter:
            yardstick = errors([model(x, t)], reference)
    right = truth(reference, yardstick, kind)
    right.bounds[0] = max(right.bounds[0], MODEL_TOLERANCE * reference[0].abs().max().item())
    row.bytes, row.flops = nbytes(*model.parameters(), x, x), counter.get_total_flops()
    row.limit_ms = bench.limit_ms(Work(row.bytes, row.flops), dtype)

    def column(
        name: str, network: nn.Module, context: Context = nullcontext, ours: bool = False, last: bool = False
    ) -> Column:
        given = x.contiguous(memory_format=torch.channels_last) if last else x
        return _column(name, lambda: [_tensor(network(given, t))], right, context, ours)

    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    columns = [
        column("eager", model, plain_pytorch),
        column("eager channels_last", last, plain_pytorch, last=True),
        column("reference", model, partial(backends.use_backend, "reference")),
        column("auto", model, ours=True),
        column("auto channels_last", last, ours=True, last=True),
    ]
    others = diffusers_unet(preset, model)
    if others is not None:
        columns.append(column("diffusers", others))
    modes = bench.compile_modes(row)
    if modes and device == "cpu":
        modes["compile freezing"] = {"options": {"freezing": True}}
    for name, options in modes.items():
        columns.append(column(name, torch.compile(copy.deepcopy(model), dynamic=False, **options), plain_pytorch))
    return run_row(row, columns, bench.timer, bench.seconds)


def _tensor(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample  # diffusers' way


def diffusers_unet(preset: str, model: nn.Module) -> nn.Module | None:
    """The same network with the same weights; None without diffusers, or where it has no such network."""
    if preset != "cifar10":
        return None
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return None
    down, up = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4
    down[1], up[2] = "AttnDownBlock2D", "AttnUpBlock2D"
    network = UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), down_block_types=tuple(down), up_block_types=tuple(up),
        norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
    )  # fmt: skip
    network.load_state_dict(model.state_dict())
    weight = next(model.parameters())
    return network.to(weight.device, weight.dtype).eval()


def sampling_row(dtype: str, bench: Bench) -> Row:
    """fastgen.sample with DDIM on a small network with random weights: what a step costs around the network."""
    from fastgen.sampling import sample

    torch._dynamo.reset()
    row = Row("sampling", f"tiny-{IMAGES} images-ddim {STEPS}", dtype, bench.device, images=IMAGES)
    row.auto = backends.preferred("diffusion_step", bench.device)
    model = unet("tiny").to(bench.device, DTYPES[dtype])

    def call() -> list[Tensor]:
        return [sample(model, IMAGES, labels=3, steps=STEPS, sampler="ddim", progress=False).images]

    with plain_pytorch():
        right = truth(call(), [0.0], DTYPES[dtype])
    columns = [
        _column("eager", call, right, plain_pytorch),
        _column("reference", call, right, partial(backends.use_backend, "reference")),
        _column("auto", call, right, ours=True),
    ]
    return run_row(row, columns, bench.timer, bench.seconds)


def unet_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    for preset, batch in UNETS[: 1 if quick else None]:
        yield partial(unet_row, preset, batch, dtype, bench)


def sampling_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    if dtype == "fp32":
        yield partial(sampling_row, dtype, bench)


MODELS = {"unet": unet_rows, "sampling": sampling_rows}
