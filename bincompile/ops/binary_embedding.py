"""Look-up in a table of rows of 1-bit bases, each base with a scale per row."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bases
from bincompile.ops.embedding import check_indices


def _reference(indices, table, row_scale, embedding_dim):
    scales = row_scale[indices].reshape(*indices.shape, bases.count_of(row_scale))
    signs = bases.split(table[indices], scales.shape[-1], embedding_dim, row_scale.dtype)
    return bases.combine(signs, scales)


def _shape(indices, table, row_scale, embedding_dim):
    return row_scale.new_empty((*indices.shape, embedding_dim))


def _check(indices, table, row_scale, embedding_dim):
    bases.check_table(table, row_scale, embedding_dim)
    check_indices(indices, table.shape[0])


def packed_sample(rows: int, columns: int, count: int, generator: torch.Generator,
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """A random packed table and its scales."""
    packed = bases.join(torch.randn(rows, count, columns, generator=generator))
    scale = torch.rand(rows, count, generator=generator)
    return packed, scale[:, 0] if count == 1 else scale


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for rows, columns, shape in ((1, 1, (3,)), (17, 13, (2, 5)), (40, 64, (0,)), (5, 8, ()),
                                 (9, 100, (2, 1, 3))):
        for count in (1, 2, 3):
            yield Sample((torch.randint(rows, shape, generator=generator),
                          *packed_sample(rows, columns, count, generator), columns))
    table, scale = packed_sample(5, 9, 1, generator)
    scale[2] = 0.0  # a padding row
    yield Sample((torch.tensor([2, 4, 2], dtype=torch.int32), table, scale, 9))
    yield Sample((torch.tensor([2, 4]), table, scale.half(), 9))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    table, scale = torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4)
    yield Sample((torch.tensor([4]), table, scale, 16), error="index 4")
    yield Sample((torch.tensor([-1]), table, scale, 16), error="index -1")
    yield Sample((torch.tensor([0.0]), table, scale, 16), error="int")
    yield Sample((torch.tensor([0]), table, scale, 17), error="uint8")
    yield Sample((torch.tensor([0]), table, scale[:2], 16), error="row_scale")
    yield Sample((torch.tensor([0]), table, torch.ones(4, 2), 16), error="(num_embeddings, 4)")
    yield Sample((torch.tensor([0]), table, torch.ones(4, 9), 16), error="row_scale")


binary_embedding = Operator(
    name="binary_embedding",
    schema="(Tensor indices, Tensor table, Tensor row_scale, int embedding_dim) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="binary bases of arXiv:1802.00150; a row scale of 0 is a padding row",
)
