"""Attention in a captured graph: PyTorch's own function, and softmax(q·kᵀ·scale)·v written by hand.

Legend: N batch, h heads, L queries, S keys, D head dim.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fastgen.acceleration import calls as fused
from fastgen.acceleration.chains import Chain, Match, idle
from fastgen.acceleration.facts import Facts, call, calls, number, same, tensor


def attention(node: Node, facts: Facts, taken: set[Node], recorded: bool) -> Match | str:
    """scaled_dot_product_attention without a mask and without dropout."""
    found = call(node)
    q, k, v = (tensor(found[n]) for n in ("query", "key", "value"))
    if found["attn_mask"] is not None:
        return "attention with a mask"
    if number(found["dropout_p"]) != 0 or not isinstance(found["is_causal"], bool) or found["enable_gqa"]:
        return "attention with dropout or grouped queries"
    if any(t is None or t.ndim != 4 or not t.is_floating_point() for t in (q, k, v)):
        return "attention of tensors that are not [N, h, L, D]"
    if not same(v.shape, k.shape) or not same(q.shape[:2], k.shape[:2]):
        return "attention whose keys and values differ in shape"
    if number(found["scale"]) is None and found["scale"] is not None:
        return "attention whose scale is not a number"
    chain = Chain(node, facts, taken, recorded)
    constants = {"scale": found["scale"], "causal": found["is_causal"], "dtype": tensor(node).dtype}
    inputs = [found["query"], found["key"], found["value"]]
    reason = chain.why_not(*inputs)
    return reason or Match(
        "scaled_dot_product_attention", "attention", node, [node], fused.attention, inputs, constants
    )


def written_attention(node: Node, facts: Facts, taken: set[Node], recorded: bool) -> Match | str:
    """softmax(q·kᵀ·scale, -1)·v by matmul, bmm, baddbmm or einsum, without a mask and without dropout."""
    found, scores = call(node), tensor(node)
    if scores is None or scores.ndim not in (3, 4) or number(found["dim"]) not in (-1, scores.ndim - 1):
        return ""
    chain = Chain(node, facts, taken, recorded)
    query = _queries(chain, found["input"])
    chain.skip_idle()
    result = _values(chain)
    if query is None or result is None:
        return "softmax that is not between q·kᵀ and a product with v alone"
    q, k, scale = query
    v, order = result
    last = chain.last
    chain.words = ["softmax(q·kᵀ)·v"]
    constants = {"scale": scale, "dtype": tensor(last).dtype, "order": order}
    constants |= {"q_order": q[1], "k_order": k[1], "v_order": v[1]}
    inputs = [q[0], k[0], v[0]]
    if any(tensor(t).dtype != tensor(last).dtype for t in inputs) or not tensor(last).is_floating_point():
        return "attention of tensors of different dtypes"
    shapes = [[tensor(t).shape[i] for i in o] for t, o in zip(inputs, (q[1], k[1], v[1]), strict=True)]
    if not same(shapes[1], shapes[2]) or not same(shapes[0][:-2], shapes[1][:-2]):
        return "attention whose keys and values differ in shape"
    nodes = sorted(chain.nodes, key=facts.position.__getitem__)
    reason = chain.why_not(*inputs)
    return reason or Match("softmax(q·kᵀ)·v", "attention", node, nodes, fused.written_attention, inputs, constants)


Operand = tuple[Node, tuple[int, ...]]  # a node, and its dimensions in the order [..., L or S, D]


def _queries(chain: Chain, node: Any) -> tuple[Operand, Operand, float] | None:
    """q, k and the scale of scores that only the softmax reads."""
    scale = 1.0
    while chain.free(node) and set(node.users) <= chain.nodes:
        factor = calls(node, "mul", "div", "mul_")
        if factor is not None and number(factor["other"]) and factor.arguments.get("rounding_mode") is None:
            scale *= factor["other"] if factor.name != "div" else 1 / factor["other"]
            chain.join(node)
            node = factor["input"]
        elif idle(node) is not None:
            chain.join(node)
            node = idle(node)
        else:
            break
    if not chain.free(node) or not set(node.users) <= chain.nodes:
        return None
    product = _product(node)
    if product is None:
        return None
    chain.join(node)
    q, k, order, factor = product
    if order != tuple(range(len(order))):
        return None
    return q, k, scale * factor


def _product(node: Node) -> tuple[Operand, Operand, tuple[int, ...], float] | None:
    """node = a·bᵀ [..., L, S] of a [..., L, D] and b [..., S, D], any of the three perhaps with dimensions in another
    order: (a, b, the order that node's dimensions have, a factor)."""
    found, t = call(node), tensor(node)
    if found is None or t is None:
        return None
    plain, turned = tuple(range(t.ndim)), (*range(t.ndim - 2), t.ndim - 1, t.ndim - 2)
    if found.name == "matmul":
        a, b = found["input"], found["other"]
        return ((a, plain), (b, turned), plain, 1.0) if _ranks(a, b, t.ndim) else None
    if found.name == "baddbmm" and number(found["beta"]) == 0 and number(found["alpha"]) is not None:
        a, b = found["batch1"], found["batch2"]
        return ((a, plain), (b, turned), plain, float(found["alpha"])) if _ranks(a, b, t.ndim) else None
    return _einsum(found) if found.name == "einsum" else None


def _ranks(a: Any, b: Any, ndim: int) -> bool:
    return all(tensor(x) is not None and tensor(x).ndim == ndim for x in (a, b))


def _einsum(found: Any) -> tuple[Operand, Operand, tuple[int, ...], float] | None:
    left, arrow, out = found["equation"].replace(" ", "").partition("->")
    if not arrow or left.count(",") != 1 or "." in left:
        return None
    a, b = left.split(",")
    shared = [d for d in a if d in b and d not in out]
    rows, columns = [d for d in a if d not in b], [d for d in b if d not in a]
    batch = [d for d in a if d in b and d in out]
    words = (a, b, out)
    if any(len(set(w)) != len(w) for w in words) or [len(x) for x in (shared, rows, columns)] != [1, 1, 1]:
        return None
    if set(out) != {*batch, *rows, *columns} or len(a) != len(b) or len(a) not in (3, 4):
        return None
    order_a = tuple(a.index(d) for d in (*batch, *rows, *shared))
    order_b = tuple(b.index(d) for d in (*batch, *columns, *shared))
    order = tuple([*batch, *rows, *columns].index(d) for d in out)
    return (found["input"], order_a), (found["other"], order_b), order, 1.0


def _values(chain: Chain) -> tuple[Operand, tuple[int, ...]] | None:
    """v [..., S, D], and the order of the result's dimensions, of the product that follows the softmax."""
    user, ndim = chain.after(), tensor(chain.last).ndim
    product = _product(user) if user is not None else None
    if product is None:
        return None
    (a, order_a), (b, order_b), order, factor = product
    plain = tuple(range(ndim))
    if b is chain.last and a is not chain.last:  # v, probabilities: the product the other way round
        a, order_a, b, order_b = b, order_b, a, order_a
        order = tuple({ndim - 2: ndim - 1, ndim - 1: ndim - 2}.get(i, i) for i in order)
    if a is not chain.last or factor != 1.0 or order_a != plain:
        return None
    chain.extend(user)
    return (b, (*order_b[:-2], order_b[-1], order_b[-2])), order
