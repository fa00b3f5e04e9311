"""The forward diffusion with its noise, against torch.randn_like and two gathered coefficients."""

from benchmarks.harness import Work, nbytes
from benchmarks.ops import philox


def work(inputs, outputs):
    x_t = outputs[0]
    x0, noise = inputs["x0"], inputs.get("noise")
    drawn = philox.FLOPS if noise is None else 0
    made = nbytes(x_t) if noise is None else nbytes(noise)  # noise is written, or read
    forward = Work(nbytes(x0, x_t, inputs["t"], inputs.get("seeds")) + made, (3 + drawn) * x_t.numel())
    backward = Work(nbytes(x_t, x0, noise), (1 if noise is None else 2) * x_t.numel())  # dx_t in, dx0 (and dnoise) out
    return forward, backward
