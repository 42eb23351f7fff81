"""Look-up of several rows of 1-bit bases, and their sum, mean, maximum or majority."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bases
from bincompile.ops.binary_embedding import binary_embedding, packed_sample
from bincompile.ops.embedding import check_indices

MAJORITY = "majority"
MODES = ("sum", "mean", "max", MAJORITY)


def vote(mean: torch.Tensor, tie: float) -> torch.Tensor:
    """+1 where more votes are +1, -1 where more are -1, `tie` where as many."""
    return torch.where(mean == 0, tie, torch.where(mean > 0, 1.0, -1.0)).to(mean.dtype)


def torch_bags(indices: torch.Tensor, offsets: torch.Tensor | None, mode: str,
               include_last_offset: bool) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Flat indices, offsets and include_last_offset as torch's kernel can take them.

    It refuses bags of length 0 without offsets, and for a maximum it writes behind its result
    where indices come after the last bag.
    """
    if offsets is None:
        starts = torch.arange(indices.shape[0], device=indices.device) * indices.shape[1]
        return indices.reshape(-1), starts, False
    if include_last_offset and mode == "max" and not is_fake(offsets):
        return indices[:int(offsets[-1])], offsets[:-1].long(), False
    return indices, offsets.long(), include_last_offset


def reduce_rows(rows: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor | None,
                mode: str, weights: torch.Tensor | None = None, include_last_offset: bool = False,
                padding_idx: int | None = None) -> torch.Tensor:
    """Rows (n, D), one for each of n indices, by bags: (bags, D); mode "sum", "mean" or "max".

    It is `torch.nn.functional.embedding_bag` over rows that were looked up before.
    """
    flat, starts, last = torch_bags(indices, offsets, mode, include_last_offset)
    count = flat.shape[0]
    places, rows = torch.arange(count, device=indices.device), rows[:count]
    weights = None if weights is None else weights.reshape(-1)[:count].to(rows.dtype)
    if padding_idx is not None:
        places = torch.where(flat == padding_idx, count, places)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return F.embedding_bag(
        places, rows, starts, mode=mode, per_sample_weights=weights, include_last_offset=last,
        padding_idx=None if padding_idx is None else count)


def _reference(table, indices, offsets, row_scale, embedding_dim, mode="mean", weights=None,
               include_last_offset=False, padding_idx=None, tie=1.0):
    rows = binary_embedding.reference(indices.reshape(-1), table, row_scale, embedding_dim)
    out = reduce_rows(rows, indices, offsets, "mean" if mode == MAJORITY else mode, weights,
                      include_last_offset, padding_idx)
    return vote(out, tie) if mode == MAJORITY else out


def _shape(table, indices, offsets, row_scale, embedding_dim, mode="mean", weights=None,
           include_last_offset=False, padding_idx=None, tie=1.0):
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)
    return row_scale.new_empty((bags, embedding_dim))


def _check(table, indices, offsets, row_scale, embedding_dim, mode="mean", weights=None,
           include_last_offset=False, padding_idx=None, tie=1.0):
    if mode not in MODES:
        raise InputError(f"mode={mode!r}", " or ".join(map(repr, MODES)), "the mode")
    bases.check_table(table, row_scale, embedding_dim)
    check_bags(indices, offsets, weights, mode, include_last_offset)
    check_indices(indices, table.shape[0])


def check_bags(indices: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None,
               mode: str, include_last_offset: bool) -> None:
    """Raise unless indices, offsets and weights fit together."""
    if indices.ndim != (2 if offsets is None else 1):
        given = "without" if offsets is None else "with"
        raise InputError(f"indices of rank {indices.ndim} {given} offsets",
                         "rank 2 without offsets, rank 1 with offsets", "the indices or offsets")
    if offsets is not None and (offsets.ndim != 1 or offsets.dtype not in (torch.int32,
                                                                           torch.int64)):
        raise InputError(f"offsets {offsets.dtype} of shape {tuple(offsets.shape)}",
                         "int32 or int64 of rank 1", "the offsets")
    if offsets is not None and include_last_offset and offsets.shape[0] < 1:
        raise InputError("no offsets with include_last_offset=True",
                         "at least one offset, the number of indices", "the offsets")
    if offsets is not None and not is_fake(offsets) and offsets.device.type != "meta":
        check_bounds(offsets.tolist(), indices.shape[0])
    if weights is not None and mode != "sum":
        raise InputError(f"per-sample weights with mode={mode!r}", "mode='sum'", "the mode")
    if weights is not None and weights.shape != indices.shape:
        raise InputError(f"per-sample weights of shape {tuple(weights.shape)}",
                         f"{tuple(indices.shape)}, that of the indices", "the weights")


def check_bounds(offsets: list[int], count: int) -> None:
    """Raise unless the offsets start at 0, never fall, and stay within the indices."""
    fits = all(a <= b for a, b in itertools.pairwise([0, *offsets, count]))
    if not fits or (offsets and offsets[0]):
        raise InputError(f"offsets {offsets[:8]}{'...' * (len(offsets) > 8)} for {count} indices",
                         f"offsets that start at 0, never fall and end by {count}", "the offsets")


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def indices(*shape: int) -> torch.Tensor:
        return torch.randint(9, shape, generator=generator)

    for mode in MODES:
        for count in ((1,) if mode == MAJORITY else (1, 2, 3)):
            table, scale = packed_sample(9, 13, count, generator)
            scale = torch.ones(9) if mode == MAJORITY else scale
            yield Sample((table, indices(3, 5), None, scale, 13, mode))
            yield Sample((table, indices(6), torch.tensor([0, 2, 2]), scale, 13, mode))
        yield Sample((table, indices(2, 4), None, scale, 13, mode, None, False, 3, 0.0))
        yield Sample((table, indices(7).int(), torch.tensor([0, 4, 7], dtype=torch.int32), scale,
                      13, mode, None, True, 0))
        yield Sample((table, indices(2, 0), None, scale, 13, mode))
    table, scale = packed_sample(9, 8, 2, generator)
    yield Sample((table, indices(6), torch.tensor([0, 4, 6]), scale, 8, "sum",
                  torch.rand(6, generator=generator), True, 2))
    yield Sample((table, indices(2, 3), None, scale.half(), 8, "mean"))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    table, scale = packed_sample(4, 8, 1, generator)
    two, one = torch.zeros(2, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    yield Sample((table, two, None, scale, 8, "median"), error="mode")
    yield Sample((table, two, torch.tensor([0]), scale, 8), error="rank")
    yield Sample((table, one, None, scale, 8), error="rank 1 without offsets")
    yield Sample((table, one, torch.tensor([0.0]), scale, 8), error="offsets")
    yield Sample((table, one, torch.tensor([1, 2]), scale, 8), error="start at 0")
    yield Sample((table, one, torch.tensor([0, 2, 1]), scale, 8), error="never fall")
    yield Sample((table, one, torch.tensor([0, 4]), scale, 8), error="end by 3")
    yield Sample((table, two + 4, None, scale, 8), error="index 4 into a table of 4 rows")
    yield Sample((table, two, None, scale, 8, "mean", torch.ones(2, 2)), error="weights")
    yield Sample((table, two, None, scale, 8, "sum", torch.ones(2, 3)), error="weights")
    yield Sample((table, two, None, scale, 9), error="uint8")


binary_embedding_bag = Operator(
    name="binary_embedding_bag",
    schema="(Tensor table, Tensor indices, Tensor? offsets, Tensor row_scale, int embedding_dim, "
           "str mode='mean', Tensor? weights=None, bool include_last_offset=False, "
           "int? padding_idx=None, float tie=1.0) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(rtol=1e-5, atol=1e-5),  # a kernel may round a weighted row once more
    source="torch.nn.functional.embedding_bag over binary bases (arXiv:1802.00150); majority: "
           "the sign of the mean, as in bitorch_engine's BinaryEmbeddingBag",
)
