"""`fastgen.accelerate` and `fastgen.restore`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from fastgen.acceleration.accelerating import MODES, WRAPPERS, Options, attach, detach
from fastgen.acceleration.backend import check_rest
from fastgen.acceleration.checks import check_model, nothing_to_replace
from fastgen.acceleration.observing import arguments
from fastgen.acceleration.verifying import check_whole, verify_model
from fastgen.errors import UsageError


def accelerate(
    model: nn.Module, *, mode: str = "auto", verify: Any = None,
    filter: Callable[[str, nn.Module], bool] | None = None, rest: str = "auto",
) -> nn.Module:  # fmt: skip
    """Lets ``model``'s calls run on fastgen's operations, in place; returns the same model.

        model = fastgen.accelerate(model)

    The forward is captured at the first call (seconds), and again for other kinds of call: training or evaluation,
    with gradients or without. In it these are replaced, forward and backward: group norm → scale and shift →
    activation → convolution; nearest upsampling → convolution; convolution or transposed convolution → batch norm →
    activation, also with a residual; attention, also written by hand; Gaussian reparameterisation. Results are
    those of the model within the tolerance rule. Direct children are accelerated too, for calls that go around the
    model's forward (``vae.decode``).

    mode: "auto"; "train": transformed weights are not kept from one evaluation to the next, which saves four times
    the parameters' memory; "infer": for models whose parameters and modules do not change from here on (loading other
    values into them is seen, ``.data`` and hooks are not), so that nothing of them is looked at before a call.
    verify: the arguments of one call (a tuple, a dict of keywords or one tensor), which is then made, forward and
    backward, with and without: prints the drift of every replaced place as a share of what the tolerance rule allows,
    puts back the places that exceed it, and raises VerificationError, with the list, where the whole differs.
    filter: filter(name, module) says whether the place around a module may be replaced; name as in named_modules.
    rest: what runs everything else: "eager", "inductor" or "auto", which is Inductor on a GPU.

    Parameters, keys of the state_dict, hooks, train/eval, devices, dtypes, optimizers, DDP, autocast and gradient
    checkpoints stay as they were; after hooks are added or removed, accelerate again. A deep copy is accelerated too,
    a pickled one is not, and a warning says so. Warns, and leaves the model as it is, where there is nothing to
    replace. Raises UsageError for what is no module, for scripted, quantised, sparse, complex and meta-device models
    and for one that is compiled already.
    """
    if mode not in MODES:
        raise UsageError(f"mode: must be one of {', '.join(MODES)}, not {mode!r}")
    check_rest(rest)
    if filter is not None and not callable(filter):
        raise UsageError(f"filter: must be a function of a name and a module, not {filter!r}")
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise UsageError("model: DataParallel copies the module at each call; use DistributedDataParallel")
    inner = model.module if isinstance(model, WRAPPERS) else model
    check_model(inner)
    if nothing_to_replace(inner):
        warnings.warn(
            f"fastgen.accelerate({type(inner).__name__}): nothing to replace was found; it is left as it was",
            stacklevel=2,
        )
        return model
    detach(inner)
    options = Options(mode, filter, rest)
    attach(inner, options)
    if verify is not None:
        _verified(inner, verify, options)
    return model


def _verified(model: nn.Module, batch: Any, options: Options) -> None:
    """Puts back the places that fail; takes everything away where the whole fails."""
    args, kwargs = arguments(batch)
    try:
        drifts = verify_model(model, args, kwargs, options)
        failed = frozenset((d.name, d.op) for d in drifts if not d.passed)
        if failed:
            detach(model)
            attach(model, replace(options, spared=failed))
        check_whole(model, args, kwargs, drifts)
    except BaseException:
        detach(model)
        raise


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate` wholly, in ``model`` and in all of its modules; returns the same model."""
    check_model(model, unusual=False)
    detach(model)
    return model
