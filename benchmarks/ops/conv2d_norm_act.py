"""Convolution, batch norm and activation, against F.conv2d or F.conv_transpose2d, F.batch_norm and the activation."""

from benchmarks.harness import Work, nbytes


def work(inputs, outputs):
    """FLOPs of the sums as they are written; a transposed convolution adds each input pixel kh · kw times."""
    x, weight, y = inputs["x"], inputs["weight"], outputs[0]
    names = ("x", "residual", "weight", "bias", "running_mean", "running_var", "norm_weight", "norm_bias")
    read = nbytes(*(inputs.get(name) for name in names))
    transposed = weight.shape[1] == y.shape[1] and y.shape[2] > x.shape[2]
    flops = 2 * (x.numel() * weight[0].numel() if transposed else y.numel() * weight[0].numel())
    return Work(read + nbytes(y), flops), Work(2 * read + nbytes(x, y), 2 * flops)
