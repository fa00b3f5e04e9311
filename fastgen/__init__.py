"""fastgen: image generators in PyTorch whose hot paths run on fused kernels.

    images = fastgen.sample("ddpm-mnist", n=16)    # real images, at once
    images.save("samples.png")

`fastgen.ops` holds the fused operations, `fastgen.doctor()` says which kernels run here.
Everything is imported on first use: `import fastgen` itself is as good as free.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from fastgen.version import __version__

if importlib.util.find_spec("fastgen.kernels") is None:
    raise ImportError(
        f"Python found the source folder {__path__[0]}, not the installed package: fastgen.kernels is missing. "
        "Start Python from another folder, or install the checkout with `pip install -e .`."
    )

if TYPE_CHECKING:
    from fastgen import ops
    from fastgen.backends import use_backend
    from fastgen.checkpoint import load, save
    from fastgen.diagnosis import doctor
    from fastgen.errors import UsageError
    from fastgen.sampling import Samples, sample

_WHERE = {
    "BackendError": "backends",
    "Samples": "sampling",
    "UsageError": "errors",
    "doctor": "diagnosis",
    "load": "checkpoint",
    "sample": "sampling",
    "save": "checkpoint",
    "use_backend": "backends",
}

__all__ = [
    "BackendError",
    "Samples",
    "UsageError",
    "__version__",
    "doctor",
    "load",
    "ops",
    "sample",
    "save",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("fastgen.ops")
    if name in _WHERE:
        return getattr(importlib.import_module(f"fastgen.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
