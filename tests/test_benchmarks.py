"""The benchmark harness: no speed for a wrong result, columns in turn, and a record that can be read later."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import training_rows
from benchmarks.harness import Bench, Column, CpuTimer, Truth, gate, measure, run_row, truth
from benchmarks.op_rows import OPS, OpCall, module_of, op_row
from benchmarks.record import Cell, Record, Row
from fastgen.testing import CASES, EAGER, cases

SMALL = {"seconds": 0.0, "compile": False}


class FakeClock:
    """A clock that moves only when a call says so, by the next of its durations."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *durations: float):
        turns = []

        def run() -> None:
            self.order.append(name)
            self.now += durations[len(turns) % len(durations)]
            turns.append(name)

        return run


@pytest.fixture
def bench() -> Bench:
    """Limits that are not measured, since a test has no use for them."""
    made = Bench("cpu", **SMALL)
    made.bandwidth = lambda moved: 1e9
    made.flop_rate = lambda dtype: 1e9
    return made


def small(op: str):
    """A case with as much in it as the benchmarks' own: not empty, images, and seeds where the op takes them."""
    found = [c for c in cases(op) if "0x" not in c.label[:2]]
    return next((c for c in found if "seeds" in c.label), found[0])


def test_columns_alternate_and_slow_calls_are_not_repeated():
    clock = FakeClock()
    columns = [Column(name, clock.call(name, 1.0)) for name in "abc"]
    samples = measure(columns, CpuTimer(clock), seconds=21.0)
    assert clock.order == list("abc") * (1 + 7)  # one call each to see how long it takes, then 21 s / 3 s rounds
    assert {name: len(s) for name, s in samples.items()} == dict.fromkeys("abc", 7)


def test_a_fast_call_is_repeated_until_a_sample_is_long_enough():
    clock = FakeClock()
    samples = measure([Column("a", clock.call("a", 2**-10))], CpuTimer(clock), seconds=0.0)
    assert samples["a"] == [2**-10] * 5
    assert len(clock.order) == 1 + 3 + 1 + 5 * 6  # 6 ms are the first whole number of calls beyond 5 ms


def test_median_and_percentiles():
    clock = FakeClock()
    # The gate's call, one that tells how long it takes (1 s), then 5 rounds.
    call = clock.call("a", 7.0, 1.0, 5.0, 1.0, 2.0, 4.0, 3.0)
    cell = run_row(Row("op", "case", "fp32", "cpu"), [Column("a", call)], CpuTimer(clock), 0).columns["a"]
    assert (cell.status, cell.samples, cell.ms) == ("unchecked", 5, 3000.0)
    assert (cell.p10_ms, cell.p90_ms) == pytest.approx((1400.0, 4600.0))


def test_the_gate():
    right = Truth([torch.ones(3, dtype=torch.float64)], [1e-6])

    def column(value: torch.Tensor) -> Column:
        return Column("x", lambda: [value], lambda: [value], right)

    assert gate(column(torch.ones(3))).status == "ok"
    assert gate(column(torch.ones(3) + 2e-6)).status == "FAIL"
    assert gate(column(torch.tensor([1.0, 1.0, float("nan")]))).status == "FAIL"
    assert gate(column(torch.ones(4))).status == "FAIL"
    failing = gate(Column("x", lambda: 1 / 0, lambda: 1 / 0, right))
    assert failing.status.startswith("error: ZeroDivisionError")


def test_an_absurd_yardstick_lets_nothing_through():
    reference = torch.linspace(-1, 1, 5, dtype=torch.float64)
    assert truth([reference], [100.0], torch.float32).bounds[0] <= 0.05
    assert truth([reference], [1e-7], torch.float32, 4.0).bounds == [
        4 * truth([reference], [1e-7], torch.float32).bounds[0]
    ]
    assert truth([torch.zeros(3, dtype=torch.uint8)], [7.0], torch.float32).bounds == [1.0]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_wrong_kernel_gets_no_speed(bench, backward):
    case = small("group_norm_act")
    row, call = Row(case.op, case.label, "fp32", "cpu"), OpCall(case, "fp32", "cpu", backward)
    columns = [*call.columns(bench, row), call.other("wrong", lambda **kw: EAGER[case.op](**kw) * 1.001)]
    run_row(row, columns, bench.timer, bench.seconds)
    assert row.columns["wrong"].status == "FAIL" and row.columns["wrong"].ms is None
    assert row.columns["eager"].status == row.columns["auto"].status == "ok" and row.columns["eager"].ms > 0


def test_a_wrong_kernel_of_ours_is_reported(bench, monkeypatch):
    from fastgen import ops

    right = ops.to_uint8
    monkeypatch.setattr(ops, "to_uint8", lambda x: right(x) // 2)
    row = op_row(small("to_uint8"), "fp32", bench, backward=False)
    assert "auto" in row.broken() and row.columns["eager"].status == "ok"
    assert "FAIL" in Record("test", "cpu", {}, [row]).summary()


@pytest.mark.parametrize("op", CASES)
def test_every_op_has_a_benchmark(op, bench):
    assert op in OPS and module_of(op).__doc__
    assert cases(op, bench=True)
    case = small(op)
    for backward in (False, True) if case.differentiable else (False,):
        row = op_row(case, "fp32", bench, backward)
        assert row.columns["eager"].ms > 0 and row.columns["auto"].ms > 0 and not row.broken(), row
        assert row.bytes > 0 and row.flops > 0 and row.limit_ms > 0


def test_low_precision_runs(bench):
    for backward in (False, True):
        assert not op_row(small("reparameterize"), "bf16", bench, backward).broken()


def test_compile_is_left_out_when_time_is_up(bench):
    bench.compile, bench.deadline = True, time.monotonic() - 1
    row = op_row(small("to_uint8"), "fp32", bench, backward=False)
    assert row.columns["compile"].status == "skipped: time budget" and row.columns["compile"].ms is None


def test_rows_of_a_gpu(bench, monkeypatch):
    """Small, and on the CPU: what `make gpu` measures runs, and passes its gate."""
    from benchmarks import gpu_rows, model_rows

    monkeypatch.setattr(gpu_rows, "unet", lambda preset: model_rows.unet("tiny"))
    monkeypatch.setattr(gpu_rows, "diffusers_unet", lambda preset, model: None)
    monkeypatch.setattr(gpu_rows, "STEPS", 2)
    monkeypatch.setattr(gpu_rows, "TRAINING_BATCH", 2)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        sampling = gpu_rows.sampling_row(2, "fp32", bench)
    training = gpu_rows.training_row("bf16", bench)
    assert {"eager", "launches", "auto", "loop graph"} <= set(sampling.columns)
    for row in (sampling, training):
        assert {c.status for c in row.columns.values()} == {"ok"} and not row.broken()


def test_the_averages(bench):
    """Every way to keep averages gives them, and one that gives others gets no speed."""
    row = training_rows.ema_row("tiny", 2, bench)
    assert list(row.columns) == ["eager", "foreach", "AveragedModel", "auto"]
    assert all(cell.status == "ok" and cell.ms for cell in row.columns.values())


def test_wrong_averages_get_no_speed(bench, monkeypatch):
    monkeypatch.setattr(training_rows, "LATE", 3)  # while the decay is still another
    row = training_rows.ema_row("tiny", 1, bench)
    assert row.columns["auto"].status == "FAIL" and row.columns["auto"].ms is None


def test_the_loop_and_the_bare_loop_take_turns(monkeypatch):
    clock, order = FakeClock(), []
    monkeypatch.setattr(training_rows.time, "perf_counter", clock)

    class Recipe:
        family = "unet"

        def loss(self, *batch):
            order.append("trainer")
            clock.now += 3.0

    class Bare:
        params = (torch.zeros(1),)

        def run(self, steps):
            order.extend(["bare"] * steps)
            clock.now += 2.0 * steps

    alternating = training_rows.Alternating(Recipe(), Bare(), block=2)
    for step in range(5):
        alternating.loss(step)
    assert order == ["bare", "bare", "trainer", "trainer"] * 2 + ["bare", "bare", "trainer"]
    assert alternating.samples == {"eager": [2.0] * 3, "auto": [3.0] * 2} and alternating.family == "unet"


def test_the_record(tmp_path):
    row = Row("op", "2x3", "fp32", "cpu", limit_ms=0.5, ours=["auto"], images=4)
    row.columns = {"eager": Cell("ok", 4.0, 3.0, 5.0, 7, 1e-7, 2e-7), "auto": Cell("ok", 2.0, 1.5, 2.5, 7)}
    row.columns["other"] = Cell("FAIL")
    record = Record("all-quick", "cpu", {"seconds": 1.0}, [row], {"copy, GB/s": {"1 MB": 10.0}})
    files = record.write(tmp_path / "results")
    assert [f.suffix for f in files] == [".json", ".md"]
    assert all(f.name.startswith(record.date[:10]) and f.stem.endswith("-all-quick") for f in files)

    read = json.loads(files[0].read_text())
    assert {"format", "date", "command", "commit", "dirty", "settings", "limits"} <= set(read)
    assert {"cpu", "cores", "threads"} <= set(read["hardware"])
    assert {"python", "torch", "triton", "fastgen", "CUDA"} <= set(read["versions"])
    assert read["rows"][0]["columns"]["auto"]["ms"] == 2.0 and read["rows"][0]["columns"]["other"]["ms"] is None

    table = files[1].read_text()
    assert "| 4 (3-5)" in table and "2 (1.5-2.5) 2.00×, 2000 images/s" in table and "| FAIL |" in table
    assert "2.00" in record.summary() and record.commit in table


def test_the_command(capsys, tmp_path):
    assert command.main(["--list"]) == 0
    assert "group_norm_act" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--ops", "nonsense"])
    assert command.what(command.parse(["--ops", "to_uint8", "--quick"])) == "to_uint8-quick"
    assert command.parse([]).dtype == ["fp32"] and not command.parse(["--quick"]).compile
