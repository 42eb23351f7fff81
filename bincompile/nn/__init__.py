"""Layers of 1-bit weights, which train with float masters and compile to packed operators, and
continual layers, which attend within a sliding window one token at a time."""

from bincompile.nn.binary_embedding import BinaryEmbedding, BinaryEmbeddingForward
from bincompile.nn.binary_embedding_bag import BinaryEmbeddingBag
from bincompile.nn.binary_linear import BinaryLinear
from bincompile.nn.bmha import BMHA
from bincompile.nn.calling import call_mode
from bincompile.nn.multihead_attention import MultiheadAttention
from bincompile.nn.retroactive import RetroactiveMultiheadAttention
from bincompile.nn.ring import StreamState
from bincompile.nn.single_output import SingleOutputMultiheadAttention

__all__ = [
    "BMHA", "BinaryEmbedding", "BinaryEmbeddingBag", "BinaryEmbeddingForward", "BinaryLinear",
    "MultiheadAttention", "RetroactiveMultiheadAttention", "SingleOutputMultiheadAttention",
    "StreamState", "call_mode",
]
