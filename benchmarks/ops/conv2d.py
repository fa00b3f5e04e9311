"""Convolutions with what stands around them, against F.group_norm, F.silu and F.conv2d one after the other."""

from benchmarks.harness import Work, nbytes


def work(inputs, outputs):
    """FLOPs of the sums as they are written: Winograd's algorithm needs fewer, so it can pass this limit."""
    x, weight, y = inputs["x"], inputs["weight"], outputs[0]
    tensors = ("x", "skip", "residual", "weight", "bias", "scale", "shift", "norm_weight", "norm_bias")
    read = nbytes(*(inputs.get(name) for name in tensors))
    flops = 2 * y.numel() * weight[0].numel()
    return Work(read + nbytes(y), flops), Work(2 * read + nbytes(x, y), 2 * flops)
