"""A bias, an activation, a gain and a clamp, against an addition, F.leaky_relu, a multiplication and a clamp."""

import torch

from benchmarks.harness import Work, nbytes


def work(inputs, outputs):
    x, y = inputs["x"], outputs[0]
    forward = Work(nbytes(x, inputs.get("b"), y), 5 * y.numel())
    backward = Work(nbytes(x, y, x) + 2 * nbytes(inputs.get("b")), 8 * y.numel())  # x and dy in, dx out
    return forward, backward


def prepare(inputs):
    """Moves x away from lrelu's kink: there a rounding of x + b decides over a whole gradient, by chance."""
    x, b = inputs["x"], inputs.get("b")
    z = x if b is None else x + b.reshape([-1 if i == inputs["dim"] else 1 for i in range(x.ndim)])
    with torch.no_grad():
        moved = torch.where(z.abs() < 1e-3, x + 0.02, x)
    return inputs | {"x": torch.empty_like(x).copy_(moved).requires_grad_(x.requires_grad)}
