"""fastgen.accelerate on small networks, each with one trap: what may be fused, and what stays as it was."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastgen
from fastgen.acceleration.accelerating import ATTRIBUTE
from fastgen.acceleration.observing import tensors

C = 16


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():  # nothing is said that a test does not ask for
        warnings.filterwarnings("error", message=".*fastgen.*", category=UserWarning)
        yield


class Block(nn.Module):
    """norm → act → conv, twice, with a residual."""

    def __init__(self, inplace: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, C), nn.GroupNorm(4, C)
        self.conv1, self.conv2 = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        self.act, self.dropout = nn.SiLU(inplace=inplace), nn.Dropout(dropout)

    def forward(self, x):
        h = self.conv1(self.act(self.norm1(x)))
        return x + self.conv2(self.dropout(self.act(self.norm2(h))))


class Function(nn.Module):
    """A forward that is a function of a block and an image."""

    def __init__(self, forward, **options) -> None:
        super().__init__()
        self.block, self.function = Block(**options), forward

    def forward(self, x, *rest):
        return self.function(self.block, x, *rest)


def places(model: nn.Module) -> list[tuple[str, str]]:
    found = model.__dict__[ATTRIBUTE].found
    return [(p.name, p.op) for r in found for p in r.places]


def image(n: int = 2, size: int = 12) -> torch.Tensor:
    return torch.randn(n, C, size, size)


def run(model: nn.Module, *args, grad: bool = True):
    """Outputs and gradients, of parameters and of images."""
    given = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        outputs = tensors(model(*given))
        if not grad:
            return outputs
        weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)) for i, o in enumerate(outputs)]
        wanted = [*model.parameters(), *(g for g in given if isinstance(g, torch.Tensor) and g.requires_grad)]
        return outputs + [g for g in torch.autograd.grad(outputs, wanted, weights, allow_unused=True) if g is not None]


def close(a, b, error: float = 1e-5) -> None:
    assert len(a) == len(b)
    scale = max(x.norm().item() for x in b if x.is_floating_point())
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        if not x.is_floating_point():
            assert torch.equal(x, y)
            continue
        # A bias before a norm has no gradient but rounding.
        assert (x - y).norm() <= error * max(y.norm().item(), 1e-2 * scale), (x - y).norm() / y.norm()


def same(model: nn.Module, *args, count: int | None = None, error: float = 1e-5) -> list[tuple[str, str]]:
    """Accelerated, the model computes what it did, outputs, gradients and buffers; what was replaced in it."""
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    for grad in (True, False):
        ours, theirs = run(model, *args, grad=grad), run(plain, *args, grad=grad)
        close(ours, theirs, error)
        if not grad:
            assert [t.stride() for t in ours] == [t.stride() for t in theirs]
    close([*model.buffers()], [*plain.buffers()], error) if list(plain.buffers()) else None
    found = [(p.name, p.op) for p in model.__dict__[ATTRIBUTE].found[0].places] if ATTRIBUTE in model.__dict__ else []
    assert count is None or len(found) == count, found
    return found


# What is replaced


def test_norm_act_conv_and_residual():
    assert same(Block(), image()) == [("conv1", "norm_act_conv2d"), ("conv2", "norm_act_conv2d")]


def test_inplace_activation_is_part_of_the_place():
    assert same(Block(inplace=True), image(), count=2)


def test_dropout_in_training_keeps_its_random_numbers():
    found = same(Block(dropout=0.3), image())
    assert found == [("conv1", "norm_act_conv2d"), ("norm2", "group_norm_act"), ("conv2", "conv2d")]


def test_dropout_in_evaluation_is_looked_through():
    assert same(Block(dropout=0.3).eval(), image(), count=2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(transposed, training):
    conv = nn.ConvTranspose2d(C, C, 4, 2, 1, bias=False) if transposed else nn.Conv2d(C, C, 3, padding=1)
    model = nn.Sequential(conv, nn.BatchNorm2d(C), nn.ReLU(True)).train(training)
    op = "conv_transpose2d_norm_act" if transposed else "conv2d_norm_act"
    assert same(model, image()) == [("0", op)]
    assert model[1].num_batches_tracked.item() == (2 if training else 0)


def test_residual_before_the_activation():
    def forward(block, x):
        h = F.batch_norm(block.conv1(x), None, None, training=True)
        h += x
        return F.relu_(h)

    assert same(Function(forward), image()) == [("block.conv1", "conv2d_norm_act")]


def test_scale_and_shift_and_bias_of_each_image():
    def forward(block, x, e):
        scale, shift = e[:, :, None, None].chunk(2, dim=1)
        h = block.conv1(F.silu(block.norm1(x))) + e[:, :C].unsqueeze(-1).unsqueeze(-1)
        return block.conv2(F.silu(block.norm2(h) * (1 + scale) + shift))

    found = same(Function(forward), image(), torch.randn(2, 2 * C))
    assert found == [("block.conv1", "norm_act_conv2d"), ("block.conv2", "norm_act_conv2d")]


def test_upsampling_and_two_sources():
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(4, 2 * C), nn.Conv2d(2 * C, C, 3, padding=1)
            self.shortcut, self.up = nn.Conv2d(2 * C, C, 1), nn.Conv2d(C, C, 3, padding=1)

        def forward(self, x, y):
            x = torch.cat([x, y], dim=1)
            x = self.conv(F.silu(self.norm(x))) + self.shortcut(x)
            return self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    found = same(Up(), image(), image())
    assert sorted(found) == [("conv", "norm_act_conv2d"), ("shortcut", "conv2d"), ("up", "conv2d")]


@pytest.mark.parametrize("how", ["sdpa", "matmul", "bmm", "baddbmm", "einsum", "einsum channels"])
def test_attention(how):
    def forward(block, q, k, v):
        scale = q.shape[-1] ** -0.5
        if how == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        if how == "matmul":
            return ((q @ k.transpose(-1, -2)) * scale).softmax(-1) @ v
        if how == "bmm":
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            return torch.bmm(F.softmax(torch.bmm(q * scale, k.mT), dim=-1), v)
        if how == "baddbmm":
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            empty = torch.empty(q.shape[0], q.shape[1], k.shape[1])
            return torch.baddbmm(empty, q, k.mT, beta=0, alpha=scale).softmax(dim=-1) @ v
        if how == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
            return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v)
        q, k, v = (x.transpose(-1, -2) for x in (q * scale, k, v))
        scores = torch.einsum("b h c i, b h c j -> b h i j", q, k)
        return torch.einsum("bhij,bhdj->bhid", scores.softmax(dim=-1), v)

    args = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    assert [op for _, op in same(Function(forward), *args, error=1e-4)] == ["attention"]


@pytest.mark.parametrize("how", ["plain", "in place", "deviation used"])
def test_reparameterisation(how):
    def forward(block, mu, logvar):
        std = torch.exp(0.5 * logvar)
        noise = torch.randn_like(std)
        if how == "in place":
            return noise.mul(std).add_(mu)
        z = mu + std * noise
        return (z, std) if how == "deviation used" else z

    assert [op for _, op in same(Function(forward), torch.randn(4, 8), torch.randn(4, 8))] == ["reparameterize"]


# What must not be


def test_a_value_that_others_see_is_kept():
    def forward(block, x):
        h = block.norm1(x)
        return block.conv1(F.silu(h)), h

    assert same(Function(forward), image()) == [("block.norm1", "group_norm_act"), ("block.conv1", "conv2d")]


def test_a_value_that_is_changed_later_in_place():
    def forward(block, x):
        h = block.conv1(x)
        y = h * 2
        h += x  # y was made of h as it was before
        return F.relu_(h), y

    same(Function(forward), image())


def test_a_residual_that_is_written_to_in_place_by_the_sum():
    def forward(block, x):
        r = x * 1.5
        view = r[:, :1]
        r += block.conv1(x)
        return r, view * 2

    same(Function(forward), image())


def test_an_input_that_is_written_to_in_between():
    def forward(block, x):
        x = x + 0
        h = block.norm1(x)
        x.mul_(2)
        return block.conv1(F.silu(h)) + x, block.conv2(F.silu(block.norm2(x)))

    model = Function(forward)  # without gradients, for PyTorch's norm needs its input as it was
    plain, x = copy.deepcopy(model), image()
    fastgen.accelerate(model)
    close(run(model, x, grad=False), run(plain, x, grad=False))
    assert ("block.conv1", "norm_act_conv2d") not in places(model)
    assert ("block.conv2", "norm_act_conv2d") in places(model)


def test_a_residual_that_is_written_to_afterwards():
    def forward(block, x):
        r = x * 2
        y = block.conv1(x) + r
        r.zero_()
        return y, block.conv2(F.silu(block.norm2(y)))

    same(Function(forward), image())


def test_a_view_that_is_written_to():
    def forward(block, x):
        h = block.conv1(x)
        h[:, :2].zero_()
        h.view(-1)[:5] = 7.0
        return block.conv2(h)

    same(Function(forward), image())


def test_views_of_what_lies_otherwise_now():
    def forward(block, x):
        h = block.conv1(x)
        flat = h.view(h.shape[0], -1)
        tokens = block.conv2(h).view(x.shape[0], C, -1).transpose(1, 2)
        return flat, tokens.reshape(x.shape[0], -1, 4), torch.as_strided(h, (3, 3), (7, 1))

    same(Function(forward), image())


def test_noise_is_drawn_where_it_was():
    def forward(block, x):
        h = block.conv1(x)
        return h + torch.randn_like(h) + torch.bernoulli(torch.sigmoid(h.detach()) * 0 + 0.5)

    same(Function(forward), image())


def test_a_hook_sees_what_it_saw():
    model, seen = Block(), []
    model.norm1.register_forward_hook(lambda m, i, o: seen.append(o.detach().clone()))
    model.conv1.register_forward_pre_hook(lambda m, i: (i[0] * 1.25,))
    same(model, image())
    assert len(seen) == 4  # ours and theirs, with gradients and without
    close(seen[::2], seen[1::2])


def test_full_backward_hooks():
    model, seen = Block(), []
    model.conv1.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].norm().item()))
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastgen.accelerate(model)
        x = image()
        close(run(model, x), run(plain, x))
    assert len(seen) == 2 and seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_a_graph_break_costs_fusions_and_nothing_else():
    def forward(block, x):
        h = block.conv1(F.silu(block.norm1(x)))
        if h.sum().item() > 1e9:
            return h
        return block.conv2(F.silu(block.norm2(h)))

    assert same(Function(forward), image())


def test_gradient_checkpoints():
    def forward(block, x):
        return checkpoint(block, x, use_reentrant=False)

    assert same(Function(forward), image()) == [("block.conv1", "norm_act_conv2d"), ("block.conv2", "norm_act_conv2d")]


def test_autocast():
    model = Block()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    x = image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = run(model, x), run(plain, x)
    close(ours, theirs, 3e-2)
    close(run(model, x), run(plain, x))


def test_second_derivatives():
    model = Block()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    penalties = []
    x = image().requires_grad_()
    for m in (model, plain):
        (g,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(g.square().sum(), list(m.parameters()), allow_unused=True))
    close(*[[g for g in p if g is not None] for p in penalties], 1e-4)


def _shared_norm(block, x):
    first, second = block.conv1(x), block.conv2(x * 2)
    first, second = block.bn(first), block.bn(second)  # updates the same statistics, in this order
    return F.relu(second) * 2 + F.relu(first) + block.conv1(F.silu(block.norm1(x)))


def _statistics_read_in_between(block, x):
    h = block.bn(block.conv1(x))
    mean = block.bn.running_mean.clone()
    return F.relu(h) + mean[:, None, None] + block.conv1(F.silu(block.norm1(x)))


def _sum_of_a_finer_dtype(block, x):
    return F.relu(block.bn(block.conv1(x)) + x.double())


@pytest.mark.parametrize("forward", [_shared_norm, _statistics_read_in_between, _sum_of_a_finer_dtype])
def test_batch_norms_that_look_alike(forward):
    model = Function(forward)
    model.block.bn = nn.BatchNorm2d(C, momentum=0.5)
    same(model, image())


def test_attention_whose_scores_are_rounded():
    def forward(block, q, k, v):
        return torch.div(q @ k.mT, 0.5, rounding_mode="floor").softmax(-1) @ v

    model = fastgen.accelerate(Function(forward), filter=lambda name, module: True)
    x = [torch.randn(2, 2, 10, 8) for _ in range(3)]
    close([model(*x)], [forward(None, *x)])
    assert not places(model)


def test_deviations_that_others_see_changed_in_place():
    def forward(block, mu, logvar, noise):
        half = 0.5 * logvar
        z = mu + half.exp_() * noise
        deviation = torch.exp(0.5 * logvar)
        y = deviation.mul_(noise).add_(mu)
        return z, half * 1, y * 1, deviation * 1

    model, x = fastgen.accelerate(Function(forward), filter=lambda name, module: True), torch.randn(3, 4, 8)
    with torch.no_grad():
        close(model(*x), forward(None, *x))


def test_scale_with_a_multiple_of_one():
    def forward(block, x, scale, shift):
        return F.silu(block.norm1(x) * torch.add(scale, 1, alpha=2) + shift)

    same(Function(forward), image(), torch.randn(2, C, 1, 1), torch.randn(2, C, 1, 1))


def test_a_concatenation_that_records_no_gradient():
    def forward(block, x, y):
        with torch.no_grad():
            h = torch.cat([x, y], dim=1)
        return F.conv2d(h, block.conv1.weight.repeat(1, 2, 1, 1), padding=1)

    same(Function(forward), image(), image(), count=1)


_OPERATORS = torch.library.Library("fastgen_tests", "DEF")
_OPERATORS.define("fill(Tensor(a!) x) -> ()")
_OPERATORS.define("in_memory(Tensor x) -> Tensor")
_OPERATORS.impl("fill", lambda x: (x.exp_(), None)[1], "CompositeExplicitAutograd")
_OPERATORS.impl("in_memory", lambda x: x.as_strided((x.numel(),), (1,)).clone(), "CompositeExplicitAutograd")
_OPERATORS.impl("in_memory", lambda x: x.new_empty(x.numel()), "Meta")


@pytest.mark.parametrize(
    "write",
    [
        lambda x: torch.ops.fastgen_tests.fill(x), lambda x: torch.ops.fastgen_tests.fill.default(x=x),
        lambda x: torch._foreach_sub_([x], [x.square()]), lambda x: x.__imul__(torch.arange(12.0)),
    ],
)  # fmt: skip
def test_an_input_that_is_written_to_in_unusual_ways(write):
    def forward(block, x):
        x = x * 2
        h = block.norm1(x)
        write(x)
        return block.conv1(F.silu(h))

    model, x = Function(forward), image()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model, filter=lambda name, module: True)
    close(run(model, x, grad=False), run(plain, x, grad=False))


@pytest.mark.parametrize("function", [torch.ops.fastgen_tests.in_memory, lambda h: torch.dropout_(h * 1, 0.5, True)])
def test_functions_that_depend_on_how_an_image_lies(function):
    model, x = Function(lambda block, x: function(block.conv1(x))), image()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    close(run(model, x, grad=False), run(plain, x, grad=False))
    assert places(model)


# What stays as it was


def test_in_place_per_instance_and_undone():
    model, other = Block(), Block()
    keys, forward = list(model.state_dict()), model.forward
    assert fastgen.accelerate(model) is model and type(model) is Block
    model(image())
    assert list(model.state_dict()) == keys and model.forward == forward and other._compiled_call_impl is None
    assert fastgen.restore(model) is model
    assert all(ATTRIBUTE not in m.__dict__ and "_compiled_call_impl" not in m.__dict__ for m in model.modules())
    assert model._compiled_call_impl is None


def test_an_optimizer_made_before():
    losses = []
    for accelerated in (False, True):
        torch.manual_seed(3)
        model = Block()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        if accelerated:
            fastgen.accelerate(model)
        for i in range(5):
            x = torch.randn(2, C, 8, 8, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-4) and losses[0] != pytest.approx(losses[4], rel=1e-3)


def test_train_and_eval_are_told_apart():
    model = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    for training in (True, False, True, False):
        model.train(training), plain.train(training)
        with torch.no_grad():
            x = image()
            close([model(x)], [plain(x)])


def test_frozen_parameters():
    model = Block()
    model.conv1.requires_grad_(False)
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    x = image()
    for m in (model, plain):
        m(x).sum().backward()
    assert model.conv1.weight.grad is None
    close(
        [p.grad for p in model.parameters() if p.requires_grad], [p.grad for p in plain.parameters() if p.requires_grad]
    )
    model.conv1.requires_grad_(True), plain.conv1.requires_grad_(True)
    close(run(model, x), run(plain, x))


def test_another_dtype_afterwards():
    model = fastgen.accelerate(Block())
    model(image())
    model.double()
    plain = fastgen.restore(copy.deepcopy(model))
    x = image().double()
    close([model(x)], [plain(x)], 1e-12)


def test_weights_that_change_behind_pytorchs_back():
    model = fastgen.accelerate(Block().eval())
    x = image(4, 32)
    with torch.no_grad():
        first = model(x)
        model.conv1.weight.data.mul_(2.0)
        again = model(x)
        right = fastgen.restore(copy.deepcopy(model))(x)
    close([again], [right])
    assert not torch.allclose(first, again)


def test_a_deep_copy_is_accelerated_too():
    model = fastgen.accelerate(Block().eval())
    x = image()
    with torch.no_grad():
        y = model(x)
        other = copy.deepcopy(model)
        other.conv1.weight.mul_(2)
        z = other(x)
        close([z], [fastgen.restore(copy.deepcopy(other))(x)])
    assert not torch.allclose(y, z) and places(other) == places(model)
    assert other.__dict__[ATTRIBUTE] is not model.__dict__[ATTRIBUTE]


def test_a_hook_added_after_the_first_call():
    model, x = fastgen.accelerate(Block()), image()
    model(x)
    handle = model.norm1.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match="hooks changed after its capture"):
        close([model(x)], [fastgen.restore(copy.deepcopy(model))(x)], 0)
    handle.remove()
    run_ = next(iter(model._compiled_call_impl.runs.values()))
    close([model(x)], [fastgen.restore(copy.deepcopy(model))(x)])
    assert run_.executed == 1


def test_forward_derivatives_run_as_written():
    model, x = fastgen.accelerate(Block()), image()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        ours, right = model(x), fastgen.restore(copy.deepcopy(model))(x)
        close(*[[torch.autograd.forward_ad.unpack_dual(y).tangent] for y in (ours, right)])


def test_an_averaged_model():
    model = fastgen.accelerate(Block().eval())
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        average.update_parameters(model)
        x = image()
        close([average(x)], [fastgen.restore(copy.deepcopy(average.module))(x)])
    assert places(average.module)


def test_a_pickle_says_that_it_is_not_accelerated():
    model = fastgen.accelerate(Block().eval())
    file = io.BytesIO()
    with pytest.warns(UserWarning, match="pickled copy is not accelerated"):
        torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert loaded._compiled_call_impl is None and b"fastgen.acceleration" not in file.getvalue()
    x = image()
    with torch.no_grad():
        close([loaded(x)], [model(x)])
    fastgen.accelerate(loaded)
    loaded(x)
    assert places(loaded)


def test_entry_points_other_than_forward():
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.blocks = Block(), nn.ModuleList([Block()])

        def decode(self, z):
            return self.blocks[0](z)

        def forward(self, x):
            return self.decode(self.encoder(x))

    model = Autoencoder()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    x = image()
    close([model.decode(x), model.encoder(x), model(x)], [plain.decode(x), plain.encoder(x), plain(x)])
    assert len(places(model.encoder)) == 2 and len(places(model.blocks[0])) == 2 and len(places(model)) == 4


def test_functional_call_and_vmap_run_as_written():
    model = fastgen.accelerate(Block().eval())
    plain = fastgen.restore(copy.deepcopy(model))
    x = image()
    changed = {k: v * 2 for k, v in model.state_dict().items()}
    close([torch.func.functional_call(model, changed, (x,))], [torch.func.functional_call(plain, changed, (x,))])
    per_sample = torch.func.vmap(torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x[None],)).sum()),
                                 in_dims=(None, 0))  # fmt: skip
    assert per_sample(dict(model.named_parameters()), x)["conv1.weight"].shape == (2, C, C, 3, 3)


def test_under_another_torch_compile():
    model = fastgen.accelerate(Block().eval())
    plain = fastgen.restore(copy.deepcopy(model))
    x = image()
    with torch.no_grad():
        close([torch.compile(model, backend="eager")(x)], [plain(x)])


def test_as_a_backend_of_torch_compile():
    model = Block().eval()
    x = image()
    close(run(torch.compile(model, backend="fastgen"), x), run(model, x))
    with pytest.raises(Exception, match="rest: must be one of"):
        torch.compile(Block(), backend="fastgen", options={"rest": "other"})(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="takes options"):
        torch.compile(Block(), backend="fastgen", options={"speed": 11})(x)


@pytest.mark.slow
def test_inductor_around_our_operations(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    model = Block()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model, rest="inductor")
    x = image()
    close(run(model, x), run(plain, x))
    assert places(model)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for around in (True, False):
            model = Block()
            plain = copy.deepcopy(model)
            if around:
                model = fastgen.accelerate(nn.parallel.DistributedDataParallel(model))
            else:
                model = nn.parallel.DistributedDataParallel(fastgen.accelerate(model))
            x = image()
            for m in (model, plain):
                m(x).square().sum().backward()
            close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], 1e-4)
            assert places(model.module)
    finally:
        torch.distributed.destroy_process_group()


# Captures


@pytest.mark.parametrize("mode", ["auto", "infer"])
def test_eight_sizes_cost_at_most_four_captures(mode):
    model = Block().eval()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model, mode=mode)
    with torch.no_grad():
        for n, size in ((1, 8), (2, 8), (3, 8), (4, 12), (5, 16), (2, 20), (6, 12), (7, 24)):
            x = image(n, size)
            close([model(x)], [plain(x)])
    (captured,) = model._compiled_call_impl.runs.values()
    assert captured.captures <= 4


@torch._dynamo.config.patch(recompile_limit=3)
def test_too_many_captures_are_said_and_stay_fused():
    model = Function(lambda block, x, word: block(x) * len(word)).eval()
    fastgen.accelerate(model)
    x = image()
    with torch.no_grad(), pytest.warns(UserWarning) as said:
        for word in ("a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh"):
            close([model(x, word)], [model.function(fastgen.restore(copy.deepcopy(model)).block, x, word)])
        for word in ("dddd", "eeeee"):  # captured: still fused
            run_ = next(iter(model._compiled_call_impl.runs.values()))
            model(x, word)
            assert run_.executed
    words = " ".join(str(w.message) for w in said)
    assert "all sizes are left open" in words and "ran as it was written" in words


def test_infer_looks_at_no_parameter_and_takes_no_training():
    model = Block().eval()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model, mode="infer")
    x = image()
    with torch.no_grad():
        close([model(x)], [plain(x)])
        model.conv1.weight.mul_(2), plain.conv1.weight.mul_(2)  # counted by PyTorch, so seen
        close([model(x)], [plain(x)])
    with pytest.warns(UserWarning, match="with gradients runs as it was written"):
        close(run(model, x), run(plain, x), 0)
    with torch.no_grad(), pytest.warns(UserWarning, match="in training mode runs as it was written"):
        model.train()(x)


def test_train_keeps_no_transformed_weights():
    from fastgen.ops.weights import CACHE

    model, other = fastgen.accelerate(Block().eval(), mode="train"), fastgen.accelerate(Block().eval())
    x = image(4, 32)
    with torch.no_grad():
        CACHE.clear()
        model(x)
        assert not CACHE.entries
        other(x)
        assert CACHE.entries
    CACHE.clear()


def test_the_filter():
    asked = []

    def wanted(name, module):
        asked.append((name, type(module)))
        return name != "conv1"

    model = fastgen.accelerate(Block(), filter=wanted)
    model(image())
    assert places(model) == [("conv2", "norm_act_conv2d")] and ("conv1", nn.Conv2d) in asked


def test_a_users_own_error_is_the_users():
    model = fastgen.accelerate(Block())
    with pytest.raises(RuntimeError, match="number of channels in input"):
        model(torch.randn(2, C + 4, 8, 8))
    model(image())
    assert places(model)


# verify and explain


def test_verify_passes_and_leaves_no_trace(capsys):
    model = nn.Sequential(Block(), nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
    x, before, state = image(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fastgen.accelerate(model, verify=x)
    text = capsys.readouterr().out
    assert "norm_act_conv2d" not in text and "group_norm → silu → conv2d" in text and "PUT BACK" not in text
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verify_knows_the_rounding_of_a_dtype(dtype):
    model = fastgen.accelerate(Block().to(dtype), verify=image().to(dtype))
    model(image().to(dtype))
    assert len(places(model)) == 2


def test_verify_puts_back_what_fails(monkeypatch, capsys):
    from fastgen.acceleration import calls

    right = calls.ops.norm_act_conv2d

    def wrong(x, *args, residual=None, **kwargs):  # a residual with the wrong sign, where there is one
        return right(x, *args, residual=None if residual is None else -residual, **kwargs)

    monkeypatch.setattr(calls.ops, "norm_act_conv2d", wrong)
    model = Block()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model, verify=(image(),))
    assert "conv2: group_norm → silu → conv2d → residual" in capsys.readouterr().out
    x = image()
    close(run(model, x), run(plain, x))
    assert ("conv1", "norm_act_conv2d") in places(model) and ("conv2", "norm_act_conv2d") not in places(model)


def test_verify_raises_where_the_whole_differs(monkeypatch):
    from fastgen.acceleration import verifying

    monkeypatch.setattr(
        verifying, "_drift", lambda place, given: verifying.Drift(place.name, place.kind, place.op, 0, 0)
    )
    from fastgen.acceleration import calls

    right = calls.ops.norm_act_conv2d
    monkeypatch.setattr(calls.ops, "norm_act_conv2d", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    model = Block()
    with pytest.raises(fastgen.VerificationError, match="differs from what it computes") as caught:
        fastgen.accelerate(model, verify=image())
    assert [d.name for d in caught.value.places] == ["conv1", "conv2"] and ATTRIBUTE not in model.__dict__


def test_explain_tables_every_place():
    model = nn.Sequential(Block(), nn.Conv2d(C, C, 5, padding=2))
    table = fastgen.explain(model, image())
    first, second, left = table.rows
    assert (first.name, first.replaced_by, left.replaced_by) == ("0.conv1", "norm_act_conv2d", None)
    assert "as fast" in left.why_not and second.bytes_after < second.bytes_before
    assert 0 < first.share < 1 and first.ms_after > 0 and table.backward
    assert "2 of 3 places replaced" in str(table) and model._compiled_call_impl is None
    assert not fastgen.explain(model.eval(), image()).backward


# Bad input


def test_nothing_to_replace():
    for model, x in ((nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)), (Plain(), torch.randn(2, 4))):
        with pytest.warns(UserWarning, match="nothing to replace was found; it is left as it was"):
            fastgen.accelerate(model)(x)
        assert ATTRIBUTE not in model.__dict__ and model._compiled_call_impl is None


class Plain(nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2


def refused() -> list:
    scripted = torch.jit.trace(Block().eval(), image())
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))
    sparse = Block()
    sparse.conv1.weight = nn.Parameter(sparse.conv1.weight.detach().to_sparse(), requires_grad=False)
    compiled = Block()
    compiled.compile(backend="eager")
    return [
        (scripted, "scripted"), (quantised, "quantised"), (Block().to("meta"), "meta device"), (sparse, "sparse"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, dtype=torch.complex64)), "complex"), (compiled, "compiled already"),
        (torch.compile(Block(), backend="eager"), "compiled already"), (nn.LazyConv2d(4, 3), "no shape yet"),
        ("a model", "torch.nn.Module"),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_accelerated_is_refused():
    warnings.simplefilter("ignore")
    for model, words in refused():
        with pytest.raises(fastgen.UsageError, match=words):
            fastgen.accelerate(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"mode": "fast"}, "mode: must be"), ({"filter": 3}, "filter: must be"), ({"rest": "xla"}, "rest: must be")],
)
def test_wrong_options(options, words):
    with pytest.raises(fastgen.UsageError, match=words):
        fastgen.accelerate(Block(), **options)
