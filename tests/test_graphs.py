"""Sampling over graphs, on a tape that keeps to the rules of a CUDA graph, and on a GPU where there is one."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastgen
from fastgen import denoising, finite, graphs, ops
from fastgen.diffusion.samplers import DDIM, SAMPLERS, SamplingDefaults
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.models.unet import PRESETS, UNet
from fastgen.ops import registration
from fastgen.sampling import sample, stream

pytestmark = pytest.mark.usefixtures("one_thread")

COSINE = DiffusionConfig("cosine", 100, prediction="v")
KINDS = ("step", "loop")
# What waits for the device. So does a tensor made of numbers of the host, but for a single one.
FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")


def tiny(**changes: Any) -> UNet:
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], **changes)
    return UNet(config, COSINE, SamplingDefaults("ddim", 6, 1.0)).eval()


def memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: the operators that ran, on the very tensors they ran on.

    What they made lies in the graph's own memory, which is filled with NaN before and after every replay. Nothing of
    Python runs in a replay, so what came from the host while recording stays as it was. Recording changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.names: set[str] = set()  # of all operators that were called
        self.own: dict[int, Tensor] = {}  # memory -> a tensor that the graph made
        self.outside: dict[int, Tensor] = {}  # memory -> a tensor that was there before
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # of those outside that are written: what they held

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in FORBIDDEN or (name == "lift_fresh" and args[0].ndim):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        self.names.add(func._schema.name)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in inputs:
            if memory(x) not in self.own:
                self.outside[memory(x)] = x
        for written in (x for a, x in zip(func._schema.arguments, args) if a.alias_info and a.alias_info.is_write):
            if memory(written) not in self.own and memory(written) not in self.before:
                self.before[memory(written)] = written, written.clone()
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = [x for x in made if memory(x) not in {memory(i) for i in inputs}]
        self.own |= {memory(x): x for x in fresh}
        if fresh or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, fresh))
        return out

    def poison(self) -> None:
        for x in self.own.values():
            if x.is_floating_point():
                x.fill_(float("nan"))

    def replay(self) -> None:
        self.poison()
        for func, args, kwargs, fresh in self.calls:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for x, new in zip(fresh, again if fresh else [], strict=True):
                x.copy_(new)
        self.poison()

    def reset(self) -> None:
        self.calls.clear()
        self.own.clear()


@dataclass
class TapeRecorder:
    """Stands in for `graphs.Recorder`. ``log``: what was done, over all jobs."""

    device: torch.device
    log: list[str] = field(default_factory=list)
    tapes: list[Tape] = field(default_factory=list)

    def warm(self, function: Callable[[], None]) -> None:
        self.log.append("warm")
        function()

    def capture(self, function: Callable[[], None]) -> Any:
        self.log.append("capture")
        tape = Tape()
        try:
            with tape:
                function()
        finally:
            for x, was in tape.before.values():
                x.copy_(was)
            tape.poison()
        self.tapes.append(tape)
        replay = tape.replay
        tape.replay = lambda: (self.log.append("replay"), replay())
        return tape, sum(x.nbytes for x in tape.own.values())

    @property
    def held(self) -> int:
        return sum(len(tape.own) for tape in self.tapes)

    def wait(self) -> None:
        self.log.append("wait")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    made = TapeRecorder(torch.device("cpu"))
    monkeypatch.setitem(graphs.RECORDERS, "cpu", lambda device: made)
    return made


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the fp32 images that `sample` turns into bytes."""
    seen: list[Tensor] = []
    real = ops.to_uint8
    monkeypatch.setattr(ops, "to_uint8", lambda x, *args: (seen.append(x.clone()), real(x, *args))[1])
    return seen


@pytest.fixture(scope="module")
def model() -> UNet:
    return tiny()


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="graph:")
        yield


def assert_same_bits(model: nn.Module, floats: list[Tensor], *kinds: Any, **arguments: Any) -> None:
    """The images of each kind of graph are those without, to the bit and before they are rounded to bytes."""
    plain = sample(model, graph=False, **arguments)
    expected = torch.cat(floats)
    for kind in kinds:
        floats.clear()
        made = sample(model, graph=kind, **arguments)
        x = torch.cat(floats)
        assert torch.equal(x, expected) and x.stride() == expected.stride(), kind
        assert torch.equal(made.images, plain.images) and made.recipe == plain.recipe
    floats.clear()


GREYS = (torch.arange(256, dtype=torch.uint8) * 5).view(1, 16, 16)
CASES: dict[str, dict[str, Any]] = {
    **{name: {"sampler": name} for name in SAMPLERS},
    "guided": {"guidance": 3.0, "sampler": "ddpm"},
    "interval": {"guidance": 2.0, "guidance_interval": (0.3, 0.7), "sampler": "dpmpp_2m_sde"},
    "late": {"guidance": 2.0, "guidance_interval": (0.0, 0.2), "sampler": "heun"},
    "rescaled": {"guidance": 4.0, "guidance_rescale": 0.7, "guidance_interval": (0.2, 1.0)},
    "start": {"image": GREYS, "strength": 0.5, "sampler": "dpmpp_2m"},
    "starts": {"image": GREYS.expand(5, 1, 16, 16), "strength": 0.7, "sampler": "ddpm", "guidance": 2.0},
    "nothing": {"image": GREYS, "strength": 0.0},
    "one": {"steps": 1},
    "fp16": {"dtype": torch.float16},
    "reference": {"backend": "reference", "sampler": "dpmpp_2m_sde", "guidance": 2.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_same_bits(model: UNet, floats: list[Tensor], recorder: TapeRecorder, case: str, kind: str) -> None:
    """In batches of 2, 2 and 1, of which the second reads what is its own on the graphs of the first."""
    assert_same_bits(model, floats, kind, n=5, seed=-2, batch_size=2, **{"steps": 5, **CASES[case]})
    assert "replay" in recorder.log or case in ("nothing", "one")


def test_an_unconditional_model(floats: list[Tensor], recorder: TapeRecorder) -> None:
    assert_same_bits(tiny(num_classes=None), floats, *KINDS, n=3, batch_size=2, sampler="ddpm")


def test_steps_are_recorded_once_a_size(model: UNet, recorder: TapeRecorder) -> None:
    """The first row runs as it is and is a row like the others; the second is recorded."""
    sample(model, 5, steps=4, batch_size=2, graph="step")
    full = ["warm", "capture", "replay", "replay", "replay"]
    assert recorder.log == [*full, *["replay"] * 4, *full, "wait"]


def test_guided_rows_have_a_graph_of_their_own(model: UNet, recorder: TapeRecorder) -> None:
    """Of 99, 79, 59, 40, 20 and 0, the third and fourth are guided."""
    arguments = {"guidance": 2.0, "guidance_interval": (0.3, 0.7), "sampler": DDIM(spacing="linspace"), "steps": 6}
    sample(model, 2, graph="step", **arguments)
    assert recorder.log == ["warm", "capture", "replay", "warm", "capture", "replay", "replay", "replay", "wait"]
    recorder.log.clear()
    sample(model, 4, graph="loop", batch_size=2, **arguments)
    assert recorder.log == ["warm", "warm", "capture", "replay", "replay", "wait"]


def test_a_loop_is_recorded_once_a_size(model: UNet, recorder: TapeRecorder) -> None:
    sample(model, 5, steps=4, batch_size=2, graph="loop")
    assert recorder.log == ["warm", "capture", "replay", "replay", "warm", "capture", "replay", "wait"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_graph_reads(model: UNet, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Weights, and what is held for it: nothing that was made for one batch. It writes only what it holds."""
    held: list[denoising.Batch] = []
    clone = denoising.Batch.clone
    monkeypatch.setattr(denoising.Batch, "clone", lambda self: (held.append(clone(self)), held[-1])[1])
    sample(model, 4, batch_size=2, guidance=2.0, sampler="dpmpp_2m_sde", steps=4, graph=kind)
    (tape,), (batch,) = recorder.tapes, held
    places = {memory(x): name for name, x in vars(batch).items() if x is not None}
    weights = {memory(p) for p in [*model.parameters(), *model.buffers()]}
    read = {places[m] for m in tape.outside.keys() - weights}
    step = {"row"} if kind == "step" else set()
    assert read == {"x", "kept", "seeds", "doubled", "scale", "coefficients", "timesteps"} | step
    assert {places[m] for m in tape.before} == {"x"} | (step and {"row", "kept"})


@pytest.mark.parametrize("kind", KINDS)
def test_no_op_waits_inside(
    model: UNet, floats: list[Tensor], recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The tape sees an op of fastgen as one call; here it sees every operator of PyTorch within, as a GPU does."""
    monkeypatch.setattr(registration, "_is_plain", lambda args: True)
    arguments = {"guidance": 2.0, "guidance_rescale": 0.5, "sampler": "dpmpp_2m_sde", "backend": "reference"}
    assert_same_bits(model, floats, kind, n=3, batch_size=2, steps=4, **arguments)
    names = set().union(*(tape.names for tape in recorder.tapes))
    assert all(any(word in name for name in names) for word in ("conv", "group_norm", "scaled_dot_product", "index"))
    assert not any(name.startswith("fastgen") for name in names)


def test_recording_is_reported(
    model: UNet, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch, caplog: Any, capfd: Any
) -> None:
    """On the bar, the memory of all graphs; in the log, that of each."""
    capture = recorder.capture
    monkeypatch.setattr(recorder, "capture", lambda function: (capture(function)[0], 3 * 2**20 + 2**19))
    with caplog.at_level(logging.INFO, "fastgen.graphs"):
        sample(model, 3, steps=3, batch_size=2, graph="step", progress=True)
    assert [(r.levelname, r.getMessage().split(";")[1]) for r in caplog.records] == [("INFO", " it takes 3.5 MB")] * 2
    assert "3/3 images, graphs 7 MB" in capfd.readouterr().err


def test_graphs_are_freed(model: UNet, recorder: TapeRecorder) -> None:
    """At the end, and when a stream is left in the middle."""
    sample(model, 2, steps=3, graph="step")
    assert recorder.held == 0
    batches = stream(model, 6, batch_size=2, steps=3, graph="loop")
    next(batches)
    assert recorder.held > 0
    batches.close()
    assert recorder.held == 0


def changed(model: UNet) -> None:
    with torch.no_grad():
        model.conv_in.weight.mul_(1.5)


def replaced(model: UNet) -> None:
    model.conv_in.weight = nn.Parameter(model.conv_in.weight.detach() * 1.5)


@pytest.mark.parametrize(("change", "again"), [(changed, 1), (replaced, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change_between_two_batches(
    floats: list[Tensor], recorder: TapeRecorder, change: Callable, again: int, kind: str
) -> None:
    """In place: the graph reads them where they lie. Others in their place: it is recorded anew."""

    def drawn(graph: Any) -> Tensor:
        model = tiny()
        batches = stream(model, 4, batch_size=2, graph=graph)
        next(batches)
        change(model)
        next(batches)
        return floats.pop()

    assert torch.equal(drawn(kind), drawn(False))
    assert recorder.log.count("capture") == again


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_between_two_batches(model: UNet, floats: list[Tensor], recorder: TapeRecorder, kind: str) -> None:
    def drawn(graph: Any) -> list[Tensor]:
        batches = stream(model, 6, batch_size=2, steps=3, graph=graph)
        next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            next(batches)
        next(batches)
        return [floats.pop() for _ in range(3)]

    expected, found = drawn(False), drawn(kind)
    assert all(map(torch.equal, expected, found)) and recorder.log.count("capture") == 3


# Falling back


class Waiting(nn.Module):
    """A network that asks the host for the timestep, which a graph cannot."""

    def __init__(self, model: UNet, wait: Callable[[Tensor], Any] = Tensor.item) -> None:
        super().__init__()
        self.model, self.wait = model, wait
        self.config, self.diffusion, self.sampling = model.config, model.diffusion, model.sampling

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.wait(t)
        return self.model(x, t, labels)


@pytest.mark.parametrize("wait", [Tensor.item, bool, lambda t: torch.tensor([3.0]) * t])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_recorded(
    model: UNet, floats: list[Tensor], recorder: TapeRecorder, capfd: Any, kind: str, wait: Callable
) -> None:
    """One warning, with the reason, and the same images."""
    network = Waiting(model, wait)
    with pytest.warns(UserWarning, match=r"graph: .*without a CUDA graph \(.*capturing: ") as caught:
        assert_same_bits(network, floats, kind, n=5, batch_size=2, steps=3, progress=True)
    assert len(caught) == 1 and recorder.log.count("capture") == 1 and recorder.held == 0
    assert "9/9" in capfd.readouterr().err.rsplit("\r", 1)[-1], "no row is counted twice"


def test_the_first_reason_is_told() -> None:
    """The end of a capture that was broken raises as well, and says nothing."""

    def function() -> None:
        try:
            raise RuntimeError("operation not permitted\nCUDA kernel errors might be reported later")
        finally:
            raise RuntimeError("capture was invalidated")

    held = graphs.Graphs.__new__(graphs.Graphs)
    held.recorder, held.recorded = TapeRecorder(torch.device("cpu")), {}
    with pytest.raises(graphs.CaptureError, match=r"^operation not permitted$"):
        held.capture("key", function)


def test_errors_of_the_network_pass(model: UNet, recorder: TapeRecorder) -> None:
    def fail(t: Tensor) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        sample(Waiting(model, fail), 2, graph="step")


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_and_hooks_are_called(model: UNet, floats: list[Tensor], recorder: TapeRecorder, kind: str) -> None:
    rows: list[int] = []
    with pytest.warns(UserWarning, match="graph: .*callback") as caught:
        assert_same_bits(model, floats, kind, n=3, batch_size=2, steps=3, callback=lambda row, *_: rows.append(row))
    assert len(caught) == 1 and rows == [0, 1, 2] * 4
    rows.clear()
    handle = model.mid_block.resnets[0].register_forward_hook(lambda *_: rows.append(0))
    try:
        with pytest.warns(UserWarning, match=r"graph: .*mid_block\.resnets\.0 has forward hooks") as caught:
            assert_same_bits(model, floats, kind, n=3, batch_size=2, steps=3)
    finally:
        handle.remove()
    assert len(caught) == 1 and len(rows) == 12 and recorder.log == []


def test_hooks_that_come_between_two_batches(model: UNet, recorder: TapeRecorder) -> None:
    batches, seen = stream(model, 4, batch_size=2, steps=3, graph="step"), []
    next(batches)
    handle = model.conv_out.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        with pytest.warns(UserWarning, match=r"graph: .*conv_out has forward hooks"):
            next(batches)
    finally:
        handle.remove()
        batches.close()


def test_nothing_is_recorded_on_a_cpu(model: UNet) -> None:
    expected = sample(model, 2, steps=2).images
    for kind in KINDS:
        with pytest.warns(UserWarning, match=r"graph: .*\(the network is on the cpu"):
            assert torch.equal(sample(model, 2, steps=2, graph=kind).images, expected)


def test_the_default(model: UNet, recorder: TapeRecorder) -> None:
    """ "step" where there is something to record on; silently nothing with a callback."""
    sample(model, 2, steps=3)
    assert recorder.log == ["warm", "capture", "replay", "replay", "wait"]
    recorder.log.clear()
    sample(model, 2, steps=3, callback=lambda *_: None)
    sample(model, 2, steps=3, graph=False)
    assert recorder.log == []


@pytest.mark.parametrize("value", [True, 1, 0, "steps", "", "auto", [], torch.zeros(2)])
def test_wrong_graph(model: UNet, value: Any) -> None:
    with pytest.raises(fastgen.UsageError, match=r"^graph: must be 'step', 'loop', False or None, not "):
        sample(model, graph=value)


@pytest.mark.parametrize("name", ["compile", "check_finite"])
def test_wrong_flag(model: UNet, name: str) -> None:
    for value in (None, 1, "yes"):
        with pytest.raises(fastgen.UsageError, match=f"^{name}: must be True or False, not {value!r}"):
            sample(model, **{name: value})


# NaN


def poisoned(name: str, value: float = float("nan")) -> UNet:
    model = tiny()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    return model


@pytest.mark.parametrize("graph", [False, *KINDS])
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("time_embedding.linear_2.weight", "time_embedding.linear_2 (Linear), whose weight"),
        ("down_blocks.1.resnets.0.conv1.weight", "down_blocks.1.resnets.0 (ResnetBlock), whose conv1.weight"),
        ("mid_block.resnets.0.time_emb_proj.bias", "mid_block.resnets.0.time_emb_proj (Linear), whose bias"),
        ("conv_in.weight", "down_blocks.0.resnets.0 (ResnetBlock)"),
        ("conv_norm_out.weight", "the network (UNet), whose conv_norm_out.weight"),
    ],
)
def test_a_nan_is_traced_to_its_module(recorder: TapeRecorder, graph: Any, name: str, module: str) -> None:
    model = poisoned(name)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = value
        with pytest.raises(FloatingPointError) as caught:
            sample(model, 3, seed=7, steps=4, graph=graph, batch_size=2)
        message = str(caught.value)
        assert message.startswith("2 of 2 images (seeds 7, 8) hold NaN or infinity, first at row 0 (timestep 99) in ")
        assert module in message and "\n" not in message
    assert not any(m._forward_hooks for m in model.modules())


class Late(nn.Module):
    """Answers with NaN for one label from a timestep on, by an inner module."""

    def __init__(self, below: float, value: float = float("nan")) -> None:
        super().__init__()
        self.config, self.diffusion, self.sampling = PRESETS["tiny"], COSINE, SamplingDefaults("ddim", 6, 1.0)
        self.inner, self.below, self.value = nn.ModuleDict({"a": nn.Identity(), "b": nn.Linear(1, 1)}), below, value

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        bad = (labels == 3) & (t < self.below)
        x = self.inner["a"](0.5 * x)
        return self.inner["a"](torch.where(bad[:, None, None, None], self.value, x))


def test_the_row_and_the_image_are_told() -> None:
    """Timesteps are 99, 79, 59, 39, 19 … of a hundred."""
    labels = [1, 3, 2, 3, 1, 3, 3, 3]
    with pytest.raises(FloatingPointError) as caught:
        sample(Late(50), 8, labels=labels, sampler=DDIM(spacing="linspace"))
    assert str(caught.value) == (
        "5 of 8 images (seeds 1, 3, 5, …) hold NaN or infinity, first at row 3 (timestep 40) in inner.a (Identity)"
    )
    with pytest.raises(FloatingPointError, match=r"^1 of 2 images \(seed 1\) .* \(timestep \d+\.\d+\) in inner\.a"):
        sample(Late(98), 2, labels=[1, 3], sampler="heun")
    assert len(sample(Late(0), 8, labels=labels)) == 8


def test_a_step_that_overflows() -> None:
    """What the network says is finite; guidance is not."""
    network = Late(1000, 3e38)
    network.diffusion = replace(COSINE, clip=None)
    with pytest.raises(FloatingPointError, match=r"first at row 0 .* in the sampler's step, after the network$"):
        sample(network, 2, labels=3, guidance=30.0)


def test_a_nan_that_does_not_come_again() -> None:
    network, calls = Late(0), []
    network.inner["a"].forward = lambda x: (calls.append(1), x * float("nan") if len(calls) == 1 else x)[1]
    with pytest.raises(FloatingPointError, match="but not when they are drawn again without"):
        sample(network, 1)


def test_fp16_that_overflows() -> None:
    network = tiny()
    with torch.no_grad():
        network.down_blocks[0].resnets[0].conv2.bias.fill_(6e4)
        network.down_blocks[1].resnets[0].conv2.bias.fill_(6e4)
        network.down_blocks[0].downsamplers[0].conv.bias.fill_(3e4)
    assert len(sample(network, 1)) == 1
    with pytest.raises(FloatingPointError, match=r"\(\w+\); float16 ends at 65504, so try dtype=torch.bfloat16$"):
        sample(network, 1, dtype=torch.float16)


def test_the_check_can_be_left_out() -> None:
    made = sample(poisoned("conv_in.weight"), 2, check_finite=False)
    assert len(made) == 2


def test_the_check_looks_once_a_batch(model: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = finite.finite
    monkeypatch.setattr(finite, "finite", lambda x: (seen.append(x.shape), real(x))[1])
    sample(model, 5, batch_size=2)
    assert [s[0] for s in seen] == [2, 2, 1]
    sample(model, 5, check_finite=False)
    assert len(seen) == 3


def test_nested_outputs() -> None:
    bad = torch.tensor([1.0, float("inf")])
    assert finite.finite([torch.arange(3), {"a": (bad[:1], None)}, 7])
    assert not finite.finite([{"a": (None, bad)}])


# Half precision


@pytest.mark.parametrize("kind", [False, *KINDS])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision(
    model: UNet, floats: list[Tensor], recorder: TapeRecorder, dtype: torch.dtype, most: float, kind: Any
) -> None:
    """The image is kept in fp32, and half a network's digits make half an image's."""
    for sampler in ("dpmpp_2m", "ddpm"):
        sample(model, 4, sampler=sampler, graph=False)
        expected = floats.pop()
        sample(model, 4, sampler=sampler, dtype=dtype, graph=kind)
        x = floats.pop()
        assert x.dtype == torch.float32 and x.isfinite().all()
        assert (x - x.to(dtype)).abs().max() > 0, "not rounded on the way"
        assert 0 < (x - expected).abs().max() <= most
    assert next(model.parameters()).dtype == torch.float32


# torch.compile


@pytest.mark.slow
def test_compiled(floats: list[Tensor], recorder: TapeRecorder) -> None:
    """Once for each kind of network and shape in a process; the images are those of the network as it is."""
    network, compiled = tiny(), []
    arguments = {"n": 3, "steps": 3, "guidance": 2.0, "sampler": "dpmpp_2m"}
    expected, x = sample(network, **arguments, graph=False), floats.pop()
    for _ in range(2):
        made = sample(network, **arguments, graph=False, compile=True)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert (floats.pop() - x).abs().max() <= 1e-4 and (made.images.int() - expected.images.int()).abs().max() <= 1
        assert made.recipe.environment["compiled"] and "compiled" not in expected.recipe.environment
    assert compiled[0] == compiled[1]
    with torch.no_grad():
        network.conv_in.weight.mul_(1.5)
    sample(network, **arguments, graph=False)
    sample(network, **arguments, graph=False, compile=True)
    assert (floats.pop() - floats.pop()).abs().max() <= 1e-4 and not network._compiled_call_impl
    with pytest.raises(FloatingPointError, match=r"in conv_in|down_blocks"):
        sample(poisoned("conv_in.weight"), 3, steps=3, guidance=2.0, compile=True)


# On a GPU

gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c != "fp16"])
def test_same_bits_on_a_gpu(model: UNet, floats: list[Tensor], case: str, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and case not in ("dpmpp_2m_sde", "interval", "rescaled"):
        pytest.skip("in fp32 only")
    network = copy.deepcopy(model).to("cuda", dtype)
    assert_same_bits(network, floats, *KINDS, None, n=5, seed=-2, batch_size=2, **{"steps": 5, **CASES[case]})


@gpu
def test_a_hundred_replays() -> None:
    """The same bits each time; and from other seeds other noise, the same as of the op by itself."""
    device = torch.device("cuda")
    x, row = torch.zeros(64, 3, 32, 32, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    seeds, table = torch.arange(64, device=device), torch.randn(100, 9, device=device)
    out = torch.empty_like(x)

    def step() -> None:
        out.copy_(ops.diffusion_step(x, x, table, row, seeds=seeds)[0])
        row.add_(1)

    held = graphs.Graphs(device)
    with torch.inference_mode():
        held.run("step", step)
        for again in range(2):
            row.zero_()
            for i in range(100):
                held.run("step", step)
                at = torch.tensor(i, device=device)
                assert torch.equal(out, ops.diffusion_step(x, x, table, at, seeds=seeds)[0]), (again, i)
            seeds.add_(1000)
    held.clear()


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_loops_of_the_same_bits(floats: list[Tensor], kind: str) -> None:
    sample(tiny().cuda(), seed=[3, 4] * 100, labels=1, batch_size=2, steps=4, sampler="ddpm", graph=kind)
    assert len(floats) == 100 and all(torch.equal(x, floats[0]) for x in floats)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_stream_of_the_callers(model: UNet, floats: list[Tensor], kind: str) -> None:
    """Beside other work, from a stream that is not the default one, and back on it afterwards."""
    arguments = {"n": 6, "batch_size": 2, "device": "cuda", "sampler": "dpmpp_2m_sde", "guidance": 2.0}
    sample(model, graph=False, **arguments)
    expected = torch.cat(floats)
    floats.clear()
    mine, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    with torch.cuda.stream(mine):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        sample(model, graph=kind, **arguments)
        assert torch.cuda.current_stream() == mine
    assert torch.equal(torch.cat(floats), expected)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_two_threads(model: UNet, kind: str) -> None:
    network = tiny().cuda()
    arguments = {"n": 6, "batch_size": 2, "sampler": "ddpm", "steps": 10}
    expected = [sample(network, seed=seed, graph=False, **arguments).images for seed in (0, 100)]
    made: dict[int, Tensor] = {}

    def draw(i: int) -> None:
        made[i] = sample(network, seed=100 * i, graph=kind, **arguments).images

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made[i], expected[i]) for i in range(2))


@gpu
def test_memory_of_graphs(model: UNet, caplog: Any) -> None:
    """It is told, and given back."""
    network = tiny().cuda()
    sample(network, 64, steps=3, graph=False)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with caplog.at_level(logging.INFO, "fastgen.graphs"):
        sample(network, 64, steps=3, graph="step")
    assert float(caplog.text.split("takes ")[1].split(" MB")[0]) > 1
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 64 * 2**20, "but for the workspaces of the vendor's libraries"


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_recorded_on_a_gpu(floats: list[Tensor], kind: str) -> None:
    network = Waiting(tiny()).cuda()
    stream_before = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match=r"graph: .*without a CUDA graph \(.*captur") as caught:
        assert_same_bits(network, floats, kind, n=5, batch_size=2, steps=3)
    assert len(caught) == 1 and torch.cuda.current_stream() == stream_before
    assert_same_bits(tiny().cuda(), floats, kind, n=3, steps=3)


@gpu
def test_compiled_on_a_gpu(floats: list[Tensor]) -> None:
    network = tiny().cuda()
    arguments = {"n": 4, "steps": 4, "guidance": 2.0, "sampler": "dpmpp_2m_sde", "batch_size": 2}
    sample(network, graph=False, **arguments)
    expected = torch.cat(floats)
    for kind in (False, *KINDS):
        floats.clear()
        sample(network, graph=kind, compile=True, **arguments)
        x = torch.cat(floats)
        assert (x - expected).abs().max() <= 2e-3
    assert x.isfinite().all()
