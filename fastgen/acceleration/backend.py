"""The backend "fastgen" of torch.compile: a captured graph, rewritten, and what it runs as.

torch.compile(model, backend="fastgen")
torch.compile(model, backend="fastgen", options={"rest": "inductor"})
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule

from fastgen.acceleration.rewriting import Filter, Rewritten, rewrite
from fastgen.errors import UsageError

RESTS = ("auto", "eager", "inductor")


@dataclass
class Settings:
    """rest: what runs all that was not replaced; wanted, names: as in `rewrite`."""

    rest: str = "auto"
    wanted: Filter | None = None
    names: dict[str, str] | None = None


def fastgen_backend(
    owner: GraphModule, inputs: Sequence[Tensor], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """What torch.compile calls with a captured graph and its inputs.

    options: "rest": what runs that which is not replaced, "eager" (PyTorch as it is), "inductor" (its compiler) or
    "auto", which is the compiler on a GPU. Raises UsageError for any other option, and for a ``mode``.
    """
    options = dict(options or {})
    rest = options.pop("rest", "auto")
    check_rest(rest)
    if mode not in (None, "default") or options:
        unknown = f"mode={mode!r}" if mode not in (None, "default") else ", ".join(options)
        raise UsageError(f"torch.compile(backend='fastgen') takes options={{'rest': ...}} only, not {unknown}")
    made, failure = compile_graph(owner, inputs, Settings(rest))
    if failure:
        warnings.warn(f"fastgen: a graph runs as it was written: {failure}", stacklevel=2)
    return made[1]


def check_rest(rest: str) -> None:
    """Raises UsageError for what is none of `RESTS`."""
    if rest not in RESTS:
        raise UsageError(f"rest: must be one of {', '.join(RESTS)}, not {rest!r}")


def compile_graph(
    owner: GraphModule, inputs: Sequence[Any], settings: Settings
) -> tuple[tuple[Rewritten, Callable[..., Any]], str | None]:
    """((the rewritten graph, what runs it), None); where rewriting failed the graph as it was, and why."""
    failure = None
    result = Rewritten(owner)
    for pinned in (False, True):
        try:
            result = rewrite(copy_graph(owner), settings.wanted, settings.names, pinned)
            failure = None
            break
        except Exception as error:  # whatever it is, the graph as it was is right
            failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    if settings.rest == "inductor" or (settings.rest == "auto" and on_gpu):
        from torch._inductor.compile_fx import compile_fx

        return (result, compile_fx(result.graph, inputs)), failure
    return (result, result.graph.forward), failure


def copy_graph(owner: GraphModule) -> GraphModule:
    """A graph that can be rewritten while the original stays; parameters and constants are shared."""
    graph = Graph()
    output = graph.graph_copy(owner.graph, {}, return_output_node=True)
    value, old = output if isinstance(output, tuple) else (output, None)
    made = graph.output(value)
    if old is not None:
        made.meta = dict(old.meta)
    copied = GraphModule(owner, graph)
    for node in list(graph.nodes):
        for argument in (*node.args, *node.kwargs.values()):
            name = str(getattr(argument, "target", ""))
            if getattr(argument, "op", "") == "get_attr" and isinstance(getattr(owner, name, None), GraphModule):
                setattr(copied, name, copy_graph(getattr(owner, name)))
    return copied
