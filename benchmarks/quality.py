"""How good the images of each sampler are, by its steps: the table that helps to choose.

    python -m benchmarks.quality --out benchmarks/results
    python -m benchmarks.quality --model runs/digits --samplers ddim heun --steps 10 20 -n 500

Every row is one `fastgen.metrics.evaluate` on the same seeds and labels. The record is written after each row, and a
row that is in it already, of the same weights and the same number of images, is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.record import hardware, slug, table_line, versions
from fastgen.checkpoint import fingerprint, load
from fastgen.diffusion.samplers import SAMPLERS, get_sampler
from fastgen.errors import UsageError
from fastgen.metrics import evaluate

STEPS = [5, 10, 20, 50]
COLUMNS = {
    "sampler": "sampler", "spacing": "spacing", "steps": "steps", "calls": "calls", "label_accuracy": "label accuracy",
    "frechet": "Fréchet distance", "frechet_ratio": "× training images'", "precision": "precision", "recall": "recall",
    "nearest_least": "nearest, least",
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ddpm-mnist", help="a shipped model or a checkpoint (ddpm-mnist)")
    parser.add_argument("--out", type=Path, help="folder for the record; without it nothing is written")
    parser.add_argument("-n", type=int, default=1000, help="images a row (1000)")
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS), metavar="NAME")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--spacing", nargs="+", default=[None], help="default: each sampler's own")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, sampler: Any, steps: int) -> dict[str, Any]:
    calls = len(sampler.plan(load(args.model).diffusion, steps).timesteps)
    started = time.perf_counter()
    found = evaluate(args.model, args.n, sampler=sampler, steps=steps, guidance=args.guidance, progress=False)
    seconds = round(time.perf_counter() - started, 1)
    return {**found.as_dict(), "spacing": sampler.spacing, "calls": calls, "seconds": seconds}


def markdown(record: dict[str, Any]) -> str:
    first = record["rows"][0]
    facts = {**record["hardware"], **record["versions"], "model": f"{first['model']}, SHA-256 {first['sha256']}"}
    lines = [f"# Samplers of {first['model']}, {record['date'][:10]}", "", f"`{record['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        f"- each row: {first['n']} images, seeds from {first['seed']}, guidance {first['guidance']:g}",
        f"- held-out images: {first['held_out_accuracy']:.1%} read right; Fréchet distance of 1,000 training images "
        f"to them {first['frechet_training']:.4f}",
        "- calls: of the network for one image, each on a doubled batch under guidance; nearest, least: the least of "
        "all ratios of nearest-training-image distances to those of held-out images (classes and percentiles 1, 5, 50)",
    ]
    lines += ["", table_line(list(COLUMNS.values())), table_line(["---"] * len(COLUMNS))]
    for row in record["rows"]:
        cells = dict(row, label_accuracy=f"{row['label_accuracy']:.1%}", frechet=f"{row['frechet']:.4f}")
        for key in ("frechet_ratio", "nearest_least"):
            cells[key] = f"{row[key]:.2f}"
        for key in ("precision", "recall"):
            cells[key] = f"{row[key]:.3f}"
        lines.append(table_line([str(cells[key]) for key in COLUMNS]))
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record: dict[str, Any] = {
        "what": "quality", "date": now, "command": " ".join(["python -m benchmarks.quality", *sys.argv[1:]]),
        "hardware": hardware(), "versions": versions(), "rows": [],
    }  # fmt: skip
    stem = (
        None
        if args.out is None
        else f"{now[:10]}-{slug(record['hardware']['cpu'])}-quality-{slug(Path(args.model).name)}"
    )
    if stem and (args.out / f"{stem}.json").exists():
        earlier = json.loads((args.out / f"{stem}.json").read_text(encoding="utf-8"))
        record["rows"], record["command"] = earlier["rows"], f"{earlier['command']}; {record['command']}"
    key = ("sha256", "n", "sampler", "spacing", "steps", "guidance")
    model = load(args.model)
    guidance = model.sampling.guidance if args.guidance is None else args.guidance
    done = {tuple(row[k] for k in key) for row in record["rows"]}
    for spacing in args.spacing:
        for name in args.samplers:
            sampler = get_sampler(name, spacing=spacing)
            try:
                sampler.plan(model.diffusion, min(args.steps))
            except UsageError as error:
                print(f"left out: {name}: {error}", flush=True)
                continue
            for steps in args.steps:
                if (fingerprint(model), args.n, name, sampler.spacing, steps, guidance) in done:
                    continue
                record["rows"].append(measure(args, sampler, steps))
                print(markdown(record).splitlines()[-1], flush=True)
                if stem:
                    args.out.mkdir(parents=True, exist_ok=True)
                    (args.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                    (args.out / f"{stem}.md").write_text(markdown(record), encoding="utf-8")


if __name__ == "__main__":
    main()
