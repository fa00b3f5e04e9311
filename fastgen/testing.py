"""What tests and benchmarks share: one table of inputs per op, and the tolerance rule.

An `OpCase` makes the keyword arguments of one call. Every op has three functions to call with
them: the public one, its reference, and `EAGER[op]`, what a user would write in plain PyTorch in
the same dtype, whose error is the yardstick and whose time is the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import ops
from fastgen.diffusion.schedules import DiffusionConfig, forward_table
from fastgen.ops.activations import ACTIVATIONS
from fastgen.ops.bias_act import FUNCTIONS as BIAS_ACTIVATIONS

Inputs = dict[str, Any]


@dataclass(frozen=True)
class OpCase:
    """One call of an op. ``make(generator)`` returns fp64 CPU inputs; `inputs` casts and moves them.

    differentiable: the arguments that take gradients. images: those that exist in both layouts.
    bench: a realistic size, for benchmarks only.
    """

    op: str
    label: str
    make: Callable[[torch.Generator], Inputs]
    differentiable: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    bench: bool = False

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", channels_last: bool = False, seed: int = 0
    ) -> Inputs:
        """The keyword arguments, the same values for the same seed; fp32 tables and integers keep their dtype."""
        made = self.make(torch.Generator().manual_seed(seed))
        out: Inputs = {}
        for name, value in made.items():
            if isinstance(value, Tensor):
                value = value.to(device, dtype if value.dtype == torch.float64 else None)
                if channels_last and name in self.images and value.ndim == 4:
                    value = value.contiguous(memory_format=torch.channels_last)
                if name in self.differentiable:
                    value.requires_grad_()
            out[name] = value
        return out

    def __str__(self) -> str:
        return self.label


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _seeds(n: int) -> Tensor:
    return torch.arange(n) * 7919 - (1 << 40)  # negative and beyond 32 bits: both halves of the key count


def _shape(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _reparameterize(*shape: int, seeded: bool = False, bench: bool = False) -> OpCase:
    def make(g: torch.Generator) -> Inputs:
        source = {"seeds": _seeds(shape[0])} if seeded else {"noise": _normal(g, *shape)}
        return {"mu": _normal(g, *shape), "logvar": _normal(g, *shape), **source}

    label = f"{_shape(*shape)}-{'seeds' if seeded else 'noise'}"
    differentiable = ("mu", "logvar") if seeded else ("mu", "logvar", "noise")
    return OpCase("reparameterize", label, make, differentiable, ("mu", "logvar", "noise"), bench)


def _q_sample(*shape: int, seeded: bool = False, bench: bool = False) -> OpCase:
    table = forward_table(DiffusionConfig(timesteps=50))

    def make(g: torch.Generator) -> Inputs:
        source = {"seeds": _seeds(shape[0])} if seeded else {"noise": _normal(g, *shape)}
        t = torch.randint(len(table), (shape[0],), generator=g)
        return {"x0": _normal(g, *shape), "t": t, "table": table, **source}

    label = f"{_shape(*shape)}-{'seeds' if seeded else 'noise'}"
    return OpCase("q_sample", label, make, ("x0",) if seeded else ("x0", "noise"), ("x0", "noise"), bench)


def _diffusion_step(
    *shape: int, guidance: str | None = None, clip: float | None = None, history: bool = False, keep: str | None = None,
    noise: str | None = "noise", bench: bool = False,
) -> OpCase:  # fmt: skip
    def make(g: torch.Generator) -> Inputs:
        made: Inputs = {"x_t": _normal(g, *shape)}
        made["model_out"] = _normal(g, shape[0] * (2 if guidance else 1), *shape[1:])
        made["coefficients"] = torch.rand((5, 9), generator=g) + 0.25
        made["step"] = torch.tensor(3)
        if guidance:
            made["guidance"] = torch.rand(shape[:1] if guidance == "each" else (), generator=g, dtype=torch.float64) + 1
        made |= {"clip": clip, "keep": keep}
        if history:
            made["history"] = _normal(g, *shape)
        if noise:
            made |= {"noise": _normal(g, *shape)} if noise == "noise" else {"seeds": _seeds(shape[0])}
        return made

    parts = [_shape(*shape), guidance and f"guidance-{guidance}", clip and "clip", history and "history", keep, noise]
    images = ("x_t", "model_out", "history", "noise")
    differentiable = ("x_t", "model_out", "guidance", "history", "noise")
    return OpCase("diffusion_step", "-".join(p for p in parts if p), make, differentiable, images, bench)


def _group_norm_act(
    *shape: int,
    groups: int,
    act: str = "silu",
    affine: bool = True,
    scale_shift: bool = False,
    skip: int = 0,
    bench: bool = False,
) -> OpCase:
    def make(g: torch.Generator) -> Inputs:
        n, c = shape[0], shape[1] + skip
        made: Inputs = {"x": _normal(g, *shape) * 2 + 1, "num_groups": groups, "eps": 1e-5, "act": act}
        if affine:
            made |= {"weight": _normal(g, c), "bias": _normal(g, c)}
        if scale_shift:
            made |= {"scale": _normal(g, n, c), "shift": _normal(g, n, c)}
        if skip:
            made["skip"] = _normal(g, n, skip, *shape[2:]) - 1
        return made

    parts = [
        _shape(*shape),
        f"g{groups}",
        act,
        None if affine else "plain",
        scale_shift and "adagn",
        skip and f"skip{skip}",
    ]
    differentiable = ("x", "weight", "bias", "scale", "shift", "skip")
    return OpCase("group_norm_act", "-".join(p for p in parts if p), make, differentiable, ("x", "skip"), bench)


def _batch_norm_act(
    *shape: int,
    training: bool,
    running: bool = False,
    act: str = "relu",
    affine: bool = True,
    residual: bool = False,
    bench: bool = False,
) -> OpCase:
    """Running statistics are there where training is False, and with ``running``."""

    def make(g: torch.Generator) -> Inputs:
        c = shape[1]
        made: Inputs = {"x": _normal(g, *shape) * 2 + 1, "training": training, "eps": 1e-5, "act": act}
        if running or not training:
            made |= {"running_mean": _normal(g, c) + 1, "running_var": _normal(g, c).square() + 1, "momentum": 0.25}
        if affine:
            made |= {"weight": _normal(g, c), "bias": _normal(g, c)}
        if residual:
            made["residual"] = _normal(g, *shape) - 1
        return made

    parts = [
        _shape(*shape),
        ("train-running" if running else "train") if training else "eval",
        act,
        None if affine else "plain",
        residual and "residual",
    ]
    differentiable = ("x", "weight", "bias", "residual")
    return OpCase("batch_norm_act", "-".join(p for p in parts if p), make, differentiable, ("x", "residual"), bench)


def _bias_act(
    *shape: int, act: str = "lrelu", dim: int = 1, bias: bool = True, bench: bool = False, **options: Any
) -> OpCase:
    """options: alpha, gain, clamp."""

    def make(g: torch.Generator) -> Inputs:
        made: Inputs = {"x": _normal(g, *shape), "dim": dim, "act": act, **options}
        return made | ({"b": _normal(g, shape[dim])} if bias else {})

    parts = [_shape(*shape), act, dim != 1 and f"dim{dim}", not bias and "plain"]
    parts += [f"{name}{value}" for name, value in options.items()]
    return OpCase("bias_act", "-".join(str(p) for p in parts if p), make, ("x", "b"), ("x",), bench)


def _conv2d(
    n: int, c: int, k: int, h: int, w: int, kernel: int = 3, *, norm: bool = False, bench: bool = False, skip: int = 0,
    each: bool = False, residual: bool = False, scale_shift: bool = False, groups: int = 4, **options: Any,
) -> OpCase:  # fmt: skip
    """options: those of the op that are no tensors. each: one bias for each image."""

    def make(g: torch.Generator) -> Inputs:
        made: Inputs = {"x": _normal(g, n, c, h, w), "weight": _normal(g, k, c + skip, kernel, kernel)}
        made["weight"] = made["weight"] / math.sqrt((c + skip) * kernel**2)
        made["bias"] = _normal(g, n, k) if each else _normal(g, k)
        made |= options
        if skip:
            made["skip"] = _normal(g, n, skip, h, w) - 1
        if norm:
            made |= {"norm_weight": _normal(g, c + skip), "norm_bias": _normal(g, c + skip), "num_groups": groups}
        if scale_shift:
            made |= {"scale": _normal(g, n, c + skip), "shift": _normal(g, n, c + skip)}
        if residual:
            made["residual"] = _normal(g, *ops.conv2d_reference(made["x"], made["weight"], **_geometry(made)).shape)
        return made

    flags = [skip and f"skip{skip}", each and "each", residual and "residual", scale_shift and "adagn"]
    parts = [
        _shape(n, c, k, h, w),
        f"{kernel}x{kernel}",
        *(f"{name}{value}" for name, value in options.items()),
        *flags,
    ]
    differentiable = ("x", "weight", "bias", "skip", "residual", "norm_weight", "norm_bias", "scale", "shift")
    label = "-".join(str(p) for p in parts if p)
    op = "norm_act_conv2d" if norm else "conv2d"
    return OpCase(op, label, make, differentiable, ("x", "skip", "residual"), bench)


def _conv_norm_act(
    n: int, c: int, k: int, h: int, kernel: int, *, transposed: bool = False, residual: bool = False,
    bench: bool = False, **options: Any,
) -> OpCase:  # fmt: skip
    op = "conv_transpose2d_norm_act" if transposed else "conv2d_norm_act"

    def make(g: torch.Generator) -> Inputs:
        shape = (c, k) if transposed else (k, c)
        made: Inputs = {"x": _normal(g, n, c, h, h), "weight": _normal(g, *shape, kernel, kernel)}
        made["weight"] = made["weight"] / math.sqrt(c * kernel**2)
        made |= {name: _normal(g, k) for name in ("bias", "norm_weight", "norm_bias", "running_mean")}
        made |= {"running_var": torch.rand(k, generator=g, dtype=torch.float64) + 0.5, **options}
        if residual:
            made["residual"] = _normal(g, *getattr(ops, f"{op}_reference")(**made).shape)
        return made

    parts = [_shape(n, c, k, h), f"{kernel}x{kernel}", *(f"{name}{value}" for name, value in options.items())]
    label = "-".join([*parts, *(["residual"] if residual else [])])
    differentiable = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")
    return OpCase(op, label, make, differentiable, ("x", "residual"), bench)


def _modulated_conv2d(
    n: int, c: int, k: int, h: int, w: int, kernel: int = 3, *, gain: tuple[int, ...] | None = None,
    bench: bool = False, **options: Any,
) -> OpCase:  # fmt: skip
    """gain: the shape of input_gain. options: demodulate, padding."""

    def make(g: torch.Generator) -> Inputs:
        made: Inputs = {"x": _normal(g, n, c, h, w), "w": _normal(g, k, c, kernel, kernel), **options}
        made["s"] = _normal(g, n, c) / 2 + 1
        return made | ({} if gain is None else {"input_gain": _normal(g, *gain).abs() + 0.5})

    parts = [_shape(n, c, k, h, w), f"{kernel}x{kernel}", *(f"{name}{value}" for name, value in options.items())]
    label = "-".join([*parts, *([] if gain is None else [f"gain{len(gain)}"])])
    return OpCase("modulated_conv2d", label, make, ("x", "w", "s", "input_gain"), ("x",), bench)


def _geometry(made: Inputs) -> Inputs:
    names = ("skip", "stride", "padding", "dilation", "groups", "upsample")
    return {name: made[name] for name in names if name in made}


def _to_uint8(*shape: int, bench: bool = False) -> OpCase:
    return OpCase("to_uint8", _shape(*shape), lambda g: {"x": _normal(g, *shape)}, (), ("x",), bench)


def _upfirdn2d(
    *shape: int, taps: tuple[int, ...], up: tuple[int, int] = (1, 1), down: tuple[int, int] = (1, 1),
    padding: tuple[int, ...] = (0, 0, 0, 0), flip: bool = False, bench: bool = False,
) -> OpCase:  # fmt: skip
    """taps: (fh, fw), or one number for a separable filter."""

    def make(g: torch.Generator) -> Inputs:
        f = _normal(g, *taps).float() / math.sqrt(math.prod(taps))
        made: Inputs = {"x": _normal(g, *shape), "f": f, "up": list(up), "down": list(down), "padding": list(padding)}
        return made | {"flip_filter": flip, "gain": float(math.prod(up))}

    parts = [_shape(*shape), f"f{_shape(*taps)}", up != (1, 1) and f"up{_shape(*up)}"]
    parts += [down != (1, 1) and f"down{_shape(*down)}", any(padding) and f"padding{padding}", flip and "flip"]
    return OpCase("upfirdn2d", "-".join(str(p) for p in parts if p), make, ("x",), ("x",), bench)


def _attention(
    n: int, h: int, length: int, d: int, keys: int | None = None, causal: bool = False, bench: bool = False
) -> OpCase:
    def make(g: torch.Generator) -> Inputs:
        sizes = {"q": length, "k": keys or length, "v": keys or length}
        return {name: _normal(g, n, h, size, d) for name, size in sizes.items()} | {"causal": causal}

    label = _shape(n, h, length, d) + (f"-keys{keys}" if keys else "") + ("-causal" if causal else "")
    return OpCase("attention", label, make, ("q", "k", "v"), (), bench)


def _philox_normal(n: int, *shape: int, bench: bool = False) -> OpCase:
    def make(g: torch.Generator) -> Inputs:
        return {"seeds": _seeds(n), "shape": shape, "step": 5, "stream": int(ops.Stream.STEP)}

    return OpCase("philox_normal", _shape(n, *shape), make, bench=bench)


# N, C, K, H = W of what a U-Net's blocks compute, from the lowest level to images of 256² pixels.
NORM_ACT_CONV_SHAPES = (
    (4, 128, 128, 32), (4, 256, 256, 16), (4, 512, 256, 16), (4, 256, 256, 8), (4, 256, 256, 4), (16, 64, 64, 32),
    (1, 128, 128, 64), (1, 128, 128, 256),
)  # fmt: skip

# Sizes that no block divides, one channel, one element, an empty batch; then, for benchmarks, real ones.
CASES: dict[str, list[OpCase]] = {
    "reparameterize": [
        _reparameterize(3, 5), _reparameterize(2, 37, seeded=True), _reparameterize(2, 4, 5, 7, seeded=True),
        _reparameterize(2, 1200), _reparameterize(1, 1), _reparameterize(0, 8),
        _reparameterize(2, 3, 5, 1, seeded=True),
        _reparameterize(4096, 512, seeded=True, bench=True), _reparameterize(64, 4, 64, 64, seeded=True, bench=True),
    ],
    "q_sample": [
        _q_sample(3, 2, 5, 7), _q_sample(3, 2, 5, 7, seeded=True), _q_sample(2, 1, 1, 1), _q_sample(0, 1, 4, 4),
        _q_sample(2, 1030, seeded=True), _q_sample(5, 3, 9, 11, seeded=True),
        _q_sample(128, 3, 32, 32, seeded=True, bench=True), _q_sample(16, 3, 256, 256, seeded=True, bench=True),
    ],
    "diffusion_step": [
        _diffusion_step(3, 2, 5, 7), _diffusion_step(3, 2, 5, 7, clip=1.0, noise="seeds", keep="x0"),
        _diffusion_step(2, 3, 9, 11, guidance="one", clip=1.0, noise=None),
        _diffusion_step(3, 1, 5, 3, guidance="each", history=True, keep="eps", noise="seeds"),
        _diffusion_step(2, 1100, clip=0.5, history=True, keep="x0"), _diffusion_step(0, 1, 4, 4),
        _diffusion_step(16, 3, 256, 256, clip=1.0, noise="seeds", bench=True),
        _diffusion_step(64, 3, 32, 32, guidance="one", clip=1.0, noise="seeds", bench=True),
    ],
    "group_norm_act": [
        _group_norm_act(2, 8, 5, 3, groups=4), _group_norm_act(2, 6, 5, 7, groups=2, scale_shift=True, skip=2),
        _group_norm_act(1, 1, 1, 3, groups=1), _group_norm_act(2, 6, 4, 4, groups=6, affine=False, act="relu"),
        _group_norm_act(3, 4, 9, groups=2, act="gelu", skip=8), _group_norm_act(2, 12, groups=3, act="tanh"),
        _group_norm_act(0, 8, 4, 4, groups=2), _group_norm_act(1, 10, 41, 43, groups=5, scale_shift=True),
        *(_group_norm_act(2, 4, 3, 5, groups=2, act=act) for act in ACTIVATIONS if act != "silu"),
        _group_norm_act(4, 128, 64, 64, groups=32, bench=True), _group_norm_act(4, 256, 16, 16, groups=32, bench=True),
        _group_norm_act(1, 128, 256, 256, groups=32, bench=True),
        _group_norm_act(4, 256, 32, 32, groups=32, scale_shift=True, skip=128, bench=True),
    ],
    "batch_norm_act": [
        _batch_norm_act(3, 5, 4, 7, training=True, act="silu", residual=True),
        _batch_norm_act(3, 6, 5, 3, training=False, residual=True),
        _batch_norm_act(4, 3, 5, 3, training=True, running=True), _batch_norm_act(5, 1, 1, 1, training=True),
        _batch_norm_act(1, 1, 1, 1, training=False), _batch_norm_act(5, 12, training=True, act="gelu"),
        _batch_norm_act(3, 4, 9, training=True, running=True, affine=False, residual=True),
        _batch_norm_act(0, 8, 4, 4, training=False), _batch_norm_act(0, 8, 4, 4, training=True, running=True),
        _batch_norm_act(2, 130, 11, 13, training=True), _batch_norm_act(2, 3, 61, 71, training=True, act="leaky_relu"),
        *(_batch_norm_act(2, 4, 3, 5, training=t, act=act) for act in ACTIVATIONS for t in (True, False)),
        _batch_norm_act(64, 256, 16, 16, training=True, running=True, bench=True),
        _batch_norm_act(16, 64, 64, 64, training=True, running=True, residual=True, bench=True),
        _batch_norm_act(64, 512, 4, 4, training=True, running=True, bench=True),
        _batch_norm_act(64, 64, 32, 32, training=True, running=True, act="leaky_relu", bench=True),
        _batch_norm_act(16, 64, 64, 64, training=False, residual=True, bench=True),
    ],
    "bias_act": [
        _bias_act(3, 5, 4, 7, act="swish", clamp=1.5), _bias_act(2, 6, 5, 9, clamp=1.0),
        _bias_act(2, 3, 9, 11, act="tanh", bias=False, gain=0.5), _bias_act(1, 1, 1, 1), _bias_act(0, 4, 3, 3),
        _bias_act(5, 12), _bias_act(7, dim=0, act="elu"), _bias_act(3, 4, 5, dim=2, act="softplus"),
        _bias_act(4, 3, 2, 5, dim=0, act="selu", gain=2.0), _bias_act(2, 130, 3, 3, alpha=0.1),
        _bias_act(2, 3, 37, 41, act="sigmoid"), _bias_act(2, 3, 5, 7, dim=3, act="swish"),
        *(_bias_act(2, 4, 3, 5, act=act, clamp=0.75) for act in BIAS_ACTIVATIONS),
        _bias_act(32, 512, 16, 16, clamp=256.0, bench=True), _bias_act(8, 128, 128, 128, clamp=256.0, bench=True),
        _bias_act(4, 3, 256, 256, act="linear", clamp=256.0, bench=True), _bias_act(32, 512, bench=True),
        _bias_act(8, 128, 64, 64, act="swish", bench=True),
    ],
    "conv2d": [
        _conv2d(2, 8, 6, 5, 7, padding=1), _conv2d(2, 3, 4, 5, 4, padding=1, skip=2, each=True, act="silu"),
        _conv2d(2, 12, 20, 9, 8, padding=1, skip=5, each=True, act="silu"),
        _conv2d(1, 1, 1, 3, 3), _conv2d(0, 4, 4, 4, 4), _conv2d(2, 6, 5, 6, 4, padding=1, upsample=2),
        _conv2d(2, 5, 7, 6, 9, 1, residual=True, act="tanh"), _conv2d(2, 6, 4, 8, 7, stride=2, padding=(0, 1, 0, 1)),
        _conv2d(1, 6, 4, 8, 7, 2, padding=1), _conv2d(2, 4, 6, 7, 6, 5, padding=2, dilation=2),
        _conv2d(1, 48, 70, 13, 17, padding=1), _conv2d(2, 3, 17, 18, 19, residual=True),
        _conv2d(1, 20, 24, 9, 16, padding=1, upsample=2), _conv2d(8, 24, 40, 4, 4, padding=1),
        _conv2d(2, 17, 18, 9, 8, stride=2, padding=(0, 1, 0, 1)), _conv2d(3, 16, 20, 8, 6, 4, stride=2, padding=1),
        _conv2d(4, 128, 128, 32, 32, padding=1, bench=True), _conv2d(4, 384, 256, 16, 16, 1, bench=True),
        _conv2d(4, 128, 128, 32, 32, stride=2, padding=(0, 1, 0, 1), bench=True),
        _conv2d(4, 256, 256, 16, 16, padding=1, upsample=2, bench=True),
        _conv2d(4, 3, 128, 32, 32, padding=1, bench=True),
    ],
    "norm_act_conv2d": [
        _conv2d(2, 8, 6, 5, 7, norm=True, padding=1),
        _conv2d(2, 6, 5, 6, 5, norm=True, groups=2, padding=1, skip=4, each=True, residual=True, scale_shift=True),
        _conv2d(1, 24, 40, 16, 12, norm=True, padding=1, in_act="gelu"), _conv2d(0, 4, 4, 4, 4, norm=True),
        _conv2d(2, 12, 6, 6, 9, 1, norm=True, in_act="none"), _conv2d(2, 8, 6, 5, 5, norm=True, padding=1, upsample=2),
        _conv2d(2, 8, 6, 6, 9, norm=True, stride=2, padding=1, act="relu"),
        _conv2d(1, 36, 9, 11, 10, norm=True, skip=12),
        *(
            _conv2d(n, c, k, s, s, norm=True, groups=32, padding=1, bench=True) for n, c, k, s in NORM_ACT_CONV_SHAPES
        ),
    ],
    "conv2d_norm_act": [
        _conv_norm_act(2, 5, 6, 7, 3, padding=1), _conv_norm_act(2, 6, 9, 8, 4, stride=2, padding=1, act="leaky_relu"),
        _conv_norm_act(2, 6, 5, 6, 3, padding=1, residual=True), _conv_norm_act(2, 6, 5, 6, 3, training=True),
        _conv_norm_act(1, 24, 20, 13, 3, act="silu"),
        _conv_norm_act(16, 64, 64, 32, 3, padding=1, residual=True, bench=True),
        _conv_norm_act(64, 64, 128, 32, 4, stride=2, padding=1, act="leaky_relu", bench=True),
    ],
    "conv_transpose2d_norm_act": [
        _conv_norm_act(2, 5, 6, 7, 4, transposed=True, stride=2, padding=1),
        _conv_norm_act(2, 7, 3, 5, 4, transposed=True, stride=2, padding=1, act="tanh"),
        _conv_norm_act(3, 8, 4, 1, 4, transposed=True), _conv_norm_act(2, 4, 5, 4, 3, transposed=True, padding=1),
        _conv_norm_act(2, 6, 5, 4, 4, transposed=True, stride=2, padding=1, residual=True, act="silu"),
        _conv_norm_act(2, 6, 3, 4, 4, transposed=True, stride=2, padding=1, residual=True),
        _conv_norm_act(2, 16, 18, 5, 4, transposed=True, stride=2, padding=1, training=True),
        _conv_norm_act(2, 20, 16, 4, 4, transposed=True, stride=2, padding=1, residual=True, act="silu"),
        _conv_norm_act(2, 4, 5, 4, 3, transposed=True, stride=2, padding=1, output_padding=1, training=True),
        _conv_norm_act(64, 256, 128, 16, 4, transposed=True, stride=2, padding=1, bench=True),
        _conv_norm_act(64, 512, 256, 8, 4, transposed=True, stride=2, padding=1, bench=True),
    ],
    "modulated_conv2d": [
        _modulated_conv2d(2, 5, 6, 7, 5, padding=1), _modulated_conv2d(3, 6, 4, 5, 6, demodulate=False, padding=(0, 2)),
        _modulated_conv2d(2, 8, 3, 4, 4, 1, demodulate=False, gain=(8,)), _modulated_conv2d(1, 1, 1, 3, 3),
        _modulated_conv2d(3, 7, 5, 6, 6, padding=2),
        _modulated_conv2d(2, 24, 20, 13, 9, padding=1, gain=(2, 24)),
        _modulated_conv2d(8, 256, 256, 16, 16, padding=1, bench=True),
        _modulated_conv2d(4, 128, 128, 64, 64, padding=1, bench=True),
        _modulated_conv2d(4, 128, 3, 64, 64, 1, demodulate=False, bench=True),
    ],
    "to_uint8": [
        _to_uint8(2, 3, 5, 7), _to_uint8(1, 1, 1, 1), _to_uint8(0, 3, 4, 4), _to_uint8(2, 4, 33, 31),
        _to_uint8(16, 3, 256, 256, bench=True), _to_uint8(64, 3, 64, 64, bench=True),
    ],
    "upfirdn2d": [
        _upfirdn2d(2, 3, 5, 7, taps=(4, 4), up=(2, 2), padding=(2, 1, 2, 1)),
        _upfirdn2d(2, 4, 9, 8, taps=(6,), down=(2, 2), padding=(2, 2, 2, 2), flip=True),
        _upfirdn2d(1, 1, 1, 1, taps=(1, 1)), _upfirdn2d(0, 2, 4, 4, taps=(3, 3)),
        _upfirdn2d(2, 3, 6, 5, taps=(3, 5), up=(3, 2), down=(2, 3), padding=(1, 2, 0, 3)),
        _upfirdn2d(1, 20, 7, 9, taps=(12,), up=(2, 1), down=(1, 2), padding=(6, 5, 6, 5)),
        _upfirdn2d(2, 2, 11, 13, taps=(4, 4), down=(2, 2), padding=(-1, 2, 1, -2)),
        _upfirdn2d(1, 3, 5, 6, taps=(2, 2), up=(4, 4), flip=True), _upfirdn2d(3, 5, 4, 4, taps=(4, 4)),
        _upfirdn2d(8, 128, 64, 64, taps=(4, 4), up=(2, 2), padding=(2, 1, 2, 1), bench=True),
        _upfirdn2d(8, 128, 128, 128, taps=(4, 4), down=(2, 2), padding=(1, 1, 1, 1), bench=True),
        _upfirdn2d(8, 128, 128, 128, taps=(4, 4), padding=(2, 1, 2, 1), bench=True),
        _upfirdn2d(4, 128, 64, 64, taps=(12,), up=(2, 2), padding=(6, 5, 6, 5), bench=True),
        _upfirdn2d(4, 3, 256, 256, taps=(12,), down=(2, 2), padding=(5, 5, 5, 5), bench=True),
    ],
    "attention": [
        _attention(2, 3, 17, 8), _attention(2, 2, 9, 5, causal=True), _attention(1, 1, 1, 1),
        _attention(2, 2, 50, 16, keys=131), _attention(2, 1, 70, 24, keys=7, causal=True),
        _attention(1, 2, 13, 33, keys=150, causal=True), _attention(1, 1, 99, 64), _attention(0, 2, 5, 8),
        _attention(4, 32, 256, 8, bench=True), _attention(4, 8, 256, 32, bench=True),
        _attention(4, 4, 1024, 64, bench=True),
    ],
    "philox_normal": [
        _philox_normal(3, 2, 5, 7), _philox_normal(1, 1), _philox_normal(0, 4), _philox_normal(2, 1030),
        _philox_normal(16, 3, 256, 256, bench=True),
    ],
}  # fmt: skip


# What a GPU is measured on in place of the realistic ones above: 64 MB in bf16, and a U-Net's shapes at batch 128.
GPU_CASES: dict[str, list[OpCase]] = {
    "reparameterize": [_reparameterize(128, 4, 256, 256, seeded=True, bench=True)],
    "q_sample": [_q_sample(192, 3, 256, 256, seeded=True, bench=True)],
    "diffusion_step": [_diffusion_step(192, 3, 256, 256, clip=1.0, noise="seeds", bench=True)],
    "to_uint8": [_to_uint8(192, 3, 256, 256, bench=True)],
    "philox_normal": [_philox_normal(192, 3, 256, 256, bench=True)],
    "group_norm_act": [
        _group_norm_act(64, 128, 64, 64, groups=32, bench=True),
        _group_norm_act(128, 128, 32, 32, groups=32, bench=True),
        _group_norm_act(128, 256, 16, 16, groups=32, bench=True),
        _group_norm_act(1, 128, 256, 256, groups=32, bench=True),
        _group_norm_act(128, 256, 16, 16, groups=32, scale_shift=True, skip=128, bench=True),
    ],
    "attention": [
        _attention(16, 32, 256, 8, bench=True), _attention(16, 8, 256, 64, bench=True),
        _attention(16, 8, 1024, 64, bench=True), _attention(4, 8, 4096, 64, bench=True),
    ],
    "norm_act_conv2d": [
        _conv2d(n, c, k, s, s, norm=True, groups=32, padding=1, bench=True)
        for n, c, k, s in ((128, 128, 128, 32), (128, 256, 256, 16), (128, 512, 256, 16), (1, 256, 256, 16))
    ],
}  # fmt: skip


def cases(op: str, *, bench: bool = False, device: str = "cpu") -> list[OpCase]:
    """The cases of an op: the small ones for tests, or with ``bench`` the realistic ones, for a GPU larger ones."""
    if bench and device == "cuda" and op in GPU_CASES:
        return GPU_CASES[op]
    return [case for case in CASES[op] if case.bench == bench]


# What a user would write in plain PyTorch, in the tensors' own dtype.


def _noise_like(x: Tensor, noise: Tensor | None) -> Tensor:
    return torch.randn_like(x) if noise is None else noise


def _eager_reparameterize(
    mu: Tensor, logvar: Tensor, noise: Tensor | None = None, seeds: Any = None
) -> tuple[Tensor, Tensor]:
    z = mu + torch.exp(0.5 * logvar) * _noise_like(mu, noise)
    return z, -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).flatten(1).sum(1)


def _eager_q_sample(
    x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | None = None, seeds: Any = None
) -> tuple[Tensor, Tensor]:
    noise = _noise_like(x0, noise)
    a, b = table[t].to(x0.dtype).reshape(len(t), 2, *[1] * (x0.ndim - 1)).unbind(1)
    return a * x0 + b * noise, noise


def _eager_diffusion_step(
    x_t: Tensor, model_out: Tensor, coefficients: Tensor, step: Tensor, *, guidance: Any = None, clip: Any = None,
    history: Any = None, keep: Any = None, noise: Any = None, seeds: Any = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    p0, p1, p2, p3, q0, q1, q2, q3, q4 = coefficients.index_select(0, step.reshape(1))[0].to(x_t.dtype)
    m = model_out
    if guidance is not None:
        uncond, cond = m.chunk(2)
        m = uncond + guidance.reshape(-1, *[1] * (x_t.ndim - 1)) * (cond - uncond)
    x0, eps = p0 * x_t + p1 * m, p2 * x_t + p3 * m
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    y = q0 * x_t + q1 * x0 + q2 * eps
    y = y if history is None else y + q3 * history
    if noise is not None or seeds is not None:
        y = y + q4 * _noise_like(x_t, noise)
    return y, {None: None, "x0": x0, "eps": eps}[keep]


def _eager_group_norm_act(
    x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, act: str = "silu",
    scale: Any = None, shift: Any = None, skip: Any = None,
) -> Tensor:  # fmt: skip
    x = x if skip is None else torch.cat([x, skip], dim=1)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale.reshape(*scale.shape, *[1] * (x.ndim - 2)))
    if shift is not None:
        y = y + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))
    return ACTIVATIONS[act][1](y)


def _eager_batch_norm_act(
    x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, act: str = "relu", residual: Any = None,
) -> Tensor:  # fmt: skip
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[act][1](y if residual is None else y + residual)


def _eager_bias_act(
    x: Tensor, b: Any = None, dim: int = 1, act: str = "linear", alpha: Any = None, gain: Any = None, clamp: Any = None
) -> Tensor:
    _, function, default_alpha, default_gain = BIAS_ACTIVATIONS[act]
    z = x if b is None else x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    y = function(z, default_alpha if alpha is None else alpha)
    gain = default_gain if gain is None else gain
    y = y if gain == 1 else y * gain
    return y if clamp is None else y.clamp(-clamp, clamp)


def _eager_conv2d(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    *, upsample: int = 1, skip: Any = None, residual: Any = None, act: str | None = None,
) -> Tensor:  # fmt: skip
    x = x if skip is None else torch.cat([x, skip], dim=1)
    x = x if upsample == 1 else F.interpolate(x, scale_factor=float(upsample), mode="nearest")
    if not isinstance(padding, int) and len(padding) == 4:
        x, padding = F.pad(x, padding), 0
    each = bias is not None and bias.ndim == 2
    y = F.conv2d(x, weight, None if each else bias, stride, padding, dilation, groups)
    y = y + bias[:, :, None, None] if each else y
    y = y if residual is None else y + residual
    return ACTIVATIONS[act or "none"][1](y)


def _eager_norm_act_conv2d(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *, num_groups: int,
    norm_weight: Any = None, norm_bias: Any = None, eps: float = 1e-5, in_act: str = "silu", scale: Any = None,
    shift: Any = None, skip: Any = None, **rest: Any,
) -> Tensor:  # fmt: skip
    h = _eager_group_norm_act(x, num_groups, norm_weight, norm_bias, eps, in_act, scale, shift, skip)
    return _eager_conv2d(h, weight, bias, stride, padding, **rest)


def _eager_conv2d_norm_act(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, **norm: Any
) -> Tensor:
    return _eager_normed(F.conv2d(x, weight, bias, stride, padding), **norm)


def _eager_conv_transpose2d_norm_act(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, **norm: Any
) -> Tensor:
    return _eager_normed(F.conv_transpose2d(x, weight, bias, stride, padding, output_padding), **norm)


def _eager_normed(
    h: Tensor, *, norm_weight: Any = None, norm_bias: Any = None, act: str = "relu", residual: Any = None, **norm: Any
) -> Tensor:
    h = F.batch_norm(h, weight=norm_weight, bias=norm_bias, **norm)
    return ACTIVATIONS[act][1](h if residual is None else h + residual)


def _eager_upfirdn2d(
    x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up[0] - 1, 0, 0, 0, up[1] - 1]).reshape(n, c, h * up[1], w * up[0])
    x, f = F.pad(x, padding), (f * gain ** (f.ndim / 2)).to(x.dtype)
    f = f if flip_filter else f.flip(list(range(f.ndim)))
    if f.ndim == 2:
        return F.conv2d(x, f.expand(c, 1, *f.shape), groups=c)[:, :, :: down[1], :: down[0]]
    x = F.conv2d(x, f.expand(c, 1, 1, len(f)), groups=c)
    return F.conv2d(x, f[:, None].expand(c, 1, len(f), 1), groups=c)[:, :, :: down[1], :: down[0]]


def _eager_modulated_conv2d(
    x: Tensor, w: Tensor, s: Tensor, demodulate: bool = True, padding: Any = 0, input_gain: Any = None
) -> Tensor:
    n, c, h, width = x.shape
    if demodulate:
        w = w * w.square().mean((1, 2, 3), keepdim=True).rsqrt()
        s = s * s.square().mean().rsqrt()
    each = w * s[:, None, :, None, None]
    if demodulate:
        each = each * (each.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    if input_gain is not None:
        each = each * input_gain.expand(n, c)[:, None, :, None, None]
    y = F.conv2d(x.reshape(1, n * c, h, width), each.flatten(0, 1), padding=padding, groups=n)
    return y.reshape(n, len(w), *y.shape[2:])


def _eager_to_uint8(x: Tensor) -> Tensor:
    return (x.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


EAGER: dict[str, Callable] = {
    "reparameterize": _eager_reparameterize,
    "q_sample": _eager_q_sample,
    "diffusion_step": _eager_diffusion_step,
    "group_norm_act": _eager_group_norm_act,
    "batch_norm_act": _eager_batch_norm_act,
    "bias_act": _eager_bias_act,
    "conv2d": _eager_conv2d,
    "norm_act_conv2d": _eager_norm_act_conv2d,
    "conv2d_norm_act": _eager_conv2d_norm_act,
    "conv_transpose2d_norm_act": _eager_conv_transpose2d_norm_act,
    "modulated_conv2d": _eager_modulated_conv2d,
    "upfirdn2d": _eager_upfirdn2d,
    "to_uint8": _eager_to_uint8,
    "attention": ops.attention_reference,
    "philox_normal": lambda seeds, shape, step, stream: torch.randn((len(seeds), *shape), device=seeds.device),
}
