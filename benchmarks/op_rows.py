"""The rows of ops: each case of `fastgen.testing`, forward and forward + backward, by every way there is."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DTYPES, Bench, Column, Truth, errors, run_row, truth, winograd_truth
from benchmarks.record import Row
from fastgen import backends, ops
from fastgen.testing import CASES, EAGER, Inputs, OpCase, cases
from fastgen.tolerance import frobenius_error

# The rule is for ours. Others keep their speed unless they compute something else: PyTorch's channels_last group norm
# errs 9 times as much as its contiguous one, diffusers' fp32 tables 20 times as much as ours.
OTHERS = 64.0
# Held to the rule of Winograd's algorithm in fp32; in half precision the rounding of the result is larger.
WINOGRAD = ("conv2d", "norm_act_conv2d", "conv2d_norm_act", "conv_transpose2d_norm_act", "modulated_conv2d")


class Call:
    """``fn(**inputs)`` as a flat list of its results, followed by the gradients of the ``wanted`` inputs."""

    def __init__(self, fn: Callable, inputs: Inputs, wanted: Sequence[str], dtype: torch.dtype) -> None:
        self.fn, self.inputs, self.dtype = fn, inputs, dtype
        self.leaves = [inputs[name] for name in wanted]
        self.grads: list[Tensor] = []

    def __call__(self) -> list[Tensor]:
        out = self.fn(**self.inputs)
        outputs = [out] if isinstance(out, Tensor) else [o for o in out if o is not None]
        if not self.leaves:
            return outputs
        roots = [o for o in outputs if o.requires_grad]
        self.grads = self.grads or [self._gradient(i, o) for i, o in enumerate(roots)]
        return [*outputs, *torch.autograd.grad(roots, self.leaves, self.grads)]

    def _gradient(self, i: int, output: Tensor) -> Tensor:
        """The same values for every column, in the layout of the output."""
        values = torch.randn(output.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        return torch.empty_like(output).copy_(values.to(self.dtype)).detach()


def module_of(op: str) -> ModuleType:
    """benchmarks/ops/<stem>.py, the stem being that of the op's kernels."""
    return importlib.import_module(f"benchmarks.ops.{backends.STEMS[op]}")


def double(inputs: Inputs) -> Inputs:
    """The same values in fp64."""

    def wide(v: Any) -> Any:
        floating = isinstance(v, Tensor) and v.is_floating_point()
        return v.detach().double().requires_grad_(v.requires_grad) if floating else v

    return {name: wide(v) for name, v in inputs.items()}


def with_noise(inputs: Inputs, op: str) -> Inputs | None:
    """The same call with noise in place of seeds, for those who cannot make ours; None if the op has no such call.

    It is what ``torch.Generator().manual_seed(0)`` draws, for those that take a generator.
    """
    if "seeds" not in inputs:
        return inputs
    if "noise" not in inspect.signature(EAGER[op]).parameters:
        return None
    x = next(v for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
    generator = torch.Generator(x.device).manual_seed(0)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    noise = torch.empty_like(x, requires_grad=False).copy_(noise)
    return {**{name: v for name, v in inputs.items() if name != "seeds"}, "noise": noise}


class OpCall:
    """A case in one dtype and direction: its inputs in each layout, what is right, and the columns that compute it."""

    def __init__(self, case: OpCase, dtype: str, device: str, backward: bool) -> None:
        self.op, self.case, self.dtype, self.device, self.backward = case.op, case, DTYPES[dtype], device, backward
        self.module = module_of(case.op)
        self.grad = nullcontext if backward else torch.no_grad
        self.inputs = {False: self._inputs(channels_last=False)}
        first = self.inputs[False]
        if any(isinstance(first.get(name), Tensor) and first[name].ndim == 4 for name in case.images):
            self.inputs[True] = self._inputs(channels_last=True)
        self.wanted = [n for n in case.differentiable if isinstance(first.get(n), Tensor)] if backward else []
        self._know(first)

    def _inputs(self, channels_last: bool) -> Inputs:
        made = self.case.inputs(self.dtype, self.device, channels_last)
        return self.module.prepare(made) if hasattr(self.module, "prepare") else made

    def _know(self, inputs: Inputs) -> None:
        """Our truth, from seeds, and that of the others, from noise; eager's error is the yardstick of both."""
        reference, known = getattr(ops, f"{self.op}_reference"), with_noise(inputs, self.op)
        if self.op in WINOGRAD and self.dtype == torch.float32:
            with self.grad():
                self.right = self._call(reference, double(inputs))()
                yardstick = errors(self._call(EAGER[self.op], inputs)(), self.right, frobenius_error)
            self.others_truth = winograd_truth(self.right, yardstick, OTHERS)
            self.our_truth: Truth = winograd_truth(self.right, yardstick)
            return
        with self.grad():
            self.right = self._call(reference, double(inputs))()
            if known is None:
                self.others_truth, yardstick = None, [0.0] * len(self.right)
            else:
                right = self.right if known is inputs else self._call(reference, double(known))()
                yardstick = errors(self._call(EAGER[self.op], known)(), right)
                self.others_truth = truth(right, yardstick, self.dtype, OTHERS)
            self.our_truth = truth(self.right, yardstick, self.dtype)

    def _call(self, fn: Callable, inputs: Inputs) -> Call:
        return Call(fn, inputs, self.wanted, self.dtype)

    def limit(self, row: Row, bench: Bench) -> None:
        outputs = [o.to(self.dtype) if o.is_floating_point() else o for o in self.right]
        forward, backward = self.module.work(self.inputs[False], outputs)
        work = forward + backward if self.backward else forward
        row.bytes, row.flops, row.limit_ms = work.bytes, work.flops, bench.limit_ms(work, row.dtype)

    def other(self, name: str, fn: Callable, channels_last: bool = False) -> Column:
        """Someone else's way; checked on given noise, timed with its own generator."""
        inputs = self.inputs[channels_last]
        known = with_noise(inputs, self.op)
        check = None if known is None else self._call(fn, known)
        return Column(name, self._call(fn, inputs), check, self.others_truth, self.grad)

    def our(self, name: str, backend: str | None = None, channels_last: bool = False) -> Column:
        """The public op, on one backend or on "auto"."""

        def context() -> AbstractContextManager:
            stack = ExitStack()
            stack.enter_context(self.grad())
            if backend is not None:
                stack.enter_context(backends.use_backend(backend))
            return stack

        call = self._call(getattr(ops, self.op), self.inputs[channels_last])
        return Column(name, call, call, self.our_truth, context, ours=True)

    def columns(self, bench: Bench, row: Row) -> list[Column]:
        eager, ours = EAGER[self.op], _fused(self.op, self.device)
        out = []
        for channels_last in self.inputs:
            suffix = " channels_last" if channels_last else ""
            out.append(self.other(f"eager{suffix}", eager, channels_last))
            out += [self.our(f"{b}{suffix}", b, channels_last) for b in ours]
        out.append(self.our("auto"))
        if hasattr(self.module, "columns"):
            found = self.module.columns(self.inputs[False])
            out += [self.other(name, fn) for name, fn in found.items()]
        for name, options in bench.compile_modes(row).items():
            compiled = torch.compile(eager, dynamic=False, fullgraph=True, **options)
            out.append(self.other(name, compiled))
        return out


def _fused(op: str, device: str) -> list[str]:
    """Our kernels that run here; Triton's interpreter is no kernel."""
    names = ("cpp",) if device == "cpu" else ("triton", "cuda")
    return [name for name in names if backends.why_not(op, name, device) is None]


def op_rows(op: str, dtype: str, bench: Bench, *, quick: bool = False) -> Iterator[Callable[[], Row]]:
    """The rows of an op, each to be run by calling it."""
    for case in cases(op, bench=True, device=bench.device)[: 1 if quick else None]:
        if dtype != "fp32" and not _has_dtype(case):
            continue
        for backward in (False, True) if case.differentiable else (False,):
            yield partial(op_row, case, dtype, bench, backward)


def _has_dtype(case: OpCase) -> bool:
    """Whether anything in the case has a dtype to choose."""
    made = case.make(torch.Generator().manual_seed(0))
    return any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in made.values())


def op_row(case: OpCase, dtype: str, bench: Bench, backward: bool) -> Row:
    torch._dynamo.reset()  # each row compiles for its own shapes
    row = Row(case.op, case.label, dtype, bench.device, "forward + backward" if backward else "forward")
    row.auto = backends.preferred(case.op, bench.device)
    call = OpCall(case, dtype, bench.device, backward)
    call.limit(row, bench)
    return run_row(row, call.columns(bench, row), bench.timer, bench.seconds)


OPS = tuple(CASES)
