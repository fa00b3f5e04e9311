"""The rows of training data: how soon a folder of many files is ready, and how many images a second come out of one.

python -m benchmarks.data_rows [files [folder]] prints them as JSON, and writes a record into the folder. Images and
index lie in a temporary one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.record import Record, slug
from fastgen.training.config import TrainConfig
from fastgen.training.data import Loader, open_data
from fastgen.training.ddpm import DDPMRecipe
from fastgen.training.loop import Trainer

IMAGES, BATCH, SECONDS = 2000, 64, 3.0


@contextlib.contextmanager
def cache_of_its_own() -> Iterator[Path]:
    """A temporary folder, whose "cache" holds the indices."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, FASTGEN_CACHE=f"{folder}/cache"):
        yield Path(folder)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def index_row(files: int = 1_000_000, in_each: int = 1000) -> dict[str, float]:
    """Seconds of `open_data` on a folder of ``files`` empty files, ``in_each`` to a folder: read for the first time
    ("cold": the file system's own cache is warm), the second ("cached"), and after one file more ("changed")."""
    with cache_of_its_own() as folder:
        root = folder / "images"
        for i in range(files):
            if i % in_each == 0:
                (root / f"{i // in_each:05d}").mkdir(parents=True)
            os.close(os.open(root / f"{i // in_each:05d}" / f"{i:08d}.jpg", os.O_CREAT | os.O_WRONLY))
        time.sleep(2.1)  # a folder that changed in the last two seconds is read again

        def opened() -> object:
            return open_data(str(root), channels=3, image_size=64, holdout=0.01)

        row = {"files": files, "cold_s": seconds(opened), "cached_s": seconds(opened)}
        (root / "00000" / "new.jpg").touch()
        return row | {"changed_s": seconds(opened)}


def write_images(folder: Path, suffix: str, size: int, images: int) -> None:
    """Images of colours and some noise, which compress somewhat as photos do: ``size`` pixels a side, in 4 classes."""
    rng = np.random.default_rng(0)
    for i in range(images):
        file = folder / str(i % 4) / f"{i:05d}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size))
        noise = rng.integers(-12, 13, (size, size, 3))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(file)


def loader_rows(workers: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, object]]:
    """Images a second that a Loader gives to one who only takes them, over `SECONDS`, and when the first batch came."""
    rows: list[dict[str, object]] = []
    with cache_of_its_own() as folder:
        for suffix, size in (("jpg", 64), ("png", 32)):
            write_images(folder / suffix, suffix, size, IMAGES)
            for count in workers:
                first, rate = rate_of(folder / suffix, size, count)
                row = {"images": f"{size}x{size} {suffix}", "workers": count, "first_batch_s": first, "per_s": rate}
                rows.append(row)
    return rows


def rate_of(folder: Path, size: int, workers: int) -> tuple[float, float]:
    """Seconds to the first batch, and images a second from then on."""
    started = time.perf_counter()
    loader = Loader(open_data(str(folder), channels=3, image_size=size), BATCH, seed=0, workers=workers)
    try:
        next(loader)
        begun, batches = time.perf_counter(), 0
        while time.perf_counter() - begun < SECONDS:
            next(loader)
            batches += 1
        return begun - started, batches * BATCH / (time.perf_counter() - begun)
    finally:
        loader.close()


def waiting_row(steps: int = 12) -> dict[str, object]:
    """The share of its time that a run waits for images, 64x64 JPEGs, with the workers it takes by itself: the
    smallest network that has 64 pixels to do, after the first step."""
    with cache_of_its_own() as folder:
        write_images(folder / "jpg", "jpg", 64, IMAGES)
        config = TrainConfig(data=str(folder / "jpg"), preset="mnist", image_size=64, batch_size=32)
        trainer = Trainer(DDPMRecipe(config), config, folder)
        waited, started = [0.0], 0.0
        with contextlib.closing(trainer._loader(0)) as loader:
            trainer.loader = Timed(loader, waited)  # type: ignore[assignment]
            for step in range(steps):
                trainer._train_step()
                trainer.step += 1
                if step == 0:
                    waited[0], started = 0.0, time.perf_counter()
        total = time.perf_counter() - started
        return {"batch": 32, "steps": steps - 1, "seconds": total, "waited_s": waited[0], "share": waited[0] / total}


class Timed:
    """A loader that adds up how long its batches are waited for."""

    def __init__(self, loader: Loader, waited: list[float]) -> None:
        self.loader, self.waited = loader, waited

    def __next__(self) -> object:
        started = time.perf_counter()
        batch = next(self.loader)
        self.waited[0] += time.perf_counter() - started
        return batch


def main(files: int, out: Path | None) -> None:
    record = asdict(Record("data", "cpu", {}))
    record["command"] = " ".join(["python -m benchmarks.data_rows", *sys.argv[1:]])
    record["rows"] = [{"index": index_row(files)}, {"loader": loader_rows()}, {"waiting": waiting_row()}]
    print(json.dumps(record["rows"], indent=1))
    if out is not None:
        stem = f"{record['date'][:10]}-{slug(record['hardware']['cpu'])}-data.json"
        (out / stem).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
