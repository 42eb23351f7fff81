"""Floating-point operations of multi-head attention, counted from its formula."""

from __future__ import annotations

from torch import nn


def linear(rows: int, inputs: int, outputs: int, bias: bool) -> tuple[int, int]:
    """Multiplications and additions of a linear layer; a bias counts with the multiplications."""
    return rows * outputs * (inputs + bias), rows * outputs * (inputs - 1)


def attention(queries: int, keys: int, features: int) -> tuple[int, int, int]:
    """Multiplications, additions and exponentials of one head.

    The scaling of the queries and the division by the sum count as multiplications; taking off
    the maximum is not counted. For as many queries as keys, n, the additions are
    2 n^2 d - n d - n, as in Continual Transformers (arXiv:2201.06268).
    """
    products = queries * keys * features
    return (2 * products + 2 * queries * features,
            2 * products - queries * features - queries, queries * keys)


def count(layer: nn.MultiheadAttention, queries: int, keys: int, answers: int, window: int,
          ) -> tuple[int, int, int]:
    """Multiplications, additions, exponentials to project so many queries and keys (and values)
    and to answer `answers` queries over `window` keys."""
    bias = layer.in_proj_bias is not None
    width = layer.embed_dim
    linears = [linear(queries, width, width, bias), linear(keys, layer.kdim, width, bias),
               linear(keys, layer.vdim, width, bias), linear(answers, width, width, bias)]
    window += (layer.bias_k is not None) + layer.add_zero_attn
    muls, adds, exps = (layer.num_heads * n
                        for n in attention(answers, window, layer.head_dim))
    return muls + sum(m for m, _ in linears), adds + sum(a for _, a in linears), exps
