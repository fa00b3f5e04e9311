"""Where a NaN comes from: the first submodule of a network whose output is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def finite(values: Any) -> bool:
    """Whether every floating tensor among ``values``, nested in any way, is finite. Waits for the device."""
    floating = (v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point())
    return all(bool(v.isfinite().all()) for v in floating)


@contextmanager
def watch(network: nn.Module) -> Iterator[list[str]]:
    """Fills the list with the names of the submodules whose output is not finite, in the order in which they end.

    A module that is called by another ends before it, so the first is as deep as can be told. "" is the network itself.
    """
    names: list[str] = []

    def hook(name: str) -> Any:
        return lambda module, inputs, output: None if finite(output) else names.append(name)

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def describe(network: nn.Module, name: str) -> str:
    """A submodule in words: its name and class, and the first parameter or buffer of it that is not finite, or why
    fp16 may be to blame."""
    module = network.get_submodule(name)
    words = f"{name or 'the network'} ({type(module).__name__})"
    for own, value in [*module.named_parameters(), *module.named_buffers()]:
        if not finite(value):
            return f"{words}, whose {own} is not finite"
    if next(network.parameters()).dtype == torch.float16:
        words += "; float16 ends at 65504, so try dtype=torch.bfloat16"
    return words
