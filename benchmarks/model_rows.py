"""The rows of whole models: a U-Net's forward and its training step, a DCGAN generator, sampling from start to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import DTYPES, Bench, Column, Truth, Work, errors, nbytes, run_row, truth
from benchmarks.record import Row
from fastgen import backends, ops
from fastgen.models import FAMILIES
from fastgen.testing import EAGER

UNETS = {
    "cpu": (("mnist", 16), ("cifar10", 1), ("cifar10", 4), ("cifar10", 16)),
    "cuda": (("cifar10", 1), ("cifar10", 16), ("cifar10", 256)),
}  # preset, batch
TRAINING = (("cifar10", 8),)
GENERATOR = (100, 512, 256, 128, 64, 3)  # channels of the DCGAN generator for 64×64 pixels (Radford et al. 2016)
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


def training_row(preset: str, batch: int, dtype: str, bench: Bench) -> Row:
    """Forward, backward and AdamW's step; right if the loss is. No weight decay, and steps too small to matter."""
    torch._dynamo.reset()
    kind, device = DTYPES[dtype], bench.device
    row = Row("training", f"{preset}-batch {batch}", dtype, device, auto=backends.preferred("norm_act_conv2d", device))
    model = unet(preset).to(device, kind)
    generator, size = torch.Generator().manual_seed(0), model.config.image_size
    x = torch.randn((batch, model.config.in_channels, size, size), generator=generator).to(device, kind)
    t = torch.randint(1000, (batch,), generator=generator).to(device)
    with torch.no_grad(), plain_pytorch():
        loss = copy.deepcopy(model).double()(x.double(), t).square().mean()
    right = truth([loss], [MODEL_TOLERANCE * loss.item()], kind)

    def column(name: str, network: nn.Module, context: Context = nullcontext, ours: bool = False) -> Column:
        network = copy.deepcopy(network).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-9, weight_decay=0.0)

        def step() -> list[Tensor]:
            optimizer.zero_grad()
            loss = _tensor(network(x, t)).square().mean()
            loss.backward()
            optimizer.step()
            return [loss.detach()]

        return Column(name, step, step, right, context, ours=ours)

    columns = [column("eager", model, plain_pytorch), column("auto", model, ours=True)]
    others = diffusers_unet(preset, model)
    if others is not None:
        columns.append(column("diffusers", others))
    for name, options in bench.compile_modes(row).items():
        compiled = column(name, model, plain_pytorch)
        compiled.call = torch.compile(compiled.call, dynamic=False, **options)
        columns.append(compiled)
    return run_row(row, columns, bench.timer, bench.seconds)


class Generator(nn.Sequential):
    """DCGAN's generator, z [N, 100, 1, 1] -> images [N, 3, 64, 64]; `fused` runs it on our ops."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for i, (c, k) in enumerate(pairwise(GENERATOR)):
            last = i == len(GENERATOR) - 2
            layers.append(nn.ConvTranspose2d(c, k, 4, 1 if i == 0 else 2, 0 if i == 0 else 1, bias=False))
            layers += [nn.Tanh()] if last else [nn.BatchNorm2d(k), nn.ReLU(True)]
        super().__init__(*layers)

    def fused(self, z: Tensor) -> Tensor:
        """The same in evaluation, each layer one op."""
        layers = list(self)
        for conv, norm in zip(layers[0::3], [*layers[1:-1:3], None], strict=True):
            if norm is None:
                statistics = {"running_mean": z.new_zeros(3), "running_var": z.new_ones(3), "eps": 0.0, "act": "tanh"}
            else:
                statistics = {"running_mean": norm.running_mean, "running_var": norm.running_var, "eps": norm.eps}
                statistics |= {"norm_weight": norm.weight, "norm_bias": norm.bias}
            z = ops.conv_transpose2d_norm_act(z, conv.weight, None, conv.stride, conv.padding, **statistics)
            z = z.contiguous(memory_format=torch.channels_last)
        return z


def dcgan_row(dtype: str, bench: Bench) -> Row:
    torch._dynamo.reset()
    kind, device = DTYPES[dtype], bench.device
    row = Row("dcgan", "generator 64x64-batch 64", dtype, device)
    row.auto = backends.preferred("conv_transpose2d_norm_act", device)
    torch.manual_seed(0)
    model = Generator().to(device).eval()
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.02)  # the paper's, section 4
    z = torch.randn((64, GENERATOR[0], 1, 1), generator=torch.Generator().manual_seed(0)).to(device, kind)
    with torch.no_grad():
        reference = [copy.deepcopy(model).double()(z.double())]
        model = model.to(kind)
        with FlopCounterMode(display=False) as counter:
            yardstick = errors([model(z)], reference)
    right = truth(reference, yardstick, kind)
    right.bounds[0] = max(right.bounds[0], MODEL_TOLERANCE * reference[0].abs().max().item())
    row.bytes, row.flops = nbytes(*model.parameters(), z, *reference), counter.get_total_flops()
    row.limit_ms = bench.limit_ms(Work(row.bytes, row.flops), dtype)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    columns = [
        _column("eager", lambda: [model(z)], right),
        _column("eager channels_last", lambda: [last(z)], right),
        _column("auto", lambda: [model.fused(z)], right, ours=True),
    ]
    for name, options in bench.compile_modes(row).items():
        compiled = torch.compile(copy.deepcopy(last), dynamic=False, **options)
        columns.append(_column(name, lambda compiled=compiled: [compiled(z)], right))
    return run_row(row, columns, bench.timer, bench.seconds)


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
    for preset, batch in UNETS[bench.device][: 1 if quick else None]:
        yield partial(unet_row, preset, batch, dtype, bench)


def training_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    if bench.device == "cuda" and dtype != "fp32" and not quick:
        from benchmarks.gpu_rows import training_row as autocast_row

        yield partial(autocast_row, dtype, bench)
        return
    for preset, batch in TRAINING:
        yield partial(training_row, "tiny" if quick else preset, batch, dtype, bench)


def dcgan_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    yield partial(dcgan_row, dtype, bench)


def sampling_rows(dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    if bench.device == "cuda" and dtype != "fp32" and not quick:
        from benchmarks.gpu_rows import BATCHES
        from benchmarks.gpu_rows import sampling_row as whole_row

        for batch in BATCHES:
            yield partial(whole_row, batch, dtype, bench)
    elif dtype == "fp32":
        yield partial(sampling_row, dtype, bench)


MODELS = {"unet": unet_rows, "training": training_rows, "dcgan": dcgan_rows, "sampling": sampling_rows}
