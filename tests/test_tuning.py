"""fastgen.tune, with a clock of the test's own: what is measured, what is kept, what is then launched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from suite import DEVICES

import fastgen
from fastgen import backends, ops, tuned

pytest.importorskip("triton")
from fastgen.kernels import _tuning

interpreted = pytest.mark.skipif(DEVICES != ("cpu",), reason="Triton's interpreter is for machines without a GPU")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    tuned.load.cache_clear()
    yield tmp_path / "cache"
    tuned.load.cache_clear()


class Clock:
    """Milliseconds by backend, and by configuration of Triton's kernels; notes what was launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fast: dict[str, int] | None = None, **ms: float) -> None:
        self.ms, self.fast, self.launched = ms, fast, []
        original = backends.kernel

        def noting(op: str, function: str, backend: str) -> Any:
            self.last = backend
            return original(op, function, backend)

        monkeypatch.setattr(backends, "kernel", noting)

    def __call__(self, call: Any) -> float:
        self.last, seen = "reference", []
        inner = _tuning.choosers[-1:] or [lambda key, options: options[0]]

        def watching(key: Any, options: Any) -> Any:
            seen.append(inner[0](key, options))
            return seen[-1]

        _tuning.choosers.append(watching)
        try:
            call()
        finally:
            _tuning.choosers.remove(watching)
        self.launched += seen
        return self.ms[self.last] * (0.5 if self.fast in seen else 1.0)


def workload() -> None:
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    ops.group_norm_act(x, 2).sum().backward()
    ops.to_uint8(x.detach())
    ops.to_uint8(x.detach())


@interpreted
def test_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    fast = {"TILE": 1024, "num_warps": 4}
    clock = Clock(monkeypatch, fast, reference=1.0, cpp=2.0, triton=1.5)
    report = fastgen.tune(workload, device="cpu", timer=clock)
    assert [m.op for m in report.calls] == ["group_norm_act", "to_uint8"]
    assert report.calls[0].milliseconds == {"reference": 1.0, "cpp": 2.0, "triton": 0.75}
    assert report.calls[0].backend == "triton" and "triton (reference 1, cpp 2, triton 0.75 ms)" in str(report)
    found = tuned.load("cpu")
    assert found.backends[("group_norm_act", "torch.float32", (8, 6, 6), True, 2)] == "triton"
    assert found.configurations == {("group_norm_act_fwd", "torch.float32", (8, 6, 6, True)): fast}
    assert report.file.parent == own_folder and not list(own_folder.glob("*.tmp"))


@interpreted
def test_what_is_found_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    options = [{"BLOCK": 128, "num_warps": 4}, {"BLOCK": 256, "num_warps": 4}]
    x = torch.zeros(2, 8, 6, 6)
    monkeypatch.setattr(_tuning, "choosers", [lambda key, given: asked.append(key) or given[0]])
    assert _tuning.configuration("q_sample", options, x) == options[0]
    monkeypatch.setattr(_tuning, "choosers", [])
    monkeypatch.setattr(_tuning, "CHOSEN", {asked[0]: options[1]})
    assert _tuning.configuration("q_sample", options, x) == options[1]
    assert _tuning.configuration("q_sample", options, x[:1]) == options[1], "the batch decides nothing"
    assert _tuning.configuration("q_sample", options, x.double()) == options[0]
    # A configuration that the kernel no longer has, from an older file, is not used.
    assert _tuning.configuration("q_sample", options[:1], x) == options[0]


def test_what_is_found_is_handed_to_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, which is made up here; what was chosen before and is no longer goes."""
    found = tuned.Tuned({}, {("q_sample", "torch.float32"): {"BLOCK": 256}})
    monkeypatch.setattr(_tuning, "CHOSEN", {("philox",): {"BLOCK": 128}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuned, "here", lambda device: found)
    backends.use_configurations.cache_clear()
    backends.use_configurations()
    assert _tuning.CHOSEN == found.configurations
    backends.use_configurations.cache_clear()


def test_auto_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, which is made up here: resolve looks into the table before all else, and obeys who names a backend."""
    gpu, x = torch.device("cuda", 0), torch.zeros(2, 8, 6, 6)
    table = tuned.Tuned({tuned.key("group_norm_act", (x, 2)): "triton"})
    monkeypatch.setattr(tuned, "here", lambda device: table)
    monkeypatch.setattr(backends, "why_not", lambda op, backend, device: None)
    monkeypatch.setattr(backends, "_auto", lambda op, device: "cuda")
    assert backends.resolve("group_norm_act", gpu, like=(x, 2)) == "triton"
    assert backends.resolve("group_norm_act", gpu, like=(x[:1], 2)) == "triton"
    assert backends.resolve("group_norm_act", gpu, like=(x, 4)) == "cuda"
    assert backends.resolve("group_norm_act", gpu, "reference", like=(x, 2)) == "reference"
    with fastgen.use_backend("reference"):
        assert backends.resolve("group_norm_act", gpu, like=(x, 2)) == "reference"


@interpreted
def test_a_wrong_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, original = Clock(monkeypatch, reference=1.0, cpp=0.1, triton=0.1), backends.kernel

    def broken(op: str, function: str, backend: str) -> Any:
        launcher = original(op, function, backend)

        def wrong(*args: Any) -> None:
            launcher(*args)
            args[-3].mul_(1.1)  # y

        return wrong if (function, backend) == ("group_norm_act_fwd", "cpp") else launcher

    monkeypatch.setattr(backends, "kernel", broken)
    row = fastgen.tune(workload, device="cpu", timer=clock).calls[0]
    assert row.backend == "triton" and "cpp" not in row.milliseconds
    assert "differs from the reference" in row.out_of_the_running["cpp"]


@interpreted
def test_ops_that_keep_something_for_their_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backend keeps what it likes: only what is returned, and gradients, are compared."""
    clock = Clock(monkeypatch, reference=1.0, cpp=1.0, triton=0.5)

    def calls() -> None:
        x, w = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
        ops.norm_act_conv2d(x, w, padding=1, num_groups=2).sum().backward()
        ops.batch_norm_act(x, training=True).sum().backward()
        q = torch.randn(1, 2, 9, 8, requires_grad=True)
        ops.attention(q, q, q).sum().backward()

    report = fastgen.tune(calls, device="cpu", timer=clock)
    assert {"conv2d", "batch_norm_act", "attention"} <= {m.op for m in report.calls}
    for row in report.calls:
        assert not row.out_of_the_running and row.backend == "triton", row


@interpreted
def test_tuning_again_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, reference=1.0, cpp=2.0, triton=3.0)
    fastgen.tune(workload, device="cpu", timer=clock)
    clock.ms["cpp"] = 0.5
    fastgen.tune(lambda: ops.group_norm_act(torch.randn(3, 4, 5, 5), 2), device="cpu", timer=clock)
    found = {key[:3]: backend for key, backend in tuned.load("cpu").backends.items()}
    op, dtype = "group_norm_act", "torch.float32"
    assert found[op, dtype, (8, 6, 6)] == "reference" and found[op, dtype, (4, 5, 5)] == "cpp"


def test_files(own_folder: Path) -> None:
    """Another version's file is not used, a damaged one is named, and what cannot be written is an error."""
    found = tuned.Tuned({("op", "torch.float32", (3, 4), True, 2): "triton"}, {("k", (1, 2)): {"BLOCK": 64}})
    file = tuned.save(found, "NVIDIA Some GPU")
    assert file.name == "tuned-nvidia-some-gpu.json" and tuned.load("NVIDIA Some GPU") == found
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"versions": data["versions"] | {"triton": "0.1"}}))
    tuned.load.cache_clear()
    assert tuned.load("NVIDIA Some GPU") == tuned.Tuned()
    file.write_text("{")
    tuned.load.cache_clear()
    with pytest.warns(UserWarning, match=r"tuned-nvidia-some-gpu\.json is damaged"):
        assert tuned.load("NVIDIA Some GPU") == tuned.Tuned()
    file.unlink()
    own_folder.rmdir()
    own_folder.write_text("a file where the folder should be")
    with pytest.raises(fastgen.UsageError, match="FASTGEN_CACHE: cannot write"):
        tuned.save(found, "NVIDIA Some GPU")


def test_wrong_arguments() -> None:
    with pytest.raises(fastgen.UsageError, match="device: only GPUs are tuned"):
        fastgen.tune(device="cpu")
    with pytest.raises(fastgen.UsageError, match="ops: unknown conv3d"):
        fastgen.tune(ops=["conv3d"], device="cpu", timer=lambda call: 1.0)
    with pytest.raises(fastgen.UsageError, match="workload: it calls no op"):
        fastgen.tune(lambda: None, device="cpu", timer=lambda call: 1.0)
    if not torch.cuda.is_available():
        with pytest.raises(fastgen.UsageError, match="device: cuda is not visible"):
            fastgen.tune()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = torch.randn(2, 64, 16, 16, device="cuda", dtype=torch.bfloat16)
    row = fastgen.tune(lambda: ops.group_norm_act(x, 8)).calls[0]
    assert row.backend == min(row.milliseconds, key=row.milliseconds.get) and len(row.milliseconds) > 1
    assert backends.resolve("group_norm_act", x.device, like=(x, 8)) == row.backend
