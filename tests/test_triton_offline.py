"""Every Triton kernel compiles for GPUs that this machine need not have: no spills, no oversized shared memory.

Run as a program it is the compiler, a process of its own without TRITON_INTERPRET (an interpreted
function cannot be compiled): ``test_triton_offline.py TARGET representative|all|huge`` prints the
results as JSON. A configuration is a call of a launcher on meta tensors; what it would have launched is
recorded and compiled. So the compiled signatures are the launched ones.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Target: backend, architecture, threads per warp, bytes of shared memory that a program may use.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
# Noise is the same bits everywhere only where a * b + c is rounded twice.
EXACT = re.compile("philox_normal|reparameterize|q_sample|diffusion_step|to_uint8")


@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str) -> None:
    results = _compile(target, "representative")
    missing = set(results["kernels"]) - {r["kernel"] for r in results["compiled"]}
    assert not missing, f"kernels without a configuration in {Path(__file__).name}: {', '.join(sorted(missing))}"
    _check(target, results)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_everything(target: str) -> None:
    _check(target, _compile(target, "all"))


def _compile(target: str, level: str) -> dict[str, Any]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, target, level], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _check(target: str, results: dict[str, Any]) -> None:
    faults = [f"{r['kernel']} ({r['configuration']}): {fault}" for r in results["compiled"] for fault in r["faults"]]
    assert not faults, f"{len(faults)} faults for {target}:\n" + "\n".join(faults)


def test_images_beyond_32_bits() -> None:
    """One image of 2^31 elements is indexed in 64 bits. (That a batch is, every configuration is checked for.)"""
    _check("sm_90", _compile("sm_90", "huge"))


def test_narrow_offsets_are_noticed() -> None:
    """The check of index widths sees the classic mistake: image number times image size in 32 bits."""
    ttir = """
      %pid = tt.get_program_id x : i32 loc(#loc1)
      %n = arith.divsi %pid, %blocks : i32 loc(#loc2)
      %bad = arith.muli %n, %size : i32 loc(#loc3)
      %wide = arith.extsi %n : i32 to i64 loc(#loc4)
      %good = arith.muli %wide, %size64 : i64 loc(#loc5)
      %rest = arith.remsi %pid, %blocks : i32 loc(#loc6)
      %first = arith.muli %rest, %c128 : i32 loc(#loc7)"""
    assert _narrow_offsets(ttir) == ["arith.muli %n, %size : i32"]
    assert _narrow_offsets(ttir, huge=True) == ["arith.muli %n, %size : i32", "arith.muli %rest, %c128 : i32"]


def _narrow_offsets(ttir: str, huge: bool = False) -> list[str]:
    """32-bit sums and products of a program's number, or of what it says about which image: they overflow.

    The remainder of a division says where in the image: 32 bits will do, unless one image alone is huge.
    """
    unbounded: set[str] = set()
    faults = []
    for name, operation, operands, types in re.findall(r"(%[\w:]+) = ([\w.]+) ([^:\n]*) : ([^\n]*)", ttir):
        if operation == "tt.get_program_id":
            unbounded.add(name)
            continue
        if operation == "arith.trunci":  # on purpose: Philox's counter is a 32-bit word
            continue
        bounded = operation.endswith(("remsi", "remui")) and not huge
        if bounded or not unbounded.intersection(re.findall(r"%[\w#]+", operands)):
            continue
        kind = types.split(" loc(")[0]
        if operation in ("arith.muli", "arith.addi", "arith.shli") and kind.endswith(("i32", "i32>")):
            faults.append(f"{operation} {operands.strip()} : {kind}")
        if operation.startswith("arith.") or operation in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            unbounded.add(name)
    return faults


# What follows runs in the other process.


def configurations(level: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launcher call: "representative": every kernel, "all": the matrix, "huge": 2^31 elements."""
    import torch

    dtypes = {"representative": (torch.bfloat16,), "all": (torch.bfloat16, torch.float32, torch.float64)}
    for dtype in dtypes.get(level, (torch.float32,)):
        for last in {"representative": (False,), "all": (False, True)}.get(level, (True,)):
            yield from _elementwise(dtype, last, level)
            yield from _group_norm(dtype, last, level)
            yield from _batch_norm(dtype, last, level)
            yield from _bias_act(dtype, last, level)
            yield from _upfirdn2d(dtype, last, level)
        yield from _attention(dtype, level)
        yield from _conv2d(dtype, level)
    if level == "representative":
        yield from _group_norm(torch.float64, True, level)
        yield from (call for dtype in (torch.float32, torch.float64) for call in _conv2d(dtype, "other dtypes"))


def _meta(dtype: Any, last: bool, *shape: int) -> Any:
    import torch

    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if last else x


def _elementwise(dtype: Any, last: bool, level: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """With generated noise, and with "all" also with noise that is given."""
    import torch

    from fastgen.kernels.diffusion_step import diffusion_step_fwd
    from fastgen.kernels.philox import philox_bits_fwd, philox_normal_fwd
    from fastgen.kernels.q_sample import q_sample_fwd
    from fastgen.kernels.reparameterize import reparameterize_bwd, reparameterize_fwd
    from fastgen.kernels.to_uint8 import to_uint8_fwd

    n, image = 4, (3, 2**15, 2**15) if level == "huge" else (3, 64, 64)
    x, two = _meta(dtype, last, n, *image), _meta(dtype, last, 2 * n, *image)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ids, step = (_meta(torch.int64, False, *shape) for shape in ((n,), ()))
    table, rows, g, kl = (_meta(torch.float32, False, *shape) for shape in ((1000, 2), (50, 9), (), (n,)))
    kl = kl.to(wide)
    name = f"{dtype}{' channels_last' * last}"
    yield f"{name} normal", lambda: philox_normal_fwd(ids, 7, 0, x)
    yield f"{name} bits", lambda: philox_bits_fwd(ids, 7, 0, _meta(torch.int64, False, n, 100))
    yield f"{name} bytes", lambda: to_uint8_fwd(x, _meta(torch.uint8, False, n, *image[1:], image[0]))
    for noise, seeds in ((None, ids), (x, None)) if level == "all" else ((None, ids),):
        name = f"{dtype}{' channels_last' * last} {'seeds' if noise is None else 'noise'}"
        yield name, lambda a=(x, x, noise, seeds): reparameterize_fwd(*a, x, kl)
        yield name, lambda a=(x, kl, x, x, noise, seeds): reparameterize_bwd(*a, x, x)
        yield name, lambda a=(x, ids, table, noise, seeds): q_sample_fwd(*a, x, x if a[4] is not None else None)
        a = (x, x, rows, step, None, None, None, 0, noise, seeds, x, None)
        yield f"{name} plain", lambda a=a: diffusion_step_fwd(*a)
        a = (x, two, rows, step, g, 1.0, x, 1, noise, seeds, x, x)
        yield f"{name} guided", lambda a=a: diffusion_step_fwd(*a)


def _group_norm(dtype: Any, last: bool, level: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Small groups (one kernel), large groups (three); with "all" odd shapes, and every activation on two of them."""
    shapes: dict[str, tuple[int, int, tuple[int, int], int]] = {
        "skip": (256, 128, (16, 16), 32), "large": (128, 0, (64, 64), 16),
    }  # fmt: skip
    if level == "huge":
        shapes = {"huge": (8, 0, (2**15, 2**14), 4)}
    elif level == "all":
        shapes |= {
            "small": (128, 0, (16, 16), 32), "one channel": (1, 0, (28, 28), 1),
            "odd": (33, 7, (9, 5), 8), "odd large": (33, 7, (99, 51), 8),
            "layer norm": (512, 0, (32, 32), 1), "instance norm": (64, 0, (64, 64), 64),
            "one pixel": (512, 0, (1, 1), 32), "skip large": (128, 128, (128, 128), 32),
        }  # fmt: skip
    every = set(itertools.product(shapes, (3,), (True, False) if level == "all" else (True,)))
    if level == "all":
        every |= set(itertools.product(("odd", "odd large"), range(8), (True,)))
    for shape, act, full in sorted(every):
        name = f"{dtype}{' channels_last' * last} {shape} act={act}{' weight bias scale shift' * full}"
        yield name, lambda a=(dtype, last, *shapes[shape], act, full): _launch_group_norm(*a)


def _launch_group_norm(
    dtype: Any, last: bool, c1: int, c2: int, positions: tuple[int, int], groups: int, act: int, full: bool
) -> None:
    import torch

    from fastgen.kernels.group_norm_act import group_norm_act_bwd, group_norm_act_fwd

    n, c, wide = 2, c1 + c2, torch.float64 if dtype == torch.float64 else torch.float32
    x, y = _meta(dtype, last, n, c1, *positions), _meta(dtype, last, n, c, *positions)
    skip = _meta(dtype, last, n, c2, *positions) if c2 else None
    weight, scale = (_meta(wide, False, *shape) if full else None for shape in ((c,), (n, c)))
    statistics, sums = _meta(wide, False, n, groups), _meta(wide, False, n, c)
    parameters = (weight, weight, scale, scale)
    group_norm_act_fwd(x, skip, *parameters, groups, 1e-5, act, y, statistics, statistics)
    group_norm_act_bwd(y, x, skip, *parameters, statistics, statistics, groups, act, x, skip, sums, sums)


def _batch_norm(dtype: Any, last: bool, level: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """In training with all there is; with "all" also without, in evaluation, odd shapes and every activation."""
    shapes = {"usual": (128, 16, 16), "one pixel": (512, 1, 1), "odd": (33, 99, 51)}
    if level == "huge":
        shapes = {"huge": (8, 2**15, 2**14)}
    elif level == "representative":
        shapes = {"usual": shapes["usual"]}
    both = (True, False) if level == "all" else (True,)
    every = set(itertools.product(shapes, both, both, (1,)))
    if level == "all":
        every |= set(itertools.product(("odd",), (True,), (True,), range(8)))
    for shape, training, full, act in sorted(every):
        name = f"{dtype}{' channels_last' * last} {shape} act={act}{' training' * training}{' all' * full}"
        yield name, lambda a=(dtype, last, shapes[shape], training, full, act): _launch_batch_norm(*a)


def _launch_batch_norm(
    dtype: Any, last: bool, shape: tuple[int, int, int], training: bool, full: bool, act: int
) -> None:
    import torch

    from fastgen.kernels.batch_norm_act import batch_norm_act_bwd, batch_norm_act_fwd

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, c = _meta(dtype, last, 4, *shape), _meta(wide, False, shape[0])
    given = (x, c, c) if full else (None, None, None)
    batch_norm_act_fwd(x, *given, training, 1e-5, act, x, c, c)
    batch_norm_act_bwd(x, x, *given, c, c, training, 1e-5, act, x, given[0], c, c)


def _attention(dtype: Any, level: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Tokens [N, L, h, D] at D = 64 and 8; with "all" other widths and lengths, and causal."""
    shapes = {(4, 256, 64, 256, False), (32, 256, 8, 256, False)}
    if level == "huge":
        shapes = {(2**14, 2**12, 32, 2**12, True)}
    elif level == "all":
        shapes |= {(4, 1024, d, 1024, d == 64) for d in (8, 16, 32, 40, 64, 80, 128, 256)}
        shapes |= {(2, 49, 24, 7, False), (2, 49, 5, 130, True)}
    for h, length, d, keys, causal in sorted(shapes):
        name = f"{dtype} {h}x{length}x{d} keys={keys}{' causal' * causal}"
        yield name, lambda a=(dtype, h, length, d, keys, causal): _launch_attention(*a)


def _launch_attention(dtype: Any, h: int, length: int, d: int, keys: int, causal: bool) -> None:
    import torch

    from fastgen.kernels.attention import attention_bwd, attention_fwd

    q, k = (_meta(dtype, False, 2, tokens, h, d).transpose(1, 2) for tokens in (length, keys))
    sums = _meta(torch.float64 if dtype == torch.float64 else torch.float32, False, 2, 2, h, length)
    attention_fwd(q, k, k, d**-0.5, causal, q, sums)
    attention_bwd(q, q, k, k, sums, d**-0.5, causal, q, k, k)


def _bias_act(dtype: Any, last: bool, level: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A swish with a clamp, all derivatives; with "all" every activation, odd shapes, and without a bias."""
    shapes = {"usual": (128, 64, 64), "matrix": (512, 1, 1), "odd": (33, 9, 5)}
    if level == "huge":
        shapes = {"huge": (8, 2**15, 2**14)}
    elif level == "representative":
        shapes = {"usual": shapes["usual"]}
    every = set(itertools.product(shapes, (8,), (True, False) if level == "all" else (True,)))
    if level == "all":
        every |= set(itertools.product(("odd",), range(9), (True,)))
    for shape, act, full in sorted(every):
        name = f"{dtype}{' channels_last' * last} {shape} act={act}{' bias' * full}"
        yield name, lambda a=(dtype, last, shapes[shape], act, full): _launch_bias_act(*a)


def _launch_bias_act(dtype: Any, last: bool, shape: tuple[int, int, int], act: int, full: bool) -> None:
    import torch

    from fastgen.kernels.bias_act import bias_act_bwd, bias_act_bwd_bwd, bias_act_fwd

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, b = _meta(dtype, last, 4, *shape), _meta(wide, False, shape[0]) if full else None
    step = x.stride(1) if full else x.numel()
    how = (b, step, act, 0.2, 1.5, 256.0 if full else float("inf"))
    bias_act_fwd(x, *how, x)
    bias_act_bwd(x, x, *how, x, b)
    bias_act_bwd_bwd(x, b, x, x, *how, x, None if act < 3 else x, None if act < 3 else b)


def _upfirdn2d(dtype: Any, last: bool, level: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """StyleGAN's filters, up and down, of one pass and of two; huge: an image of 2^31 pixels."""
    import torch

    from fastgen.kernels.upfirdn2d import upfirdn2d_fwd

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    small, large = ((8, 2**14, 2**13), (8, 2**15, 2**14)) if level == "huge" else ((64, 32, 32), (64, 64, 64))
    both = {"up": (small, large, 2, 1), "down": (large, small, 1, 2), "odd": ((33, 9, 5), (33, 13, 7), 3, 2)}
    for name, (before, after, up, down) in both.items():
        for taps in ((4, 4), (12,)):
            if level != "all" and (name == "odd" or (level == "huge" and len(taps) == 1)):
                continue
            x, y, f = _meta(dtype, last, 2, *before), _meta(dtype, last, 2, *after), _meta(wide, False, *taps)
            what = f"{dtype}{' channels_last' * last} {name} {taps}"
            yield what, lambda a=(x, f, up, up, down, down, 2, 2, False, 4.0, y): upfirdn2d_fwd(*a)


def _conv2d(dtype: Any, level: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A block of a U-Net with all there is, strides, upsampling, and gradients; with "all" odd sizes and groups too."""
    norm: dict[str, Any] = {"norm": True, "act": 3, "residual": True}
    cases: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
        "block": ((16, 128, 0, 128, 32, 32), 3, norm | {"c2": 128}), "down": ((16, 128, 0, 128, 32, 32), 3, {"s": 2}),
        "up": ((16, 256, 0, 256, 16, 16), 3, {"up": 2}), "small": ((4, 256, 0, 256, 4, 4), 3, norm),
    }  # fmt: skip
    if level == "other dtypes":
        cases = {name: cases[name] for name in ("block", "small")}
    elif level == "huge":
        cases = {"huge": ((2, 8, 0, 8, 2**15, 2**14), 3, norm)}
    elif level == "all":
        cases |= {
            "odd": ((3, 33, 7, 45, 9, 5), 3, norm), "groups": ((3, 33, 9, 42, 9, 5), 3, norm | {"groups": 3}),
            "one channel": ((2, 1, 0, 1, 28, 28), 3, {"act": 6}), "from rgb": ((64, 3, 0, 128, 32, 32), 3, {}),
            "to rgb": ((64, 128, 0, 3, 32, 32), 3, norm), "1x1": ((16, 384, 0, 256, 16, 16), 1, {"residual": True}),
            "one pixel": ((64, 512, 0, 512, 1, 1), 1, norm), "batch 1": ((1, 512, 0, 512, 8, 8), 3, norm),
            "4x4": ((64, 128, 0, 64, 16, 16), 4, {"s": 2, "act": 2}), "5x5": ((2, 64, 0, 64, 19, 23), 5, {"d": 2}),
            "wide": ((64, 320, 320, 320, 64, 64), 3, norm),
        }  # fmt: skip
        cases |= {f"in_act={a}": ((3, 33, 7, 45, 9, 5), 3, norm | {"in_act": a, "act": a}) for a in range(8)}
    for name, (sizes, kernel, options) in cases.items():
        yield f"{dtype} {name}", lambda a=(dtype, sizes, kernel), o=options: _launch_conv2d(*a, **o)


def _launch_conv2d(
    dtype: Any, sizes: tuple[int, ...], kernel: int, s: int = 1, d: int = 1, up: int = 1, groups: int = 1,
    norm: bool = False, in_act: int = 3, act: int = 0, residual: bool = False, c2: int = 0,
) -> None:  # fmt: skip
    """Forward, data gradient (whatever it is) and, for stride 1, weight gradient."""
    import torch

    from fastgen.kernels.conv2d import conv2d_data_bwd, conv2d_fwd, conv2d_weight_bwd

    n, c1, more, k, h, w = sizes
    c2, wide = c2 + more, torch.float64 if dtype == torch.float64 else torch.float32
    x, skip = _meta(dtype, True, n, c1, h, w), _meta(dtype, True, n, c2, h, w) if c2 else None
    weight, dweight = (_meta(t, last, k, (c1 + c2) // groups, kernel, kernel) for t, last in ((dtype, 1), (wide, 0)))
    y = _meta(dtype, True, n, k, h * up // s, w * up // s)
    c, each, statistics = (_meta(wide, False, *shape) for shape in ((c1 + c2,), (n, c1 + c2), (n, 1)))
    given = (statistics, statistics, c, c, each, each) if norm else (None,) * 6
    bias = _meta(wide, False, n, k) if norm else _meta(wide, False, k)
    more, p = y if residual else None, kernel // 2 * d
    where = (kernel, kernel, s, s, p, p, d, d, *y.shape[2:], up**2)
    conv2d_fwd(x, skip, weight, *given, in_act, None, bias, more, act, *where, 0, y)
    if up == 1:
        both = _meta(dtype, True, n, c1 + c2, h, w)
        conv2d_data_bwd(y, weight, None, None, None, 0, s, s, p, p, d, d, both)
    if up == s == d == groups == 1:
        conv2d_weight_bwd(y, x, skip, *given, in_act, p, p, 0, dweight)


def main(target: str, level: str) -> None:
    """Prints the names of all kernels and what compiling each distinct launch gave."""
    import triton

    import fastgen.kernels._common

    fastgen.kernels._common.architecture = lambda x: target  # what a tensor's own device would say
    launched: list[tuple[Any, tuple, dict]] = []
    triton.JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launched.append((self, args, kwargs))
    compiled: dict[str, dict[str, Any]] = {}
    for name, call in configurations(level):
        launched.clear()
        for _ in _choices(call) if level == "all" else [call()]:
            pass
        for function, args, kwargs in launched:
            source, options = _source(function, args, kwargs)
            result = {"kernel": function.__name__, "configuration": f"{level}: {name}"}
            compiled.setdefault(
                f"{source.hash()} {sorted(options.items())}", {**result, "source": source, "options": options}
            )
    for result in compiled.values():
        result["faults"] = _faults(target, **result)
        del result["source"], result["options"]
    print(json.dumps({"kernels": _kernels(), "compiled": list(compiled.values())}))


def _choices(call: Callable[[], None]) -> Iterator[None]:
    """Makes the call once with each of the configurations that `fastgen.tune` may choose for its kernels."""
    from fastgen.kernels import _tuning

    most = [1]
    for i in itertools.count():
        if i == most[0]:
            return

        def choose(key: Any, options: Any, i: int = i) -> Any:
            most[0] = max(most[0], len(options))
            return options[min(i, len(options) - 1)]

        _tuning.choosers[:] = [choose]
        yield call()


def _kernels() -> list[str]:
    """The names of all functions `*_kernel` under Triton's jit in fastgen.kernels."""
    import triton

    import fastgen.kernels

    found = set()
    for file in pkgutil.iter_modules(fastgen.kernels.__path__):
        functions = vars(importlib.import_module(f"fastgen.kernels.{file.name}")).items()
        found |= {k for k, v in functions if k.endswith("_kernel") and isinstance(v, triton.JITFunction)}
    return sorted(found)


def _source(function: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What Triton would compile for a launch: types, constants, and which arguments 16 divides."""
    import torch
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    options = {k: values.pop(k) for k in list(values) if k not in function.arg_names}
    signature, constants, attributes = {}, {}, {}
    for parameter in function.params:
        value = values[parameter.name]
        specialised = not parameter.do_not_specialize
        integer = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (specialised and integer and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes), options


def _faults(target: str, kernel: str, configuration: str, source: Any, options: dict[str, Any]) -> list[str]:
    """Compiles; what is wrong with the result, in words."""
    import triton
    from triton.backends.compiler import GPUTarget

    backend, architecture, warp, most_shared = TARGETS[target]
    try:
        binary = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    except Exception as error:
        return [f"does not compile: {error.__cause__ or ''} {str(error)[-400:]}"]
    faults = [
        f"32-bit offset: {line}" for line in _narrow_offsets(binary.asm["ttir"], configuration.startswith("huge"))
    ]
    if binary.metadata.shared > most_shared:
        faults.append(f"{binary.metadata.shared} bytes of shared memory, of {most_shared}")
    # fp64, which is there to prove the kernels, divides in a subroutine: ptxas saves a register or two around it.
    allowed = 8 if "*fp64" in source.signature.values() else 0
    spilled = _spilled_nvidia(binary.asm["cubin"], allowed) if backend == "cuda" else _spilled_amd(binary.asm["amdgcn"])
    if spilled:
        faults.append(f"spills {spilled}")
    if backend == "cuda" and EXACT.match(kernel) and "fma.rn.f32" in binary.asm["ptx"]:
        faults.append("contracts a * b + c: launch it with **EXACT")
    return faults


def _spilled_nvidia(cubin: bytes, allowed: int) -> str:
    """What lies in local memory, as cuobjdump reports it; empty if it is no more than ``allowed`` bytes a thread."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, check=True
        ).stdout.decode()
    found = dict(re.findall(r"(STACK|LOCAL):(\d+)", usage))
    assert found, f"cuobjdump printed no resource usage: {usage}"
    return " ".join(f"{k}:{v}" for k, v in found.items() if int(v) > allowed)


def _spilled_amd(assembly: str) -> str:
    """The vector registers spilled, as the metadata of the code object has it (scalar ones go to vector registers)."""
    count = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])
    return f"{count} vector registers" if count else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
