"""What is known of a captured graph: which function a node calls with what, what it may alias, what is mutated where.

The graph is Dynamo's: PyTorch's own functions, not functionalised, each node with a fake tensor of its value.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
import types
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

_REQUIRED = object()


def _signature(text: str, **defaults: Any) -> dict[str, Any]:
    """Names of arguments in order, with their defaults."""
    return {name: defaults.get(name, _REQUIRED) for name in text.split()}


_CONV = _signature(
    "input weight bias stride padding dilation groups", bias=None, stride=1, padding=0, dilation=1, groups=1
)
_CONV_TRANSPOSE = _signature(
    "input weight bias stride padding output_padding groups dilation",
    bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1,
)  # fmt: skip
_SDPA = _signature(
    "query key value attn_mask dropout_p is_causal scale enable_gqa",
    attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
)  # fmt: skip
_GROUP_NORM = _signature("input num_groups weight bias eps cudnn_enabled", weight=None, bias=None, eps=1e-5,
                         cudnn_enabled=True)  # fmt: skip
_BATCH_NORM = _signature(
    "input running_mean running_var weight bias training momentum eps",
    weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
)  # fmt: skip
_INSTANCE_NORM = _signature(
    "input running_mean running_var weight bias use_input_stats momentum eps",
    running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5,
)  # fmt: skip
_INTERPOLATE = _signature(
    "input size scale_factor mode align_corners recompute_scale_factor antialias",
    size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None, antialias=False,
)  # fmt: skip
_DROPOUT = _signature("input p training inplace", p=0.5, training=True, inplace=False)
_UNARY = _signature("input")
_ACT = _signature("input inplace", inplace=False)
_BINARY = _signature("input other alpha", alpha=1)
_MUL = _signature("input other")
_DIV = _signature("input other rounding_mode", rounding_mode=None)
_SOFTMAX = _signature("input dim _stacklevel dtype", dim=None, _stacklevel=3, dtype=None)
_CAT = _signature("tensors dim", dim=0)

# Function, or name of a method -> the name it goes by here, and its arguments.
_CALLS: dict[Any, tuple[str, dict[str, Any]]] = {}
for _name, _signed, _targets in (
    ("conv2d", _CONV, (torch.conv2d, F.conv2d)),
    ("conv_transpose2d", _CONV_TRANSPOSE, (torch.conv_transpose2d, F.conv_transpose2d)),
    ("sdpa", _SDPA, (F.scaled_dot_product_attention,)),
    ("group_norm", _GROUP_NORM, (F.group_norm, torch.group_norm)),
    ("batch_norm", _BATCH_NORM, (F.batch_norm,)),
    ("instance_norm", _INSTANCE_NORM, (F.instance_norm,)),
    ("interpolate", _INTERPOLATE, (F.interpolate,)),
    ("dropout", _DROPOUT, (F.dropout, F.dropout2d)),
    ("silu", _ACT, (F.silu,)),
    ("relu", _ACT, (F.relu, torch.relu, "relu")),
    ("relu_", _UNARY, (F.relu_, torch.relu_, "relu_")),
    ("leaky_relu", _signature("input negative_slope inplace", negative_slope=0.01, inplace=False), (F.leaky_relu,)),
    ("gelu", _signature("input approximate", approximate="none"), (F.gelu,)),
    ("tanh", _UNARY, (torch.tanh, F.tanh, "tanh")),
    ("sigmoid", _UNARY, (torch.sigmoid, F.sigmoid, "sigmoid")),
    ("add", _BINARY, (operator.add, torch.add, "add", "__add__", "__radd__")),
    ("add_", _BINARY, (operator.iadd, "add_")),
    ("mul", _MUL, (operator.mul, torch.mul, "mul", "__mul__", "__rmul__")),
    ("mul_", _MUL, (operator.imul, "mul_")),
    ("div", _DIV, (operator.truediv, torch.div, torch.true_divide, "div", "__truediv__")),
    ("exp", _UNARY, (torch.exp, "exp")),
    ("exp_", _UNARY, (torch.exp_, "exp_")),
    ("softmax", _SOFTMAX, (F.softmax,)),
    ("softmax", _signature("input dim dtype", dtype=None), (torch.softmax, "softmax")),
    ("matmul", _MUL, (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__")),
    ("baddbmm", _signature("input batch1 batch2 beta alpha", beta=1, alpha=1), (torch.baddbmm,)),
    ("cat", _CAT, (torch.cat, torch.concat)),
    ("contiguous", _signature("input memory_format", memory_format=torch.contiguous_format), ("contiguous",)),
    ("cast", _signature("input dtype", dtype=None), ("to", "type", "float", "half", "bfloat16", "type_as")),
):  # fmt: skip
    for _target in _targets:
        _CALLS[_target] = (_name, _signed)

_BARRIERS = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


class Call(NamedTuple):
    """A node's function by its name here, and its arguments by theirs."""

    name: str
    arguments: dict[str, Any]

    def __getitem__(self, key: str) -> Any:  # type: ignore[override]
        return self.arguments[key]


def call(node: Any) -> Call | None:
    """What ``node`` calls; None for what is not known here."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    target = node.target
    if target is torch.einsum and isinstance(node.args[0], str) and len(node.args) == 3 and not node.kwargs:
        return Call("einsum", dict(zip(("equation", "input", "other"), node.args, strict=True)))
    found = _CALLS.get(target) if isinstance(target, str) == (node.op == "call_method") else None
    if found is None:
        return None
    name, signature = found
    if len(node.args) > len(signature) or any(k not in signature for k in node.kwargs):
        if name != "cast":
            return None
        return Call(name, {"input": node.args[0]})
    arguments = signature | dict(zip(signature, node.args)) | node.kwargs
    return None if any(v is _REQUIRED for v in arguments.values()) else Call(name, arguments)


def calls(node: Any, *names: str) -> Call | None:
    """`call`, if it is one of ``names``."""
    found = call(node)
    return found if found is not None and found.name in names else None


def value(node: Any) -> Any:
    """The fake value that Dynamo keeps of a node, or the constant that stands in its place."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def tensor(node: Any) -> Tensor | None:
    """The node's fake tensor, None if its value is no tensor."""
    found = value(node)
    return found if isinstance(node, Node) and isinstance(found, Tensor) else None


def same(a: Any, b: Any) -> bool:
    """Whether two sizes, or sequences of sizes, are equal whatever the symbols in them stand for."""
    if isinstance(a, (tuple, list, torch.Size)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return statically_known_true(a == b)


def number(x: Any) -> float | None:
    """x if it is a number known now."""
    return x if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def only_user(node: Node) -> Node | None:
    """The one node that uses this one, if there is one only."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def mutated(node: Node, owner: GraphModule) -> list[Node]:
    """The arguments that a node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    found = call(node)
    first = tree_leaves((node.args[:1], node.kwargs.get("input")))  # a list where the function takes many
    written: list[Any] = tree_leaves(node.kwargs.get("out"))
    if found is not None and found.name in ("batch_norm", "instance_norm"):
        written += [found["running_mean"], found["running_var"]]
    elif isinstance(target, torch._ops.HigherOrderOperator):
        written += _written_inside(node, owner)
    elif isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        written += node.all_input_nodes if any(s.is_mutable for s in _schemas(target)) else []
    elif _writes_first(node, name):
        written += first
    return [w for w in written if isinstance(w, Node)]


def _schemas(target: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> list[Any]:
    """What an operator of torch.ops, or each of its overloads, says of its arguments."""
    if isinstance(target, torch._ops.OpOverload):
        return [target._schema]
    return [getattr(target, overload)._schema for overload in target.overloads()]


_IN_PLACE_OPERATORS = {getattr(operator, n) for n in dir(operator) if n.startswith("i") and f"__{n}__" in dir(operator)}
_IN_PLACE_OPERATORS -= {operator.index, operator.inv, operator.invert}


def _writes_first(node: Node, name: str) -> bool:
    """Whether a function writes to its first argument."""
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    if in_place or name == "setitem" or node.target in _IN_PLACE_OPERATORS:
        return True
    at = _inplace_position(node.target)
    return bool(node.kwargs.get("inplace") or (at is not None and at < len(node.args) and node.args[at]))


@functools.cache
def _inplace_position(function: Any) -> int | None:
    """Where a function of torch.nn.functional takes ``inplace``."""
    if not isinstance(function, types.FunctionType):
        return None
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


def bodies(node: Node, owner: GraphModule) -> list[GraphModule]:
    """The graphs that a higher-order operator (a checkpoint) is given."""
    inside = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node) and a.op == "get_attr"]
    found = [getattr(owner, str(a.target), None) for a in inside]
    return [m for m in found if isinstance(m, GraphModule)]


def _written_inside(node: Node, owner: GraphModule) -> list[Node]:
    """Of a higher-order operator's arguments those that its graph writes to; all where that cannot be told."""
    arguments = [a for a in node.args if isinstance(a, Node) and a.op != "get_attr"]
    written: list[Node] = []
    for body in bodies(node, owner):
        inner = Facts(body)
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        if len(places) != len(arguments):
            return arguments
        written += [a for a, p in zip(arguments, places, strict=True) if inner.written(p)]
    return written


class Facts:
    """Positions, storages and mutations of one graph, as it was captured."""

    def __init__(self, owner: GraphModule) -> None:
        self.graph: Graph = owner.graph
        self.position = {n: i for i, n in enumerate(self.graph.nodes)}
        self.writes = [(i, storage(w)) for n, i in self.position.items() for w in mutated(n, owner)]
        self.barriers = [
            i for n, i in self.position.items() if any(b in str(getattr(n.target, "__name__", "")) for b in _BARRIERS)
        ]

    def written(self, node: Node, first: int = -1, last: float = float("inf")) -> bool:
        """Whether a node at a position in (first, last) writes to ``node``'s memory."""
        memory = storage(node)
        return any(first < i < last and (w is None or w == memory) for i, w in self.writes if memory is not None)

    def barrier(self, first: Node, last: Node) -> bool:
        """Whether autocast or the recording of gradients changes between the two."""
        return any(self.position[first] < i < self.position[last] for i in self.barriers)


def storage(node: Node) -> int | None:
    """A number for the memory that a node's tensor lies in: views share it. None where it has none."""
    found = tensor(node)
    if found is None or found.layout != torch.strided:
        return None
    return found.untyped_storage()._cdata


def module_name(node: Node, names: dict[str, str] | None = None) -> str:
    """The module whose forward called this, as in `named_modules`; "" for the model's own forward.

    names: a module's id, as text, -> its name. Without it the name is read from Dynamo's words for the module.
    """
    for key, (source, _) in reversed((node.meta.get("nn_module_stack") or {}).items()):
        if names is not None:
            if key.split("@")[0] in names:
                return names[key.split("@")[0]]
        else:
            parts = re.findall(r"\w+", source.replace("__dict__", "").replace("_modules", ""))
            return ".".join(p for p in parts[1:] if p != "self")
    return ""
