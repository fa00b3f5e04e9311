"""Parts of generators that are no networks by themselves."""

from fastgen.nn.gaussian import DiagonalGaussian

__all__ = ["DiagonalGaussian"]
