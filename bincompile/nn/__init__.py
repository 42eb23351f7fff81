"""Layers that hold 1-bit weights: they train with float masters and compile to packed operators."""

from bincompile.nn.binary_embedding import BinaryEmbedding, BinaryEmbeddingForward
from bincompile.nn.binary_embedding_bag import BinaryEmbeddingBag
from bincompile.nn.binary_linear import BinaryLinear
from bincompile.nn.bmha import BMHA

__all__ = [
    "BMHA", "BinaryEmbedding", "BinaryEmbeddingBag", "BinaryEmbeddingForward", "BinaryLinear",
]
