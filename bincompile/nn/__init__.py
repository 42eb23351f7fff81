"""Layers that hold 1-bit weights: they train with float masters and compile to packed operators."""

from bincompile.nn.binary_linear import BinaryLinear
from bincompile.nn.bmha import BMHA

__all__ = ["BMHA", "BinaryLinear"]
