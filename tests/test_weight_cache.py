"""Transformed weights are kept only as long as the weights have the values that they were made of."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen import backends, ops
from fastgen.diffusion.samplers import SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models.unet import PRESETS, UNet
from fastgen.ops import weights
from fastgen.ops.weights import CACHE, unchanging

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(backends.library_error("cpu") is not None, reason="the cache belongs to the C++ kernels"),
]
WORD, LANES = 2**64, 8


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    gc.collect()
    CACHE.clear()
    yield
    CACHE.clear()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the weights lie that are checked, one entry a check."""
    found, check = [], weights.checksum

    def counted(weight: Tensor) -> int:
        found.append(weight.data_ptr())
        return check(weight)

    monkeypatch.setattr(weights, "checksum", counted)
    return found


class Net(nn.Module):
    """A 3×3 convolution behind a norm, by the fused op; 1×1 and, upsampled, 3×3 ones."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.last = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.conv.weight.dtype)
        h = ops.norm_act_conv2d(x, self.conv.weight, self.conv.bias, padding=1, num_groups=2, backend="cpp")
        h = ops.conv2d(h, self.up.weight, self.up.bias, padding=1, upsample=2, backend="cpp")
        return ops.conv2d(h, self.last.weight[:, :, None, None], self.last.bias, backend="cpp")


def image(channels: int = 8) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def fresh(call: Callable[[], Tensor]) -> Tensor:
    """What the call gives without a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGEN_WEIGHT_CACHE", "0")
        return call()


def optimizer(kind: type, **how: bool) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        kind(net.parameters(), lr=0.1, **how).step()
        for p in net.parameters():
            p.grad = None

    return change


def loaded(assign: bool) -> Callable[[Net], None]:
    return lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=assign) and None


def clamp_one(net: Net) -> None:
    """As weights are clipped in a Wasserstein GAN: here one element only is beyond the bound."""
    with torch.no_grad():
        net.conv.weight[3, 2, 1, 1] = 5
    net(image())
    net.conv.weight.data.clamp_(-4, 4)


def averaged(net: Net) -> None:
    for p, mean in zip(net.parameters(), [p.detach() * 0.9 + 0.1 for p in net.parameters()], strict=True):
        p.data.copy_(mean)


def replaced(net: Net) -> None:
    net.conv.weight.data = net.conv.weight.data + 1


def to_half_and_back(net: Net) -> None:
    net.to(torch.bfloat16)
    net(image())
    net.to(torch.float32)


def in_inference_mode(net: Net) -> None:
    with torch.inference_mode():
        net.conv.weight.mul_(2)
        net(image())
        net.conv.weight.mul_(1.5)


def swapped_filters(net: Net) -> None:
    with torch.no_grad():
        net.conv.weight[[0, 5]] = net.conv.weight[[5, 0]]


def swapped_inputs(net: Net) -> None:
    net.conv.weight.data[:, [0, 1]] = net.conv.weight.data[:, [1, 0]]


def through_a_view(net: Net) -> None:
    net.conv.weight.detach()[2, 1, :, 1].add_(1)


def through_numpy(net: Net) -> None:
    net.up.weight.detach().numpy()[1, 2, 0, 0] += 1


def doubled_linear(net: Net) -> None:
    net.last.weight.data.mul_(2)


def swapped_modules(net: Net) -> None:
    net.conv.weight, net.up.weight = net.up.weight, net.conv.weight


CHANGES = {
    **{
        f"{kind.__name__}-{how}": optimizer(kind, **{how: True} if how != "loop" else {"foreach": False})
        for kind in (torch.optim.SGD, torch.optim.AdamW) for how in ("loop", "foreach", "fused")
    },
    "load_state_dict": loaded(False), "load_state_dict-assign": loaded(True),
    **{
        f.__name__: f for f in (
            clamp_one, averaged, replaced, to_half_and_back, in_inference_mode, swapped_filters, swapped_inputs,
            through_a_view, through_numpy, doubled_linear, swapped_modules,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[Net], None], last: bool) -> None:
    net, x = Net(), image()
    net = net.to(memory_format=torch.channels_last) if last else net
    with torch.no_grad():
        before = net(x)
        assert torch.equal(net(x), before) and CACHE.hits == 3 and CACHE.misses == 3
    change(net)
    with torch.no_grad():
        after = net(x)
        assert torch.equal(after, fresh(lambda: net(x)))
        assert not torch.equal(after, before)
        assert torch.equal(net(x), after)


def conv(x: Tensor, weight: Tensor, **how: Any) -> Tensor:
    with torch.no_grad():
        return ops.conv2d(x, weight, padding=1, backend="cpp", **how)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape or (8, 8, 3, 3), generator=torch.Generator().manual_seed(2), dtype=dtype))


def test_zeros_of_either_sign() -> None:
    x, w = image(), parameter()
    w.data[0] = 0.0
    before = conv(x, w)
    w.data[0] = -0.0
    assert torch.equal(conv(x, w), before)


def test_to_other_dtypes_and_layouts() -> None:
    net, x = Net(), image()
    with torch.no_grad():
        expected = net(x)
        assert (net.double()(x) - expected).abs().max() < 1e-4
        assert torch.equal(net.float()(x), expected)
        net.to(memory_format=torch.channels_last)
        assert torch.equal(net(x), fresh(lambda: net(x)))
        assert torch.equal(net.to(memory_format=torch.contiguous_format)(x), expected)


def test_one_memory_read_in_two_ways() -> None:
    """The same numbers as another shape, other strides or another dtype are another weight."""
    x, w = image(4), parameter(4, 4, 4, 4)
    for other in (w, w.detach().view(16, 4, 2, 2), w.detach().as_strided(w.shape, (64, 1, 16, 4))):
        assert torch.equal(conv(x, other), fresh(lambda other=other: conv(x, other)))
    flat = torch.zeros(8 * 8 * 9).bfloat16().copy_(parameter().detach().view(-1))
    assert torch.equal(conv(image(), flat.view(8, 8, 3, 3)), fresh(lambda: conv(image(), flat.view(8, 8, 3, 3))))


def test_uses_of_one_weight_do_not_mix() -> None:
    x, w = image(), parameter()
    uses: list[dict[str, Any]] = [{}, {"upsample": 2}, {"stride": 2}, {"dilation": 2}]
    expected = [fresh(lambda how=how: conv(x, w, **how)) for how in uses]
    expected.append(fresh(lambda: conv(x.double(), w)))
    for _ in range(2):
        found = [*(conv(x, w, **how) for how in uses), conv(x.double(), w)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_parameters_made_in_inference_mode() -> None:
    x = image()
    with torch.inference_mode():
        w = parameter()
        for how in (contextless, unchanging):
            with how():
                assert torch.equal(conv(x, w), conv(x, w))
        w.mul_(2)
        assert torch.equal(conv(x, w), fresh(lambda: conv(x, w)))
    kept = conv(x, w)  # what was made in inference mode serves outside of it
    assert torch.equal(kept, fresh(lambda: conv(x, w)))


def contextless() -> Any:
    return torch.no_grad()


def test_memory_used_again() -> None:
    """A weight at the address of one that is gone."""
    x, seen, again = image(), set(), 0
    for i in range(30):
        w = torch.full((8, 8, 3, 3), float(i))
        again += w.data_ptr() in seen
        seen.add(w.data_ptr())
        assert torch.equal(conv(x, w), fresh(lambda w=w: conv(x, w)))
        del w
    assert again and not CACHE.entries
    memory = torch.empty(8 * 8 * 9)  # and, surely, at the very same one
    for i in range(3):
        w = memory.view(8, 8, 3, 3).fill_(i)
        assert torch.equal(conv(x, w), fresh(lambda w=w: conv(x, w)))


def test_copies() -> None:
    net, x = Net(), image()
    with torch.no_grad():
        before = net(x)
        other = copy.deepcopy(net)
        other.conv.weight.mul_(2)
        assert not torch.equal(other(x), before) and torch.equal(net(x), before)
        assert torch.equal(other(x), fresh(lambda: other(x)))


def test_computed_weights() -> None:
    x, net = image(), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    for _ in range(3):
        with torch.no_grad():
            net.parametrizations.weight.original1.mul_(1.5).add_(0.1)
            assert torch.equal(conv(x, net.weight), fresh(lambda: conv(x, net.weight)))
            with unchanging():
                assert torch.equal(conv(x, net.weight), fresh(lambda: conv(x, net.weight)))


def test_threads() -> None:
    """Two that call at once, with changes between the rounds, and two weights of which only one fits."""
    nets, x, rounds = [Net(), Net()], image(), 20
    barrier, wrong = threading.Barrier(2), []

    def work(own: int) -> None:
        with torch.no_grad():
            for i in range(rounds):
                barrier.wait(60)
                nets[own].conv.weight.data.mul_(1.01 + own)
                barrier.wait(60)
                wrong.extend(i for net in nets for _ in range(3) if not torch.equal(net(x), expected(net)))

    def expected(net: Net) -> Tensor:
        return copy.deepcopy(net)(x)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert CACHE.bytes == sum(entry.made.nbytes for entry in CACHE.entries.values())


def test_a_change_while_it_is_made() -> None:
    """By another thread: what comes out may be of either, but it is not kept for the values from before."""
    w, original = parameter().data, parameter().data

    def make() -> Tensor:
        w.mul_(2)
        return w.clone()

    CACHE.get(w, (), make)
    w.copy_(original)
    assert torch.equal(CACHE.get(w, (), w.clone), original)


# The checksum


def model_of(data: bytes) -> int:
    """The checksum by its definition, in Python's integers."""

    def words(given: list[int]) -> int:
        sums = [0x9E3779B185EBCA87 * (i + 1) for i in range(LANES)]
        for at, word in enumerate(given):
            i = at % LANES
            masked = word ^ (0xC2B2AE3D27D4EB4F * (2 * i + 1) + at // LANES * 0x165667B19E3779F9) % WORD
            sums[i] += (masked % 2**32) * (masked >> 32)
            sums[i ^ 1] += word
        result = len(given)
        for value in sums:
            result = (result ^ value % WORD) * 0x9FB21C651E98DF25 % WORD
            result ^= result >> 35
        return result

    def split(part: bytes) -> list[int]:
        return np.frombuffer(part, np.uint64).tolist()

    whole, piece = len(data) // 64 * 64, 32 << 10
    sums = [words(split(data[i : min(i + piece, whole)])) for i in range(0, whole, piece)]
    sums += split(data[whole:].ljust(whole + 64 - len(data) + len(data[whole:]), b"\0")[:64])
    sums += [0] * (-len(sums) % LANES)
    return (words(sums) + 2**63) % WORD - 2**63


SIZES = [1, 15, 16, 17, 64, 1000, 8192, 8193, 20011]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_checksum_is_its_definition(dtype: torch.dtype) -> None:
    """Wherever the weights lie."""
    for size in SIZES:
        flat = torch.randn(size + 1).to(dtype)
        for given in (flat[:-1], flat[1:]):
            data = given.clone().view(torch.uint8).numpy().tobytes()
            assert weights.checksum(given.view(-1, 1, 1, 1)) == model_of(data), size


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_the_checksum_is_one_on_all_instruction_sets(isa: str) -> None:
    script = """if True:
        import torch
        from fastgen import backends
        from fastgen.ops.weights import checksum
        print(backends.library_error("cpu") or checksum(torch.arange(20011.0).view(-1, 1, 1, 1)))
    """
    environment = os.environ | {"FASTGEN_CPU_ISA": isa}
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode and "FASTGEN_CPU_ISA" in found.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert int(found.stdout) == weights.checksum(torch.arange(20011.0).view(-1, 1, 1, 1)), found.stderr


@pytest.mark.parametrize("size", SIZES)
def test_any_bit_changes_the_checksum(size: int) -> None:
    generator = np.random.default_rng(size)
    w = torch.randn(size, 1, 1, 1)
    data, before = w.view(-1).numpy().view(np.uint8), weights.checksum(w)
    last = range(max(0, 4 * size - 70), 4 * size)  # the tail, that fills no block
    for at in [*last, *generator.integers(0, 4 * size, 300)]:
        bit = np.uint8(1 << generator.integers(8))
        data[at] ^= bit
        assert weights.checksum(w) != before, (at, bit)
        data[at] ^= bit
    assert weights.checksum(w) == before


@pytest.mark.parametrize("low", [0, 1])
def test_a_product_does_not_hide_a_change(low: int) -> None:
    """One half of a masked word is 0 or 1: the product alone, or with the word added to it, would miss some flips."""
    w = torch.zeros(64, 1, 1, 1)
    words = w.view(-1).numpy().view(np.uint64)
    words[0] = 0x3D00000000000000 | (0x27D4EB4F ^ low)
    before = weights.checksum(w)
    for bit in range(64):
        words[0] ^= np.uint64(1 << bit)
        assert weights.checksum(w) != before, bit
        words[0] ^= np.uint64(1 << bit)


# unchanging


def test_unchanging_checks_once(checks: list[int]) -> None:
    net, x = Net(), image()
    with torch.no_grad(), unchanging():
        first = net(x)
        after_first = len(checks)
        assert torch.equal(net(x), first)
    assert len(set(checks)) == 3 and len(checks) == after_first, "a view of a parameter counts as it"
    with torch.no_grad():
        net(x)
    assert len(checks) == after_first + 3


def test_unchanging_trusts_parameters_only(checks: list[int]) -> None:
    x, w = image(), parameter().detach().clone()
    with unchanging():
        for factor in (1.0, 2.0):
            w.data.mul_(factor)  # which no version counts
            count = len(checks)
            assert torch.equal(conv(x, w), fresh(lambda: conv(x, w))) and len(checks) > count


def test_changes_after_the_block_are_seen() -> None:
    x, w = image(), parameter()
    with unchanging():
        before = conv(x, w)
    w.data.mul_(2)
    assert not torch.equal(conv(x, w), before)
    with unchanging():
        assert torch.equal(conv(x, w), fresh(lambda: conv(x, w)))


def test_counted_changes_within_the_block_are_seen() -> None:
    x, w = image(), parameter()
    with torch.no_grad(), unchanging():
        conv(x, w)
        w.mul_(2)
        assert torch.equal(conv(x, w), fresh(lambda: conv(x, w)))
        w[0, 0] = 5
        assert torch.equal(conv(x, w), fresh(lambda: conv(x, w)))
        w.data = w.data + 1
        assert torch.equal(conv(x, w), fresh(lambda: conv(x, w)))


def test_a_block_in_a_block(checks: list[int]) -> None:
    x, w = image(), parameter()
    with unchanging():
        conv(x, w)
        count = len(checks)
        with unchanging():
            conv(x, w)
        conv(x, w)
    assert len(checks) == count
    with pytest.raises(KeyError), unchanging():
        raise KeyError
    assert weights._trusted.get() is None


# Sampling


def tiny() -> UNet:
    torch.manual_seed(0)
    return UNet(PRESETS["tiny"], DiffusionConfig("cosine", 100, prediction="v"), SamplingDefaults("ddim", 4, 1.0))


def test_sampling_checks_each_weight_once(checks: list[int]) -> None:
    net = tiny()
    images = fastgen.sample(net, 3, batch_size=1, backend="cpp").images
    assert checks and len(CACHE.entries) * 2 == len(checks), "twice: before it was made, and after"
    checks.clear()
    assert torch.equal(fastgen.sample(net, 3, batch_size=1, backend="cpp").images, images)
    assert len(checks) == len(set(checks)) == len(CACHE.entries)
    checks.clear()
    list(fastgen.stream(net, 3, batch_size=1, backend="cpp"))
    assert len(checks) == 3 * len(set(checks)), "whoever takes the images may change weights in between"


def test_sampling_sees_changes_between_calls() -> None:
    net = tiny()
    before = fastgen.sample(net, 2, backend="cpp").images
    with torch.no_grad():
        net.conv_in.weight.data.mul_(1.5)
    after = fastgen.sample(net, 2, backend="cpp").images
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(lambda: fastgen.sample(net, 2, backend="cpp").images))


def test_stream_keeps_its_promise_to_itself() -> None:
    """Between two batches the caller's weights are checked, and changed ones are used for the next batch."""
    net, found = tiny(), []
    for made in fastgen.stream(net, 2, batch_size=1, backend="cpp"):
        assert weights._trusted.get() is None
        found.append(made.images)
        net.conv_in.weight.data.mul_(1.5)
    assert weights._trusted.get() is None
    net = tiny()
    net.conv_in.weight.data.mul_(1.5)
    assert torch.equal(found[1], fastgen.sample(net, seed=1, backend="cpp").images)
    abandoned = fastgen.stream(net, 2, batch_size=1, backend="cpp")
    next(abandoned)
    abandoned.close()
    assert weights._trusted.get() is None


def test_a_callback_may_change_weights() -> None:
    def call() -> Tensor:
        net = tiny()
        change = lambda row, x, x0: net.conv_in.weight.data.mul_(1.2)  # noqa: E731
        return fastgen.sample(net, 2, backend="cpp", callback=change).images

    assert torch.equal(call(), fresh(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_changes_no_bit(dtype: torch.dtype) -> None:
    net = tiny().to(dtype)
    arguments = {"seed": 3, "labels": [1, 2, 3, 4, 5], "guidance": 2.0, "batch_size": 2, "backend": "cpp"}
    kept, again = (fastgen.sample(net, 5, **arguments).images for _ in range(2))
    assert torch.equal(kept, again) and torch.equal(kept, fresh(lambda: fastgen.sample(net, 5, **arguments).images))


# The bound, and what is let go


def exact() -> bool:
    return CACHE.bytes == sum(entry.made.nbytes for entry in CACHE.entries.values())


def test_the_least_recently_used_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: parameter().data for name in "abc"}

    def get(name: str, numel: int = 100_000) -> int:
        """1 for a hit."""
        before = CACHE.hits
        CACHE.get(made[name], (name,), lambda: torch.zeros(numel))
        assert exact() and CACHE.bytes <= 1 << 20
        return CACHE.hits - before

    monkeypatch.setenv("FASTGEN_WEIGHT_CACHE", "1")
    assert [get(name) for name in "abaca"] == [0, 0, 1, 0, 1]  # c pushed b out, for a was used since
    assert get("b") == 0 and get("a") == 1 and get("c") == 0
    assert CACHE.bytes == 800_000
    del made["c"]
    gc.collect()
    CACHE.clear()
    get("a", 2**18)
    assert CACHE.bytes == 1 << 20
    get("b", 2**18 + 1)
    assert CACHE.bytes == 1 << 20 and len(CACHE.entries) == 1, "what is larger than the cache pushes nothing out"


def test_off(monkeypatch: pytest.MonkeyPatch, checks: list[int]) -> None:
    monkeypatch.setenv("FASTGEN_WEIGHT_CACHE", "0")
    net, x = Net(), image()
    with torch.no_grad(), unchanging():
        assert torch.equal(net(x), net(x))
    assert not CACHE.entries and CACHE.bytes == 0 and not checks


@pytest.mark.parametrize("text", ["much", "-1", "1.5", " 1", "²"])
def test_a_wrong_limit(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_WEIGHT_CACHE", text)
    with pytest.raises(ValueError, match=f"FASTGEN_WEIGHT_CACHE must be .* not '{text}'"):
        conv(image(), parameter())
    assert "FASTGEN_WEIGHT_CACHE must be" in fastgen.doctor().cache["limit"]


def test_clear() -> None:
    w = parameter()
    conv(image(), w)
    assert CACHE.bytes and exact()
    CACHE.clear()
    assert not CACHE.entries and CACHE.bytes == 0


def test_training_keeps_nothing() -> None:
    net, x = Net(), image()
    net(x).square().sum().backward()
    assert net.conv.weight.grad is not None and CACHE.bytes == 0 and not CACHE.entries


def test_entries_of_freed_weights_go() -> None:
    net, x = Net(), image()
    with torch.no_grad():
        net(x)
        other = copy.deepcopy(net)
        other(x)
        assert len(CACHE.entries) == 6
        other.double()  # its old memory is freed
        assert len(CACHE.entries) == 3 and exact()
        other.float()(x)
        alias = other.conv.weight.detach()
    del net, other
    gc.collect()
    assert len(CACHE.entries) == 1 and exact(), "memory that something else still holds is there"
    del alias
    assert not CACHE.entries and CACHE.bytes == 0


def test_memory_freed_within_the_lock() -> None:
    """As the garbage collector may free it: no deadlock, and the entry goes with the next use."""
    dead, w = parameter(), parameter()
    conv(image(), dead)
    with CACHE.lock:
        del dead
    assert len(CACHE.entries) == 1
    conv(image(), w)
    assert len(CACHE.entries) == 1 and exact() and not CACHE.freed


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    w = parameter(64, 64, 3, 3)
    conv(image(64), w)
    megabytes = round(CACHE.bytes / 2**20, 1)
    assert megabytes and fastgen.doctor().cache == {"entries": 1, "MB": megabytes, "limit": 1024}
    assert fastgen.doctor().as_dict()["cache"]["entries"] == 1
    monkeypatch.setenv("FASTGEN_WEIGHT_CACHE", "0")
    assert "limit       off (FASTGEN_WEIGHT_CACHE=0)" in str(fastgen.doctor())
