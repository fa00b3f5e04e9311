"""Batch norm, residual, activation, against F.batch_norm, an addition and F.relu."""

from benchmarks.harness import Work, nbytes

PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def work(inputs, outputs):
    y = outputs[0]
    images = nbytes(inputs["x"], inputs.get("residual"))
    small = nbytes(*(inputs.get(name) for name in PARAMETERS))
    # Each image is read once, as if it stayed in cache between statistics and normalisation.
    forward = Work(images + small + nbytes(y), 10 * y.numel())
    backward = Work(nbytes(y) + 2 * images + 2 * small, 15 * y.numel())  # dy and the inputs in, gradients out
    return forward, backward
