"""Files and directories that are there whole or not at all, through `kill -9`, full disks and lost power.

What is written stands beside its place as `.fastgen-<8 hex digits>-<name>`, is synced, takes its place in one rename,
and the folder is synced after it. Where two names cannot be exchanged in one call (only Linux can, and not on every
file system), what is replaced is `.fastgen-old-<name>` for a moment. A writer that is killed leaves such names behind;
`sweep` removes them, told from those of a living writer by the lock (flock) that it holds while it writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody's lock can be seen there, so nothing is swept
    fcntl = None

OURS = re.compile(r"\.fastgen-(old|[0-9a-f]{8})-(.+)", re.DOTALL)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a fresh directory beside ``path`` that takes its place when the block succeeds.

    Files and folder are synced before the rename, and ``path``'s folder after it. Where the block or any of that
    fails, what stood at ``path`` stays. What killed writers of the same path left behind is swept first. Of two
    writers at once the last one wins. Missing folders above are made. Raises OSError, with a file's name.
    """
    _make(path.parent)
    sweep(path.parent, path.name)
    work, lock = _create(path, directory=True)
    try:
        yield work
        for file in [*work.rglob("*"), work]:
            _fsync(file)
        _take_place(work, path)
    except OSError as error:
        if error.errno and error.filename is None:  # of a write: say at least where to
            error.filename = str(path)
        raise
    finally:
        _discard(work)  # after an exchange, what was replaced
        _close(lock)


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yields the path of an empty file beside ``path``, to be written in place, that takes its place when the block
    succeeds; nothing is left of one that fails.

    ``sync`` False is for many files that can be made again: killed or not they are whole, but lost power may empty
    them. Sweeps nothing, since that reads the whole folder: call `sweep` once before.
    """
    work, lock = _create(path, directory=False)
    try:
        yield work
        if sync:
            _fsync(work)
        _close(lock)  # Windows moves no open file
        lock = None
        os.replace(work, path)
        if sync:
            _fsync(path.parent)
    finally:
        _discard(work)
        _close(lock)


def remove(path: Path) -> None:
    """Removes a directory in one step: killed anywhere in it, ``path`` is still whole, or is gone."""
    work = _beside(path)
    os.rename(path, work)
    _fsync(path.parent)
    _discard(work)


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes from ``folder`` what writers that were killed left behind, of ``name`` or of all, and puts back what one
    had moved aside. What a living process is writing stays, as does what is not ours."""
    with _locked(folder):
        for entry in sorted(os.listdir(folder)):
            found = OURS.fullmatch(entry)
            if not found or name not in (None, found[2]):
                continue
            place = folder / found[2]
            if found[1] != "old":
                _discard_stale(folder / entry)
            elif os.path.lexists(place):
                _discard(folder / entry)
            else:
                os.rename(folder / entry, place)


def aside(path: Path) -> Path:
    """Where the directory ``path`` is found whole if it is missing because a writer was killed replacing it."""
    return path.with_name(f".fastgen-old-{path.name}")


def umask() -> int:
    """The process's umask. On Linux it is read; elsewhere it must be set to be known, so not from several threads."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _beside(path: Path) -> Path:
    return path.with_name(f".fastgen-{secrets.token_hex(4)}-{path.name}")


def _make(folder: Path) -> None:
    """Makes a folder and those above it so that they outlive lost power."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync(folder.parent)


def _create(path: Path, directory: bool) -> tuple[Path, int | None]:
    """A new file or directory beside ``path``, with the mode that the umask leaves, and the lock on it."""
    while True:
        work = _beside(path)
        if directory:
            os.mkdir(work)
        else:
            os.close(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if fcntl is None:
            return work, None
        lock = None
        try:
            lock = os.open(work, os.O_RDONLY)
            if _lock(lock) is not False and os.path.samestat(os.fstat(lock), os.stat(work)):
                return work, lock
        except FileNotFoundError:
            pass  # swept between the two calls, before it was locked
        except BaseException:
            _discard(work)
            _close(lock)
            raise
        _close(lock)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time moves what is in ``folder``, where the file system has locks."""
    descriptor = None
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _close(descriptor)


def _discard_stale(work: Path) -> None:
    """Removes what no living process has locked. The lock is held over it, so that its maker sees that it is gone."""
    if fcntl is None:
        return
    try:
        descriptor = os.open(work, os.O_RDONLY)
    except OSError:
        return
    try:
        if _lock(descriptor):
            _discard(work)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Removes a file or a directory. What cannot be removed is left to the next sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _take_place(work: Path, path: Path) -> None:
    """Puts ``work`` at ``path`` and syncs the folder; undone where that fails. What was replaced is at ``work`` after
    it, or gone."""
    undo: list[tuple[Callable[..., object], Path, Path]] = []
    old = aside(path)
    with _locked(path.parent):
        try:
            replacing = os.path.lexists(path)
            if replacing and _exchange(work, path):
                undo.append((_exchange, work, path))
            else:
                if replacing:
                    _discard(old)
                for source, target in [(path, old), (work, path)] if replacing else [(work, path)]:
                    os.rename(source, target)
                    undo.append((os.rename, target, source))
            _fsync(path.parent)
        except BaseException:
            for move, source, target in reversed(undo):
                move(source, target)
            raise
        _discard(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges what two names stand for, in one step; False where libc or the file system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old libc
        return None


def _fsync(path: Path) -> None:
    """Waits until the file, or the names in the directory, are on the disk. Raises OSError with its name."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for a directory
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)
