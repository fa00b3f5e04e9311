"""The tests that every op passes. An op's test file is a subclass that names the op, plus what is special to it:

    class TestReparameterize(OpSuite):
        op = "reparameterize"

Inputs come from `fastgen.testing.CASES`; backends from this machine: one that cannot run an op is not collected
(test_backends.py asserts that those which must be there are).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import backends, ops, testing
from fastgen.ops.conv2d_arguments import arguments
from fastgen.ops.diffusion_step import KEEP
from fastgen.testing import Inputs, OpCase
from fastgen.tolerance import frobenius_error, max_error, tolerance

# The ops with kernels in C++ and in Triton, and a table of cases; and those with kernels in C++.
NATIVE = (
    "philox_normal",
    "reparameterize",
    "q_sample",
    "diffusion_step",
    "group_norm_act",
    "to_uint8",
    "bias_act",
    "upfirdn2d",
)
CONVOLUTIONS = ("conv2d", "norm_act_conv2d")
CPP = (*NATIVE, "attention", "batch_norm_act", *CONVOLUTIONS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# The noise that an op makes from seeds: (stream, the argument that is its step).
NOISE = {
    "reparameterize": (ops.Stream.REPARAMETERIZE, None),
    "q_sample": (ops.Stream.Q_SAMPLE, "t"),
    "diffusion_step": (ops.Stream.STEP, "step"),
}
# Arguments with one row per image (model_out has two where there is guidance).
BATCHED = (
    "mu", "logvar", "noise", "seeds", "x0", "t", "x_t", "model_out", "history", "x", "skip", "scale", "shift",
    "residual", "q", "k", "v",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where an op runs. Triton on the CPU is its interpreter: slow, and wrong in bf16."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"


def places(op: str) -> list[Place]:
    return [Place(b, d) for d in DEVICES for b in backends.BACKENDS if backends.why_not(op, b, d) is None]


def flat(output: Any) -> list[Tensor]:
    """The tensors that a call returned."""
    return [y for y in (output if isinstance(output, (tuple, list)) else [output]) if y is not None]


def call(op: str, inputs: Inputs, backend: str | None = None) -> list[Tensor]:
    return flat(getattr(ops, op)(**inputs, backend=backend))


def schema_args(name: str, inputs: Inputs, backend: str | None) -> list[Any]:
    """The arguments of torch.ops.fastgen.<name>, by the names in its schema; what is not given is None."""
    if name in CONVOLUTIONS:
        return list(arguments(**inputs, backend=backend))
    given = {"eps": 1e-5, "act": "silu", "dtype": torch.float32} | inputs | {"backend": backend}
    if name == "diffusion_step":
        given["keep"] = KEEP[inputs["keep"]]
    return [given.get(a.name) for a in getattr(torch.ops.fastgen, name).default._schema.arguments]


def dispatch(op: str, inputs: Inputs, backend: str | None = None) -> list[Tensor]:
    """The op by way of the dispatcher, cut down to what the public function returns."""
    out = flat(getattr(torch.ops.fastgen, op).default(*schema_args(op, inputs, backend)))
    if op in ("group_norm_act", "batch_norm_act", "attention", *CONVOLUTIONS):
        return out[:1]
    if op == "diffusion_step":
        return out if inputs["keep"] else out[:1]
    if op == "q_sample" and inputs.get("noise") is not None:
        return [out[0], inputs["noise"]]
    return out


def cast(case: OpCase, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values in another dtype, as fresh leaves; tables, seeds and steps as they are."""
    out: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            wanted = dtype if name in case.images + case.differentiable else value.dtype
            value = value.detach().to(wanted).requires_grad_(value.requires_grad)
        out[name] = value
    return out


def names(case: OpCase, inputs: Inputs) -> list[str]:
    return [n for n in case.differentiable if inputs.get(n) is not None and inputs[n].requires_grad]


def gradients(case: OpCase, inputs: Inputs, outputs: list[Tensor], outer: list[Tensor]) -> dict[str, Tensor | None]:
    """The gradient of each differentiable argument, for the gradients `outer` of the outputs that have one."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, outer, strict=True) if o.requires_grad]
    if not pairs:
        return {}
    outs, grads = zip(*pairs, strict=True)
    wanted = names(case, inputs)
    return dict(
        zip(wanted, torch.autograd.grad(outs, [inputs[n] for n in wanted], grads, allow_unused=True), strict=True)
    )


def outer_for(outputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device) for o in outputs]


def run(case: OpCase, inputs: Inputs, fn: Callable) -> list[Tensor | None]:
    """Outputs, then gradients, of one call: a list to compare with another."""
    outputs = fn(inputs)
    return [*outputs, *gradients(case, inputs, outputs, outer_for(outputs)).values()]


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """Bit for bit the same, NaN like NaN."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), f"result {i}: {a} and {e}"
        if a is not None:
            assert a.shape == e.shape and a.dtype == e.dtype, f"result {i}"
            assert torch.equal(a.nan_to_num(1e30), e.nan_to_num(1e30)), f"result {i} differs by {max_error(a, e)}"


def detached(inputs: Inputs, change: Callable[[str, Tensor], Tensor]) -> Inputs:
    """Every tensor put through `change`, as fresh leaves."""
    return {
        n: change(n, v.detach()).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for n, v in inputs.items()
    }


def batched(name: str, x: Tensor) -> bool:
    """Whether an argument has one row for each image; guidance and a convolution's bias may have one for all."""
    return name in BATCHED or x.ndim == {"guidance": 1, "bias": 2}.get(name)


def rows(inputs: Inputs, index: Tensor) -> Inputs:
    """The inputs of the images `index` of the batch, repeated where it repeats them."""
    doubled = inputs.get("guidance") is not None

    def pick(name: str, x: Tensor) -> Tensor:
        if name == "model_out" and doubled:
            return torch.cat([half.index_select(0, index) for half in x.chunk(2)])
        if batched(name, x):
            y = x.index_select(0, index)
            keep = torch.channels_last if x.ndim == 4 and not x.is_contiguous() else torch.contiguous_format
            return y.contiguous(memory_format=keep)
        return x

    return detached(inputs, pick)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- parity


@functools.lru_cache(maxsize=512)
@threads(1)  # PyTorch's hundreds of small steps: on a busy machine a second thread only waits
def expectation(case: OpCase, dtype: torch.dtype, device: str, channels_last: bool, seed: int) -> dict[str, tuple]:
    """name -> (fp64 reference, error of eager PyTorch in ``dtype``), for outputs and gradients; None: no gradient."""
    inputs = case.inputs(dtype, device, channels_last, seed)
    wide, narrow = cast(case, inputs, torch.float64), cast(case, inputs, dtype)
    if inputs.get("seeds") is not None:  # eager has no such noise: give it the right one
        stream, step = NOISE[case.op]
        shape = inputs[case.images[0]].shape[1:]
        narrow["noise"] = ops.philox_normal_reference(inputs["seeds"], shape, inputs.get(step, 0), stream, dtype)
    wide_out = flat(getattr(ops, f"{case.op}_reference")(**wide))
    narrow_out = flat(testing.EAGER[case.op](**narrow))
    results = {f"output {i}": pair for i, pair in enumerate(zip(wide_out, narrow_out, strict=True))}
    outer = outer_for(wide_out)
    wide_grads, narrow_grads = (gradients(case, *args, outer) for args in ((wide, wide_out), (narrow, narrow_out)))
    results |= {f"gradient of {n}": (g, narrow_grads[n]) for n, g in wide_grads.items()}
    return {
        n: (None, 0.0) if r is None else (r.detach(), distance(case.op, e, r, dtype)) for n, (r, e) in results.items()
    }


def regrouped(op: str, dtype: torch.dtype) -> bool:
    """Whether Winograd's algorithm regroups the sums: an element's error is then that of its neighbours, however small
    it is itself. In half precision the rounding of the result is larger."""
    return op in CONVOLUTIONS and dtype in (torch.float32, torch.float64)


def distance(op: str, actual: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    """What `bound` bounds: the largest error, or that of all elements together in relation to the reference."""
    return (frobenius_error if regrouped(op, dtype) else max_error)(actual, reference)


def bound(op: str, reference: Tensor, eager_error: float, dtype: torch.dtype) -> float:
    if regrouped(op, dtype):
        return 1e-12 if dtype == torch.float64 else max(1e-5, 2 * eager_error)
    if dtype == torch.float64:
        return 1e-12 * max(1.0, reference.abs().max().item() if reference.numel() else 0.0)
    return tolerance(reference, eager_error, dtype)


def parity_errors(case: OpCase, place: Place, dtype: torch.dtype, channels_last: bool, seed: int = 0) -> list[str]:
    """What breaks the tolerance rule, in words; nothing where all is well."""
    expected = expectation(case, dtype, place.device, channels_last, seed)
    inputs = case.inputs(dtype, place.device, channels_last, seed)
    outputs = call(case.op, inputs, place.backend)
    actual = {f"output {i}": y for i, y in enumerate(outputs)}
    grads = gradients(case, inputs, outputs, outer_for(outputs))
    actual |= {f"gradient of {n}": g for n, g in grads.items()}
    if actual.keys() != expected.keys():
        return [f"there are {list(actual)} where there should be {list(expected)}"]
    wrong = []
    for name, (reference, eager_error) in expected.items():
        y = actual[name]
        if y is None or reference is None:
            # No gradient at all, where the formula has one that is zero, is as good.
            if (y is None) != (reference is None) and (y if reference is None else reference).any():
                wrong.append(f"{name}: {'missing' if y is None else 'should be None'}")
            continue
        error = distance(case.op, y, reference, dtype)
        allowed = bound(case.op, reference, eager_error, dtype)
        if not error <= allowed:
            wrong.append(f"{name}: error {error:.3g} > {allowed:.3g} (eager's is {eager_error:.3g})")
    return wrong


def exact_errors(case: OpCase, place: Place, dtype: torch.dtype, channels_last: bool, seed: int = 0) -> list[str]:
    """For ops whose result is defined to the bit: what differs from the reference in the same dtype."""
    inputs = case.inputs(dtype, place.device, channels_last, seed)
    if case.op == "philox_normal":
        inputs["dtype"] = dtype
    expected = flat(getattr(ops, f"{case.op}_reference")(**inputs))
    actual = call(case.op, inputs, place.backend)
    return [
        f"output {i}"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True))
        if a.dtype != e.dtype or not torch.equal(a, e)
    ]


EXACT = ("philox_normal", "philox_bits", "to_uint8")


def errors(case: OpCase, *args: Any) -> list[str]:
    return (exact_errors if case.op in EXACT else parity_errors)(case, *args)


# ------------------------------------------------------------------------------------------------- recorders


class Recorder(TorchDispatchMode):
    """Notes the fastgen ops that pass the dispatcher, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if getattr(func, "namespace", "") == "fastgen":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass of Tensor that notes the functions it is given to."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


# Ways to lay the same values out in memory.


def every_second(x: Tensor) -> Tensor:
    buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 77)
    buffer[..., ::2] = x
    return buffer[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def misaligned(x: Tensor) -> Tensor:
    """The same strides, one element behind where the allocator would start."""
    storage = x.new_full((x.numel() + 1,), 77)
    return storage[1:].as_strided(x.shape, x.contiguous().stride()).copy_(x)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


VIEWS = {f.__name__: f for f in (every_second, transposed, misaligned, expanded)}


# ----------------------------------------------------------------------------------------------------- suite


class OpSuite:
    op = ""
    # The labels of the cases for checks that are dear; by default the first two.
    few: tuple[str, ...] = ()
    at_size: OpCase
    second_derivatives = False

    @classmethod
    def cases(cls) -> list[OpCase]:
        return testing.cases(cls.op)

    @classmethod
    def few_cases(cls) -> list[OpCase]:
        found = [c for c in cls.cases() if c.label in cls.few] if cls.few else cls.cases()[:2]
        assert len(found) == (len(cls.few) or 2), f"a label in {cls.few} is not a case of {cls.op}"
        return found

    @classmethod
    def has_gradient(cls) -> bool:
        return any(case.differentiable for case in cls.cases())

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Fills in `place` and `case` (all of them), `few` (some); `parity` is all four at once."""
        found = places(self.op)
        marks = {p: [pytest.mark.gpu] if p.device == "cuda" else [] for p in found}
        wanted = metafunc.fixturenames
        if "parity" in wanted:
            metafunc.parametrize(
                "parity", [pytest.param(p, marks=marks[p[1]], id=self.label(*p)) for p in self.matrix(found)]
            )
        for name, cases in (("case", self.cases), ("few", self.few_cases)):
            if name in wanted:
                metafunc.parametrize(name, cases(), ids=str)
        if "place" in wanted:
            metafunc.parametrize("place", [pytest.param(p, marks=marks[p], id=str(p)) for p in found])
        if "device" in wanted:
            metafunc.parametrize(
                "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
            )

    @staticmethod
    def label(case: OpCase, place: Place, dtype: torch.dtype, channels_last: bool) -> str:
        return f"{place}-{str(dtype)[6:]}-{'last-' if channels_last else ''}{case}"

    def matrix(self, found: list[Place]) -> Iterator[tuple[OpCase, Place, torch.dtype, bool]]:
        for place in found:
            for dtype in DTYPES:
                if place.interpreted and dtype == torch.bfloat16:
                    continue
                for case in self.cases():
                    if case.op == "philox_bits" and dtype != torch.float32:
                        continue  # no floating argument
                    # Interpreted, what does not depend on the dtype is tested in one.
                    if place.interpreted and dtype != torch.float32 and case not in self.few_cases():
                        continue
                    yield case, place, dtype, False
                    four = any(
                        isinstance(v, Tensor) and v.ndim == 4 for k, v in case.inputs().items() if k in case.images
                    )
                    if four:
                        yield case, place, dtype, True

    # Values

    def test_parity(self, parity):
        case, place, dtype, channels_last = parity
        assert not errors(case, place, dtype, channels_last)

    def test_parity_at_size(self, place):
        """A size that takes many blocks, tiles and threads."""
        if place.interpreted or place.backend == "reference":
            pytest.skip("for kernels; the interpreter takes minutes")
        for channels_last in (False, True) if self.at_size.images else (False,):
            assert not errors(self.at_size, place, torch.float32, channels_last)

    # Layouts

    def test_output_layout(self, place, few):
        """Outputs keep channels last, have the reference's dtypes, and the fake kernel promises just these strides."""
        for channels_last in (False, True):
            for dtype in (torch.float32, torch.float16):
                inputs = few.inputs(dtype, place.device, channels_last)
                real = call(self.op, inputs, place.backend)
                mode = FakeTensorMode()
                with mode:
                    faked = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
                    fake = call(self.op, faked, place.backend)
                plain = flat(getattr(ops, f"{self.op}_reference")(**inputs))
                for r, f, p in zip(real, fake, plain, strict=True):
                    assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
                    assert (r.shape, r.dtype) == (p.shape, p.dtype)
                    if channels_last and r.ndim == 4 and few.images:
                        wanted = torch.contiguous_format if r.dtype == torch.uint8 else torch.channels_last
                        assert r.is_contiguous(memory_format=wanted)

    @pytest.mark.parametrize("view", VIEWS)
    def test_views(self, place, few, view):
        """Any strides and any alignment of any argument give what dense copies give."""
        made = few.inputs(device=place.device)

        def change(name: str, x: Tensor) -> Tensor:
            return VIEWS[view](x) if x.ndim else x

        views = detached(made, change)
        dense = detached(views, lambda _, x: x.clone(memory_format=torch.contiguous_format))
        results = [run(few, inputs, lambda i: call(self.op, i, place.backend)) for inputs in (views, dense)]
        assert_same(*results)

    def test_mixed_layouts(self, place, few):
        """The first image decides; the others may lie in the other layout."""
        if len([n for n in few.images if n in few.inputs()]) < 2:
            pytest.skip("one image")
        if place.backend == "reference":
            pytest.skip("promised of kernels; PyTorch's own sums follow the layout")
        for channels_last in (False, True):
            inputs = few.inputs(device=place.device, channels_last=channels_last)
            other = torch.contiguous_format if channels_last else torch.channels_last

            def change(name: str, x: Tensor, other: torch.memory_format = other) -> Tensor:
                swap = name in few.images[1:] and x.ndim == 4
                return x.clone(memory_format=other) if swap else x.clone()

            results = [
                run(few, i, lambda i: call(self.op, i, place.backend)) for i in (inputs, detached(inputs, change))
            ]
            assert_same(*results)

    # Sameness

    def test_repeats(self, place, few):
        torch.use_deterministic_algorithms(True)
        first, second = (
            run(few, few.inputs(device=place.device), lambda i: call(self.op, i, place.backend)) for _ in range(2)
        )
        assert_same(first, second)

    def test_thread_count(self):
        if Place("cpp", "cpu") not in places(self.op):
            pytest.skip("no C++ library")
        case = self.at_size
        for channels_last in (False, True) if case.images else (False,):
            inputs = case.inputs(channels_last=channels_last)
            results: list[list[Tensor | None]] = []
            for n in (1, 2):
                with threads(n):
                    results.append(run(case, inputs, lambda i: call(self.op, i, "cpp")))
            assert_same(*results)

    def test_batch_invariance(self, place, few):
        """An image's result does not depend on the images around it."""
        if place.backend == "reference":
            pytest.skip("promised of kernels; PyTorch's own sums depend on the shape")
        for channels_last in (False, True) if few.images else (False,):
            inputs = few.inputs(device=place.device, channels_last=channels_last)
            n = len(call(self.op, inputs, place.backend)[0])
            together = rows(inputs, torch.arange(2 * n, device=place.device) % n)
            for i in (0,) if place.interpreted else (0, n - 1):
                alone = rows(inputs, torch.tensor([i], device=place.device))
                for a, b in zip(
                    call(self.op, alone, place.backend), call(self.op, together, place.backend), strict=True
                ):
                    assert torch.equal(a[0], b[i]) and torch.equal(a[0], b[i + n])

    # PyTorch's machinery

    def test_bypass_equals_dispatcher(self, place, case, monkeypatch):
        if place.interpreted and case not in self.few_cases():
            pytest.skip("few cases in the interpreter")
        for channels_last in (False, True) if case.images else (False,):
            inputs = case.inputs(device=place.device, channels_last=channels_last)
            through = run(case, inputs, lambda i: dispatch(self.op, i, place.backend))
            with monkeypatch.context() as patch:  # the bypass must not need the dispatcher at all
                patch.setattr(self.fused_op(), "op", None)
                around = run(case, inputs, lambda i: call(self.op, i, place.backend))
            assert_same(around, through)

    def fused_op(self):
        from fastgen.ops.registration import FusedOp

        module = getattr(ops, self.op).__globals__
        return next(v for v in module.values() if isinstance(v, FusedOp) and v.name == self.op)

    def test_dispatch_mode_sees_the_op(self, device, few):
        inputs = few.inputs(device=device)
        plain = run(few, inputs, lambda i: call(self.op, i))
        with Recorder() as recorder:
            seen = run(few, inputs, lambda i: call(self.op, i))
        assert getattr(torch.ops.fastgen, self.op).default in [f for f, _ in recorder.calls]
        assert_same(seen, plain)

    def test_subclass_reaches_the_dispatcher(self, device, few):
        inputs = few.inputs(device=device)
        plain = call(self.op, inputs)
        Labelled.seen = []
        labelled = {k: v.detach().as_subclass(Labelled) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        out = call(self.op, labelled)
        assert getattr(torch.ops.fastgen, self.op).default in Labelled.seen
        assert all(isinstance(y, Labelled) for y in out)
        assert_same([y.as_subclass(Tensor) for y in out], [y.detach() for y in plain])

    def test_parameter_takes_the_bypass(self, device, few, monkeypatch):
        inputs = few.inputs(device=device)
        expected = call(self.op, inputs)
        monkeypatch.setattr(self.fused_op(), "op", None)
        wrapped = {
            k: torch.nn.Parameter(v) if isinstance(v, Tensor) and v.requires_grad else v for k, v in inputs.items()
        }
        assert_same(call(self.op, wrapped), expected)

    def test_inference_mode(self, place, few):
        inputs = few.inputs(device=place.device)
        expected = call(self.op, inputs, place.backend)
        with torch.inference_mode():
            actual = call(self.op, inputs, place.backend)
            assert_same(actual, [y.detach() for y in expected])
            made = [y for y in actual if not any(y is v for v in inputs.values())]
            assert made and not any(y.requires_grad for y in made)

    def test_autocast(self, place, few):
        """Kernels compute in fp32 whatever comes in, so autocast changes neither dtypes nor values."""
        for dtype in (torch.float32, torch.bfloat16):
            if place.interpreted and dtype == torch.bfloat16:
                continue
            inputs = few.inputs(dtype, place.device)
            plain = run(few, inputs, lambda i: call(self.op, i, place.backend))
            with torch.autocast(place.device, dtype=torch.bfloat16):
                outputs = call(self.op, inputs, place.backend)
            grads = gradients(few, inputs, outputs, outer_for(outputs))
            assert_same([*outputs, *grads.values()], plain)

    def test_opcheck(self, place, few):
        """The first of the few cases contiguous, the last one channels last."""
        inputs = few.inputs(device=place.device, channels_last=few is self.few_cases()[-1])
        torch.library.opcheck(getattr(torch.ops.fastgen, self.op).default, schema_args(self.op, inputs, place.backend))

    def test_opcheck_backward(self, place, few):
        if not self.has_gradient():
            pytest.skip("not differentiable")
        inputs = few.inputs(device=place.device, channels_last=few is self.few_cases()[-1])
        with Recorder() as recorder:
            run(few, inputs, lambda i: dispatch(self.op, i, place.backend))
        calls = [(f, args) for f, args in recorder.calls if f.name().endswith("_bwd")]
        if not calls:
            assert not self.second_derivatives
            pytest.skip("its backward is plain PyTorch")
        for f, args in calls:
            torch.library.opcheck(f, args)

    def test_opcheck_double_backward(self, device):
        """The backward op, when what the forward took needs gradients; the statistics it kept do not."""
        if not self.second_derivatives:
            pytest.skip("not promised")
        case = self.few_cases()[-1]
        with Recorder() as recorder:
            run(case, case.inputs(device=device), lambda i: dispatch(self.op, i))
        (f, args), *_ = [call for call in recorder.calls if call[0].name().endswith("_bwd")]
        again = [
            a.detach().clone().requires_grad_(a.is_floating_point() and s.name not in ("mean", "rstd", "var"))
            if isinstance(a, Tensor)
            else a
            for a, s in zip(args, f._schema.arguments, strict=True)
        ]
        torch.library.opcheck(f, again, test_utils=("test_autograd_registration", "test_aot_dispatch_dynamic"))

    def test_vmap(self, device, few):
        """One more batch dimension, by PyTorch's own loop over it."""
        inputs = few.inputs(device=device)
        mapped = {k: v.detach() for k, v in inputs.items() if isinstance(v, Tensor)}
        stacked = {k: torch.stack([v, v.flip(0) if v.ndim else v]) for k, v in mapped.items()}
        fixed = {k: v for k, v in inputs.items() if k not in mapped}
        actual = torch.func.vmap(lambda tensors: tuple(call(self.op, {**tensors, **fixed})))(stacked)
        for i in range(2):
            expected = call(self.op, {**{k: v[i] for k, v in stacked.items()}, **fixed})
            assert_same([y[i] for y in actual], expected)

    def test_per_sample_gradients(self, device):
        """vmap over grad, as in torch.func's recipe for one gradient per sample."""
        if not self.has_gradient():
            pytest.skip("not differentiable")
        case = self.few_cases()[0]
        inputs = case.inputs(device=device)
        fixed = {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}
        tensors = {k: v.detach() for k, v in inputs.items() if k not in fixed}
        stacked = {k: torch.stack([v, v.flip(0) if v.ndim else v]) for k, v in tensors.items()}
        name = names(case, inputs)[0]

        def loss(value: Tensor, others: Inputs) -> Tensor:
            return sum((y.double() ** 2).sum() for y in call(self.op, {**others, **fixed, name: value}))

        others = {k: v for k, v in stacked.items() if k != name}
        actual = torch.func.vmap(torch.func.grad(loss))(stacked[name], others)
        for i in range(2):
            value = stacked[name][i].clone().requires_grad_()
            (expected,) = torch.autograd.grad(loss(value, {k: v[i] for k, v in others.items()}), value)
            assert_same([actual[i]], [expected])

    def test_func_grad(self, place, few):
        if not self.has_gradient():
            pytest.skip("not differentiable")
        inputs = few.inputs(device=place.device)
        wanted = {k: inputs[k] for k in names(few, inputs)}

        def loss(tensors: Inputs) -> Tensor:
            return sum((y.double() ** 2).sum() for y in call(self.op, {**inputs, **tensors}, place.backend))

        expected = torch.autograd.grad(loss(wanted), list(wanted.values()), allow_unused=True, materialize_grads=True)
        actual = torch.func.grad(loss)({k: v.detach() for k, v in wanted.items()})
        assert_same(list(actual.values()), list(expected))

    def test_compile(self, device, few):
        """One graph, forward and backward, equal to eager."""
        inputs, counter, fn = few.inputs(device=device, channels_last=True), *self.compiled(few)
        assert_same(run(few, inputs, fn), run(few, inputs, lambda i: call(self.op, i)))
        assert counter.frame_count == 1

    def test_compile_any_batch(self, device, few):
        """One graph for every batch size: nothing on the way, backward included, fixes the one it was traced with."""
        first, counter, fn = few.inputs(device=device, channels_last=True), *self.compiled(few)
        n = len(call(self.op, first)[0])
        for size in (n + 4, 2 * n + 1, n + 1):
            inputs = rows(first, torch.arange(size, device=device) % n)
            for name, value in inputs.items():
                if isinstance(value, Tensor) and batched(name, value):
                    torch._dynamo.mark_dynamic(value, 0)  # an error, should it be fixed nevertheless
            assert_same(run(few, inputs, fn), run(few, inputs, lambda i: call(self.op, i)))
        assert counter.frame_count == 1

    def compiled(self, case: OpCase) -> tuple[Any, Callable]:
        from torch._dynamo.testing import CompileCounterWithBackend

        counter = CompileCounterWithBackend("aot_eager")
        fixed = {k: v for k, v in case.inputs().items() if not isinstance(v, Tensor)}

        def fn(tensors: Inputs) -> list[Tensor]:
            return call(self.op, tensors | fixed)

        compiled = torch.compile(fn, fullgraph=True, backend=counter)
        return counter, lambda inputs: compiled({k: v for k, v in inputs.items() if isinstance(v, Tensor)})

    def test_inductor(self):
        """The default compiler relies on the fake kernel's strides: something pointwise on either side."""
        case = self.few_cases()[0]
        inputs = case.inputs(channels_last=True)
        first = next((n for n in case.images if n in inputs), None)

        def fn(inputs: Inputs) -> list[Tensor]:
            inputs = inputs if first is None else inputs | {first: inputs[first] * 0.5}
            return [y + 1 for y in call(self.op, inputs)]

        actual, expected = run(case, inputs, torch.compile(fn, fullgraph=True)), run(case, inputs, fn)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)

    # Derivatives

    def test_gradcheck(self, place, few):
        if not self.has_gradient():
            pytest.skip("not differentiable")
        # Element by element once; by a random projection elsewhere.
        slow = place.backend in ("cpp", "cuda") and few is self.few_cases()[0]
        self.derivatives(torch.autograd.gradcheck, place, few, fast=not slow)

    def test_gradgradcheck(self, place, few):
        if not self.second_derivatives:
            pytest.skip("not promised")
        self.derivatives(torch.autograd.gradgradcheck, place, few, fast=True)

    def derivatives(self, check: Callable, place: Place, case: OpCase, fast: bool) -> None:
        inputs = case.inputs(torch.float64, place.device)
        wanted = names(case, inputs)

        def fn(*values: Tensor) -> tuple[Tensor, ...]:
            outputs = call(self.op, inputs | dict(zip(wanted, values, strict=True)), place.backend)
            return tuple(y for y in outputs if y.requires_grad)

        with threads(1):  # a thousand tiny calls: a second thread only waits
            assert check(fn, [inputs[n] for n in wanted], fast_mode=fast)

    def test_penalty(self, place, few):
        """As in a gradient penalty: the outer gradient is itself a function of the inputs."""
        if not self.second_derivatives:
            pytest.skip("not promised")
        inputs = few.inputs(torch.float64, place.device)
        wanted = names(few, inputs)

        def fn(*values: Tensor) -> Tensor:
            outputs = call(self.op, inputs | dict(zip(wanted, values, strict=True)), place.backend)
            return torch.stack([y.square().sum() for y in outputs if y.requires_grad])

        with threads(1):
            assert torch.autograd.gradgradcheck(fn, [inputs[n] for n in wanted], fast_mode=True)

    def test_expanded_gradient(self, place, few):
        """The gradient of a sum is one number with strides of zero."""
        if not self.has_gradient():
            pytest.skip("not differentiable")
        inputs = few.inputs(device=place.device)
        outputs = [y for y in call(self.op, inputs, place.backend) if y.requires_grad]
        ones = [torch.ones_like(y) for y in outputs]
        wanted = [inputs[n] for n in names(few, inputs)]
        dense = torch.autograd.grad(outputs, wanted, ones, retain_graph=True, allow_unused=True)
        strided = torch.autograd.grad(outputs, wanted, [o[(0,) * o.ndim].expand_as(o) for o in ones], allow_unused=True)
        assert_same(list(strided), list(dense))
