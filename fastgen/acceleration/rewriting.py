"""Puts the operations of `fastgen.ops` in the place of what `matching` found in a captured graph.

Our operations keep images channels last, so tensors may lie in memory otherwise than they did. Values are the same;
what depends on the layout is put right: views that such a tensor does not have become copies, random numbers are drawn
in the layout in which they were, and what leaves the graph lies as it did. The graph is run on fake tensors to see it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from fastgen.acceleration import calls
from fastgen.acceleration.chains import Match
from fastgen.acceleration.facts import Facts, bodies, call, module_name, storage, tensor
from fastgen.acceleration.matching import find

Filter = Callable[[str, str], bool]


@dataclass
class Place:
    """One replaced part of a model.

    name: the module around which it is built, as in `named_modules`; kind: what stood there; op: the operation of
    `fastgen.ops` that stands there now; node: its call in the rewritten graph; before, after: functions of that call's
    tensors, as it was and as it is.
    """

    name: str
    kind: str
    op: str
    before: GraphModule
    after: Callable[..., Tensor]
    node: Node


@dataclass
class Rewritten:
    """A graph, with what was replaced in it and what was looked at and left: (module, function, reason)."""

    graph: GraphModule
    places: list[Place] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)


def rewrite(
    owner: GraphModule, wanted: Filter | None = None, names: dict[str, str] | None = None, pinned: bool = False
) -> Rewritten:
    """Rewrites ``owner`` in place.

    wanted(name, op): whether the place around a module may be replaced; None: all. names: a module's id, as text, ->
    its name. pinned: every result of ours is laid in memory as what it replaces. Raises where the result cannot be
    proven to be right, or fake tensors fail; then ``owner`` is spoilt: give a copy.
    """
    recorded = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in map(tensor, owner.graph.nodes)
    )
    result = Rewritten(owner)
    for node in list(owner.graph.nodes):
        for body in bodies(node, owner):
            inner = rewrite(body, wanted, names, pinned)
            result.places += inner.places
            result.left += inner.left
    sharing = _Sharing(owner)
    matches, refused = find(owner, recorded)
    result.left += [(module_name(n, names), call(n).name, why) for n, why in refused]
    replaced: dict[Node, Node] = {}
    for match in matches:
        name = module_name(match.anchor, names)
        if wanted is not None and not wanted(name, match.op):
            result.left.append((name, match.kind, "the filter says no"))
            continue
        result.places.append(_replace(owner, match, name, replaced, pinned))
    if result.places:
        _run_on_fakes(owner)
        sharing.check()
        owner.graph.lint()
        owner.recompile()
    return result


def _replace(owner: GraphModule, match: Match, name: str, replaced: dict[Node, Node], pinned: bool) -> Place:
    """Puts the call of ``match`` where its last node stood."""
    graph, last = owner.graph, match.nodes[-1]
    inputs = [replaced.get(n, n) for n in match.inputs]
    before = _extract(owner, match, inputs)
    with graph.inserting_before(last):
        node = new = graph.call_function(match.target, tuple(inputs), dict(match.constants))
        if pinned:
            new = graph.call_function(calls.same_layout, (node, _order(tensor(last))))
    new.meta = {k: v for k, v in last.meta.items() if k in ("example_value", "nn_module_stack", "stack_trace")}
    last.replace_all_uses_with(new)
    replaced[last] = new
    for old in reversed(match.nodes):
        if not old.users:
            graph.erase_node(old)
    target, constants = match.target, dict(match.constants)
    return Place(name, match.kind, match.op, before, lambda *given: target(*given, **constants), node)


def _extract(owner: GraphModule, match: Match, inputs: list[Node | None]) -> GraphModule:
    """The nodes of a match as a graph of its own, whose inputs are those of the match."""
    graph, found = Graph(), {}
    for i, given in enumerate(inputs):
        place = graph.placeholder(f"input_{i}")
        if given is not None:
            found[given] = place

    def copy(node: Node) -> Node:
        if node not in found:
            if node.op not in ("call_function", "call_method"):
                raise RuntimeError(f"{node.name} is read by {match.kind}, and is no input of it")
            found[node] = graph.node_copy(node, copy)
        return found[node]

    graph.output([copy(node) for node in match.nodes][-1])
    return GraphModule(owner, graph)


# Layouts


class _Fakes(Interpreter):
    """Runs a graph on fake tensors and puts right what the new layouts would break."""

    def __init__(self, owner: GraphModule) -> None:
        super().__init__(owner, garbage_collect_values=False)
        self.owner = owner

    def run_node(self, node: Node) -> Any:
        dependence = _layout_dependence(node)
        if dependence == "raw" and any(self._moved(s) for s in node.all_input_nodes):
            raise RuntimeError(f"{node.name} looks at the strides of what has others now")
        if dependence:
            for source in [a for a in node.all_input_nodes if tensor(a) is not None]:
                self._restore(source, node)
        try:
            found = super().run_node(node)
        except (RuntimeError, ValueError):
            if node.op != "call_method" or node.target not in ("view", "view_as"):
                raise
            node.target = {"view": "reshape", "view_as": "reshape_as"}[node.target]
            found = super().run_node(node)
        node.meta["new_value"] = found
        return found

    def _moved(self, source: Node) -> bool:
        was, now = tensor(source), self.env.get(source)
        plain = isinstance(now, Tensor) and was is not None and was.layout == torch.strided
        return plain and _order(now) != _order(was)

    def _restore(self, source: Node, user: Node) -> None:
        """Lets ``user`` read ``source`` in the layout that it was captured in."""
        if not self._moved(source):
            return
        was, now = tensor(source), self.env[source]
        with self.owner.graph.inserting_before(user):
            copy = self.owner.graph.call_function(calls.same_layout, (source, _order(was)))
        copy.meta["example_value"] = was
        user.replace_input_with(source, copy)
        self.env[copy] = copy.meta["new_value"] = calls.same_layout(now, _order(was))


def _order(x: Tensor) -> tuple[int, ...]:
    """The dimensions from the outermost in memory to the innermost; those of size 1 do not count, and come first."""
    sizes = [int(s) if isinstance(s, int) else 2 for s in x.shape]
    strides = [s if isinstance(s, int) else s.node.hint or 1 for s in x.stride()]
    return tuple(sorted(range(x.ndim), key=lambda d: (sizes[d] != 1, -strides[d] if sizes[d] != 1 else 0, d)))


# Without the underscore of what works in place.
_RANDOM = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
           "feature_alpha_dropout", "rrelu", "randn_like", "rand_like", "randint_like", "bernoulli", "normal",
           "uniform", "random", "exponential", "cauchy", "geometric", "log_normal", "poisson", "binomial",
           "gumbel_softmax", "native_dropout", "multi_head_attention_forward", "view_as_complex", "view_as_real",
           "empty_like")  # fmt: skip
_RAW = ("as_strided", "as_strided_", "set_", "resize_", "resize_as_", "stride", "storage_offset", "data_ptr",
        "is_contiguous", "untyped_storage")  # fmt: skip


def _layout_dependence(node: Node) -> str:
    """ "" where what a node computes does not depend on how its inputs lie in memory; "order" where it does, and the
    order of dimensions is all that counts; "raw" where strides count."""
    if node.op == "output":
        return "order"
    if node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _RAW:
        return "raw"
    if name.removesuffix("_") in _RANDOM:
        found = call(node)  # a dropout that drops nothing draws nothing
        idle = found is not None and found.name == "dropout" and (found["p"] == 0 or found["training"] is False)
        return "" if idle else "order"
    if isinstance(node.target, torch._ops.HigherOrderOperator) or _foreign(node.target):
        return "order"
    if name == "view" and any(isinstance(a, torch.dtype) for a in node.args):
        return "order"
    module = getattr(node.target, "__module__", None) or "torch"
    known = isinstance(node.target, str) or module.split(".")[0] in ("torch", "_operator", "math", "builtins")
    return "" if known or module == calls.__name__ else "order"


def _foreign(target: Any) -> bool:
    """Whether this is an operator of torch.ops that is not PyTorch's: its kernel may count on the layout it saw."""
    operator = isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    return operator and str(target).split(".")[0] not in ("aten", "prims")


def _run_on_fakes(owner: GraphModule) -> None:
    inputs = [n.meta.get("example_value") for n in owner.graph.nodes if n.op == "placeholder"]
    # Dynamo hands a fresh mode to the backend, and leaves the one it traced with in the graph.
    mode = next((t.fake_mode for t in map(tensor, owner.graph.nodes) if isinstance(t, FakeTensor)), None)
    if mode is None:
        raise RuntimeError("the graph came without fake tensors")
    fresh = nullcontext() if mode.shape_env is None else mode.shape_env.ignore_fresh_unbacked_symbols()
    with mode, fresh, torch.no_grad():
        _Fakes(owner).run(*inputs)


class _Sharing:
    """Which nodes of a graph share memory, where that can be seen: where it is written to, or leaves the graph."""

    def __init__(self, owner: GraphModule) -> None:
        self.owner = owner
        self.ends = [storage(n) for n in _ends(owner.graph)]

    def check(self) -> None:
        """Raises RuntimeError where nodes that shared such memory do not, in the rewritten graph."""
        now: dict[int, int] = {}
        for memory, node in zip(self.ends, _ends(self.owner.graph), strict=True):
            _expect(now, memory, node)
        written, now = {w for _, w in Facts(self.owner).writes}, {}
        for node in self.owner.graph.nodes:
            leaves = node.target is calls.same_layout and all(u.op == "output" for u in node.users)
            if storage(node) in written and not leaves:  # what leaves is copied after all writing
                _expect(now, storage(node), node)


def _ends(graph: Graph) -> list[Node]:
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    return nodes + next(n for n in graph.nodes if n.op == "output").all_input_nodes


def _expect(now: dict[int, int], memory: int | None, node: Node) -> None:
    """``node`` lies where the first of its ``memory`` does."""
    new = node.meta.get("new_value")
    if memory is None or not isinstance(new, Tensor):
        return
    if now.setdefault(memory, new.untyped_storage()._cdata) != new.untyped_storage()._cdata:
        raise RuntimeError(f"{node.name} would no longer share its memory")
