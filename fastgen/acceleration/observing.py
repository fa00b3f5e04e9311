"""One call of a model, watched: what was replaced in it, and the tensors that each replaced place was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fastgen.acceleration.accelerating import ATTRIBUTE, Accelerated, Options, entry
from fastgen.acceleration.backend import Settings, compile_graph
from fastgen.acceleration.rewriting import Place, Rewritten
from fastgen.errors import UsageError


@dataclass
class Observed:
    """places: with the tensors of one call, detached; None where it was not run by itself, inside a checkpoint.
    left: (module, function, reason) of what stays as it is; failures: graphs that could not be rewritten."""

    places: list[tuple[Place, list[Any] | None]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """args and kwargs of one call, from a tuple or list, a dict of keywords, or the only argument.

    Raises UsageError where nothing is given.
    """
    if batch is None:
        raise UsageError("batch: must be the arguments of one call: a tuple, a dict of keywords or one tensor")
    if isinstance(batch, dict):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


class _Recorder(Interpreter):
    """Runs a rewritten graph and notes what the calls of ours are given."""

    def __init__(self, result: Rewritten, observed: Observed) -> None:
        super().__init__(result.graph)
        self.places = {p.node: p for p in result.places}
        self.observed, self.seen = observed, set()

    def run_node(self, node: Node) -> Any:
        place = self.places.get(node)
        if place is not None and node not in self.seen:
            self.seen.add(node)
            values, _ = self.fetch_args_kwargs_from_env(node)
            kept = [v.detach().clone() if isinstance(v, Tensor) else v for v in values]
            for old, new in zip(values, kept, strict=True):
                if isinstance(old, Tensor) and old.requires_grad:
                    new.requires_grad_()
            self.observed.places.append((place, kept))
        return super().run_node(node)


def observe(model: nn.Module, args: tuple, kwargs: dict[str, Any], options: Options | None = None) -> Observed:
    """Calls ``model`` once, rewritten, in the state that it is in, and returns what was seen."""
    observed = Observed()
    settings = Accelerated(model, options or Options(rest="eager"), True).settings()
    settings = Settings("eager", settings.wanted, settings.names)

    def backend(graph: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        (result, _), failure = compile_graph(graph, inputs, settings)
        observed.left += result.left
        observed.failures += [failure] if failure else []
        recorder = _Recorder(result, observed)
        unseen = [p for p in result.places if p.node.graph is not result.graph.graph]
        observed.places += [(p, None) for p in unseen]
        return lambda *given: recorder.run(*given)

    with as_written(model):
        torch.compile(entry(model), backend=backend)(*args, **kwargs)
    return observed


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Within the block the calls of ``model`` and of its modules run as they were written."""
    held = [(m, m.__dict__.pop("_compiled_call_impl")) for m in model.modules() if ATTRIBUTE in m.__dict__
            and isinstance(m.__dict__.get("_compiled_call_impl"), Accelerated)]  # fmt: skip
    try:
        yield
    finally:
        for module, call in held:
            module.__dict__["_compiled_call_impl"] = call


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts buffers and random numbers back after the block; gradients are not touched by it, if it touches none."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors in what a model returned, tuples, dicts and dataclasses (diffusers' outputs) included."""
    leaves = output if isinstance(output, (Tensor, list, tuple, dict)) else getattr(output, "__dict__", {})
    return [t for t in torch.utils._pytree.tree_leaves(leaves) if isinstance(t, Tensor) and t.is_floating_point()]


def gradients(output: Any, wanted: list[Tensor], seed: int = 0) -> list[Tensor | None]:
    """Of ``wanted``, for random gradients of all that was returned, the same for the same seed and shapes in any
    dtype; no ``.grad`` is touched."""
    outputs = [t for t in tensors(output) if t.requires_grad]
    if not outputs:
        return [None] * len(wanted)
    generator = torch.Generator().manual_seed(seed)
    outer = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    return list(torch.autograd.grad(outputs, wanted, outer, allow_unused=True))
