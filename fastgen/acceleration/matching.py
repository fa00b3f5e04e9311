"""Finds in a captured graph what the operations of `fastgen.ops` compute.

Each matcher takes the node that its kind of place is built around, follows the chain backward and forward, and returns
a `Match`, or in words why there is none. Convolutions come first: a norm goes to the convolution that reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from fastgen.acceleration import calls as fused
from fastgen.acceleration.attention_patterns import attention, written_attention
from fastgen.acceleration.chains import Chain, Match, activation, idle, image, per_image
from fastgen.acceleration.facts import Facts, call, calls, number, same, storage, tensor
from fastgen.ops.conv2d_arguments import four, pair
from fastgen.ops.convolution import Geometry, strided

Refusal = str
Matcher = Callable[[Node, Facts, set[Node], bool], "Match | Refusal"]


def find(owner: GraphModule, recorded: bool) -> tuple[list[Match], list[tuple[Node, Refusal]]]:
    """The matches in a graph, none of which share a node, and what was looked at and left, with the reason.

    recorded: whether gradients are.
    """
    facts, taken = Facts(owner), set()
    matches: list[Match] = []
    refused: list[tuple[Node, Refusal]] = []
    for kinds in MATCHERS:
        for node in owner.graph.nodes:
            found = call(node)
            if found is None or found.name not in kinds or node in taken:
                continue
            match = kinds[found.name](node, facts, taken, recorded)
            if isinstance(match, Match):
                taken.update(match.nodes)
                matches.append(match)
            elif match:
                refused.append((node, match))
    matches = _without_divided_statistics(matches, facts, taken, refused) if recorded else matches
    _split_concatenations(matches, facts, recorded)
    matches.sort(key=lambda m: facts.position[m.nodes[-1]])
    return matches, refused


def _without_divided_statistics(
    matches: list[Match], facts: Facts, taken: set[Node], refused: list[tuple[Node, Refusal]]
) -> list[Match]:
    """The matches but those whose running statistics PyTorch's batch norm updates too: it keeps them for its backward,
    which our update would then refuse."""
    plain = [found for n in facts.position if n not in taken and (found := calls(n, "batch_norm")) is not None]
    shared = {storage(found["running_mean"]) for found in plain} - {None}
    divided = [m for m in matches if m.statistics and storage(m.inputs[0]) in shared]
    refused += [(m.anchor, "its running statistics are also those of a norm that stays") for m in divided]
    return [m for m in matches if m not in divided]


def _finish(chain: Chain, op: str, target: Callable, inputs: list[Node | None], constants: dict[str, Any],
            statistics: int = 0) -> Match | Refusal:  # fmt: skip
    """The match of a chain, the first ``statistics`` of whose inputs its batch norm may write to."""
    reason = chain.why_not(*inputs[statistics:], statistics=inputs[:statistics])
    if reason is not None:
        return reason
    nodes = sorted(chain.nodes, key=chain.facts.position.__getitem__)
    return Match(" → ".join(chain.words), op, chain.anchor, nodes, target, inputs, constants, statistics)


# Convolutions


def convolution(node: Node, facts: Facts, taken: set[Node], recorded: bool) -> Match | Refusal:
    """[group_norm → [scale, shift] → act →] [interpolate →] conv2d [→ + bias per image] [→ + residual] [→ act], or
    conv2d → batch_norm [→ + residual] [→ act]."""
    found = call(node)
    x, weight = image(found["input"]), tensor(found["weight"])
    if x is None or weight is None:
        return f"conv2d of {_described(found['input'])}: only [N, C, H, W] in fp16, bf16, fp32 or fp64 on cpu or cuda"
    where = {"stride": found["stride"], "padding": _padding(found, weight), "dilation": found["dilation"]}
    usual = found["groups"] == 1 and pair(where["dilation"]) == (1, 1)
    chain = Chain(node, facts, taken, recorded)
    if usual and (match := _with_batch_norm(chain, where | {"transposed": False})) is not None:
        return match
    kernel = tuple(weight.shape[2:])
    geometry = Geometry(pair(where["stride"]), four(where["padding"]), pair(where["dilation"]), found["groups"])
    if recorded and strided(x, weight, geometry):
        constants = where | {"dtype": tensor(node).dtype}
        given = [found["input"], found["weight"], found["bias"], *[None] * 7]
        return _finish(chain, "conv2d", fused.convolution, given, constants)
    if not usual or pair(where["stride"]) != (1, 1) or kernel not in ((1, 1), (3, 3)):
        return f"PyTorch's convolution is as fast ({_geometry(found, kernel)})"
    source, upsample = _upsampled(chain, found["input"], kernel == (3, 3) and four(where["padding"]) == (1, 1, 1, 1))
    norm, inputs = _normalised(chain, source)
    source = norm.pop("source", source)
    bias, residual, act = _epilogue(chain)
    alone = not norm and residual is None and bias is None and act is None
    if kernel == (1, 1) and alone and not _concatenated(source):
        return "PyTorch's convolution is as fast (1×1)"
    constants = where | norm | {"upsample": upsample, "act": act, "dtype": tensor(chain.last).dtype}
    given = [source, found["weight"], found["bias"], None, bias, residual, *inputs]
    op = "norm_act_conv2d" if "num_groups" in norm else "conv2d"
    return _finish(chain, op, fused.convolution, given, constants)


def convolution_transposed(node: Node, facts: Facts, taken: set[Node], recorded: bool) -> Match | Refusal:
    """conv_transpose2d → batch_norm [→ + residual] [→ act]; without a norm where no gradient is recorded."""
    found = call(node)
    if image(found["input"]) is None or found["groups"] != 1 or pair(found["dilation"]) != (1, 1):
        return "PyTorch's transposed convolution is as fast (groups or dilation)"
    where = {k: found[k] for k in ("stride", "padding", "output_padding")}
    chain = Chain(node, facts, taken, recorded)
    if (match := _with_batch_norm(chain, where | {"transposed": True})) is not None:
        return match
    if recorded:
        return "PyTorch's transposed convolution is as fast in training, and no batch norm follows it"
    act = _act_after(chain) or "none"
    constants = where | {"act": act, "dtype": tensor(node).dtype}
    given = [found["input"], found["weight"], found["bias"]]
    return _finish(chain, "conv_transpose2d_norm_act", fused.transposed_convolution, given, constants)


def _with_batch_norm(chain: Chain, where: dict[str, Any]) -> Match | Refusal | None:
    """The convolution of ``chain`` with the batch norm that follows it; None where none does."""
    found, norm = call(chain.anchor), calls(chain.after(), "batch_norm")
    if norm is None or norm["input"] is not chain.anchor or not _norm_known(norm):
        return None
    chain.extend(chain.after(), "batch_norm")
    residual, act = _residual(chain, one_dtype=True), _act_after(chain) or "none"
    where = {k: v for k, v in where.items() if k != "dilation"}
    constants = where | {k: norm[k] for k in ("training", "momentum", "eps")}
    constants |= {"act": act, "dtype": tensor(chain.anchor).dtype}
    given = [norm["running_mean"], norm["running_var"], found["input"], found["weight"], found["bias"]]
    given += [norm["weight"], norm["bias"], residual]
    op = "conv_transpose2d_norm_act" if where["transposed"] else "conv2d_norm_act"
    return _finish(chain, op, fused.convolution_batch_norm, given, constants, statistics=2)


def _norm_known(norm: Any) -> bool:
    stats = norm["running_mean"] is not None or norm["training"]
    return isinstance(norm["training"], bool) and number(norm["momentum"]) is not None and stats


def _upsampled(chain: Chain, source: Node, fits: bool) -> tuple[Node, int]:
    """What a nearest upsampling by 2 before the convolution reads, and 2; else ``source`` and 1."""
    source = _behind_idle(chain, source)
    found = chain.before(source, "interpolate") if fits else None
    if found is None or found["mode"] != "nearest" or image(found["input"]) is None or found["size"] is not None:
        return source, 1
    before, after = image(found["input"]).shape, tensor(source).shape
    if not same(after[2:], (before[2] * 2, before[3] * 2)):
        return source, 1
    chain.join(source, word="interpolate", front=True)
    return _behind_idle(chain, found["input"]), 2


def _behind_idle(chain: Chain, node: Node) -> Node:
    """Goes backward over what changes nothing and is seen by the chain alone."""
    while chain.free(node) and set(node.users) <= chain.nodes and idle(node) is not None:
        chain.join(node)
        node = idle(node)
    return node


def _normalised(chain: Chain, node: Node) -> tuple[dict[str, Any], list[Node | None]]:
    """The group norm, scale and shift and activation that end in ``node``: constants with "source", what is normed;
    and norm_weight, norm_bias, scale, shift. Nothing joins the chain where there is no norm."""
    nothing: tuple[dict[str, Any], list[Node | None]] = ({}, [None] * 4)
    joined = []
    act = activation(node) if chain.free(node) and set(node.users) <= chain.nodes else None
    if act is not None:
        joined.append(node)
        node = act[1]
    scale, shift, affine, node = _scale_shift(node, joined[-1:] or list(chain.nodes), chain)
    joined += affine
    norm = calls(node, "group_norm") if chain.free(node) else None
    if norm is None or image(norm["input"]) is None or not set(node.users) <= {*chain.nodes, *joined}:
        return nothing
    chain.join(*joined, node)
    words = ["group_norm", *(["scale, shift"] if affine else []), *([act[0]] if act else [])]
    chain.words[:0] = words
    constants = {"num_groups": norm["num_groups"], "eps": norm["eps"], "in_act": act[0] if act else "none"}
    return constants | {"source": norm["input"]}, [norm["weight"], norm["bias"], scale, shift]


def _scale_shift(node: Node, users: list[Node], chain: Chain) -> tuple[Node | None, Node | None, list[Node], Node]:
    """node = normed · (1 + scale) + shift, each seen by the next alone: (scale, shift, nodes, normed)."""
    nothing = (None, None, [], node)
    add = calls(node, "add", "add_")
    if add is None or add["alpha"] != 1 or not chain.free(node) or not set(node.users) <= {*users, *chain.nodes}:
        return nothing
    for product, shift in ((add["input"], add["other"]), (add["other"], add["input"])):
        mul = calls(product, "mul", "mul_")
        if mul is None or not chain.free(product) or set(product.users) != {node}:
            continue
        if add.name == "add_" and product is not add["input"]:
            continue
        for normed, factor in ((mul["input"], mul["other"]), (mul["other"], mul["input"])):
            plus = calls(factor, "add")
            if plus is None or plus["alpha"] != 1 or not calls(normed, "group_norm") or set(normed.users) != {product}:
                continue
            if mul.name == "mul_" and normed is not mul["input"]:
                continue
            scale = plus["input"] if number(plus["other"]) == 1 else plus["other"]
            one = plus["other"] if scale is plus["input"] else plus["input"]
            like = tensor(node)
            if number(one) == 1 and image(normed) is not None and per_image(scale, like) and per_image(shift, like):
                alone = [factor] if chain.free(factor) and set(factor.users) == {product} else []
                return scale, shift, [node, product, *alone], normed
    return nothing


def _epilogue(chain: Chain) -> tuple[Node | None, Node | None, str | None]:
    """What follows a convolution: the bias per image, the residual, and the activation."""
    bias = _added(chain, lambda other: per_image(other, tensor(chain.anchor)), "bias")
    residual = _residual(chain)
    # With gradients the sums would have to be made again in the backward.
    return bias, residual, None if chain.recorded else _act_after(chain)


def _residual(chain: Chain, one_dtype: bool = False) -> Node | None:
    """What is added to all of the chain's last; ``one_dtype``: only what leaves its dtype as it is."""
    like = tensor(chain.last)

    def fits(other: Any) -> bool:
        fitting = image(other) is not None and same(tensor(other).shape, like.shape)
        return fitting and (not one_dtype or tensor(other).dtype == like.dtype)

    chain.skip_idle()
    return _added(chain, fits, "residual")


def _added(chain: Chain, fits: Callable[[Any], bool], word: str) -> Node | None:
    """What the next node adds to the chain's last, if it ``fits``; the node joins."""
    user = chain.after()
    add = calls(user, "add", "add_")
    if add is None or add["alpha"] != 1:
        return None
    other = add["other"] if add["input"] is chain.last else add["input"]
    if other is chain.last or not fits(other) or (add.name == "add_" and add["input"] is not chain.last):
        return None
    if chain.aliased(user) and add.name == "add":
        return None
    chain.extend(user, word)
    chain.skip_idle()
    return other


def _act_after(chain: Chain) -> str | None:
    user = chain.after()
    act = activation(user) if user is not None else None
    if act is None or act[1] is not chain.last:
        return None
    chain.extend(user, act[0])
    return act[0]


def _padding(found: Any, weight: Any) -> Any:
    """A number for each side, also for "same" and "valid"."""
    if not isinstance(found["padding"], str):
        return found["padding"]
    if found["padding"] == "valid":
        return 0
    total = [d * (k - 1) for d, k in zip(pair(found["dilation"]), weight.shape[2:], strict=True)]
    return (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)


def _geometry(found: Any, kernel: tuple[int, ...]) -> str:
    words = [f"{kernel[0]}×{kernel[1]}"]
    words += [f"{k} {found[k]}" for k in ("stride", "dilation", "groups") if found[k] not in (1, (1, 1))]
    return ", ".join(words)


def _described(node: Any) -> str:
    t = tensor(node)
    return "no tensor" if t is None else f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device.type}"


# Two sources


def _concatenated(node: Any) -> bool:
    """Whether ``node`` is the concatenation of two images on channels."""
    found = calls(node, "cat")
    if found is None or number(found["dim"]) not in (1, -3) or not isinstance(found["tensors"], (list, tuple)):
        return False
    both = found["tensors"]
    fits = len(both) == 2 and all(image(t) is not None for t in both)
    return fits and len({tensor(t).dtype for t in (*both, node)}) == 1


def _split_concatenations(matches: list[Match], facts: Facts, recorded: bool) -> None:
    """Where all who read a concatenation are convolutions of ours, they read its two sources, and it goes."""
    readers: dict[Node, list[Match]] = {}
    for match in matches:
        if match.target is fused.convolution and _concatenated(match.inputs[0]):
            readers.setdefault(match.inputs[0], []).append(match)
    for node, found in readers.items():
        own = {n for m in found for n in m.nodes}
        if not set(node.users) <= own or any(node in m.inputs[1:] for m in found):
            continue
        first, second = call(node)["tensors"]
        last = float("inf") if recorded else max(facts.position[m.nodes[-1]] for m in found)
        if any(facts.written(t, facts.position[node], last) for t in (first, second)):
            continue
        if any(facts.barrier(node, m.nodes[-1]) for m in found):
            continue
        for match in found:
            match.inputs[0], match.inputs[3] = first, second
            match.nodes.insert(0, node)
            match.kind = f"cat → {match.kind}"


# Norms on their own


def group_norm(node: Node, facts: Facts, taken: set[Node], recorded: bool) -> Match | Refusal:
    """group_norm, or instance_norm of the batch's own statistics [→ scale, shift] [→ act]."""
    found, x = call(node), tensor(call(node)["input"])
    if found.name == "instance_norm" and (found["running_mean"] is not None or not found["use_input_stats"]):
        return "instance_norm with running statistics"
    if x is None or x.ndim < 3 or not x.is_floating_point() or x.device.type not in ("cpu", "cuda"):
        return f"{found.name} of {_described(found['input'])}"
    chain = Chain(node, facts, taken, recorded)
    scale, shift = _scale_shift_after(chain)
    act = _act_after(chain) or "none"
    constants = {"num_groups": found.arguments.get("num_groups"), "eps": found["eps"], "act": act}
    constants |= {"dtype": tensor(chain.last).dtype}
    given = [found["input"], found["weight"], found["bias"], scale, shift]
    return _finish(chain, "group_norm_act", fused.group_norm, given, constants)


def _scale_shift_after(chain: Chain) -> tuple[Node | None, Node | None]:
    product = chain.after()
    last = next(iter(product.users)) if product is not None and len(product.users) == 1 else None
    if last is None or not chain.free(last):
        return None, None
    scale, shift, nodes, normed = _scale_shift(last, list(last.users), chain)
    if not nodes or normed is not chain.anchor:
        return None, None
    chain.join(*nodes, word="scale, shift")
    chain.last = last
    return scale, shift


def batch_norm(node: Node, facts: Facts, taken: set[Node], recorded: bool) -> Match | Refusal:
    """batch_norm [→ + residual] [→ act]."""
    found, x = call(node), tensor(call(node)["input"])
    if x is None or x.ndim < 3 or not x.is_floating_point() or x.device.type not in ("cpu", "cuda"):
        return f"batch_norm of {_described(found['input'])}"
    if not _norm_known(found):
        return "batch_norm with a cumulative average or without statistics"
    chain = Chain(node, facts, taken, recorded)
    residual = _residual(chain, one_dtype=True) if x.ndim == 4 else None
    constants = {k: found[k] for k in ("training", "momentum", "eps")} | {"act": _act_after(chain) or "none"}
    given = [found["running_mean"], found["running_var"], found["input"], found["weight"], found["bias"], residual]
    return _finish(chain, "batch_norm_act", fused.batch_norm, given, constants, statistics=2)


# Gaussian latents


def reparameterization(node: Node, facts: Facts, taken: set[Node], recorded: bool) -> Match | Refusal:
    """mu + exp(logvar / 2) · noise; what stands at the exponential of any other thing is passed over in silence."""
    half = call(node)["input"]
    found = calls(half, "mul", "div")
    if found is None:
        return ""
    logvar, factor = found["input"], number(found["other"])
    if found.name == "mul" and factor is None:
        logvar, factor = found["other"], number(found["input"])
    if factor != (0.5 if found.name == "mul" else 2) or tensor(logvar) is None:
        return ""
    product = next((u for u in node.users if calls(u, "mul", "mul_")), None)
    added = next(iter(product.users)) if product is not None and len(product.users) == 1 else None
    add, mul = calls(added, "add", "add_"), calls(product, "mul", "mul_")
    if add is None or add["alpha"] != 1 or (mul.name == "mul_" and mul["input"] is not node):
        return ""
    noise = mul["other"] if mul["input"] is node else mul["input"]
    mu = add["other"] if add["input"] is product else add["input"]
    if added in taken or product in taken:
        return ""
    if any(tensor(t) is None for t in (noise, mu)) or (add.name == "add_" and add["input"] is not product):
        return ""
    alike = all(
        same(tensor(t).shape, tensor(mu).shape) and tensor(t).dtype == tensor(mu).dtype for t in (logvar, noise)
    )
    if not alike or tensor(mu).ndim < 2 or not tensor(mu).is_floating_point():
        return "mu, logvar and noise differ in shape or dtype"
    chain = Chain(added, facts, taken, recorded)
    chain.words, chain.nodes = ["mu + exp(logvar / 2) · noise"], {product, added}
    if set(node.users) == {product}:  # otherwise somebody else wants the deviation too
        chain.join(node)
        if set(half.users) == {node} and chain.free(half):
            chain.join(half)
    return _finish(chain, "reparameterize", fused.reparameterize, [mu, logvar, noise], {})


# In this order: what comes first takes the nodes.
MATCHERS: tuple[dict[str, Matcher], ...] = (
    {"conv2d": convolution, "conv_transpose2d": convolution_transposed},
    {"sdpa": attention, "softmax": written_attention},
    {"exp": reparameterization, "exp_": reparameterization},
    {"group_norm": group_norm, "instance_norm": group_norm, "batch_norm": batch_norm},
)
