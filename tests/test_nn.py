"""fastgen.nn beside the unfused layers of torch.nn with the same state dict, which are what a user had before."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen.errors import UsageError
from fastgen.nn import (
    Attention2d,
    ConvNormAct2d,
    ConvTransposeNormAct2d,
    DiagonalGaussian,
    GroupNormAct,
    NormActConv2d,
    Reparameterize,
)
from fastgen.ops.activations import ACTIVATIONS
from fastgen.tolerance import max_error, tolerance

pytestmark = pytest.mark.usefixtures("one_thread")
# Of Winograd's algorithm, relative to the largest value: sums are regrouped (docs/design.md).
REGROUPED = 1e-5


class Plain(nn.Module):
    """Layers under the names of ours, and the function that a user would write with them."""

    def __init__(self, call: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.call = call

    def forward(self, *args: Tensor) -> Tensor:
        return self.call(self, *args)


@dataclass(frozen=True)
class Case:
    """A layer of ours, the same unfused, and the shapes of what they take (random; None is passed on)."""

    label: str
    make: Callable[..., nn.Module]
    plain: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...] | None, ...]

    def __str__(self) -> str:
        return self.label


def _per_channel(p: Tensor) -> Tensor:
    return p[:, :, None, None]


class PlainGelu(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x), approximate="tanh")


class PlainModulated(nn.GroupNorm):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, skip: Tensor) -> Tensor:
        h = super().forward(torch.cat([x, skip], 1))
        return F.silu(h * (1 + _per_channel(scale)) + _per_channel(shift))


def _everything(m: nn.Module, x: Tensor, scale: Tensor, shift: Tensor, skip: Tensor, residual: Tensor) -> Tensor:
    h = F.gelu(m.norm(torch.cat([x, skip], 1)) * (1 + _per_channel(scale)) + _per_channel(shift))
    return F.relu(m.conv(F.interpolate(h, scale_factor=2.0)) + residual)


def _attend(m: nn.Module, x: Tensor, heads: int = 1, residual: bool = True) -> Tensor:
    n, c = x.shape[:2]
    h = m.group_norm(x).flatten(2).transpose(1, 2)
    q, k, v = (to(h).view(n, -1, heads, c // heads).transpose(1, 2) for to in (m.to_q, m.to_k, m.to_v))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, c)
    h = m.to_out[0](h).transpose(1, 2).reshape(x.shape)
    return x + h if residual else h


def _plain_attention(c: int, groups: int, eps: float, bias: bool = True, **how: Any) -> nn.Module:
    linear = {f"to_{name}": nn.Linear(c, c, bias) for name in "qkv"}
    out = nn.ModuleList([nn.Linear(c, c), nn.Dropout(0.0)])
    return Plain(
        lambda m, x: _attend(m, x, **how), group_norm=nn.GroupNorm(groups, c, eps), **linear, to_out=out
    )  # fmt: skip


CASES = [
    Case("group_norm", lambda **f: GroupNormAct(4, 12, 1e-4, act="gelu_tanh", **f),
         lambda: PlainGelu(4, 12, 1e-4), ((3, 12, 5, 7),)),
    Case("group_norm-3d", lambda **f: GroupNormAct(2, 6, act="none", **f), lambda: nn.GroupNorm(2, 6), ((2, 6, 11),)),
    Case("group_norm-modulated", lambda **f: GroupNormAct(5, 10, **f), lambda: PlainModulated(5, 10),
         ((2, 6, 5, 4), (2, 10), (2, 10), (2, 4, 5, 4))),
    Case("norm_act_conv", lambda **f: NormActConv2d(8, 12, 3, padding=1, num_groups=4, **f),
         lambda: _named(norm=nn.GroupNorm(4, 8), act=nn.SiLU(), conv=nn.Conv2d(8, 12, 3, padding=1)),
         ((2, 8, 9, 6),)),
    Case("norm_act_conv-geometry",
         lambda **f: NormActConv2d(8, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, False, num_groups=2, eps=1e-3,
                                   in_act="relu", **f),
         lambda: _named(norm=nn.GroupNorm(2, 8, 1e-3), act=nn.ReLU(),
                        conv=nn.Conv2d(8, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, bias=False)), ((2, 8, 9, 7),)),
    Case("norm_act_conv-everything",
         lambda **f: NormActConv2d(10, 6, 3, padding=1, num_groups=5, in_act="gelu", act="relu", upsample=2, **f),
         lambda: Plain(_everything, norm=nn.GroupNorm(5, 10), conv=nn.Conv2d(10, 6, 3, padding=1)),
         ((2, 7, 5, 4), (2, 10), (2, 10), (2, 3, 5, 4), (2, 6, 10, 8))),
    Case("conv_norm_act", lambda **f: ConvNormAct2d(5, 8, 4, 2, 1, False, act="leaky_relu", **f),
         lambda: _named(conv=nn.Conv2d(5, 8, 4, 2, 1, bias=False), norm=nn.BatchNorm2d(8), act=nn.LeakyReLU()),
         ((3, 5, 8, 10),)),
    Case("conv_norm_act-residual", lambda **f: ConvNormAct2d(6, 6, 3, padding=1, eps=1e-3, momentum=0.3, **f),
         lambda: Plain(lambda m, x, r: F.relu(m.norm(m.conv(x)) + r), conv=nn.Conv2d(6, 6, 3, padding=1),
                       norm=nn.BatchNorm2d(6, 1e-3, 0.3)), ((3, 6, 5, 7), (3, 6, 5, 7))),
    Case("conv_norm_act-cumulative", lambda **f: ConvNormAct2d(4, 6, 3, momentum=None, act="silu", **f),
         lambda: _named(conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6, momentum=None), act=nn.SiLU()),
         ((3, 4, 6, 7),)),
    Case("conv_norm_act-untracked", lambda **f: ConvNormAct2d(4, 6, 3, track_running_stats=False, affine=False, **f),
         lambda: _named(conv=nn.Conv2d(4, 6, 3), act=nn.ReLU(),
                        norm=nn.BatchNorm2d(6, affine=False, track_running_stats=False), order="conv norm act"),
         ((3, 4, 6, 7),)),
    Case("conv_transpose_norm_act", lambda **f: ConvTransposeNormAct2d(6, 5, 4, 2, 1, bias=False, **f),
         lambda: _named(conv=nn.ConvTranspose2d(6, 5, 4, 2, 1, bias=False), norm=nn.BatchNorm2d(5), act=nn.ReLU()),
         ((3, 6, 5, 4),)),
    Case("conv_transpose_norm_act-residual", lambda **f: ConvTransposeNormAct2d(6, 4, 3, 2, 1, 1, act="tanh", **f),
         lambda: Plain(lambda m, x, r: torch.tanh(m.norm(m.conv(x)) + r), conv=nn.ConvTranspose2d(6, 4, 3, 2, 1, 1),
                       norm=nn.BatchNorm2d(4)), ((2, 6, 4, 5), (2, 4, 8, 10))),
    Case("attention", lambda **f: Attention2d(16, head_dim=4, num_groups=4, eps=1e-6, **f),
         lambda: _plain_attention(16, 4, 1e-6, heads=4), ((2, 16, 5, 6),)),
    Case("attention-heads", lambda **f: Attention2d(12, 3, num_groups=2, bias=False, residual=False, **f),
         lambda: _plain_attention(12, 2, 1e-5, False, heads=3, residual=False), ((2, 12, 3, 4),)),
]  # fmt: skip


def _named(order: str | None = None, **layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict((name, layers[name]) for name in (order.split() if order else layers)))


def pair(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """(ours, the unfused), with the same weights, far from what they begin with."""
    torch.manual_seed(0)
    plain = case.plain()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for name, b in plain.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.uniform_(0.5, 1.5)
    ours = case.make()
    ours.load_state_dict(plain.state_dict())
    return ours.to(dtype), plain.to(dtype)


def inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 1, last: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in case.shapes]
    made = [x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x for x in made]
    return [x.requires_grad_() for x in made]


def results(model: nn.Module, given: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, the gradient of everything that has one, and the statistics that were moved."""
    x = [g.detach().to(dtype).requires_grad_() for g in given]
    y = model(*x)
    g = torch.Generator().manual_seed(2)
    y.backward(torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype))
    found = {"y": y.detach()}
    found |= {f"d{i}": p.grad for i, p in enumerate(x)}
    found |= {f"d {name}": p.grad for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def check(actual: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == exact.keys()
    for name, reference in exact.items():
        assert actual[name] is not None and actual[name].dtype == eager[name].dtype, name
        # A norm behind it takes the bias away again: the gradient is zero, and what is found the rounding of a sum.
        scale = exact["d conv.weight"] if name == "d conv.bias" else reference
        bound = tolerance(scale, max_error(eager[name], reference), dtype)
        if dtype == torch.float32:
            bound = max(bound, REGROUPED * reference.abs().max().item())
        if dtype == torch.float64:  # the same precision as what is called exact
            bound = max(bound, 1e-12 * max(1.0, reference.abs().max().item()))
        assert max_error(actual[name], reference) <= bound, f"{name}: {max_error(actual[name], reference)} > {bound}"


every_case = pytest.mark.parametrize("case", CASES, ids=str)
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@every_case
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_beside_the_unfused(case: Case, training: bool, dtype: torch.dtype) -> None:
    """Forward, every gradient and the running statistics, twice in a row, by the tolerance rule."""
    ours, plain = (m.train(training) for m in pair(case, dtype))
    exact = copy.deepcopy(plain).double()
    for seed in (1, 2):
        given = inputs(case, dtype, seed)
        for m in (ours, plain, exact):
            m.zero_grad()
        found = results(ours, given, dtype), results(exact, given, torch.float64), results(plain, given, dtype)
        check(*found, dtype)


@every_case
@modes
def test_inference(case: Case, training: bool) -> None:
    """Without gradients other kernels run: in evaluation norms are folded into convolutions."""
    ours, plain = (m.train(training) for m in pair(case))
    given = inputs(case)
    with torch.no_grad():
        expected, found = plain(*given), ours(*given)
    assert max_error(found, expected) <= REGROUPED * expected.abs().max().item()
    for name, b in plain.named_buffers():
        assert max_error(ours.get_buffer(name), b) <= REGROUPED * max(1, b.abs().max().item()), name


@every_case
def test_state_dict_both_ways(case: Case) -> None:
    ours, plain = pair(case)
    assert list(ours.state_dict()) == list(case.make().state_dict())
    assert set(ours.state_dict()) == set(plain.state_dict())
    other = case.plain()
    other.load_state_dict(ours.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in other.state_dict().items())


@every_case
def test_new_weights_are_torchs(case: Case) -> None:
    """The same distributions: those of a state that reset_parameters gives, and of the constructor."""
    torch.manual_seed(3)
    made = case.make()
    torch.manual_seed(3)
    plain = case.plain()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in made.state_dict().items())
    again = copy.deepcopy(made)
    with torch.no_grad():
        for p in again.parameters():
            p.fill_(7.0)
    torch.manual_seed(3)
    again.reset_parameters()
    for name, p in again.named_parameters():
        assert (p != 7).any() and p.abs().max() <= 1, name


@every_case
def test_factory_arguments(case: Case) -> None:
    model = case.make(device="meta", dtype=torch.bfloat16)
    floating = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert all(t.device.type == "meta" and t.dtype == torch.bfloat16 for t in floating)


@every_case
def test_channels_last_stays(case: Case) -> None:
    ours, _ = pair(case)
    given = inputs(case, last=True)
    y = ours.eval()(*given)
    assert max_error(y, ours(*inputs(case))) <= REGROUPED * y.abs().max().item()
    if y.ndim == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert ours(*inputs(case)).is_contiguous()


@every_case
@modes
def test_compiles_whole(case: Case, training: bool) -> None:
    if case.label.endswith("cumulative") and training:
        pytest.skip("the count of batches becomes a Python number, as in nn.BatchNorm2d")
    ours, _ = pair(case)
    ours.train(training)
    eager, given = copy.deepcopy(ours), inputs(case)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    y, expected = compiled(*given), eager(*given)
    assert max_error(y, expected) <= REGROUPED * expected.abs().max().item()
    y.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    for name, b in eager.named_buffers():
        assert max_error(ours.get_buffer(name), b) <= 1e-5, name


@every_case
def test_autocast(case: Case) -> None:
    ours, plain = pair(case)
    given = inputs(case)
    expected = plain.train()(*given)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours.train()(*given)
    y.sum().backward()
    assert y.dtype in (torch.float32, torch.bfloat16)  # kernels of ours keep x's, PyTorch's convolution does not
    assert max_error(y, expected) <= 0.05 * expected.abs().max().item()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@every_case
def test_deepcopy_is_apart(case: Case) -> None:
    ours, _ = pair(case)
    twin, given = copy.deepcopy(ours).eval(), inputs(case)
    expected = ours.eval()(*given)
    assert torch.equal(twin(*given), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert torch.equal(ours(*given), expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ("norm_act_conv", "conv_norm_act")], ids=str)
def test_second_derivatives(case: Case) -> None:
    ours, _ = pair(case, torch.float64)
    small = [(2, *shape[1:2], 4, 4) for shape in case.shapes]
    x = [torch.randn(s, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for s in small]
    names, parameters = zip(*ours.named_parameters(), strict=True)

    def call(x: Tensor, *p: Tensor) -> Tensor:
        return torch.func.functional_call(ours, dict(zip(names, p, strict=True)), (x,))

    given = [x[0].requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters)]
    ours.eval()
    torch.autograd.gradgradcheck(call, given, atol=1e-4)


@pytest.mark.parametrize(
    "layer", [lambda act: GroupNormAct(2, 4, act=act), lambda act: NormActConv2d(4, 4, 3, num_groups=2, in_act=act),
              lambda act: ConvNormAct2d(4, 4, 3, act=act), lambda act: ConvTransposeNormAct2d(4, 4, 3, act=act)],
    ids=["GroupNormAct", "NormActConv2d", "ConvNormAct2d", "ConvTransposeNormAct2d"],
)  # fmt: skip
def test_every_activation(layer: Callable[[str], nn.Module]) -> None:
    x = torch.randn(2, 4, 5, 5)
    outputs = []
    for act in ACTIVATIONS:
        torch.manual_seed(0)
        made = layer(act)
        assert f"act={act}" in repr(made)
        outputs.append(made(x))
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    with pytest.raises(ValueError, match="act must be one of"):
        layer("swish")


BAD = {
    "groups": (lambda: GroupNormAct(3, 8), "num_channels|num_groups"),
    "channels": (lambda: GroupNormAct(2, 8, affine=False)(torch.randn(1, 6, 4, 4)), "x: .*8 channels"),
    "skip": (lambda: GroupNormAct(2, 8)(torch.randn(1, 6, 4, 4), skip=torch.randn(1, 4, 4, 4)), "x and skip together"),
    "scale": (lambda: GroupNormAct(2, 8)(torch.randn(1, 8, 4, 4), torch.randn(8)), "scale must"),
    "same": (lambda: NormActConv2d(4, 4, 3, padding="same", num_groups=2), "padding: 'same'"),
    "same batch": (lambda: ConvNormAct2d(4, 4, 3, padding="same"), "padding: 'same'"),
    "conv channels": (lambda: NormActConv2d(4, 4, 3, num_groups=2)(torch.randn(1, 6, 4, 4)), "x: .*4 channels"),
    "residual": (lambda: ConvNormAct2d(4, 4, 3)(torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)), "residual must"),
    "small": (lambda: ConvNormAct2d(4, 4, 7)(torch.randn(2, 4, 5, 5)), "too small"),
    "one value": (lambda: ConvNormAct2d(4, 4, 3)(torch.randn(1, 4, 3, 3)), "more than one value"),
    "output padding": (lambda: ConvTransposeNormAct2d(4, 4, 3, 2, output_padding=2)(torch.randn(2, 4, 3, 3)), "output"),
    "heads": (lambda: Attention2d(8, 3, num_groups=2), "heads: 3 does not divide"),
    "head dim": (lambda: Attention2d(8, head_dim=16, num_groups=2), "head_dim: 16 does not divide"),
    "both": (lambda: Attention2d(8, 2, head_dim=4, num_groups=2), "not both"),
    "attention x": (lambda: Attention2d(8, num_groups=2)(torch.randn(1, 8, 4)), r"x: must be \[N, 8, H, W\]"),
    "odd moments": (lambda: DiagonalGaussian(torch.randn(2, 5, 4)), "moments: must be"),
    "integer moments": (lambda: DiagonalGaussian(torch.zeros(2, 4, dtype=torch.int64)), "moments: must be"),
    "two sources": (
        lambda: DiagonalGaussian(torch.randn(2, 4)).sample(torch.randn(2, 2), torch.arange(2)), "noise: give one"),
    "noise": (lambda: DiagonalGaussian(torch.randn(2, 4)).sample(torch.randn(2, 3)), "noise must have"),
    "other": (lambda: DiagonalGaussian(torch.randn(2, 4)).kl(DiagonalGaussian(torch.randn(2, 6))), "other: must be"),
    "likelihood": (lambda: DiagonalGaussian(torch.randn(2, 4)).nll(torch.randn(2, 4)), "x: must be"),
    "logvar": (lambda: Reparameterize()(torch.randn(2, 4), torch.randn(2, 3)), "logvar must have"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    call, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        call()


def test_synchronised_norms_are_refused() -> None:
    """They would be trained on one process's statistics."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(ConvNormAct2d(4, 4, 3))
    with pytest.raises(UsageError, match="norm: SyncBatchNorm"):
        model(torch.randn(2, 4, 5, 5))


def test_frozen_norm_in_training() -> None:
    """People freeze the statistics by norm.eval() inside a model in training."""
    ours, plain = pair(CASES[[c.label for c in CASES].index("conv_norm_act")])
    for m in (ours, plain):
        m.train()
        m.norm.eval()
    given, before = inputs(CASES[6]), ours.norm.running_mean.clone()
    assert max_error(ours(*given), plain(*given)) <= 1e-5
    assert torch.equal(ours.norm.running_mean, before) and ours.norm.num_batches_tracked == 0


def test_attention_loads_diffusers_weights() -> None:
    models = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    theirs = models.Attention(
        16, heads=2, dim_head=8, eps=1e-6, norm_num_groups=4, residual_connection=True, bias=True, upcast_softmax=True,
        _from_deprecated_attn_block=True,
    )  # fmt: skip
    ours = Attention2d(16, head_dim=8, num_groups=4, eps=1e-6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 6, 5)
    assert max_error(ours(x), theirs(x)) <= 1e-5
    theirs.load_state_dict(ours.state_dict())


# Gaussians


def gaussian(shape: tuple[int, ...] = (3, 8, 4, 5), dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def torchs(posterior: DiagonalGaussian) -> torch.distributions.Normal:
    return torch.distributions.Normal(posterior.mean.double(), posterior.std.double())


@pytest.mark.parametrize("shape", [(3, 8, 4, 5), (2, 6), (2, 4, 7), (0, 4, 3)], ids=str)
def test_gaussian_beside_torchs(shape: tuple[int, ...]) -> None:
    p, q = DiagonalGaussian(gaussian(shape)), DiagonalGaussian(gaussian(shape, seed=1))
    exact, other = torchs(p), torchs(q)
    standard = torch.distributions.Normal(0.0, 1.0)

    def close(found: Tensor, expected: Tensor) -> None:
        assert found.shape == shape[:1] and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected.flatten(1).sum(1), rtol=1e-5, atol=1e-5)

    close(p.kl(), torch.distributions.kl_divergence(exact, standard))
    close(p.kl(q), torch.distributions.kl_divergence(exact, other))
    x = p.sample(generator=torch.Generator().manual_seed(4))
    close(p.log_prob(x), exact.log_prob(x.double()))
    close(p.nll(x), -exact.log_prob(x.double()))
    assert torch.equal(p.mode(), p.mean) and torch.allclose(p.var, p.std.square())


def test_gaussian_beside_diffusers() -> None:
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    moments = gaussian() * 20  # beyond both clamps
    ours, theirs = DiagonalGaussian(moments), vae.DiagonalGaussianDistribution(moments)
    for name in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.manual_seed(5)
    z = ours.sample()
    torch.manual_seed(5)
    expected = theirs.sample()
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(z, ours.sample(generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(ours.kl(), theirs.kl(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.nll(z), theirs.nll(z), rtol=1e-5, atol=0)
    half, other = DiagonalGaussian(moments / 40), vae.DiagonalGaussianDistribution(moments / 40)
    near, far = DiagonalGaussian(gaussian(seed=3)), vae.DiagonalGaussianDistribution(gaussian(seed=3))
    torch.testing.assert_close(half.kl(near), other.kl(far), rtol=1e-5, atol=0)


def test_gaussian_from_noise_and_from_seeds() -> None:
    p, noise, seeds = DiagonalGaussian(gaussian()), torch.randn(3, 4, 4, 5), torch.tensor([5, -6, 7])
    torch.testing.assert_close(p.sample(noise), p.mean + p.std * noise)
    assert torch.equal(p.sample(seeds=seeds)[1:2], DiagonalGaussian(gaussian()[1:2]).sample(seeds=seeds[1:2]))
    z, kl = p.sample_and_kl(seeds=seeds)
    assert torch.equal(z, p.sample(seeds=seeds))
    torch.testing.assert_close(kl, p.kl())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_gaussian_in_half_precision(dtype: torch.dtype) -> None:
    """The sums are in fp32: over 4096 latents those of fp16 overflow."""
    p = DiagonalGaussian(gaussian((2, 8, 32, 32), dtype))
    assert p.sample().dtype == dtype
    exact = torch.distributions.kl_divergence(torchs(p), torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    for kl in (p.kl(), p.sample_and_kl()[1]):
        assert kl.dtype == torch.float32
        torch.testing.assert_close(kl.double(), exact, rtol=0.02, atol=0)


def test_gaussian_gradients() -> None:
    """Through sample, kl and nll into the moments; none through the clamp."""

    def grad(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(call(x), x)[0]

    x, noise = gaussian((2, 6, 3)).double(), torch.randn(2, 3, 3, dtype=torch.float64)

    def plain(m: Tensor) -> Tensor:
        mean, logvar = m.chunk(2, 1)
        z = mean + torch.exp(0.5 * logvar) * noise
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
        return z.square().sum() + kl + (0.5 * (logvar + (noise - mean) ** 2 / logvar.exp())).sum()

    def ours(m: Tensor) -> Tensor:
        p = DiagonalGaussian(m)
        return p.sample(noise).square().sum() + p.kl().sum() + p.nll(noise).sum()

    torch.testing.assert_close(grad(ours, x), grad(plain, x))
    assert (grad(lambda m: DiagonalGaussian(m).kl().sum(), torch.full((1, 2), 25.0))[:, 1] == 0).all()


def test_reparameterize_is_what_people_write() -> None:
    mu, logvar = gaussian((4, 16)), gaussian((4, 16), seed=1)
    torch.manual_seed(6)
    z, kl = Reparameterize()(mu, logvar)
    torch.manual_seed(6)
    expected = mu + torch.exp(0.5 * logvar) * torch.randn_like(logvar)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(kl, -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), dim=1))
    noise, seeds = torch.randn(4, 16), torch.arange(4)
    torch.testing.assert_close(Reparameterize()(mu, logvar, noise)[0], mu + torch.exp(0.5 * logvar) * noise)
    assert torch.equal(Reparameterize()(mu, logvar, seeds=seeds)[0], Reparameterize()(mu, logvar, seeds=seeds)[0])
    assert not list(Reparameterize().state_dict())


def test_latents_compile_whole() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(moments: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = DiagonalGaussian(moments)
        return (*p.sample_and_kl(noise), p.nll(noise))

    moments, noise = gaussian(), torch.randn(3, 4, 4, 5)
    p = DiagonalGaussian(moments)
    for found, expected in zip(step(moments, noise), (*p.sample_and_kl(noise), p.nll(noise)), strict=True):
        torch.testing.assert_close(found, expected)
    z, _ = torch.compile(Reparameterize(), fullgraph=True, backend="aot_eager")(noise, noise)
    assert z.isfinite().all() and math.isclose(z.shape[0], 3)


def test_public_and_lazy() -> None:
    assert fastgen.nn.GroupNormAct is GroupNormAct and "nn" in dir(fastgen)
    assert set(fastgen.nn.__all__) == {
        "Attention2d", "ConvNormAct2d", "ConvTransposeNormAct2d", "DiagonalGaussian", "GroupNormAct", "NormActConv2d",
        "Reparameterize",
    }  # fmt: skip
