"""The command: measure, say how it goes on stderr, write the record, print a short table last.

    python -m benchmarks --device cuda --out benchmarks/results
    python -m benchmarks --ops group_norm_act attention --quick

Exit code 1 where a kernel of ours is wrong or does not run.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import model_rows
from benchmarks.drop_in_rows import DROP_IN
from benchmarks.harness import DTYPES, Bench
from benchmarks.op_rows import OPS, op_rows
from benchmarks.record import Record, Row
from benchmarks.scheduler_rows import SCHEDULERS
from benchmarks.training_rows import TRAINING
from fastgen.testing import cases

MODELS = {**model_rows.MODELS, **TRAINING, **SCHEDULERS, **DROP_IN}
BANDWIDTH = ["diffusion_step", "q_sample", "reparameterize", "to_uint8"]
# What is asked of a GPU comes first, in case time runs out.
FIRST = {"cpu": [], "cuda": ["group_norm_act", *BANDWIDTH, "attention", "sampling", "unet", "training"]}
# By device: dtypes, seconds a row, and seconds after which torch.compile is left out.
DEFAULTS = {"cpu": (["fp32"], 2.0, math.inf), "cuda": (["bf16", "fp32"], 0.5, 180.0)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    names = [*OPS, *MODELS]
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the record; without it nothing is written")
    parser.add_argument("--ops", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default: fp32 on the CPU, bf16 fp32 on a GPU")
    parser.add_argument("--seconds", type=float, help="to measure a row for, compilation not counted (2; 0.5 on a GPU)")
    parser.add_argument("--budget", type=float, help="seconds until torch.compile is left out (none; 180 on a GPU)")
    parser.add_argument("--stop", type=float, default=math.inf, help="seconds after which no further row is begun")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile columns")
    parser.add_argument("--quick", action="store_true", help="one case an op, no torch.compile, short measurements")
    parser.add_argument("--list", action="store_true", help="show what there is and stop")
    args = parser.parse_args(argv)
    dtypes, seconds, budget = DEFAULTS[args.device]
    args.dtype = args.dtype or dtypes
    args.seconds = args.seconds or (0.2 if args.quick else seconds)
    args.budget = budget if args.budget is None else args.budget
    args.compile = args.compile and not args.quick
    if args.device == "cuda" and not torch.cuda.is_available() and not args.list:
        parser.error("--device cuda: no CUDA GPU is visible to PyTorch")
    return args


def what(args: argparse.Namespace) -> str:
    return "-".join([*(args.ops or ["all"]), *(["quick"] if args.quick else [])])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    names = args.ops or FIRST[args.device] + [name for name in (*OPS, *MODELS) if name not in FIRST[args.device]]
    if args.list:
        for name in names:
            print(
                name,
                *(f"  {case}" for case in (cases(name, bench=True, device=args.device) if name in OPS else ())),
                sep="\n",
            )
        return 0
    bench = Bench(args.device, args.seconds, args.dtype, args.compile, time.monotonic() + args.budget)
    settings = {"seconds": args.seconds, "compile": args.compile, "dtypes": args.dtype}
    record = Record(what(args), args.device, settings)
    files: list[Path] = []
    late = 0
    finish = time.monotonic() + args.stop
    for dtype in args.dtype:
        for name in names:
            rows = MODELS[name] if name in MODELS else partial(op_rows, name)
            for make in rows(dtype, bench, quick=args.quick):
                if time.monotonic() > finish:
                    late += 1
                    continue
                row = attempt(make, name, dtype)
                if row is None:
                    continue
                record.rows.append(row)
                record.limits = bench.limits()
                if args.out:
                    files = record.write(args.out)
    broken = [
        f"BROKEN {row.op} {row.case} {row.dtype} {row.direction}, {name}: {row.columns[name].status}"
        for row in record.rows for name in row.broken()
    ]  # fmt: skip
    if late:
        print(f"--stop: {late} rows were not measured", file=sys.stderr)
    print(f"\n{record.name}, ms\n{record.summary()}", *broken, *(f"wrote {file}" for file in files), sep="\n")
    return 1 if broken else 0


def attempt(make, name: str, dtype: str) -> Row | None:
    """One row. What this machine cannot import or hold is left out, with a word."""
    start = time.monotonic()
    try:
        row: Row = make()
    except (ImportError, torch.OutOfMemoryError) as error:
        print(f"{name} {dtype}: left out: {error}", file=sys.stderr)
        return None
    cells = ", ".join(f"{n} {c.status if c.ms is None else f'{c.ms:.3g}'}" for n, c in row.columns.items())
    took = time.monotonic() - start
    print(f"{row.op} {row.case} {dtype} {row.direction}: {cells} [{took:.0f} s]", file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
