"""fastgen.ops.vendor, what a GPU runs where no kernel of ours is known to be faster: right, on a CPU too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from suite import bound, call, distance, expectation, gradients, outer_for
from torch import Tensor

import fastgen
from fastgen import backends, ops, testing

OPS = ("conv2d", "norm_act_conv2d", "conv2d_norm_act", "conv_transpose2d_norm_act", "batch_norm_act")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tensors were there."""
    monkeypatch.setattr(backends, "left_to_vendor", lambda op, x, backend, like=(): backend is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [c for op in OPS for c in testing.cases(op)], ids=lambda c: f"{c.op}-{c.label}")
def test_parity(case: testing.OpCase, dtype: torch.dtype, on_a_gpu: None) -> None:
    """Outputs, layout, running statistics and gradients, by the rule."""
    for channels_last in (False, True):
        expected = expectation(case, dtype, "cpu", channels_last, 0)
        inputs = case.inputs(dtype, "cpu", channels_last)
        outputs = call(case.op, inputs)
        found: dict[str, Any] = {f"output {i}": y for i, y in enumerate(outputs)}
        found |= {f"gradient of {n}": g for n, g in gradients(case, inputs, outputs, outer_for(outputs)).items()}
        for name, (reference, error) in expected.items():
            y = found[name]
            if reference is None or y is None:
                assert y is None or not y.any()
                continue
            assert y.dtype == dtype
            assert distance(case.op, y, reference, dtype) <= bound(case.op, reference, error, dtype), name
        reference = getattr(ops, case.op)(**case.inputs(dtype, "cpu", channels_last), backend="reference")
        if reference.ndim == 4 and reference.numel():
            assert outputs[0].stride() == reference.stride()


def test_running_statistics(on_a_gpu: None) -> None:
    """They move as those of the op, in training."""
    case = next(c for c in testing.cases("batch_norm_act") if "train-running" in c.label)
    moved = []
    for backend in (None, "reference"):
        inputs = case.inputs(torch.float32)
        ops.batch_norm_act(**inputs, backend=backend)
        moved.append((inputs["running_mean"], inputs["running_var"]))
    for ours, right in zip(*moved, strict=True):
        assert torch.allclose(ours, right, atol=1e-6)


def test_who_is_left_to_the_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "resolve", lambda op, *_, **__: backends.AUTO["cuda"][op][0])
    gpu: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    assert backends.left_to_vendor("conv2d", gpu, None)
    assert not backends.left_to_vendor("conv2d", gpu, "triton")
    assert not backends.left_to_vendor("conv2d", SimpleNamespace(is_cuda=False), None)
    with fastgen.use_backend("triton", "reference"):
        assert not backends.left_to_vendor("conv2d", gpu, None)
    monkeypatch.setenv("FASTGEN_BACKEND", "triton")
    assert not backends.left_to_vendor("conv2d", gpu, None)


def test_compiler_sees_the_operators(on_a_gpu: None) -> None:
    """One graph, in which nothing of the convolution is hidden in an op of ours."""
    seen: list[str] = []

    def note(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return module.forward

    x, w = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    compiled = torch.compile(
        lambda x: ops.norm_act_conv2d(x, w, padding=1, num_groups=2, residual=x), backend=note, fullgraph=True
    )
    assert torch.allclose(compiled(x), ops.norm_act_conv2d(x, w, padding=1, num_groups=2, residual=x), atol=1e-5)
    assert any("conv2d" in name and "fastgen" not in name for name in seen)
    assert any("group_norm_act" in name for name in seen) and not any("fastgen.norm_act" in name for name in seen)
