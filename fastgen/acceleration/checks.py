"""Which models `accelerate` takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastgen.errors import UsageError

# What a place is built around.
_MODULES = (nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm, nn.modules.batchnorm._BatchNorm,
            nn.modules.instancenorm._InstanceNorm, nn.MultiheadAttention)  # fmt: skip


def check_model(model: Any, unusual: bool = True) -> None:
    """Raises UsageError for what cannot be accelerated; ``unusual`` False: only for what is no module."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: must be a torch.nn.Module, not {type(model).__name__}")
    if not unusual:
        return
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise UsageError("model: is scripted or traced, and has no Python forward to capture; give the original")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise UsageError(
            "model: is compiled already; give what torch.compile was given, or use torch.compile(backend='fastgen')"
        )
    for name, module in model.named_modules():
        compiled = module._compiled_call_impl
        if compiled is not None and type(compiled).__module__ != "fastgen.acceleration.accelerating":
            raise UsageError(f"model: {name or 'it'} is compiled already, by its compile(); accelerate it instead")
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise UsageError(f"model: {name} is quantised; accelerate takes floating models, before quantisation")
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        _check_tensor(name, p)


def _check_tensor(name: str, p: torch.Tensor) -> None:
    if isinstance(p, nn.parameter.UninitializedTensorMixin):
        raise UsageError(f"model: {name} has no shape yet; call the model once before")
    if p.is_meta:
        raise UsageError(f"model: {name} is on the meta device and has no values; load weights first")
    if p.is_quantized:
        raise UsageError(f"model: {name} is quantised; accelerate takes floating models, before quantisation")
    if p.layout != torch.strided:
        raise UsageError(f"model: {name} is sparse ({p.layout}); make it dense")
    if isinstance(p, nn.Parameter) and p.is_complex():
        raise UsageError(f"model: {name} is complex; fastgen's operations are real")
    if type(p) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise UsageError(f"model: {name} is a {type(p).__name__}; fastgen's operations take ordinary tensors")


def nothing_to_replace(model: nn.Module) -> bool:
    """Whether a model consists of PyTorch's own modules, none of which is anything that could be replaced.

    Of a forward that somebody wrote only its capture can tell.
    """
    modules = list(model.modules())
    return not any(isinstance(m, _MODULES) or not type(m).__module__.startswith("torch.") for m in modules)
