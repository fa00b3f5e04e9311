"""Where a NaN in training comes from: the step is taken once more, with a look at every module and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastgen import finite


def explain(model: nn.Module, losses: Callable[[], Iterator[Tensor]]) -> str:
    """What is not finite, in words, found by taking the step again: ``losses()`` draws, with the step's own seed, the
    loss of each of its batches. The gradients of ``model`` are dropped before and after."""
    try:
        return _where(model, losses)
    finally:
        model.zero_grad(set_to_none=True)


def _where(model: nn.Module, losses: Callable[[], Iterator[Tensor]]) -> str:
    model.zero_grad(set_to_none=True)
    with finite.watch(model) as outputs, _watch_gradients(model) as gradients:
        for loss in losses():
            if outputs:
                return f"it begins in the output of {finite.describe(model, outputs[0])}"
            if not finite.finite(loss):
                return "every module's output is finite, the loss itself is not"
            loss.backward()
            if gradients:
                module, _, parameter = gradients[0].rpartition(".")
                kind = type(model.get_submodule(module)).__name__
                return (
                    f"the loss is finite; backwards it begins in the gradient of {module or 'the network'} ({kind}), "
                    f"at its {parameter}"
                )
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    if not finite.finite(torch.stack(norms).norm()):
        return "every gradient is finite, but their norm is beyond the largest number: they explode"
    return "taken again the step is finite, so look at the hardware and at what in the recipe is not of its seed"


@contextmanager
def _watch_gradients(model: nn.Module) -> Iterator[list[str]]:
    """Fills the list with the parameters whose gradient is not finite, in the order in which backward comes to them."""
    names: list[str] = []

    def hook(name: str) -> Callable[[Tensor], None]:
        return lambda p: None if finite.finite(p.grad) else names.append(name)

    handles = [p.register_post_accumulate_grad_hook(hook(n)) for n, p in model.named_parameters() if p.requires_grad]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
