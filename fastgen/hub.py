"""Models by their name on the Hugging Face hub, "owner/name" or "owner/name@revision", through huggingface_hub, which
is optional and keeps them in its own cache: JSON and safetensors only."""

from __future__ import annotations

import re
from pathlib import Path

from fastgen.errors import UsageError
from fastgen.model_files import PICKLES

ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def is_id(name: str) -> bool:
    """Whether a string could be a name on the hub; a file's name, with the ending of weights, is none."""
    return bool(ID.fullmatch(name)) and Path(name).suffix not in {".safetensors", *PICKLES}


def fetch(name: str, patterns: list[str]) -> Path:
    """The folder of what a model's files that match the patterns are in, downloaded if they are not there yet.

    Raises UsageError without huggingface_hub, and with what the hub said where it has no such model or is not reached.
    """
    local = f"give a local directory; there is none named {name!r}"
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            f"model: {name!r} on the hub needs huggingface_hub: `pip install 'fastgen-kernels[hub]'`, or {local}"
        ) from None
    repository, revision = ID.fullmatch(name).groups()
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except Exception as error:  # its own, those of the system, and those of whatever it downloads with
        said = " ".join(str(error).split())[:300]
        raise UsageError(
            f"model: {name!r} did not come from the hub ({type(error).__name__}: {said}); {local}"
        ) from None
    return Path(folder)
