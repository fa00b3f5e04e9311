"""The files that models are made of, JSON and safetensors. What is wrong with one is a UsageError that names it."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen.atomic import umask
from fastgen.errors import UsageError

PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
NO_PICKLES = "which is never read, since a pickle can run code; save it again as safetensors"


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"model: {path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"model: {path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"model: {path} does not hold a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UsageError(f"model: {path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"model: {path} is not a whole safetensors file ({error})") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the mode that the umask leaves. Raises OSError, with the number of a full disk."""
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number) if code else str(error), str(path)) from None
    path.chmod(0o666 & ~umask())


def made(cls: Callable[..., Any], values: dict[str, Any], file: Path) -> Any:
    """cls(**values), with the values that ``file`` holds; UsageError where they are wrong."""
    try:
        return cls(**values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"model: {file}: {error}") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise UsageError(f"model: the weights in {directory} do not fit their configuration: {detail}") from None
