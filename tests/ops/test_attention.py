"""attention: the suite, and its layouts, its mask, extreme values, arguments."""

import pytest
import torch
from suite import VIEWS, OpSuite, errors, places

from fastgen import backends, ops, testing, use_backend

PLACES = places("attention")
KERNELS = [place for place in PLACES if place.backend != "reference"]  # the rule is for ours
INF, NAN = float("inf"), float("nan")


class TestAttention(OpSuite):
    op = "attention"
    few = ("2x3x17x8", "2x2x9x5-causal", "2x1x70x24-keys7-causal")
    at_size = testing._attention(2, 3, 300, 40, keys=517)
    second_derivatives = True

    def matrix(self, found):
        """The rule is for ours: PyTorch's attention breaks it here and there."""
        return super().matrix([place for place in found if place.backend != "reference"])

    @pytest.mark.parametrize("view", VIEWS)
    def test_views(self, place, few, view):
        if place.backend == "reference":
            pytest.skip("promised of kernels; PyTorch's products follow alignment")
        super().test_views(place, few, view)

    def derivatives(self, check, place, case, fast):
        """The second derivative is the reference's whatever the backend: interpreted, the smallest case will do."""
        if place.interpreted and case.label != "2x2x9x5-causal":
            pytest.skip("one case in the interpreter")
        super().derivatives(check, place, case, fast)

    def test_penalty(self, place, few):
        if place.interpreted:
            pytest.skip("as gradgradcheck, which one case passes in the interpreter")
        super().test_penalty(place, few)


def made(*shape, keys=None, seed=0, dtype=torch.float32, factor=1.0):
    """q, k, v, the first two times a factor."""
    g = torch.Generator().manual_seed(seed)
    n, h, length, d = shape
    sizes = (length, keys or length, keys or length)
    q, k, v = (torch.randn(n, h, m, d, generator=g, dtype=torch.float64) for m in sizes)
    return [x.to(dtype) for x in (q * factor, k * factor, v)]


@pytest.mark.parametrize("d", [*range(1, 18), 23, 24, 31, 32, 40, 48, 63, 64, 65, 80, 96, 128, 130])
def test_head_dims(d):
    """Widths of one vector, of several and between; lengths of one row more than a block."""
    case = testing._attention(1, 2, 49, d, keys=130)
    for place in KERNELS:
        if place.interpreted and d not in (1, 8, 17, 64, 130):
            continue
        assert not errors(case, place, torch.float32, False)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 11, 13, 47, 48, 97])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(length, causal):
    for keys in (1, 8, 15, 16, 17, 127, 128, 129, 257):
        case = testing._attention(1, 1, length, 12, keys=keys, causal=causal)
        for place in KERNELS:
            if not place.interpreted or (length in (1, 7, 97) and keys in (1, 17, 129)):
                assert not errors(case, place, torch.float32, False), keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1e-3, 3.0, 8.0])
def test_scores_small_and_large(dtype, factor):
    """Where scores are small the kernel takes off no maximum; where they are large it must."""

    def make(g):
        q, k, v = (torch.randn(1, 2, 60, 16, generator=g, dtype=torch.float64) for _ in range(3))
        return {"q": q * factor, "k": k * factor, "v": v, "causal": False}

    case = testing.OpCase("attention", f"factor{factor}", make, ("q", "k", "v"))
    for place in KERNELS:
        # The interpreter's products are NumPy's, which rounds q kᵀ and k qᵀ differently: by too much for fp32 scores of
        # hundreds, and not as a GPU does, which adds the terms of both in one order.
        if not place.interpreted or (dtype != torch.bfloat16 and (factor, dtype) != (8.0, torch.float32)):
            assert not errors(case, place, dtype, False)


def test_maximum_that_grows_with_every_block():
    q, k, v = made(1, 1, 7, 8, keys=700, dtype=torch.float64)
    k = k * torch.linspace(0, 40, 700, dtype=torch.float64)[:, None]
    expected = ops.attention_reference(q, k, v)
    for place in PLACES:
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
            actual = ops.attention(*(x.to(place.device, dtype) for x in (q, k, v)), backend=place.backend)
            assert (actual.cpu() - expected).abs().max() <= bound


def test_scale_and_causal_mask():
    q, k, v = made(1, 2, 6, 4, dtype=torch.float64)
    for place in PLACES:
        out = ops.attention(*(x.to(place.device) for x in (q, k, v)), scale=0.3, causal=True, backend=place.backend)
        out = out.cpu()
        torch.testing.assert_close(out[:, :, 0], v[:, :, 0])  # the first query sees the first key only
        scores = (q[:, :, 3:4] @ k[:, :, :4].transpose(-1, -2) * 0.3).softmax(-1)
        torch.testing.assert_close(out[:, :, 3:4], scores @ v[:, :, :4])


@pytest.mark.parametrize("scale", [0.0, -0.7, 2.0])
def test_any_scale(scale):
    q, k, v = (x.requires_grad_() for x in made(2, 1, 9, 6, dtype=torch.float64))
    expected = ops.attention_reference(q, k, v, scale)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for place in PLACES:
        leaves = [x.detach().to(place.device).requires_grad_() for x in (q, k, v)]
        out = ops.attention(*leaves, scale=scale, backend=place.backend)
        torch.testing.assert_close(out.cpu(), expected)
        for a, e in zip(torch.autograd.grad(out.square().sum(), leaves), gradients, strict=True):
            torch.testing.assert_close(a.cpu(), e)


# Layouts


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "one projection"])
def test_heads_that_are_views_of_tokens(fused):
    """[N, L, h, D] in memory, as projections give it: read without a copy, and the result lies the same way."""
    n, length, h, d = 2, 19, 3, 8
    for place in PLACES:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(n, length, 3 * h * d, generator=g).to(place.device)
        parts = x.chunk(3, dim=-1) if fused else [c.contiguous() for c in x.chunk(3, dim=-1)]
        q, k, v = (c.view(n, length, h, d).transpose(1, 2).detach().requires_grad_() for c in parts)
        dense = [c.detach().contiguous().requires_grad_() for c in (q, k, v)]
        out, expected = (ops.attention(*a, backend=place.backend) for a in ((q, k, v), dense))
        assert out.transpose(1, 2).is_contiguous() and expected.is_contiguous()
        torch.testing.assert_close(out, expected)
        weight = torch.linspace(-1, 1, out.numel(), device=place.device).view(out.shape)
        for a, e in zip(
            torch.autograd.grad((out * weight).sum(), (q, k, v)),
            torch.autograd.grad((expected * weight).sum(), dense),
            strict=True,
        ):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("shape", [(2, 3, 0, 4, 5), (2, 3, 5, 4, 0), (2, 0, 5, 4, 5), (0, 3, 5, 4, 5)], ids=str)
def test_without_elements(shape):
    n, h, length, d, keys = shape
    for place in PLACES:
        q, k, v = (torch.ones(n, h, m, d, device=place.device, requires_grad=True) for m in (length, keys, keys))
        out = ops.attention(q, k, v, backend=place.backend)
        assert out.shape == q.shape and not out.any()  # a sum over no key is 0
        assert all(
            g.shape == x.shape for g, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True)
        )


# Values


def extremes():
    """q, k, v in which some element is NaN or infinite, by what is so."""
    for where in range(3):
        for value in (NAN, INF, -INF):
            inputs = made(1, 2, 20, 8, keys=150)
            inputs[where][0, 0, 13, 2] = value
            yield f"{'qkv'[where]}={value}", inputs
    q, k, v = made(1, 1, 5, 4, keys=200)
    k[:, :, :140, 0], q[..., 0] = -INF, 1.0
    yield "a block of keys at -inf", [q, k, v]
    k = k.clone()
    k[..., 0] = -INF
    yield "every key at -inf", [q, k, v]
    yield "large v", [*made(1, 1, 5, 4)[:2], torch.full((1, 1, 5, 4), 3e37)]


def test_nan_and_infinity_as_eager():
    for place in KERNELS:
        for name, inputs in extremes():
            actual = ops.attention(*(x.to(place.device) for x in inputs), backend=place.backend).cpu()
            expected = ops.attention_reference(*inputs)
            torch.testing.assert_close(actual, expected, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_of_nan_are_nan():
    for place in PLACES:
        for where in range(3):
            inputs = made(1, 2, 20, 8, keys=150)
            inputs[where][0, 0, 13, 2] = NAN
            leaves = [x.to(place.device).requires_grad_() for x in inputs]
            grads = torch.autograd.grad(ops.attention(*leaves, backend=place.backend).sum(), leaves)
            assert all(g[0, 1].isfinite().all() for g in grads)  # the other head
            assert grads[0][0, 0, 13].isnan().all() and grads[1][0, 0].isnan().any()


def test_hidden_keys_play_no_part():
    q, k, v = made(1, 1, 40, 8)
    k[:, :, 30:], v[:, :, 30:] = NAN, 1e30
    for place in KERNELS:
        out = ops.attention(*(x.to(place.device) for x in (q, k, v)), causal=True, backend=place.backend).cpu()
        assert out[:, :, :30].abs().max() < 10 and out[:, :, 30:].isnan().all()


# Backends


def test_backward_may_follow_another_backend():
    """A compiled forward chooses in each call, its backward once: what one left for the other must be the same."""
    if len(PLACES) < 2:
        pytest.skip("one backend")
    q, k, v = made(1, 2, 9, 8)
    found = {}
    for place in PLACES:
        if place.device == "cpu":
            out, sums = torch.ops.fastgen.attention(q, k, v, None, True, place.backend)
            for other in PLACES:
                if other.device == "cpu":
                    args = (torch.ones_like(out), q, k, v, out, sums, None, True, other.backend)
                    found[str(place), str(other)] = torch.ops.fastgen.attention_bwd(*args)
    first, *rest = found.values()
    for grads in rest:
        torch.testing.assert_close(grads, first)


def test_auto_takes_the_kernel_where_it_wins(monkeypatch):
    real, seen = backends.kernel, []
    monkeypatch.setattr(backends, "kernel", lambda *args: seen.append(args) or real(*args))
    for d, keys, dtype, wins in (
        (64, 5, torch.float32, True), (65, 5, torch.float32, False), (32, 4097, torch.float32, False),
        (128, 5, torch.bfloat16, True), (8, 5, torch.float64, False),
    ):  # fmt: skip
        seen.clear()
        q, k, v = (x.requires_grad_() for x in made(1, 1, 5, d, keys=keys, dtype=dtype))
        ops.attention(q, k, v).sum().backward()
        assert len(seen) == (2 if wins and backends.preferred("attention", "cpu") == "cpp" else 0)
        if backends.why_not("attention", "cpp", "cpu") is None:
            with use_backend("cpp"):
                ops.attention(q, k, v)
            assert seen[-1][1:] == ("attention_fwd", "cpp")  # asked for, it runs in any case


def test_use_backend():
    q, k, v = made(1, 2, 9, 8)
    with use_backend("reference"):
        assert torch.equal(ops.attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


# Arguments


def wrong():
    q, k, v = made(2, 3, 5, 4)
    yield "q", (q[0], k, v)
    yield "q", (q.long(), k, v)
    yield "q", (q[..., :0], k[..., :0], v[..., :0])
    yield "k", (q, k[:1], v)
    yield "k", (q, k[:, :2], v)
    yield "k", (q, k[..., :3], v)
    yield "k", (q, k[0], v)
    yield "v", (q, k, v[:, :, :4])
    yield "v", (q, k, v[..., :3])
    yield "k", (q, k.double(), v)
    yield "v", (q, k, v.half())
    yield "k", (q, k.to("meta"), v)
    yield "v", (q, k, v.to("meta"))


@pytest.mark.parametrize(("name", "args"), list(wrong()))
def test_wrong_arguments_are_named(name, args):
    with pytest.raises(ValueError, match=f"^{name} "):
        ops.attention(*args)
