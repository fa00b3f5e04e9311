"""Group norm, scale and shift, activation, over one or two sources, against F.group_norm and F.silu."""

from benchmarks.harness import Work, nbytes

PARAMETERS = ("weight", "bias", "scale", "shift")


def work(inputs, outputs):
    y = outputs[0]
    image = nbytes(inputs["x"], inputs.get("skip"))
    small = nbytes(*(inputs.get(name) for name in PARAMETERS))
    # Each source is read once, as if it stayed in cache between statistics and normalisation.
    forward = Work(image + small + nbytes(y), 12 * y.numel())
    backward = Work(nbytes(y) + image + small + image + small, 25 * y.numel())  # dy and the inputs in, gradients out
    return forward, backward
