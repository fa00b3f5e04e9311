"""Resampling, against zeros in between (F.pad), F.conv2d of single channels, and a stride."""

import math

from benchmarks.harness import Work, nbytes


def work(inputs, outputs):
    """FLOPs of the taps that meet a pixel."""
    x, f, y = inputs["x"], inputs["f"], outputs[0]
    (upx, upy), (_, downy) = inputs["up"], inputs["down"]
    if f.ndim == 2:
        flops = 2 * y.numel() * math.ceil(f.shape[1] / upx) * math.ceil(f.shape[0] / upy)
    else:  # along rows first: as many of them as go in
        rows = y.numel() * downy / upy
        flops = 2 * (rows * math.ceil(len(f) / upx) + y.numel() * math.ceil(len(f) / upy))
    one = Work(nbytes(x, f, y), flops)
    return one, one
