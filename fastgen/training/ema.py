"""Averages of a model's parameters over training, e ← d·e + (1 - d)·p, for several decays d in one pass.

The memory sets the pace: p is read once for all averages, so k of them move 4 + 8k bytes a parameter. On the CPU a C++
kernel does that (csrc/cpu/ema.cpp); where the library is not built, and on GPUs, PyTorch's `_foreach` operators do,
average after average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastgen import backends
from fastgen.errors import UsageError

# A function, the parameters that it averages, and their averages, [decays][params].
Way = tuple[Callable[..., None], list[Tensor], list[list[Tensor]]]


class EMA:
    """Averages of ``params`` with each of ``decays`` (in [0, 1)), which begin as copies of them.

    ``averages``: decay -> name -> tensor, with the shape, strides and device of the parameter and its dtype, but fp32
    for halves: they could not hold the small steps of a long memory. Change them in place only. A parameter that has
    gaps in memory has an average without. What is not floating, a counter among buffers, is not averaged but copied.

    On the CPU the values are those of `torch.lerp_`, bit for bit, whatever the number of threads. Raises UsageError
    for decays that are none, or twice the same.
    """

    def __init__(self, params: Mapping[str, Tensor], decays: tuple[float, ...]) -> None:
        if not all(0 <= d < 1 for d in decays) or len(set(decays)) < len(decays):
            raise UsageError(f"decays: must be different numbers in [0, 1), not {decays}")
        self.params = dict(params)
        self.averages: dict[float, dict[str, Tensor]] = {
            float(d): {name: _begin(p) for name, p in self.params.items()} for d in decays
        }
        self._strides: list[tuple[int, ...]] = []
        self._found: list[Way] = []

    @torch.no_grad()
    def update(self, step: int, skip: Tensor | None = None) -> None:
        """Takes the parameters as they are after step ``step`` (from 0) into the averages.

        The decay of a step is min(d, (1 + step) / (10 + step)): a short memory at first, so that the average forgets
        the random start. skip: bool [] on the parameters' device. Where it is true nothing changes; a GPU's value is
        not waited for, and the parameters have to be finite then too (as they are after a step that was left out).
        """
        if skip is not None and skip.device.type == "cpu":
            if skip:
                return
            skip = None
        weights = [1 - min(d, (1 + step) / (10 + step)) for d in self.averages]
        for function, params, averages in self._ways():
            if function is _kernel:
                _kernel(params, averages, weights)
            else:
                for each, weight in zip(averages, weights, strict=True):
                    function(params, each, weight, skip)

    def _ways(self) -> list[Way]:
        strides = [p.stride() for p in self.params.values()]
        if strides != self._strides:  # the first step, or `Module.to` has given parameters another layout
            names: dict[Callable[..., None], list[str]] = {}
            for name, e in next(iter(self.averages.values()), {}).items():
                names.setdefault(_function(self.params[name], e), []).append(name)
            self._strides, self._found = strides, [self._way(*pair) for pair in names.items()]
        return self._found

    def _way(self, function: Callable[..., None], names: list[str]) -> Way:
        averages = [[each[name] for name in names] for each in self.averages.values()]
        return function, [self.params[name] for name in names], averages

    def state_dict(self) -> dict[str, Tensor]:
        """The averages themselves, no copies, as ``ema.<decay>.<name>``."""
        return {f"ema.{d}.{name}": e for d, each in self.averages.items() for name, e in each.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies ``state`` into the averages. UsageError, and nothing changed, where it has other names, shapes or
        dtypes than `state_dict`."""
        own = self.state_dict()
        wrong = [f"no {name}" for name in own if name not in state]
        wrong += [f"{name} is of no average here" for name in state if name not in own]
        wrong += [
            f"{name} is {_kind(state[name])}, here {_kind(e)}"
            for name, e in own.items()
            if name in state and _kind(state[name]) != _kind(e)
        ]
        if wrong:
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UsageError(f"ema: the state is of another run: {'; '.join(wrong[:3])}{more}")
        for name, e in own.items():
            e.copy_(state[name])


def _begin(p: Tensor) -> Tensor:
    if p.is_complex():
        raise UsageError("params: complex parameters have no average; give their real and imaginary parts")
    wide = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
    return p.detach().to(wide, copy=True)


def _function(p: Tensor, e: Tensor) -> Callable[..., None]:
    if not p.is_floating_point():
        return _copy
    alike = p.dtype == e.dtype and p.device == e.device and p.stride() == e.stride()
    return _kernel if alike and p.device.type == "cpu" and backends.library_error("cpu") is None else _foreach


def _kernel(params: list[Tensor], averages: list[list[Tensor]], weights: list[float]) -> None:
    """All averages, [decays][params], in one pass."""
    torch.ops.fastgen_cpp.ema_update.default(params, [e for each in averages for e in each], weights)


def _foreach(params: list[Tensor], averages: list[Tensor], weight: float, skip: Tensor | None) -> None:
    """The averages of one decay; those of halves by way of a copy in fp32."""
    params = [p.to(e.dtype) for p, e in zip(params, averages, strict=True)]
    if skip is None:
        torch._foreach_lerp_(averages, params, weight)
        return
    # lerp takes a weight from the device, without waiting for it, for one tensor at a time only.
    for dtype in {e.dtype for e in averages}:
        chosen = [e for e in averages if e.dtype == dtype]
        steps = torch._foreach_sub([p for p in params if p.dtype == dtype], chosen)
        torch._foreach_mul_(steps, skip.logical_not().to(dtype) * weight)
        torch._foreach_add_(chosen, steps)


def _copy(params: list[Tensor], averages: list[Tensor], weight: float, skip: Tensor | None) -> None:
    for p, e in zip(params, averages, strict=True):
        e.copy_(p if skip is None else torch.where(skip, e, p))


def _kind(t: Tensor) -> tuple[torch.dtype, list[int]]:
    return t.dtype, list(t.shape)
