"""Saving a checkpoint, killed, failing and out of room at every moment of it: is the old or the new one whole?

Two ways of saving: `Run`, a training run that gains step-N+1 and drops its oldest, and `Model`, `fastgen.save` over a
model that is there. Each trial starts from a folder saved normally, and a child process saves into it under a fault.
Then everything that counts as a checkpoint must verify and load, bit for bit what was saved, and after one more normal
save nothing hidden may be left in the folder. The checks are called through `faults.batch`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.reliability.faults import OTHER_ERROR, Counts, Unavailable, arm, fork, forked, kill_after, wait
from fastgen import atomic, checkpoint
from fastgen.diffusion.schedules import DiffusionConfig
from fastgen.errors import UsageError
from fastgen.models.unet import PRESETS, UNet
from fastgen.training.config import TrainConfig
from fastgen.training.loop import Trainer

KEEP = 2
# What a disk that is full, broken, read-only or over a quota says.
DISK_ERRORS = {errno.ENOSPC: "ENOSPC", errno.EIO: "EIO", errno.EROFS: "EROFS", errno.EDQUOT: "EDQUOT"}


class Saver:
    """A folder and a way of saving into it. Version v of the weights is the first one plus v."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.version = folder, 0
        self.model = UNet(replace(PRESETS["tiny"], channels=(8,), attention=(False,), head_dim=8), DiffusionConfig())
        self.first = {k: v.clone() for k, v in self.model.state_dict().items()}
        folder.mkdir()

    def weights(self, version: int) -> dict[str, Tensor]:
        return {k: v + version for k, v in self.first.items()}

    def save(self, version: int) -> None:
        raise NotImplementedError

    def found(self, old: int, new: int) -> str:
        """Which version is there, "old" or "new", or what is wrong. One that should be whole and is not raises
        UsageError."""
        raise NotImplementedError

    def step(self) -> None:
        """The next version, saved normally; a trial starts from it."""
        self.version += 1
        self.save(self.version)

    def verdict(self, *, both: bool = True, settle: bool = True) -> str:
        """After a trial that saved the next version: "old", "new" or what is wrong.

        ``both`` False: only the old one is right. ``settle``: then one more is saved, normally, which must leave
        nothing hidden; else the next trial starts from what this one left.
        """
        try:
            found = self.found(self.version, self.version + 1)
        except (UsageError, OSError) as error:
            found = f"torn: {error}"
        if found == "new" and not both:
            found = "the new one, though its saving failed"
        if not settle and found in ("old", "new"):
            self.version += found == "new"
            return found
        self.version += 1
        try:
            self.step()
            left = [name for name in os.listdir(self.folder) if name.startswith(".")]
            if left:
                return f"left behind: {left}"
            if self.found(self.version, self.version) not in ("old", "new"):
                return "a normal save afterwards does not load"
        except (UsageError, OSError) as error:
            return f"{found}; the save after it: {error}"
        return found


class Model(Saver):
    """`fastgen.save` over a model that is there."""

    def save(self, version: int) -> None:
        self.model.load_state_dict(self.weights(version))
        checkpoint.save(self.model, self.folder / "model")

    def found(self, old: int, new: int) -> str:
        there = checkpoint.load(self.folder / "model").state_dict()
        return next((n for n, v in (("old", old), ("new", new)) if same(there, self.weights(v))), "other weights")


class Run(Saver):
    """A training run: the new step, then the oldest is removed. The average is a version ahead of the weights."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        recipe: Any = SimpleNamespace(model=self.model, name="ddpm", family="unet", data=())
        self.trainer = Trainer(recipe, TrainConfig(preset="tiny", keep=KEEP), folder)

    def state(self, version: int) -> dict[str, Tensor]:
        return {f"model.{k}": v for k, v in self.weights(version - 1).items()}

    def save(self, version: int) -> None:
        self.model.load_state_dict(self.weights(version - 1))
        for name, average in self.trainer.ema.averages[self.trainer.config.ema_decay[0]].items():
            average.copy_(self.weights(version)[name])
        self.trainer.step = version
        self.trainer.save()
        atomic.sweep(self.folder)  # as the next run in the folder does

    def found(self, old: int, new: int) -> str:
        there = checkpoint.checkpoints_of(self.folder)
        steps = [int(path.name.removeprefix(checkpoint.STEP_PREFIX)) for path in there]
        if (steps and len(steps) < min(KEEP, old)) or not steps:
            return f"only the steps {steps} are left"
        for path, step in zip(there, steps):
            checkpoint.verify(path)
            read = {name: checkpoint.read_tensors(path / f"{name}.safetensors") for name in ("model", "training")}
            state = {k: v for k, v in read["training"].items() if k.startswith("model.")}
            if not same(read["model"], self.weights(step)) or not same(state, self.state(step)):
                return f"{path.name} holds other weights"
        if not same(checkpoint.load(self.folder).state_dict(), self.weights(steps[-1])):
            return "what loads are not the newest weights"
        return {old: "old", new: "new"}.get(steps[-1], f"the newest is step {steps[-1]}, not {old} or {new}")


SAVERS = {"run": Run, "model": Model}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@contextlib.contextmanager
def saver(kind: str, exchange: bool = True, defect: str | None = None, above: Path | None = None) -> Iterator[Saver]:
    """A `Saver` in a folder of its own, with a first version saved, and as many as a run keeps.

    exchange False: as on a system that exchanges no names. defect: one of `DEFECTS`, planted before anything is saved.
    """
    with contextlib.ExitStack() as undo:
        if not exchange:
            undo.enter_context(_patched(atomic, "_renameat2", lambda: None))
        if defect is not None:
            undo.enter_context(DEFECTS[defect]())
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="reliability-", dir=above)))
        made = SAVERS[kind](folder / "run")
        for _ in range(KEEP):
            made.step()
        yield made


def order_of_operations(kind: str, exchange: bool = True, defect: str | None = None) -> Counts:
    """One save, logged: what would be lost with the power is what was not synced before the rename."""
    counts = Counts()
    with saver(kind, exchange, defect) as made:
        problems = misordered(logged(made), made.folder)
        counts.add("; ".join(problems) or made.found(made.version - 1, made.version))
    return counts


def misordered(lines: list[list[str]], folder: Path) -> list[str]:
    """What is wrong with a sequence of (operation, inode, path, target, bytes): every file must be synced after its
    last write, and its directory after the last name made in it, before the directory takes its place; then the folder
    must be synced, before anything is removed; and the manifest is the last file that is made."""
    places = [
        i for i, (op, _, source, target, _) in enumerate(lines)
        if op in ("rename", "exchange") and Path(target).parent == folder and not Path(target).name.startswith(".")
        and not Path(source).name.startswith(".fastgen-old-")
    ]  # fmt: skip
    if not places:
        return ["nothing takes its place by a rename"]
    at = places[0]
    work = lines[at][2]
    problems, dirty, last, names_synced = [], {}, "", False
    for op, inode, path, _, _ in lines[:at]:
        inside = path.startswith(f"{work}/")
        if op == "open" and inside and "/.tmp" not in path[len(work) :]:
            last = path if path not in dirty.values() else last
        if inside and op in ("open", "rename", "unlink"):
            names_synced = False
        if op == "write":
            dirty[inode] = path
        elif op == "fsync":
            dirty.pop(inode, None)
            names_synced |= path == work
    problems += [f"{Path(path).name} is not synced after its last write" for path in dirty.values()]
    problems += [] if names_synced else ["the directory is not synced"]
    written = [Path(path).name for op, _, path, _, _ in lines[:at] if op == "write"]
    problems += [] if written and written[-1] == "manifest.json" else [f"{written[-1:]} is written last, no manifest"]
    after = [(op, path) for op, _, path, _, _ in lines[at + 1 :]]
    removed = next((i for i, (op, _) in enumerate(after) if op in ("unlink", "rmdir")), len(after))
    if ("fsync", str(folder)) not in after[:removed]:
        problems.append("the folder is not synced after the rename")
    return problems


def operations(made: Saver) -> list[str]:
    """The operations on files of a save, which it makes."""
    return [line[0] for line in logged(made)]


def logged(made: Saver) -> list[list[str]]:
    """A save without faults: operation, inode, path, target and bytes of each of its operations on files."""
    with tempfile.TemporaryFile() as log:

        def save() -> None:
            arm(made.folder, "log", log=log.fileno())
            made.save(made.version + 1)

        if code := forked(save):
            raise RuntimeError(f"a save without any fault ended with {code}")
        made.version += 1
        log.seek(0)
        return [line.split("\t") for line in log.read().decode().splitlines()]


def kill_at_every_operation(kind: str, exchange: bool = True, every: int = 1, defect: str | None = None) -> Counts:
    """SIGKILL before, in the middle of (a write that wrote half) and after each operation on files of a save.

    every: only each n-th of these moments. With a defect in no order, and no further than to what is torn.
    """
    counts = Counts()
    with saver(kind, exchange, defect) as made:
        moments = [
            (mode, at, op) for at, op in enumerate(operations(made), 1) for mode in ("before", "half", "after")
            if op == "write" or mode != "half"
        ][::every]  # fmt: skip
        if defect:
            random.Random(0).shuffle(moments)
        for mode, at, op in moments:

            def save(mode: str = mode, at: int = at) -> None:
                arm(made.folder, mode, at)
                made.save(made.version + 1)

            code = forked(save)
            counts.inside += code == -signal.SIGKILL
            verdict = made.verdict() if code in (0, -signal.SIGKILL) else f"exit code {code}"
            counts.add(verdict, f"killed {mode} operation {at}, {op}")
            if counts.torn and defect:
                break
    return counts


def fail_at_every_operation(
    kind: str, error: int = errno.ENOSPC, all_later: bool = False, exchange: bool = True, defect: str | None = None
) -> Counts:
    """Each operation of a save fails with ``error``, and all_later every one after it: an OSError of that number that
    names a file, and the old checkpoint; or, where the operation was dispensable, the new one and no error.

    When all later operations fail too, a rename cannot be taken back: then the new one, whole, is right as well.
    """
    counts = Counts()
    with saver(kind, exchange, defect) as made:
        for at in range(1, len(operations(made)) + 1):

            def save(at: int = at) -> None:
                arm(made.folder, "fail", at, error, all_later)
                made.save(made.version + 1)

            code = forked(save)
            note = f"{DISK_ERRORS.get(error, error)} at operation {at}{' and later' if all_later else ''}"
            counts.inside += code == error
            if code not in (0, error):
                made.verdict()
                counts.add("another error" if code == OTHER_ERROR else f"exit code {code}", note)
                continue
            verdict = made.verdict()
            if code == 0 and verdict == "old":
                verdict = "no error, and the new one is not there"
            if code == error and verdict == "new" and not all_later and kind == "model":
                verdict = "an error, and the old one is not there"
            counts.add(verdict, note)
            if counts.torn and defect:
                break
    return counts


def kill_at_random(kind: str, count: int, seed: int = 0, exchange: bool = True, defect: str | None = None) -> Counts:
    """SIGKILL at moments drawn uniformly over the duration of a save, until ``count`` of them fell inside one."""
    counts, chance = Counts(), random.Random(seed)
    with saver(kind, exchange, defect) as made:

        def save() -> None:
            made.save(made.version + 1)

        durations: list[float] = []

        def unharmed() -> None:
            durations.append(kill_after(save, None)[1])
            made.version += 1

        for _ in range(9):
            unharmed()
        while counts.inside < count and counts.trials < 3 * count + 20:
            delay = chance.uniform(0, statistics.median(durations[-9:]))
            code, _ = kill_after(save, delay)
            counts.inside += code == -signal.SIGKILL
            ended = code in (-signal.SIGKILL, -signal.SIGTERM)
            verdict = made.verdict(settle=counts.trials % 20 == 0) if ended else f"exit code {code}"
            counts.add(verdict, f"killed after {1e3 * delay:.2f} ms")
            if counts.trials % 10 == 0:
                unharmed()  # how long it takes depends on what else the machine does
    return counts


def two_at_once(kind: str = "model", count: int = 20, exchange: bool = True) -> Counts:
    """Two processes save at one path at the same time: both end well, and one of both is there."""
    counts = Counts()
    with saver(kind, exchange) as made:
        for _ in range(count):
            children = [fork(lambda v=made.version + k: made.save(v)) for k in (0, 1)]
            codes = [wait(child) for child in children]
            counts.add(made.verdict() if codes == [0, 0] else f"exit codes {codes}")
    return counts


# Real faults of a real file system


@contextlib.contextmanager
def mounted(size: str) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A tmpfs of that size, and a function that mounts it anew with other options. Raises Unavailable."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("mount"):
        raise Unavailable("needs root, and mount, for a file system of its own")
    with tempfile.TemporaryDirectory(prefix="reliability-") as place:

        def mount(options: str) -> None:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True
            )
            if done.returncode:
                raise Unavailable(f"no tmpfs can be mounted: {done.stderr.strip()}")

        mount(f"size={size}")
        try:
            yield Path(place), lambda options: mount(f"remount,{options}")
        finally:
            subprocess.run(["umount", place], check=False)


def real_full_disk(kind: str, rooms: int = 24) -> Counts:
    """Saves on a file system with less and less room left: ENOSPC and the old checkpoint, or enough and the new one."""
    counts = Counts()
    with mounted("16m") as (place, _), saver(kind, above=place) as made:
        size = sum(file.stat().st_size for file in made.folder.rglob("*") if file.is_file())
        filler = place / "filler"
        for i in range(rooms):
            disk = os.statvfs(place)
            room = size * 3 * i // (2 * rooms)
            filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - room)))
            code = forked(lambda: made.save(made.version + 1))
            filler.unlink()
            counts.inside += code == errno.ENOSPC
            verdict = made.verdict(both=code == 0) if code in (0, errno.ENOSPC) else f"exit code {code}"
            verdict = "no error, and the new one is not there" if code == 0 and verdict == "old" else verdict
            counts.add(verdict, f"{room} bytes left")
    return counts


def real_read_only(kind: str) -> Counts:
    """Saves on a file system mounted read-only, and, as nobody, into a folder without permission."""
    counts = Counts()
    with mounted("16m") as (place, remount), saver(kind, above=place) as made:
        remount("ro")
        code = forked(lambda: made.save(made.version + 1))
        whole = made.found(made.version, made.version)  # it loads while it is read-only too
        remount("rw")
        counts.inside += code == errno.EROFS
        counts.add(
            made.verdict(both=False)
            if code == errno.EROFS and whole in ("old", "new")
            else f"exit code {code}, {whole}",
            "ro",
        )
        made.folder.parent.chmod(0o755)
        place.chmod(0o755)

        def as_nobody() -> None:
            os.setegid(65534)
            os.seteuid(65534)
            made.save(made.version + 1)

        code = forked(as_nobody)
        counts.inside += code == errno.EACCES
        counts.add(made.verdict(both=False) if code == errno.EACCES else f"exit code {code}", "no permission")
    return counts


# Defects planted to see that the checks above find them


@contextlib.contextmanager
def _patched(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextlib.contextmanager
def _in_place(path: Path) -> Iterator[Path]:
    """Written where it is to stand."""
    path.mkdir(parents=True, exist_ok=True)
    yield path


@contextlib.contextmanager
def _renamed_first(path: Path, real: Any = atomic.atomic_directory) -> Iterator[Path]:
    """Renamed, and then written."""
    with real(path):
        pass
    yield path


def _removed_and_renamed(work: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.rename(work, path)
    atomic._fsync(path.parent)


def _files_only(path: Path, real: Callable[[Path], None] = atomic._fsync) -> None:
    if not path.is_dir():
        real(path)


def _manifest_first(directory: Path, *args: Any, real: Callable[..., None] = checkpoint.write_checkpoint, **kw: Any):
    real(directory, *args, **kw)
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config)


def _never_fails(directory: Path, *args: Any, real: Callable[..., None] = checkpoint.write_checkpoint, **kw: Any):
    with contextlib.suppress(OSError):
        real(directory, *args, **kw)


DEFECTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "written in place": lambda: _patched(checkpoint, "atomic_directory", _in_place),
    "renamed before it is written": lambda: _patched(atomic, "atomic_directory", _renamed_first),
    "the old removed before the rename": lambda: _patched(atomic, "_take_place", _removed_and_renamed),
    "the oldest removed in place": lambda: _patched(atomic, "remove", shutil.rmtree),
    "stale files never swept": lambda: _patched(atomic, "sweep", lambda *_: None),
    "nothing synced": lambda: _patched(atomic, "_fsync", lambda _: None),
    "no directory synced": lambda: _patched(atomic, "_fsync", _files_only),
    "the manifest not last": lambda: _patched(checkpoint, "write_checkpoint", _manifest_first),
    "errors swallowed": lambda: _patched(checkpoint, "write_checkpoint", _never_fails),
}

# Which check must find each of them.
FOUND_BY: dict[str, tuple[str, dict[str, Any]]] = {
    "written in place": ("kill_at_every_operation", {"kind": "model"}),
    "renamed before it is written": ("kill_at_every_operation", {"kind": "run"}),
    "the old removed before the rename": ("kill_at_every_operation", {"kind": "model"}),
    "the oldest removed in place": ("kill_at_every_operation", {"kind": "run"}),
    "stale files never swept": ("kill_at_every_operation", {"kind": "model"}),
    "nothing synced": ("order_of_operations", {"kind": "run"}),
    "no directory synced": ("order_of_operations", {"kind": "model"}),
    "the manifest not last": ("order_of_operations", {"kind": "model"}),
    "errors swallowed": ("fail_at_every_operation", {"kind": "model", "error": errno.ENOSPC}),
}
