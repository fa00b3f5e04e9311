"""`accelerate(verify=batch)`: a model's call with and without what was replaced, compared place by place and whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.acceleration.accelerating import Options
from fastgen.acceleration.observing import as_written, gradients, observe, tensors, undisturbed
from fastgen.acceleration.rewriting import Place
from fastgen.tolerance import WINOGRAD, frobenius_error, max_error, tolerance

OUTPUT, GRADIENT = 1e-4, 1e-3  # relative: of a whole model's output, of each of its gradients
_WINOGRAD_OPS = {"conv2d", "norm_act_conv2d", "conv2d_norm_act", "conv_transpose2d_norm_act"}


class VerificationError(RuntimeError):
    """A model's results differ from those that it gives as it was written. ``places`` lists what differs."""

    def __init__(self, message: str, places: list[Drift]) -> None:
        super().__init__(message)
        self.places = places


@dataclass(frozen=True)
class Drift:
    """How far a replaced place is from the fp64 result, as a share of what is allowed: 1 is the limit.

    name, kind, op: as in `Place`; output, gradient: the worst of its outputs and of its gradients, None where there is
    none.
    """

    name: str
    kind: str
    op: str
    output: float
    gradient: float | None

    @property
    def passed(self) -> bool:
        return self.output <= 1 and (self.gradient is None or self.gradient <= 1)

    def __str__(self) -> str:
        gradient = "none" if self.gradient is None else f"{self.gradient:.2f}"
        verdict = "" if self.passed else "  PUT BACK"
        return f"{self.name or '(the model)'}: {self.kind}: output {self.output:.2f}, gradients {gradient}{verdict}"


def verify_model(model: nn.Module, args: tuple, kwargs: dict[str, Any], options: Options) -> list[Drift]:
    """The drift of each place that `accelerate` would replace, and of the whole. Prints them.

    Each place gets the tensors that it gets in the call, and is held, outputs and gradients, against the same in fp64
    by the tolerance rule: 2 × the error of what stood there + 4·u·max|ref|, or for convolutions, which sum otherwise,
    max(1e-5, 2 × its error) in the Frobenius norm. Raises VerificationError where a whole without the places that fail
    still differs, by more than 1e-4 (output; 2 units of a coarser dtype) or 1e-3 (a gradient), relative, and by more
    than 4 times the model's own rounding.
    """
    with undisturbed(model), torch.enable_grad():
        observed = observe(model, args, kwargs, options)
    drifts = [_drift(place, given) for place, given in observed.places if given is not None]
    print("fastgen.accelerate: drift as a share of what is allowed, 1 being the limit")
    for drift in drifts:
        print(f"  {drift}")
    return drifts


def _drift(place: Place, given: list[Any]) -> Drift:
    exact = _run(place.before, given, torch.float64)
    plain, ours = _run(place.before, given), _run(place.after, given)
    wino = place.op in _WINOGRAD_OPS
    shares = [_share(o, p, e, wino) for o, p, e in zip(ours, plain, exact, strict=True)]
    outputs, grads = [s for s in shares[:1] if s is not None], [s for s in shares[1:] if s is not None]
    return Drift(place.name, place.kind, place.op, max(outputs), max(grads, default=None))


def _run(call: Callable[..., Any], given: list[Any], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """The output and the gradients of a place, of copies of what it was given."""
    with torch.enable_grad():
        copies = [_copied(x, dtype) for x in given]
        wanted = [x for x in copies if isinstance(x, Tensor) and x.requires_grad]
        output = call(*copies)
        return [output.detach(), *(gradients(output, wanted) if wanted else [])]


def _copied(x: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(x, Tensor):
        return x
    made = x.detach().to(dtype if dtype is not None and x.is_floating_point() else x.dtype, copy=True)
    return made.requires_grad_(x.requires_grad)


def _share(ours: Tensor | None, plain: Tensor | None, exact: Tensor | None, wino: bool) -> float | None:
    """The error of ``ours`` as a share of what the rule allows."""
    if ours is None or plain is None or exact is None:
        return None if ours is plain else math.inf
    if wino:
        return frobenius_error(ours, exact) / max(WINOGRAD, 2 * frobenius_error(plain, exact))
    allowed = tolerance(exact, max_error(plain, exact), ours.dtype)
    error = max_error(ours, exact)
    return 0.0 if error == 0 else error / allowed if allowed else math.inf


# The whole


def check_whole(model: nn.Module, args: tuple, kwargs: dict[str, Any], drifts: list[Drift]) -> None:
    """Compares the accelerated ``model``'s output and gradients with those of its call as it was written.

    Raises VerificationError.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def run() -> tuple[list[Tensor], list[Tensor | None]]:
        with undisturbed(model), torch.enable_grad():
            torch.manual_seed(0)
            output = model(*args, **kwargs)
            return [t.detach() for t in tensors(output)], gradients(output, wanted)

    ours = run()
    with as_written(model):
        plain = run()
        noise = _rounding(model, args, kwargs, plain)
    wrong = []
    for i, (a, b, own) in enumerate(zip(ours[0], plain[0], noise[0], strict=True)):
        limit = max(OUTPUT, 2 * torch.finfo(b.dtype).eps)
        if _distance(a, b) > max(limit * b.double().norm().item(), 4 * own):
            wrong.append(f"output {i} by {frobenius_error(a, b):.1e}")
    for name, a, b, own in zip(names, ours[1], plain[1], noise[1], strict=True):
        if (a is None) != (b is None):
            wrong.append(f"the gradient of {name}, which is missing")
        elif a is not None and _distance(a, b) > max(GRADIENT * b.double().norm().item(), 4 * own):
            wrong.append(f"the gradient of {name} by {frobenius_error(a, b):.1e}")
    if wrong:
        raise VerificationError(
            f"verify: {type(model).__name__} differs from what it computes as it was written: {'; '.join(wrong[:8])}"
            f"{f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''}. Its places: "
            + ("; ".join(map(str, drifts)) or "none"),
            drifts,
        )


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).norm().item()


def _rounding(model: nn.Module, args: tuple, kwargs: dict[str, Any], plain: Any) -> list[list[float]]:
    """How far the model's own rounding takes each output and each gradient from the one in fp64: of a bias before a
    norm, whose gradient is zero, nothing else is left. Zeros where the model does not run in fp64, or draws random
    numbers."""
    nothing = [[0.0] * len(given) for given in plain]
    with undisturbed(model), torch.enable_grad():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        with torch.no_grad():
            model(*args, **kwargs)
        if not torch.equal(before, torch.get_rng_state()):
            return nothing
        try:
            exact = copy.deepcopy(model).double()
            double = torch.utils._pytree.tree_map(lambda x: _copied(x, torch.float64), (args, kwargs))
            with as_written(exact):
                output = exact(*double[0], **double[1])
            found = tensors(output), gradients(output, [p for p in exact.parameters() if p.requires_grad])
        except (RuntimeError, TypeError):
            return nothing
    return [
        [0.0 if a is None or b is None else _distance(a, b) for a, b in zip(given, right, strict=True)]
        for given, right in zip(plain, found, strict=True)
    ]
