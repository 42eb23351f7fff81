"""Look-up of rows of a float table; with `wrap`, negative indices count from its end."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import is_fake

from bincompile.errors import InputError, InputTypeError
from bincompile.op import Operator, Sample, Tolerance


def check_indices(indices: torch.Tensor, rows: int, wrap: bool = False) -> None:
    """Raise unless every index is an integer from 0 to rows - 1; with `wrap`, from -rows."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise InputTypeError(f"indices of dtype {indices.dtype}", "int32 or int64",
                             "convert the indices, e.g. indices.long()")
    if is_fake(indices) or indices.device.type == "meta" or indices.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(indices))
    first = -rows if wrap else 0
    if low < first or high >= rows:
        raise InputError(f"index {low if low < first else high} into a table of {rows} rows",
                         f"{first} to {rows - 1}", "the indices, or a larger table")


def _reference(table, indices, wrap=False):
    if wrap:
        indices = torch.where(indices < 0, indices + table.shape[0], indices)
    return torch.nn.functional.embedding(indices, table)


def _shape(table, indices, wrap=False):
    return table.new_empty((*indices.shape, table.shape[1]))


def _check(table, indices, wrap=False):
    if table.ndim != 2:
        raise InputError(f"table of shape {tuple(table.shape)}", "(num_embeddings, embedding_dim)",
                         "the table")
    check_indices(indices, table.shape[0], wrap)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for rows, columns, shape in ((1, 1, (3,)), (7, 5, (2, 4)), (7, 5, (0, 4)), (3, 8, (2, 1, 3)),
                                 (4, 2, ())):
        yield Sample((torch.randn(rows, columns, generator=generator),
                      torch.randint(rows, shape, generator=generator)))
    yield Sample((torch.randn(6, 3, generator=generator, dtype=torch.float64).bfloat16(),
                  torch.tensor([5, 0, 5], dtype=torch.int32)))
    for dtype in (torch.int32, torch.int64):
        yield Sample((torch.randn(6, 3, generator=generator),
                      torch.tensor([[-6, 5], [-1, 0]], dtype=dtype), True))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    table = torch.randn(4, 3, generator=generator)
    yield Sample((table, torch.tensor([4])), error="index 4")
    yield Sample((table, torch.tensor([-1])), error="index -1")
    yield Sample((table, torch.tensor([-5]), True), error="index -5")
    yield Sample((table, torch.tensor([4]), True), error="index 4")
    yield Sample((table, torch.tensor([1.0])), error="int")
    yield Sample((table[0], torch.tensor([0])), error="num_embeddings")


embedding = Operator(
    name="embedding",
    schema="(Tensor table, Tensor indices, bool wrap=False) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(bits=True),
    source="torch.nn.functional.embedding; with wrap, torch's indexing",
)
