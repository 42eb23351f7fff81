"""Look-up in a table of 1-bit rows with a scale per row."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bits
from bincompile.ops.embedding import check_indices


def _reference(indices, table, row_scale, embedding_dim):
    rows = bits.unpack(table[indices], embedding_dim, row_scale.dtype)
    return rows * row_scale[indices].unsqueeze(-1)


def _shape(indices, table, row_scale, embedding_dim):
    return row_scale.new_empty((*indices.shape, embedding_dim))


def _check(indices, table, row_scale, embedding_dim):
    width = bits.packed_width(embedding_dim)
    if table.dtype != torch.uint8 or table.ndim != 2 or table.shape[1] != width:
        raise InputError(f"packed table {table.dtype} of shape {tuple(table.shape)}",
                         f"uint8 (num_embeddings, {width}) for {embedding_dim} columns",
                         "pack the table with bincompile.ops.bits.pack")
    if tuple(row_scale.shape) != (table.shape[0],):
        raise InputError(f"row_scale of shape {tuple(row_scale.shape)}", f"({table.shape[0]},)",
                         "the row_scale")
    check_indices(indices, table.shape[0])


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for rows, columns, shape in ((1, 1, (3,)), (17, 13, (2, 5)), (40, 64, (0,)), (5, 8, ()),
                                 (9, 100, (2, 1, 3))):
        yield Sample((torch.randint(rows, shape, generator=generator),
                      bits.pack(torch.randn(rows, columns, generator=generator)),
                      torch.rand(rows, generator=generator), columns))
    scale = torch.rand(5, generator=generator)
    scale[2] = 0.0  # a padding row
    table = bits.pack(torch.randn(5, 9, generator=generator))
    yield Sample((torch.tensor([2, 4, 2], dtype=torch.int32), table, scale, 9))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    table, scale = torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4)
    yield Sample((torch.tensor([4]), table, scale, 16), error="index 4")
    yield Sample((torch.tensor([-1]), table, scale, 16), error="index -1")
    yield Sample((torch.tensor([0.0]), table, scale, 16), error="int")
    yield Sample((torch.tensor([0]), table, scale, 17), error="uint8")
    yield Sample((torch.tensor([0]), table, scale[:2], 16), error="row_scale")


binary_embedding = Operator(
    name="binary_embedding",
    schema="(Tensor indices, Tensor table, Tensor row_scale, int embedding_dim) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="one binary base of arXiv:1802.00150; a row scale of 0 is a padding row",
)
