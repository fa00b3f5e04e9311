"""Layers of `torch.nn` that stand together in image generators, each pair or triple as one module on `fastgen.ops`.

Their parameters have the names of the unfused layers', so that state dicts go from one to the other and back.
"""

from fastgen.nn.attention import Attention2d
from fastgen.nn.conv import ConvNormAct2d, ConvTransposeNormAct2d
from fastgen.nn.gaussian import DiagonalGaussian, Reparameterize
from fastgen.nn.group_norm import GroupNormAct, NormActConv2d

__all__ = [
    "Attention2d",
    "ConvNormAct2d",
    "ConvTransposeNormAct2d",
    "DiagonalGaussian",
    "GroupNormAct",
    "NormActConv2d",
    "Reparameterize",
]
