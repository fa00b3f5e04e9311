"""How an op becomes `torch.ops.fastgen.<name>`: once, with its fake kernel, gradient and autocast rule.

An op is functional: it takes and returns tensors and mutates nothing. Its forward allocates the
outputs and hands them to the kernel of the chosen backend. In eager mode on plain tensors,
`FusedOp.__call__` goes around the dispatcher (the same kernels and the same gradient formula, at
a third of the overhead); everything else, from torch.compile to functorch, sees the dispatcher op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LIB = torch.library.Library("fastgen", "DEF")  # noqa: TOR901 - lives as long as the process
_AUTOGRAD_KEYS = tuple(
    getattr(torch._C.DispatchKey, name)
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA")
)
_PLAIN = (Tensor, torch.nn.Parameter)


class FusedOp:
    """One dispatcher op. ``schema`` names it; ``forward`` runs it on real tensors; ``fake`` on shapes.

    ``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grads)`` are the gradient formula in
    the manner of torch.autograd.Function; without them the op is not differentiable.
    ``autocast(*args)`` returns the arguments that the op should see under autocast; by default the
    floating tensors among them keep their dtypes, since kernels compute in fp32 whatever comes in.
    """

    def __init__(
        self,
        schema: str,
        forward: Callable,
        fake: Callable,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
        autocast: Callable[..., Sequence[Any]] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.forward = forward
        LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIB.impl(self.name, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastgen::{self.name}", fake, lib=LIB)
        if backward is not None:
            torch.library.register_autograd(f"fastgen::{self.name}", backward, setup_context=setup_context, lib=LIB)
        self.op = getattr(torch.ops.fastgen, self.name).default
        self._register_autocast(autocast or (lambda *args: args))
        if schema.endswith("-> Tensor[]"):  # autograd.Function tracks the tensors of a tuple, but not those of a list
            forward, backward = _in_tuple(forward), _from_list(backward)
        self.function = None if backward is None else _autograd_function(self.name, forward, setup_context, backward)
        # Function.apply binds default arguments, of which there are none, by `inspect`: as long as the small kernels.
        self.apply = None if backward is None else super(torch.autograd.Function, self.function).apply

    def _register_autocast(self, rule: Callable[..., Sequence[Any]]) -> None:
        for device in ("CPU", "CUDA"):
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

            def cast(*args: Any, _keys: torch._C.DispatchKeySet = keys) -> Any:
                with torch._C._ExcludeDispatchKeyGuard(_keys):
                    return self.op(*rule(*args))

            LIB.impl(self.name, cast, f"Autocast{device}")

    def __call__(self, *args: Any) -> Any:
        if _recorders:
            _recorders[-1](self, args)
        if torch.compiler.is_compiling():
            return self.op(*args)
        if self.function is not None and torch._C._functorch.peek_interpreter_stack() is not None:
            return self.function.apply(*args)  # torch.func transforms take this kind of Function, not the dispatcher's
        if not _is_plain(args):
            return self.op(*args)
        if self.apply is not None and torch.is_grad_enabled() and _any_requires_grad(args):
            return self.apply(*args)
        return self.forward(*args)


_recorders: list[Callable[[FusedOp, tuple], None]] = []


@contextmanager
def recording(note: Callable[[FusedOp, tuple], None]) -> Iterator[None]:
    """Within the block, ``note(op, args)`` is called before every op."""
    _recorders.append(note)
    try:
        yield
    finally:
        _recorders.remove(note)


def _is_plain(args: Sequence[Any]) -> bool:
    """Whether the dispatcher may be gone around: ordinary tensors on cpu or cuda and no mode active."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    device = None
    for a in args:
        if isinstance(a, Tensor):
            if type(a) not in _PLAIN:
                return False
            device = a.device.type
            if device not in ("cpu", "cuda"):
                return False
    return device is not None and not torch.is_autocast_enabled(device)


def _any_requires_grad(args: Sequence[Any]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _in_tuple(forward: Callable) -> Callable:
    return lambda *args: tuple(forward(*args))


def _from_list(backward: Callable | None) -> Callable | None:
    return backward and (lambda ctx, *grads: backward(ctx, list(grads)))


def _autograd_function(name: str, forward: Callable, setup_context: Callable, backward: Callable) -> type:
    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        """One call an element, as the dispatcher does for an op without a batching rule."""

        def row(a: Any, d: Any, i: int) -> Any:
            if isinstance(d, (list, tuple)):  # a list of numbers has a list of dimensions, all None
                return a
            return a if d is None else a.select(d, i)

        rows = ([row(a, d, i) for a, d in zip(args, in_dims, strict=True)] for i in range(info.batch_size))
        outputs = [function.apply(*each) for each in rows]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(column) for column in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    members = {"forward": forward, "setup_context": setup, "backward": backward, "vmap": vmap}
    function = type(f"{name}_function", (torch.autograd.Function,), {k: staticmethod(f) for k, f in members.items()})
    return function


def vjp(
    fn: Callable,
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Gradients of plain PyTorch ``fn(*inputs)`` for each input, given those of its outputs.

    Under grad mode the result can be differentiated again, to any order: it is how a backward op
    gets its own gradient. Inputs that are None, not floating or not among ``needs`` get None.
    """
    again = torch.is_grad_enabled()
    # Inside a dispatcher kernel the autograd keys are excluded, and enable_grad alone records nothing.
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude), torch.enable_grad():
        # An alias of each input: where one is a function of another (dy of x, in a penalty), the gradient of the
        # latter must not pass through the former.
        leaves = [
            x
            if x is None or not x.is_floating_point()
            else x.view_as(x)
            if again and x.requires_grad
            else x.detach().requires_grad_()
            for x in inputs
        ]
        outputs = fn(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o is not None and o.requires_grad
        ]
        needs = [True] * len(leaves) if needs is None else needs
        asked = [n and x is not None and x.is_floating_point() for x, n in zip(leaves, needs, strict=True)]
        wanted = [x for x, a in zip(leaves, asked, strict=True) if a]
        if not pairs:
            return [None] * len(inputs)
        outs, outer = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, wanted, outer, create_graph=again, allow_unused=True))
    return [next(found) if a else None for a in asked]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and coefficients are held in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layout(x: Tensor) -> torch.memory_format:
    """The layout a kernel keeps for x: channels last (4-d, 5-d) where x is dense in it, else contiguous."""
    if not x.is_contiguous():
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def dense(x: Tensor | None, like: Tensor | None = None) -> Tensor | None:
    """x without gaps: in its own layout, or with ``like`` in that tensor's layout and dtype. A copy only if needed."""
    if x is None:
        return None
    if like is None:
        return x.contiguous(memory_format=layout(x))
    return x.to(like.dtype).contiguous(memory_format=layout(like))


def empty_like(x: Tensor) -> Tensor:
    """The fake of an output that takes x's shape, dtype and layout, as `dense(x)` would have it."""
    return torch.empty_like(x, memory_format=layout(x))
