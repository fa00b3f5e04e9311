"""One place of a captured graph while it is being matched: its nodes, and whether one more may join them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fastgen.acceleration.facts import Facts, call, calls, number, only_user, same, storage, tensor
from fastgen.ops.activations import NEGATIVE_SLOPE


@dataclass
class Match:
    """What stands in the graph, and what is to stand there: ``target(*inputs, **constants)``.

    nodes: the chain, in the order of the graph; kind: its words; inputs: nodes and None, the first ``statistics`` of
    which are the running statistics of a batch norm.
    """

    kind: str
    op: str
    anchor: Node
    nodes: list[Node]
    target: Callable[..., Any]
    inputs: list[Node | None]
    constants: dict[str, Any] = field(default_factory=dict)
    statistics: int = 0


class Chain:
    """A chain around ``anchor`` that grows backward by `before` and forward by `after`.

    A node joins if it is no other chain's, and if what it computes is seen by the next of the chain alone.
    """

    def __init__(self, anchor: Node, facts: Facts, taken: set[Node], recorded: bool) -> None:
        self.facts, self.taken, self.recorded = facts, taken, recorded
        self.anchor = self.last = anchor
        self.nodes = {anchor}
        self.words: list[str] = [call(anchor).name]

    def free(self, node: Any) -> bool:
        return isinstance(node, Node) and node not in self.taken and node not in self.nodes

    def before(self, node: Any, *names: str) -> Any:
        """The call of ``node``, if it is one of ``names`` and the chain is its only user."""
        found = calls(node, *names) if self.free(node) else None
        return found if found is not None and set(node.users) <= self.nodes else None

    def after(self) -> Node | None:
        """The only user of the chain's last node."""
        user = only_user(self.last)
        return user if user is not None and self.free(user) else None

    def join(self, *nodes: Node, word: str | None = None, front: bool = False) -> None:
        self.nodes.update(nodes)
        if word and front:
            self.words.insert(0, word)
        elif word:
            self.words.append(word)

    def extend(self, node: Node, word: str | None = None) -> None:
        """``node``, the only user of the last, becomes the last."""
        self.join(node, word=word)
        self.last = node

    def skip_idle(self) -> None:
        """Goes forward over what changes nothing."""
        while (user := self.after()) is not None and idle(user) is self.last and not self.aliased(user):
            self.extend(user)

    def aliased(self, user: Node) -> bool:
        """Whether anything writes to the memory of the last node or of ``user``, other than ``user``: then the two
        may not become one."""
        at = self.facts.position[user]
        return any(self.facts.written(n, at) or self.facts.written(n, -1, at) for n in (self.last, user))

    def why_not(self, *inputs: Node | None, statistics: Sequence[Node | None] = ()) -> str | None:
        """Why the chain may not be computed at its last node from ``inputs``; None if it may.

        statistics: further inputs, the running statistics of a batch norm of the chain, which it may write to.
        """
        order = sorted(self.nodes, key=self.facts.position.__getitem__)
        first, last = order[0], order[-1]
        if last is not self.last:
            return "its parts are computed in another order"
        if self.facts.barrier(first, last):
            return "autocast or the recording of gradients changes inside"
        if self._seen(statistics):
            return "its running statistics are used by others in between"
        if any(self._writes_to_others(n, statistics) for n in order):
            return "it writes to memory that others see"
        position, own = self.facts.position, {storage(n) for n in order if n.op != "placeholder"}
        for node in inputs:
            if node is None:
                continue
            if position[node] > position[last]:
                return "an input is computed later"
            outside = [(i, w) for i, w in self.facts.writes if self.node_at(i) not in self.nodes]
            memory = storage(node)
            if any(position[first] < i < position[last] and w in (None, memory) for i, w in outside):
                return f"{node.name} is written to in between"
            if (
                self.recorded
                and any(i > position[last] and w in (None, memory) for i, w in outside)
                and (memory not in own)
            ):
                return f"{node.name}, which backward needs, is written to later"
        return None

    def _seen(self, statistics: Sequence[Node | None]) -> bool:
        """Whether another node uses the ``statistics`` after their batch norm, and before the chain's last node."""
        memory = {storage(n) for n in statistics if n is not None}
        at = self.facts.position
        first = min((at[n] for n in self.nodes if calls(n, "batch_norm")), default=at[self.last])
        between = [n for n, i in at.items() if first < i < at[self.last] and n not in self.nodes]
        return any(storage(source) in memory for n in between for source in n.all_input_nodes)

    def _writes_to_others(self, node: Node, statistics: Sequence[Node | None]) -> bool:
        """Whether ``node`` writes to memory, other than that of ``statistics``, that had a name outside the chain
        before: without the node it would keep its values."""
        at, own = self.facts.position, {None, *(storage(n) for n in statistics if n is not None)}
        written = {w for i, w in self.facts.writes if i == at[node]} - own
        return any(storage(n) in written for n, i in at.items() if i < at[self.last] and n not in self.nodes)

    def node_at(self, position: int) -> Node:
        if not hasattr(self, "_order"):
            self._order = list(self.facts.position)
        return self._order[position]


def idle(node: Node) -> Node | None:
    """The node whose values this one passes on unchanged: a dropout that drops nothing, a division by 1."""
    found = calls(node, "dropout", "div", "mul", "add", "cast", "contiguous")
    if found is None:
        return None
    source = found["input"]
    if not isinstance(source, Node) or tensor(source) is None or tensor(node) is None:
        return None
    if found.name == "dropout":
        same_values = number(found["p"]) == 0 or found["training"] is False
        return source if same_values else None
    if found.name in ("div", "mul"):
        unchanged = number(found["other"]) == 1 and found.arguments.get("rounding_mode") is None
        return source if unchanged and tensor(node).dtype == tensor(source).dtype else None
    if found.name == "add":
        return source if number(found["other"]) == 0 and tensor(node).dtype == tensor(source).dtype else None
    if any(isinstance(a, Node) for a in node.args[1:]):
        return None
    a, b = tensor(node), tensor(source)
    return source if a.dtype == b.dtype and a.device == b.device else None


def activation(node: Node) -> tuple[str, Node] | None:
    """The name in `ACTIVATIONS` of what a node computes, and the node that it is computed of."""
    found = calls(node, "silu", "relu", "relu_", "leaky_relu", "gelu", "tanh", "sigmoid")
    if found is None or not isinstance(found["input"], Node):
        return None
    name, source = found.name.rstrip("_"), found["input"]
    if name == "leaky_relu" and number(found["negative_slope"]) != NEGATIVE_SLOPE:
        return None
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(found["approximate"], "")
    return (name, source) if name else None


def per_image(node: Any, like: torch.Tensor) -> bool:
    """Whether ``node`` has one number for each image and channel of ``like`` [N, C, H, W]: [N, C, 1, 1]."""
    t = tensor(node)
    return t is not None and t.ndim == 4 and same(t.shape, (*like.shape[:2], 1, 1)) and t.is_floating_point()


def image(node: Any) -> torch.Tensor | None:
    """The fake tensor of an image [N, C, H, W] that our operations take."""
    t = tensor(node)
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    ordinary = t is not None and t.layout == torch.strided and t.device.type in ("cpu", "cuda")
    return t if ordinary and t.ndim == 4 and t.dtype in kinds else None
