"""`accelerate` and `restore`: a model's own call, on the rewritten graph of its own forward.

Only ``_compiled_call_impl`` of an instance is set, as `torch.nn.Module.compile` does: classes, parameters, keys,
hooks and the forward itself stay as they are.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fastgen.acceleration.backend import Settings, compile_graph
from fastgen.acceleration.rewriting import Rewritten
from fastgen.ops.weights import unchanging, unkept

MODES = ("auto", "train", "infer")
ATTRIBUTE = "_fastgen_accelerated"
WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_numbers = itertools.count()


@dataclass(frozen=True)
class Options:
    """The arguments of `accelerate` that a copy of the model takes along."""

    mode: str = "auto"
    filter: Callable[[str, nn.Module], bool] | None = None
    rest: str = "auto"
    spared: frozenset[tuple[str, str]] = frozenset()  # (module, op) of the places that `verify` put back


def attach(model: nn.Module, options: Options) -> None:
    """Puts an `Accelerated` behind the calls of ``model`` and of those children that may be called on their own."""
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)):  # is not called itself
        for child in model.children():
            attach(child, options)
        return
    _attach(model, model, options)
    for child in model.children():
        elements = child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else (child,)
        for module in elements:
            inner = module.module if isinstance(module, WRAPPERS) else module
            if any(True for _ in inner.children()) and not isinstance(inner, torch.jit.ScriptModule):
                _attach(inner, model, options)


def _attach(module: nn.Module, root: nn.Module, options: Options) -> None:
    if module.__dict__.get(ATTRIBUTE) is None and module._compiled_call_impl is None:
        made = Accelerated(module, options, root is module)
        module.__dict__[ATTRIBUTE] = module.__dict__["_compiled_call_impl"] = made


def detach(model: nn.Module) -> None:
    """Takes away what `attach` put anywhere into ``model``."""
    for module in model.modules():
        if ATTRIBUTE in module.__dict__:
            del module.__dict__[ATTRIBUTE]
            if isinstance(module.__dict__.get("_compiled_call_impl"), Accelerated):
                del module.__dict__["_compiled_call_impl"]


class Accelerated:
    """Stands behind the calls of one module: a `Run` for each state that the module is called in."""

    def __init__(self, model: nn.Module, options: Options, root: bool) -> None:
        self.model, self.options, self.root = model, options, root
        self.runs: dict[tuple, Run] = {}
        self.found: list[Rewritten] = []
        self.said: set[str] = set()
        self.known: dict = {}  # the parameters whose transformed weights "infer" trusts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = _state(self.model)
        if state is None or not self._wanted(state):
            return self.model._call_impl(*args, **kwargs)
        run = self.runs.get(state)
        if run is None:
            run = self.runs[state] = Run(self)
        mode = self.options.mode
        with unchanging(self.known) if mode == "infer" else unkept() if mode == "train" else nullcontext():
            return run(*args, **kwargs)

    def _wanted(self, state: tuple) -> bool:
        if self.options.mode != "infer" or not (state[0] or state[1]):
            return True
        which = "in training mode" if state[0] else "with gradients"
        self.say(f"mode='infer', and a call {which} runs as it was written; take mode='auto' for both")
        return False

    def say(self, words: str) -> None:
        """Warns, once."""
        if words not in self.said:
            self.said.add(words)
            warnings.warn(f"fastgen.accelerate({type(self.model).__name__}): {words}", stacklevel=4)

    def settings(self) -> Settings:
        modules = dict(self.model.named_modules())
        options = self.options

        def wanted(name: str, op: str) -> bool:
            if (name, op) in options.spared:
                return False
            return options.filter is None or bool(options.filter(name, modules.get(name, self.model)))

        return Settings(options.rest, wanted, {str(id(m)): n for n, m in modules.items()})

    def looked_back(self) -> None:
        """After the first capture: a model in which nothing was found is left as it was."""
        if any(r.places for r in self.found) or self.options.filter is not None or self.options.spared:
            return
        if self.root:
            self.say("nothing to replace was found; it is left as it was")
            detach(self.model)
        else:
            self.model.__dict__.pop(ATTRIBUTE, None)
            self.model.__dict__.pop("_compiled_call_impl", None)

    def __deepcopy__(self, memo: dict) -> Accelerated | None:
        """Goes with a copy of the model: the copy is accelerated too."""
        model = memo.get(id(self.model))
        if model is None:
            return None
        made = memo[id(self)] = Accelerated(model, self.options, self.root)
        model.__dict__["_compiled_call_impl"] = made
        return made

    def __reduce__(self) -> tuple:
        """A pickle carries nothing of ours, so that it loads where fastgen is not installed."""
        self.say("the pickled copy is not accelerated; call fastgen.accelerate on what is loaded from it")
        return type(None), ()


def _state(model: nn.Module) -> tuple | None:
    """What makes a call of another kind, each of which is captured for itself. None where the call is to run as it was
    written: somebody else traces it, or transforms it."""
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return None
    autocast = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class Run:
    """The captures of a module in one state, and the calls of them.

    Each has a code object of its own, for that is what Dynamo counts captures by, and keeps sizes by.
    """

    def __init__(self, owner: Accelerated, dynamic: bool | None = None) -> None:
        self.owner, self.dynamic = owner, dynamic
        self.captures = self.executed = self.fresh = self.failures = 0
        self.modules = list(owner.model.modules())
        self.hooks = _hooks(self.modules)
        options = {"guard_filter_fn": _keep_no_module} if owner.options.mode == "infer" else None
        self.compiled = torch.compile(entry(owner.model), backend=self.backend, dynamic=dynamic, options=options)

    def backend(self, graph: GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        """What Dynamo calls with each captured graph."""
        (result, forward), failure = compile_graph(graph, inputs, self.owner.settings())
        self.fresh += 1
        self.owner.found.append(result)
        if failure:
            self.owner.say(f"a graph runs as it was written: {failure}")

        def run(*given: Any) -> Any:
            self.executed += 1
            return forward(*given)

        return run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.failures > 1:
            return self.owner.model._call_impl(*args, **kwargs)
        if self.owner.options.mode != "infer" and _hooks(self.modules) != self.hooks:
            self.owner.say("hooks changed after its capture, so it runs as it was written; accelerate it again")
            return self.owner.model._call_impl(*args, **kwargs)
        self.executed = self.fresh = 0
        try:
            result = self.compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            if self.executed:  # part of the forward has run, and must not run again
                raise
            return self._as_written(error, *args, **kwargs)
        if self.fresh:
            self._captured()
        elif not self.executed:
            self.owner.say("a call ran as it was written, for its arguments fit none of the captured graphs")
        return result

    def _as_written(self, error: Exception, *args: Any, **kwargs: Any) -> Any:
        """The call without us. Where it fails too, its error is the one to see."""
        result = self.owner.model._call_impl(*args, **kwargs)
        self.failures += 1
        self.owner.say(f"its forward cannot be captured, so it runs as it was written: {_first_line(error)}")
        return result

    def _captured(self) -> None:
        self.captures += 1
        self.modules = list(self.owner.model.modules())  # one may have been put in another's place
        self.hooks = _hooks(self.modules)
        if self.captures == 1:
            self.owner.looked_back()
        if self.captures < torch._dynamo.config.recompile_limit:
            return
        if self.dynamic is None:
            self.owner.say(f"captured {self.captures} times; from here on all sizes are left open")
            self.owner.runs = {s: Run(self.owner, True) if r is self else r for s, r in self.owner.runs.items()}
        else:
            self.owner.say(f"captured {self.captures} times more; what fits none of them runs as it was written")


def _hooks(modules: list[nn.Module]) -> list[int]:
    """The hooks of modules, by torch's numbers for them. Dynamo captures those that are there, and looks at them no
    more, for its guards on them take longer than all others."""
    return [
        number
        for m in modules
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        if hooks
        for number in hooks
    ]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _keep_no_module(entries: list[Any]) -> list[bool]:
    """Of Dynamo's guards those on what is called with and on PyTorch's state, not those on modules and parameters."""
    return [not entry.orig_guard.source.is_unspecialized_nn_module() for entry in entries]


def entry(model: nn.Module) -> Callable[..., Any]:
    """A function that calls the model's own forward with its hooks, with a code object of its own."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    code = call.__code__.replace(co_name=f"accelerated_{next(_numbers)}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
