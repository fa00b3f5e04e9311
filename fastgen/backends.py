"""Which kernel runs: the only place where a backend is chosen, and where "why not" is known.

Backends: "reference" (plain PyTorch, everywhere), "cpp" (C++ on the CPU), "triton" (GPUs; the CPU
under Triton's interpreter), "cuda" (CUDA C++). A choice is made per call, in this order: the
``backend`` argument, `use_backend`, the environment variable FASTGEN_BACKEND, the table AUTO.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastgen import tuned
from fastgen.errors import UsageError

BACKENDS = ("reference", "cpp", "triton", "cuda")
PACKAGE = Path(__file__).parent

# The ops that have kernels and the file (stem) that each op's kernels live in, in every language.
STEMS = {
    "philox_bits": "philox",
    "philox_normal": "philox",
    "reparameterize": "reparameterize",
    "group_norm_act": "group_norm_act",
    "batch_norm_act": "batch_norm_act",
    "bias_act": "bias_act",
    "q_sample": "q_sample",
    "diffusion_step": "diffusion_step",
    "to_uint8": "to_uint8",
    "attention": "attention",
    "conv2d": "conv2d",
    "norm_act_conv2d": "conv2d",
    "conv2d_norm_act": "conv2d_norm_act",
    "conv_transpose2d_norm_act": "conv2d_norm_act",
    "upfirdn2d": "upfirdn2d",
    "modulated_conv2d": "modulated_conv2d",
}

# Ops that run on the kernels of another, which has all that they need.
LAUNCHERS = dict.fromkeys(
    ("norm_act_conv2d", "conv2d_norm_act", "conv_transpose2d_norm_act", "modulated_conv2d"), "conv2d"
)

# What "auto" tries, best first; an op that is not named takes the device's default.
# On a GPU some ops have no kernel of their own yet, or none that was measured: PyTorch's operators.
# group_norm_act keeps the default: by the bytes that they move, CUDA's kernel, which reads x once wherever a group fits
# in a cluster's shared memory, takes two thirds of the time of Triton's, which reads large groups twice. Not measured.
AUTO: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"default": ("cpp", "reference")},
    "cuda": {
        "default": ("cuda", "triton", "reference"),
        **dict.fromkeys(("attention", "batch_norm_act", "conv2d", *LAUNCHERS), ("reference",)),
    },
}

_choice: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar("fastgen_backend", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for cannot run. The message says why."""


@contextlib.contextmanager
def use_backend(*backends: str) -> Iterator[None]:
    """Within the block every op runs on the first of ``backends`` that can run it.

    Also takes one comma-separated string. Raises ValueError for an unknown name; an op that none
    of them can run raises BackendError. A compiled graph's forward chooses at
    each call, its backward chose while it was compiled.
    """
    token = _choice.set(_parse(",".join(backends), "use_backend"))
    try:
        yield
    finally:
        _choice.reset(token)


@functools.lru_cache(maxsize=64)
def _parse(text: str, source: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        wrong = ", ".join(map(repr, unknown)) or repr(text)
        raise UsageError(f"{source}: unknown backend {wrong}; choose from {', '.join(BACKENDS)}")
    return names


def check_backend(backend: str | None) -> None:
    """Raises UsageError for a name that is no backend."""
    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"backend: must be one of {', '.join(BACKENDS)}, not {backend!r}")


def check_device(device: torch.device | str | None) -> None:
    """Raises UsageError for a device that is not the CPU or a GPU that is there."""
    if device is None:
        return
    try:
        kind = torch.device(device)
    except (RuntimeError, TypeError):
        kind = None
    if kind is None or kind.type not in ("cpu", "cuda"):
        raise UsageError(f"device: must be cpu, cuda or cuda:<index>, not {device!r}")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device: {kind} is not visible to PyTorch, which sees {torch.cuda.device_count()} GPUs; use cpu"
        )


def default_device() -> str:
    """Where a model is loaded to if nobody says: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve(
    op: str, device: torch.device, backend: str | None = None, wins: bool = True, like: tuple[Any, ...] = ()
) -> str:
    """The backend that ``op`` runs on for tensors on ``device``; ``backend`` is the caller's argument.

    Where nobody names one: what `fastgen.tune` measured for tensors ``like`` these (a tensor [N, *], then whatever
    else decides); if it measured nothing, plain PyTorch where no kernel ``wins``, and else what AUTO says.
    """
    if _recorders and like:
        _recorders[-1](op, like)
    if backend is not None:
        return _pick(op, device.type, _parse(backend, "backend"), "backend")
    chosen = _choice.get()
    if chosen is not None:
        return _pick(op, device.type, chosen, "use_backend")
    environment = os.environ.get("FASTGEN_BACKEND")
    if environment:
        return _pick(op, device.type, _parse(environment, "FASTGEN_BACKEND"), "FASTGEN_BACKEND")
    if like and device.type == "cuda":
        measured = tuned.here(device).backends
        if measured and not any(isinstance(size, torch.SymInt) for size in like[0].shape):  # which has no value yet
            found = measured.get(tuned.key(op, like))
            if found is not None and why_not(op, found, device.type) is None:
                return found
    return _auto(op, device.type) if wins else "reference"


_recorders: list[Callable[[str, tuple[Any, ...]], None]] = []


@contextlib.contextmanager
def recording(note: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the block, ``note(op, like)`` is called for every op that asks for its backend."""
    _recorders.append(note)
    try:
        yield
    finally:
        _recorders.remove(note)


def left_to_pytorch(op: str, x: torch.Tensor, backend: str | None) -> bool:
    """Whether nobody names a backend for ``op`` on x, so that PyTorch's may be taken where it is the faster one."""
    if torch.compiler.is_compiling():  # which cannot look into `resolve`
        return False
    return resolve(op, x.device, backend, False) == "reference" != resolve(op, x.device, backend)


def _named() -> bool:
    return _choice.get() is not None or bool(os.environ.get("FASTGEN_BACKEND"))


# What `torch.compiler.assume_constant_result` sets, without importing the compiler: Dynamo asks once, while it traces.
_named._dynamo_marked_constant = True


def left_to_vendor(op: str, x: torch.Tensor, backend: str | None, like: tuple[Any, ...] = ()) -> bool:
    """Whether ``op`` is to be written in PyTorch's operators (`fastgen.ops.vendor`): on a GPU, where nobody names a
    backend and no kernel of ours is known to be faster for tensors ``like`` these. Under torch.compile it is AUTO
    that knows, for shapes have no values there."""
    if backend is not None or not x.is_cuda or _recorders or _named():
        return False
    if torch.compiler.is_compiling():
        return _order(op, "cuda")[0] == "reference"
    return resolve(op, x.device, like=like) == "reference"


def _pick(op: str, device: str, backends: tuple[str, ...], source: str) -> str:
    reasons = []
    for name in backends:
        reason = why_not(op, name, device)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"{source}={','.join(backends)}: {op} cannot run on {device} with it; {'; '.join(reasons)}")


def _order(op: str, device: str) -> tuple[str, ...]:
    table = AUTO.get(device, {})
    return table.get(op, table.get("default", ("reference",)))


def preferred(op: str, device: str) -> str:
    """What "auto" takes for ``op`` on device type ``device``."""
    return next((name for name in _order(op, device) if why_not(op, name, device) is None), "reference")


@functools.cache
def _auto(op: str, device: str) -> str:
    """`preferred`, with a warning (one an op, since the answer is cached) where that means no kernel at all."""
    choice = preferred(op, device)
    reasons = [f"{name}: {why_not(op, name, device)}" for name in _order(op, device) if name != "reference"]
    if choice == "reference" and reasons:
        warnings.warn(
            f"fastgen: {op} runs on plain PyTorch ({'; '.join(reasons)}). See `fastgen doctor`.", stacklevel=4
        )
    return choice


@functools.cache
def _why_not(op: str, backend: str, device: str, interpreted: bool) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA GPU is visible to PyTorch"
    if backend == "reference":
        return None
    if backend in ("cpp", "cuda"):
        wanted = "cpu" if backend == "cpp" else "cuda"
        if device != wanted:
            return f"it is for {wanted} tensors"
        reason = library_error(wanted)
        if reason is not None:
            return reason
        found = _native(backend, op)
        return None if found is not None else "this op has no such kernel yet"
    if importlib.util.find_spec(f"fastgen.kernels.{STEMS[LAUNCHERS.get(op, op)]}") is None:
        return "this op has no such kernel yet"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and not interpreted:
        return "Triton needs a GPU (or TRITON_INTERPRET=1, for tests)"
    return None


def why_not(op: str, backend: str, device: str) -> str | None:
    """None if ``backend`` can run ``op`` on tensors of device type ``device``, else the reason in words."""
    if op not in STEMS:
        raise KeyError(f"no op {op!r}; there are {', '.join(STEMS)}")
    return _why_not(op, backend, device, os.environ.get("TRITON_INTERPRET") == "1")


def _native(backend: str, op: str) -> Callable | None:
    namespace = getattr(torch.ops, f"fastgen_{backend}")
    return getattr(namespace, f"{LAUNCHERS.get(op, op)}_fwd", None)


@functools.cache
def kernel(op: str, function: str, backend: str) -> Callable[..., None]:
    """The launcher ``function`` of ``op``: it fills the outputs it is given. All backends share its signature."""
    if backend == "triton":
        use_configurations()
        return getattr(importlib.import_module(f"fastgen.kernels.{STEMS[op]}"), function)
    library_error("cpu" if backend == "cpp" else "cuda")
    return getattr(getattr(torch.ops, f"fastgen_{backend}"), function).default


@functools.cache
def use_configurations() -> None:
    """Hands the configurations that `fastgen.tune` found on this GPU to the launchers, which import nothing of ours.

    Once; after ``use_configurations.cache_clear()`` anew.
    """
    chosen = importlib.import_module("fastgen.kernels._tuning").CHOSEN
    chosen.clear()
    if torch.cuda.is_available():
        chosen.update(tuned.here(torch.device("cuda", torch.cuda.current_device())).configurations)


def build_info() -> dict[str, Any]:
    """What the build wrote down about the two libraries: built or not, compiler, reason."""
    file = PACKAGE / "_build_info.json"
    return json.loads(file.read_text()) if file.is_file() else {}


@functools.cache
def library_error(kind: str) -> str | None:
    """Loads the library of ``kind`` "cpu" or "cuda"; None when it is there, else why it is not."""
    found = sorted(PACKAGE.glob(f"libfastgen_{kind}.*"))
    if not found:
        reason = build_info().get(kind, {}).get("reason", "the package was not built")
        return f"the {kind} library is not built ({reason})"
    if kind == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the {kind} library does not load ({error})"
    if kind == "cpu":
        torch.ops.fastgen_cpp.isa()  # a wrong FASTGEN_CPU_ISA is said here, not from inside a kernel's threads
    return None


__all__ = [
    "AUTO",
    "BACKENDS",
    "BackendError",
    "build_info",
    "kernel",
    "library_error",
    "preferred",
    "resolve",
    "use_backend",
    "why_not",
]
