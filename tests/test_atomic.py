"""fastgen.atomic: modes, locks, sweeping, exchange and its substitute, the order of operations, errors."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgen import atomic
from fastgen.atomic import aside, atomic_directory, atomic_file, remove, sweep, umask
from fastgen.checkpoint import STEP_PREFIX, checkpoints_of, resolve

ROOT = Path(__file__).parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="modes and locks of POSIX")
STALE, OLD = ".fastgen-0123abcd-a", ".fastgen-old-a"


@pytest.fixture(params=["exchanged", "moved"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a system call that exchanges two names."""
    if request.param == "moved":
        monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    return request.param


@pytest.fixture
def mask() -> Iterator[Callable[[int], None]]:
    before = umask()
    yield os.umask
    os.umask(before)


def put(path: Path, text: str) -> None:
    with atomic_directory(path) as work:
        (work / "x").write_text(text)


def text_of(path: Path) -> str:
    return (path / "x").read_text()


@posix
@pytest.mark.parametrize("value", [0o022, 0o077, 0o000, 0o027])
def test_modes(tmp_path: Path, mask: Callable[[int], None], value: int) -> None:
    mask(value)
    assert umask() == value
    put(tmp_path / "new" / "a", "1")
    with atomic_file(tmp_path / "b") as work:
        work.write_text("1")
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "new", tmp_path / "new" / "a", tmp_path / "b")]
    assert modes == [0o777 & ~value] * 2 + [0o666 & ~value]


@posix
def test_umask_is_not_touched_where_it_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set and set back, it would be 0 for a moment, in which another thread may make a file."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    expected = umask()
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("set"))
    assert umask() == expected


@posix
def test_umask_where_it_cannot_be_read(monkeypatch: pytest.MonkeyPatch, mask: Callable[[int], None]) -> None:
    mask(0o031)
    monkeypatch.setattr(Path, "read_text", lambda *_: "Name: python\n")
    assert umask() == 0o031 and os.umask(0o031) == 0o031


# Taking a place


def test_new_and_replaced(tmp_path: Path, either: str) -> None:
    for text in ("1", "2", "3"):
        put(tmp_path / "a", text)
        assert text_of(tmp_path / "a") == text and os.listdir(tmp_path) == ["a"]


@posix
def test_replaces_files_and_links(tmp_path: Path, either: str) -> None:
    """What a link points to stays."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_text("kept")
    (tmp_path / "a").write_text("file")
    os.symlink(tmp_path / "kept", tmp_path / "b")
    for name in "ab":
        put(tmp_path / name, "new")
        assert text_of(tmp_path / name) == "new" and not (tmp_path / name).is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "kept"] and text_of(tmp_path / "kept") == "kept"


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text in ("1", "2"):
        with atomic_file(file) as work:
            work.write_text(text)
            assert work.parent == tmp_path and work.suffix == ".json" and (text == "1" or file.read_text() == "1")
        assert file.read_text() == text and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(KeyboardInterrupt), atomic_file(file) as work:
        raise KeyboardInterrupt
    assert file.read_text() == "2" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("failing", ["write", "file", "directory", "folder", "move", "second move"])
def test_an_error_leaves_the_old_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, either: str, failing: str, code: int
) -> None:
    """Wherever it occurs: the number and a file's name, what was there, and nothing beside it."""
    put(tmp_path / "a", "old")
    real_sync, real_move, moves = os.fsync, os.rename, []
    error = OSError(code, os.strerror(code))
    ino = tmp_path.stat().st_ino

    def sync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        kind = "folder" if found.st_ino == ino else "directory" if stat.S_ISDIR(found.st_mode) else ""
        if (kind or "file") == failing:
            raise error
        real_sync(descriptor)

    def move(*arguments: Any) -> Any:
        moves.append(arguments)
        if len(moves) == (1 if failing == "move" else 2) and "move" in failing:
            raise error
        return real_move(*arguments)

    if either == "moved":
        monkeypatch.setattr(os, "rename", move)
    elif failing == "second move":
        pytest.skip("an exchange is one move")
    else:
        real_move = atomic._exchange
        monkeypatch.setattr(atomic, "_exchange", move)
    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError) as caught, atomic_directory(tmp_path / "a") as work:
        (work / "x").write_text("new")
        if failing == "write":
            raise error
    assert caught.value.errno == code and (caught.value.filename or "move" in failing)
    assert failing != "file" or caught.value.filename.endswith("-a/x"), "of a sync: the file"
    assert text_of(tmp_path / "a") == "old" and os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = atomic._fsync
    monkeypatch.setattr(
        atomic, "_fsync", lambda p: real(p) if p != tmp_path else (_ for _ in ()).throw(OSError(5, "x"))
    )
    with pytest.raises(OSError):
        put(tmp_path / "a", "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("sync", [True, False])
def test_order_of_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, either: str, sync: bool) -> None:
    """Files in every depth, then directories that hold them, the move, the folder, and only then is the old gone."""
    put(tmp_path / "a", "old")
    calls: list[str] = []

    def told(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(f"{name} {arguments[0].name.partition('-')[2].partition('-')[2] or arguments[0].name}")
            return real(*arguments)

        return call

    for holder, name in (
        (atomic, "_fsync"),
        (atomic, "_exchange"),
        (os, "rename"),
        (os, "replace"),
        (atomic, "_discard"),
    ):
        monkeypatch.setattr(holder, name, told(name, getattr(holder, name)))
    with atomic_directory(tmp_path / "a") as work:
        (work / "sub").mkdir()
        (work / "sub" / "y").write_text("y")
        (work / "x").write_text("new")
    synced = [f"_fsync {name}" for name in ("a", "sub", "x", "y")]
    assert sorted(calls[:4]) == synced
    moves = ["_exchange a"] if either == "exchanged" else ["_exchange a", "_discard a", "rename a", "rename a"]
    assert calls[4:] == [*moves, f"_fsync {tmp_path.name}", "_discard a", "_discard a"]
    calls.clear()
    with atomic_file(tmp_path / "b", sync=sync) as work:
        work.write_text("1")
    folder = [f"_fsync {tmp_path.name}"]
    assert calls == [*["_fsync b"] * sync, "replace b", *folder * sync, "_discard b"]


def test_folders_above_are_made_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = [], atomic._fsync
    monkeypatch.setattr(atomic, "_fsync", lambda path: (synced.append(path), real(path)))
    put(tmp_path / "1" / "2" / "a", "new")
    assert synced[:2] == [tmp_path, tmp_path / "1"] and synced[-1] == tmp_path / "1" / "2"


def test_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a", "1")
    synced, real = [], atomic._fsync
    monkeypatch.setattr(atomic, "_fsync", lambda path: (synced.append(path), real(path)))
    with monkeypatch.context() as patch:
        patch.setattr(
            atomic, "_discard", lambda path: pytest.fail("still there") if (tmp_path / "a").exists() else None
        )
        remove(tmp_path / "a")
    (left,) = os.listdir(tmp_path)
    assert synced == [tmp_path], "before anything is removed"
    assert atomic.OURS.fullmatch(left)[2] == "a" and text_of(tmp_path / left) == "1"
    sweep(tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        remove(tmp_path / "a")


# Sweeping


@posix
def test_sweeps_what_is_stale_and_ours(tmp_path: Path) -> None:
    foreign = [
        ".fastgen",
        ".fastgen-old",
        ".fastgen-0123abcd",
        ".fastgen-0123ABCD-a",
        ".a-0123abcd",
        ".git",
        "a",
        "x-old",
    ]
    for name in [*foreign, STALE, OLD, ".fastgen-00000000-b"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / ".fastgen-11111111-a.png").write_text("half")
    sweep(tmp_path, "a")
    assert sorted(os.listdir(tmp_path)) == sorted([*foreign, ".fastgen-00000000-b", ".fastgen-11111111-a.png"])
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(foreign)


@posix
def test_the_next_writer_sweeps(tmp_path: Path) -> None:
    (tmp_path / STALE).mkdir()
    (tmp_path / STALE.replace("-a", "-b")).mkdir()
    put(tmp_path / "a", "1")
    assert sorted(os.listdir(tmp_path)) == [STALE.replace("-a", "-b"), "a"]


@posix
def test_what_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    """Never swept, by a writer of the same name neither: it is the only one there is."""
    for use in (lambda: sweep(tmp_path), lambda: sweep(tmp_path, "a"), fails):
        put(tmp_path / "a", "only")
        (tmp_path / "a").rename(aside(tmp_path / "a"))
        if use is fails:
            fails(tmp_path / "a")
        else:
            use()
        assert os.listdir(tmp_path) == ["a"] and text_of(tmp_path / "a") == "only"


def fails(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_directory(path):
        raise ZeroDivisionError


@posix
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_living_writer_is_left_alone(tmp_path: Path, kind: str) -> None:
    """Another process's too: while it lives nothing is swept; once it is killed, all of it is."""
    code = (
        "import sys, time; from pathlib import Path; from fastgen.atomic import atomic_directory, atomic_file\n"
        f"with atomic_{kind}(Path(sys.argv[1])) as work: print(work.name, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        work = other.stdout.readline().strip()
        sweep(tmp_path)
        put(tmp_path / "a", "mine")
        assert sorted(os.listdir(tmp_path)) == sorted([work, "a"])
    finally:
        other.kill()
        other.communicate()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["a"] and text_of(tmp_path / "a") == "mine"


@posix
def test_swept_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making a directory and locking it another process may sweep it: then another one is made."""
    real, swept = atomic._lock, []

    def late(descriptor: int) -> bool | None:
        if not swept:
            swept.append(1)
            sweep(tmp_path)
            assert os.listdir(tmp_path) == []
        return real(descriptor)

    monkeypatch.setattr(atomic, "_lock", late)
    monkeypatch.setattr(atomic, "_discard_stale", lambda path: path.rmdir())
    put(tmp_path / "a", "1")
    assert swept and text_of(tmp_path / "a") == "1" and os.listdir(tmp_path) == ["a"]


@posix
def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, either: str) -> None:
    """A file system that has none, or Windows: stale cannot be told from living."""
    (tmp_path / STALE).mkdir()

    def none(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.fcntl, "flock", none)
        put(tmp_path / "a", "1")
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "fcntl", None)
        put(tmp_path / "a", "2")
    assert sorted(os.listdir(tmp_path)) == [STALE, "a"] and text_of(tmp_path / "a") == "2"


# At once


def test_writers_at_once(tmp_path: Path, either: str) -> None:
    """Threads that write one path over and over: each ends well, a reader finds it whole, and nothing is left."""
    place, errors, stop = tmp_path / "a", [], threading.Event()
    put(place, "0" * 1000)

    def write(letter: str) -> None:
        try:
            for _ in range(25):
                put(place, letter * 1000)
        except BaseException as error:
            errors.append(error)

    def look() -> None:
        while not stop.is_set():
            try:
                found = text_of(place)
            except FileNotFoundError:  # moved aside, or replaced between opening the one and the other
                continue
            if len(set(found)) != 1 or len(found) != 1000:
                errors.append(found)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "1234"]
    reader = threading.Thread(target=look)
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    reader.join()
    assert not errors and os.listdir(tmp_path) == ["a"] and text_of(place) in [d * 1000 for d in "1234"]


def test_descriptors_are_closed(tmp_path: Path, either: str) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        put(tmp_path / "a", "1")
        with atomic_file(tmp_path / "b"):
            pass
        fails(tmp_path / "a")
    assert len(os.listdir("/proc/self/fd")) == before


# A checkpoint that was moved aside


def test_a_checkpoint_moved_aside_is_found(tmp_path: Path) -> None:
    """A process was killed between the two renames: the old one is where `aside` says, until the next writer."""
    steps = [tmp_path / f"{STEP_PREFIX}{n:08d}" for n in (1, 2, 3)]
    for path in steps:
        with atomic_directory(path) as work:
            for name in ("config.json", "manifest.json"):
                (work / name).write_text("{}")
    assert checkpoints_of(tmp_path) == steps and resolve(steps[1]) == steps[1]
    steps[1].rename(aside(steps[1]))
    steps[2].rename(aside(steps[2]))
    assert checkpoints_of(tmp_path) == [steps[0], aside(steps[1]), aside(steps[2])]
    assert resolve(tmp_path) == resolve(steps[2]) == aside(steps[2])
    sweep(tmp_path)
    assert checkpoints_of(tmp_path) == steps
