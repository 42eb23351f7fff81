"""Look-up of several rows and their sum, mean or maximum."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops.embedding import check_indices

MODES = ("sum", "mean", "max")


def _reference(table, indices, offsets, mode="mean", weights=None, include_last_offset=False,
               padding_idx=None):
    return torch.nn.functional.embedding_bag(
        indices, table, offsets, mode=mode, per_sample_weights=weights,
        include_last_offset=include_last_offset, padding_idx=padding_idx)


def _shape(table, indices, offsets, mode="mean", weights=None, include_last_offset=False,
           padding_idx=None):
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)
    return table.new_empty((bags, table.shape[1]))


def _check(table, indices, offsets, mode="mean", weights=None, include_last_offset=False,
           padding_idx=None):
    if mode not in MODES:
        raise InputError(f"mode={mode!r}", " or ".join(map(repr, MODES)), "the mode")
    if table.ndim != 2:
        raise InputError(f"table of shape {tuple(table.shape)}", "(num_embeddings, embedding_dim)",
                         "the table")
    if indices.ndim != (2 if offsets is None else 1):
        raise InputError(f"indices of rank {indices.ndim}",
                         "rank 2 without offsets, rank 1 with offsets", "the indices or offsets")
    if weights is not None and mode != "sum":
        raise InputError(f"per-sample weights with mode={mode!r}", "mode='sum'", "the mode")
    check_indices(indices, table.shape[0])


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def table(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    for mode in MODES:
        yield Sample((table(9, 4), torch.randint(9, (3, 5), generator=generator), None, mode))
        yield Sample((table(9, 4), torch.randint(9, (6,), generator=generator),
                      torch.tensor([0, 2, 2]), mode))
        yield Sample((table(9, 4), torch.randint(9, (2, 4), generator=generator), None, mode, None,
                      False, 3))
    yield Sample((table(9, 4), torch.randint(9, (6,), generator=generator),
                  torch.tensor([0, 4, 6]), "sum", torch.rand(6, generator=generator), True))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    table = torch.randn(4, 3, generator=generator)
    two = torch.zeros(2, 2, dtype=torch.long)
    yield Sample((table, two, None, "median"), error="mode")
    yield Sample((table, two, torch.tensor([0]), "sum"), error="rank")
    yield Sample((table, two + 4, None, "sum"), error="index 4")
    yield Sample((table, two, None, "mean", torch.ones(2, 2)), error="weights")


embedding_bag = Operator(
    name="embedding_bag",
    schema="(Tensor table, Tensor indices, Tensor? offsets, str mode='mean', "
           "Tensor? weights=None, bool include_last_offset=False, int? padding_idx=None) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="torch.nn.functional.embedding_bag",
)
