"""fastgen: image generators in PyTorch whose hot paths run on fused kernels.

    images = fastgen.sample("ddpm-mnist", n=16)    # real images, at once
    images.save("samples.png")

`fastgen.ops` holds the fused operations, `fastgen.nn` layers made of them, `fastgen.doctor()` says which kernels run
here.
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
    from fastgen import metrics, nn, ops, schedulers
    from fastgen.acceleration.explaining import explain
    from fastgen.acceleration.public import accelerate, restore
    from fastgen.acceleration.verifying import VerificationError
    from fastgen.backends import use_backend
    from fastgen.checkpoint import load, save
    from fastgen.diagnosis import doctor
    from fastgen.errors import UsageError
    from fastgen.folder import sample_to_folder
    from fastgen.images import Samples
    from fastgen.replaying import replay
    from fastgen.sampling import sample, stream
    from fastgen.tuning import tune

_WHERE = {
    "BackendError": "backends",
    "Samples": "images",
    "UsageError": "errors",
    "VerificationError": "acceleration.verifying",
    "accelerate": "acceleration.public",
    "doctor": "diagnosis",
    "explain": "acceleration.explaining",
    "load": "checkpoint",
    "replay": "replaying",
    "restore": "acceleration.public",
    "sample": "sampling",
    "sample_to_folder": "folder",
    "save": "checkpoint",
    "stream": "sampling",
    "tune": "tuning",
    "use_backend": "backends",
}

__all__ = [
    "BackendError",
    "Samples",
    "UsageError",
    "VerificationError",
    "__version__",
    "accelerate",
    "doctor",
    "explain",
    "load",
    "metrics",
    "nn",
    "ops",
    "replay",
    "restore",
    "sample",
    "sample_to_folder",
    "save",
    "schedulers",
    "stream",
    "tune",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in ("metrics", "nn", "ops", "schedulers"):
        return importlib.import_module(f"fastgen.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(f"fastgen.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
