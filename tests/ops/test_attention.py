"""attention: PyTorch's scaled_dot_product_attention against the written-out equation, in value and gradient."""

import pytest
import torch
from suite import outer_for

from fastgen import ops
from fastgen.testing import cases, max_error, tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("attention"), ids=str)
def test_parity(case, dtype):
    inputs, exact = case.inputs(dtype), case.inputs(dtype)
    for name in "qkv":
        exact[name] = exact[name].detach().double().requires_grad_()
    ours, reference = ops.attention(**inputs), ops.attention_reference(**exact)
    yardstick = ops.attention_reference(**inputs)
    (outer,) = outer_for([reference])
    tensors = [ours, *torch.autograd.grad(ours, [inputs[n] for n in "qkv"], outer.to(dtype))]
    expected = [reference, *torch.autograd.grad(reference, [exact[n] for n in "qkv"], outer)]
    plain = [yardstick, *torch.autograd.grad(yardstick, [inputs[n] for n in "qkv"], outer.to(dtype))]
    for name, a, r, e in zip(["out", *"qkv"], tensors, expected, plain, strict=True):
        bound = 1e-12 if dtype == torch.float64 else tolerance(r, max_error(e, r), dtype)
        assert a.dtype == dtype and max_error(a, r) <= bound, name


def test_scale_and_causal_mask():
    q, k, v = torch.randn(3, 2, 1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = ops.attention(q, k, v, scale=0.3, causal=True)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])  # the first query sees the first key only
    scores = (q[:, :, 3:4] @ k[:, :, :4].transpose(-1, -2) * 0.3).softmax(-1)
    torch.testing.assert_close(out[:, :, 3:4], scores @ v[:, :, :4])
