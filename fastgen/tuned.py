"""What `fastgen.tune` measured on this machine, kept on disk: backends and configurations, by op and shape of an image.

One file for each kind of GPU, in FASTGEN_CACHE, else $XDG_CACHE_HOME/fastgen, else ~/.cache/fastgen. A file
of another version of fastgen, torch or Triton is not used, and one that is damaged is named in a warning.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.atomic import atomic_file, sweep
from fastgen.errors import UsageError
from fastgen.version import __version__

Key = tuple[Any, ...]


@dataclass
class Tuned:
    """backends: `key` -> the fastest backend; configurations: a kernel's key -> what it is launched with."""

    backends: dict[Key, str] = field(default_factory=dict)
    configurations: dict[Key, dict[str, int]] = field(default_factory=dict)


def key(op: str, like: tuple[Any, ...]) -> Key:
    """What decides: the op, and of its first tensor [N, *] type, shape and layout of one image, not the batch; then
    whatever else the op names."""
    x: Tensor = like[0]
    return (op, str(x.dtype), tuple(x.shape[1:]), x.is_contiguous(), *like[1:])


def folder() -> Path:
    """Where the files are."""
    own, caches = os.environ.get("FASTGEN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(caches) if caches else Path.home() / ".cache") / "fastgen"


def path(gpu: str) -> Path:
    """The file for a GPU of this name."""
    return folder() / f"tuned-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def versions() -> dict[str, str]:
    """What a measurement is good for."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"fastgen": __version__, "torch": torch.__version__, "triton": triton}


def save(found: Tuned, gpu: str) -> Path:
    """Writes the file for ``gpu``, whole or not at all, and uses it from now on in this process."""
    file = path(gpu)
    tables = {name: [[list(k), v] for k, v in table.items()] for name, table in vars(found).items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sweep(file.parent)
        with atomic_file(file) as work:
            work.write_text(json.dumps({"gpu": gpu, "versions": versions(), **tables}, indent=1), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"FASTGEN_CACHE: cannot write {file} ({error}); name a folder that can be written") from None
    load.cache_clear()
    return file


@functools.cache
def load(gpu: str) -> Tuned:
    """What is known of this GPU; nothing where it was never tuned, or with other versions."""
    file = path(gpu)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["versions"] != versions():
            return Tuned()
        return Tuned(*({_tuple(k): v for k, v in data[name]} for name in ("backends", "configurations")))
    except FileNotFoundError:
        return Tuned()
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"fastgen: {file} is damaged ({error!r}); fastgen.tune() writes it anew", stacklevel=2)
        return Tuned()


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


def here(device: torch.device) -> Tuned:
    """What is known of a device; of a CPU nothing."""
    return load(_name(device)) if device.type == "cuda" else _NOTHING


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


_NOTHING = Tuned()
