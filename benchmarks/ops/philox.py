"""Noise from seeds, against torch.randn, whose numbers are others: its speed is shown unchecked."""

from benchmarks.harness import Work, nbytes

FLOPS = 45  # a normal: a quarter of ten Philox rounds (25 integer operations), half of a Box-Muller pair (20)


def work(inputs, outputs):
    (z,) = outputs
    return Work(nbytes(inputs["seeds"], z), FLOPS * z.numel()), Work()
