"""What every kernel file shares: block sizes, index widths, layouts, the device a launch goes to."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tuning import configuration

# Launch options. EXACT: a * b + c is rounded twice, as in PyTorch, so that noise and pixels come out bit for bit the
# same. FUSED: it may be rounded once. One of them is always given, for Triton's own default is about to change.
EXACT = {"enable_fp_fusion": False}
FUSED = {"enable_fp_fusion": True}


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one for a launch; nothing to do on the CPU (Triton's interpreter)."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def architecture(x: Tensor) -> str:
    """The GPU that x is on, as "sm_90" or "gfx942"; "" elsewhere, the interpreter included."""
    return _architecture(x.device) if x.is_cuda else ""


@functools.cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def wide_type(x: Tensor) -> tl.dtype:
    """What a kernel computes in: fp64 for fp64 tensors, else fp32."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def index_type(size: int) -> tl.dtype:
    """The type of an index within one image of ``size`` elements. Offsets across images are always 64-bit."""
    return tl.int64 if size >= 2**31 else tl.int32


def image_size(x: Tensor) -> int:
    """Elements per image of x [N, *]."""
    return math.prod(x.shape[1:])


def block_size(kernel: str, x: Tensor) -> dict[str, int]:
    """BLOCK elements of an image of x [N, *] that a program takes, and its num_warps: a power of two, which the size
    of an image need not divide."""
    most = triton.next_power_of_2(image_size(x))
    # The first is what moves 16 bytes a thread in bf16; the others trade programs for work in each.
    found = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (512, 4), (256, 2))
    fitting = [{"BLOCK": min(block, max(128, most)), "num_warps": warps} for block, warps in found]
    return configuration(kernel, [c for i, c in enumerate(fitting) if c not in fitting[:i]], x)


def channels_last(x: Tensor) -> bool:
    """Whether x [N, C, *], which is dense, keeps its channels innermost."""
    return not x.is_contiguous()


def by_blocks(kernel: str, x: Tensor, generated: bool) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of one program for every block of every image of x [N, *], and what such kernels have in common.

    Only generated noise has to know which element is which (see `element_offset`); everything else
    may take images of any layout in the order of memory.
    """
    size, strided = image_size(x), generated and channels_last(x)
    config, channels = block_size(kernel, x), x.shape[1] if strided else 1
    blocks = triton.cdiv(size, config["BLOCK"])
    return (len(x) * blocks,), {
        "size": size, "blocks": blocks, "channels": channels, "positions": size // channels, "CHANNELS_LAST": strided,
        "WIDE": wide_type(x), "INDEX": index_type(size), **config, **EXACT,
    }  # fmt: skip


@triton.jit
def element_offset(i, channels, positions, CHANNELS_LAST: tl.constexpr):
    """Where element i (row-major over channels, positions) of an image lies in its memory."""
    if CHANNELS_LAST:
        return (i % positions) * channels + i // positions
    return i
