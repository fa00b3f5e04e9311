"""Compiling what tests need, in parallel, and once: objects are kept in pytest's cache under a hash of all that they
were made of."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"


@cache
def build_script() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastgen_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_cached(
    command: Sequence[str | Path], sources: Iterable[Path], headers: Iterable[Path], folder: Path, version: str
) -> dict[Path, tuple[Path, str]]:
    """source -> (object, what the compiler said); raises AssertionError with its words where one does not compile.

    ``version`` tells the compilers apart that have one name; `headers` are all that a source may include.
    """
    words = [str(c) for c in command]
    shared = hashlib.sha256("\0".join([version, *words]).encode())
    for header in sorted(headers):
        shared.update(header.read_bytes())

    def compile_one(source: Path) -> tuple[Path, str]:
        key = shared.copy()
        key.update(source.read_bytes())
        target = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
        log = target.with_suffix(".log")
        if target.exists() and log.exists():
            return target, log.read_text()
        for old in folder.glob(f"{source.stem}-????????????????.*"):
            old.unlink(missing_ok=True)
        part = target.with_suffix(f".{os.getpid()}.o")
        done = subprocess.run(
            [*words, "-c", str(source), "-o", str(part)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, f"{source.relative_to(ROOT)} does not compile:\n{done.stdout}"
        log.write_text(done.stdout)
        part.replace(target)
        return target, done.stdout

    longest_first = sorted(sources, key=lambda s: -s.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(longest_first, pool.map(compile_one, longest_first)))
