"""A convolution by weights of each image's own, against a grouped F.conv2d as StyleGAN's code has it."""

from benchmarks.harness import Work, nbytes


def work(inputs, outputs):
    """FLOPs of the sums as they are written: Winograd's algorithm needs fewer, so it can pass this limit."""
    x, w, y = inputs["x"], inputs["w"], outputs[0]
    read = nbytes(x, w, inputs["s"], inputs.get("input_gain"))
    flops = 2 * y.numel() * w[0].numel()
    return Work(read + nbytes(y), flops), Work(2 * read + nbytes(x, y), 2 * flops)
