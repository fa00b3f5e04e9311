"""fastgen.training.ema: the equation, and that every way to compute it gives the same averages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fastgen import backends
from fastgen.errors import UsageError
from fastgen.training import ema as module
from fastgen.training.ema import EMA

DECAYS = (0.9995, 0.9, 0.3, 0.0)
needs_library = pytest.mark.skipif(backends.library_error("cpu") is not None, reason="the C++ library is not built")


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of every kind: odd sizes around the kernel's blocks and pieces, tiny ones, empty ones, every layout."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    found = {f"tiny{i}": draw(1 + i % 3) for i in range(200)}
    found |= {f"odd{n}": draw(n) for n in (15, 17, 1023, 1025, 65535, 65537, 200_003)}
    found |= {"empty": draw(0, 3), "scalar": draw(), "conv": draw(5, 7, 3, 3).to(memory_format=torch.channels_last)}
    found |= {"transposed": draw(31, 9).t(), "gaps": draw(40, 6)[:, ::2], "expanded": draw(4, 1).expand(4, 5)}
    return found


def walk(params: dict[str, Tensor], step: int) -> None:
    """A training step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for name, p in params.items():
            if p.is_floating_point() and name != "expanded":
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.1)


def weight(decay: float, step: int) -> float:
    return 1 - min(decay, (1 + step) / (10 + step))


def expected(params: dict[str, Tensor], steps: int) -> dict[float, dict[str, Tensor]]:
    """A Python loop of lerp_, tensor after tensor, after which ``params`` have walked."""
    right = {d: {k: p.detach().clone() for k, p in params.items()} for d in DECAYS}
    for step in range(steps):
        walk(params, step)
        for d, each in right.items():
            for k, e in each.items():
                e.lerp_(params[k].detach(), weight(d, step))
    return right


def run(params: dict[str, Tensor], steps: int, **options: Tensor) -> EMA:
    ema = EMA(params, DECAYS)
    for step in range(steps):
        walk(params, step)
        ema.update(step, **options)
    return ema


def assert_same(got: dict[float, dict[str, Tensor]], right: dict[float, dict[str, Tensor]]) -> None:
    assert list(got) == list(right)
    for d, each in right.items():
        assert list(got[d]) == list(each)
        for k, e in each.items():
            assert torch.equal(got[d][k], e), (d, k)


def test_the_equation() -> None:
    """In plain numbers: e = d e + (1 - d) p, with a short memory at first."""
    p = {"p": nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))}
    ema = EMA(p, (0.99, 0.25))
    e, f = [1.0, -2.0], [1.0, -2.0]
    for step in range(60):
        with torch.no_grad():
            p["p"].add_(torch.tensor([0.5, 0.25], dtype=torch.float64))
        ema.update(step)
        d = (1 + step) / (10 + step)  # below 0.99 for long
        for average, decay in ((e, min(0.99, d)), (f, min(0.25, d))):
            for i, value in enumerate(p["p"].tolist()):
                average[i] = decay * average[i] + (1 - decay) * value
    assert ema.averages[0.99]["p"].tolist() == pytest.approx(e, rel=1e-13)
    assert ema.averages[0.25]["p"].tolist() == pytest.approx(f, rel=1e-13)


def test_the_decay_is_reached() -> None:
    p = {"p": torch.zeros(1, dtype=torch.float64)}
    ema = EMA(p, (0.5,))
    p["p"].fill_(1.0)
    ema.update(0)
    assert ema.averages[0.5]["p"].item() == pytest.approx(0.9)  # the decay of the first step is 1/10
    for before in range(3):
        e = ema.averages[0.5]["p"].item()
        ema.update(1000 + before)
        assert 1 - ema.averages[0.5]["p"].item() == pytest.approx(0.5 * (1 - e))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False])
def test_every_way_is_a_loop_of_lerp(dtype: torch.dtype, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in every layout."""
    right = expected(parameters(dtype), 6)
    if not library:
        monkeypatch.setattr(backends, "library_error", lambda kind: "not built")
    ema = run(parameters(dtype), 6)
    ways = {function.__name__: len(params) for function, params, _ in ema._ways()}
    assert ways == ({"_kernel": 211, "_foreach": 2} if library else {"_foreach": 213})
    assert_same(ema.averages, right)
    for each in ema.averages.values():
        for k, p in parameters(dtype).items():
            assert each[k].dtype == dtype and (each[k].stride() == p.stride() or k in ("gaps", "expanded"))


@needs_library
def test_the_number_of_threads_changes_nothing() -> None:
    params = parameters() | {f"large{n}": torch.randn(n) for n in (500_001, 1_000_003)}  # else one thread does it all
    start, threads, found = {k: p.clone() for k, p in params.items()}, torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for k in params.keys() - {"expanded"}:
                params[k].copy_(start[k])
            found.append(run(params, 3).averages)
    finally:
        torch.set_num_threads(threads)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    assert_same(found[0], expected(start, 3))


@needs_library
@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_instruction_sets(isa: str) -> None:
    """Plain x86-64 rounds the product as well: within an ulp a step of what the others give."""
    code = (
        "import torch; from tests.test_ema import run, parameters, expected, assert_same\n"
        "got, right = run(parameters(), 5).averages, expected(parameters(), 5)\n"
        "for d in right: torch.testing.assert_close(got[d], right[d], rtol=1e-6, atol=1e-6)\n"
    )
    environment = {**os.environ, "FASTGEN_CPU_ISA": isa, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "does not have" in done.stderr or "lacks" in done.stderr:
        pytest.skip(f"this CPU lacks {isa}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False])
def test_a_layout_that_changes_later(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Module.to` gives the same parameters other memory; the averages' elements must not get mixed up."""
    if not library:
        monkeypatch.setattr(backends, "library_error", lambda kind: "not built")
    conv = nn.Conv2d(6, 5, 3)
    ema = EMA(dict(conv.named_parameters()), (0.9,))
    ema.update(0)
    conv.to(memory_format=torch.channels_last)
    walk(dict(conv.named_parameters()), 0)
    before = ema.averages[0.9]["weight"].clone()
    ema.update(100)
    assert torch.equal(ema.averages[0.9]["weight"], before.lerp(conv.weight.detach(), weight(0.9, 100)))


def test_halves_have_averages_in_fp32() -> None:
    params = {"half": torch.ones(9, dtype=torch.bfloat16), "other": torch.ones(3)}
    ema = EMA(params, (0.9999,))
    assert ema.averages[0.9999]["half"].dtype == torch.float32
    params["half"].fill_(2.0)
    for _ in range(3):
        ema.update(10**6)
    got = ema.averages[0.9999]["half"]
    torch.testing.assert_close(got, torch.full((9,), 2 - 0.9999**3), rtol=1e-6, atol=0)  # bf16 would still be at 1


def test_what_is_not_floating_is_copied() -> None:
    params = {"count": torch.tensor(3), "mask": torch.tensor([True, False]), "p": torch.ones(2)}
    ema = EMA(params, (0.9, 0.5))
    params["count"].add_(4)
    params["mask"].logical_not_()
    ema.update(0)
    for each in ema.averages.values():
        assert each["count"].item() == 7 and each["mask"].tolist() == [False, True]


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), False])
def test_skip(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """True: nothing changes. False: as without."""
    if not library:
        monkeypatch.setattr(backends, "library_error", lambda kind: "not built")
    counted = {"count": torch.tensor(1)}
    assert_same(
        run(parameters() | counted, 3, skip=torch.tensor(True)).averages,
        EMA(parameters() | counted, DECAYS).averages,
    )
    assert_same(run(parameters(), 3, skip=torch.tensor(False)).averages, run(parameters(), 3).averages)


def test_skip_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, which never asks for the value of skip: on the CPU it may be looked at, so by hand."""
    params = parameters() | {"double": torch.randn(7, dtype=torch.float64), "half": torch.ones(5).bfloat16()}
    ema = EMA(params, (0.9,))
    each = ema.averages[0.9]
    walk(params, 0)
    before = {k: e.clone() for k, e in each.items()}

    def forbidden(self: Tensor) -> bool:
        raise AssertionError("this waits for the device")

    with torch.no_grad(), monkeypatch.context() as patch:
        for name in ("__bool__", "item", "__float__"):
            patch.setattr(Tensor, name, forbidden)
        module._foreach(list(params.values()), list(each.values()), 0.1, torch.tensor(True))
        skipped = {k: e.clone() for k, e in each.items()}
        module._foreach(list(params.values()), list(each.values()), 0.1, torch.tensor(False))
        count = torch.tensor([1, 2])
        module._copy([torch.tensor([3, 4])], [count], 0.1, torch.tensor(True))
    for k, e in each.items():
        assert torch.equal(skipped[k], before[k]), k
        right = before[k].lerp(params[k].to(e.dtype), 0.1)
        close = 1e-14 if e.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(e, right, rtol=close, atol=close / 10)
    assert count.tolist() == [1, 2]


def test_state_round_trip() -> None:
    ema = run(parameters(), 3)
    state = ema.state_dict()
    assert set(state) == {f"ema.{d}.{k}" for d in DECAYS for k in parameters()}
    assert state["ema.0.9995.conv"] is ema.averages[0.9995]["conv"]
    other = EMA(parameters(), DECAYS)
    layouts = {k: e.stride() for k, e in other.averages[0.9].items()}
    other.load_state_dict({k: e.contiguous() for k, e in state.items()})  # a file knows no layouts
    assert_same(other.averages, ema.averages)
    assert {k: e.stride() for k, e in other.averages[0.9].items()} == layouts


def test_resumed_is_uninterrupted() -> None:
    whole = run(parameters(), 6)
    params = parameters()
    first = EMA(params, DECAYS)
    for step in range(3):
        walk(params, step)
        first.update(step)
    second = EMA(params, DECAYS)
    second.load_state_dict({k: e.clone() for k, e in first.state_dict().items()})
    for step in range(3, 6):
        walk(params, step)
        second.update(step)
    assert_same(second.averages, whole.averages)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("ema.0.9.odd17"), "no ema.0.9.odd17"),
        (lambda s: s.update({"ema.0.7.odd17": torch.zeros(17)}), "ema.0.7.odd17 is of no average"),
        (lambda s: s.update({"ema.0.9.odd17": torch.zeros(18)}), "ema.0.9.odd17 is"),
        (lambda s: s.update({"ema.0.9.odd17": torch.zeros(17).half()}), "ema.0.9.odd17 is"),
    ],
)
def test_another_runs_state_is_refused(change, says: str) -> None:
    ema = EMA(parameters(), DECAYS)
    state = {k: torch.ones_like(e) for k, e in ema.state_dict().items()}
    change(state)
    with pytest.raises(UsageError, match=f"^ema: .*{says}"):
        ema.load_state_dict(state)
    assert_same(ema.averages, EMA(parameters(), DECAYS).averages)


@pytest.mark.parametrize("decays", [(1.0,), (-0.1,), (0.9, 0.9), (float("nan"),)])
def test_wrong_decays(decays: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"^decays: "):
        EMA(parameters(), decays)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^params: "):
        EMA({"z": torch.zeros(2, dtype=torch.complex64)}, (0.9,))


def test_nothing_to_average() -> None:
    EMA({}, (0.9,)).update(0)
    EMA(parameters(), ()).update(0)


def test_gradients_are_left_alone() -> None:
    layer = nn.Linear(4, 3)
    ema = EMA(dict(layer.named_parameters()), (0.9,))
    loss = layer(torch.ones(2, 4)).sum()
    ema.update(0)
    loss.backward()  # the update has changed nothing that the graph holds
    assert not any(e.requires_grad for e in ema.state_dict().values())


@needs_library
def test_the_kernel_refuses_what_it_cannot_walk() -> None:
    update = torch.ops.fastgen_cpp.ema_update.default
    p = torch.randn(4, 6)
    for wrong in (p.double(), p.t().contiguous().t(), torch.randn(4, 5), torch.randn(24)):
        with pytest.raises(RuntimeError, match="ema:"):
            update([p], [wrong], [0.1])
    with pytest.raises(RuntimeError, match="ema:"):
        update([p], [p.clone()], [0.1, 0.2])
    with pytest.raises(RuntimeError, match="ema:"):
        update([p.half()], [p.half()], [0.1])
