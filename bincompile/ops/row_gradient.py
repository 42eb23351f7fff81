"""The gradient of a packed table: float, of the rows that were touched and no others.

It hangs on the table as `sparse_grad`, a coalesced sparse tensor (V, D), or (V, k, D) for k
bases: the derivative by the signs themselves, summed over look-ups and backward passes.
"""

from __future__ import annotations

import torch


def sum_rows(indices: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct rows in order, and the sum of the values (n, ...) of each, float32 or wider.

    Example:
        >>> rows, sums = sum_rows(torch.tensor([4, 1, 4]), torch.tensor([[1.0], [2.0], [3.0]]))
        >>> rows.tolist(), sums.tolist()
        ([1, 4], [[2.0], [4.0]])
    """
    rows, places = torch.unique(indices.reshape(-1), return_inverse=True)
    wide = torch.promote_types(values.dtype, torch.float32)
    sums = values.new_zeros((rows.numel(), *values.shape[1:]), dtype=wide)
    return rows.long(), sums.index_add_(0, places, values.to(wide))


def of_look_up(indices: torch.Tensor, grad: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The gradient of a table with scales (V, k) from that of what was looked up, (..., D).

    A row whose scales are all 0 is a padding row and gets none.
    """
    rows, sums = sum_rows(indices, grad.reshape(-1, grad.shape[-1]))
    factors = scales[rows]
    kept = (factors != 0).any(-1)
    if not bool(kept.all()):
        rows, sums, factors = rows[kept], sums[kept], factors[kept]
    sums = sums.mul_(factors) if scales.shape[1] == 1 else \
        sums.unsqueeze(-2) * factors.unsqueeze(-1)
    return sparse(rows, sums, scales.shape[0])


def sparse(rows: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """Sorted distinct rows and their values as a coalesced sparse tensor of `size` rows."""
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, (size, *values.shape[1:]),
                                   is_coalesced=True, check_invariants=False)


def accumulate(table: torch.Tensor, grad: torch.Tensor) -> None:
    """Add a gradient to the one that the table has, in place of it.

    Example:
        >>> table = torch.zeros(9, 1, dtype=torch.uint8)
        >>> for row in (7, 2, 7):
        ...     accumulate(table, sparse(torch.tensor([row]), torch.ones(1, 8), 9))
        >>> table.sparse_grad.indices().tolist(), table.sparse_grad.values()[:, 0].tolist()
        ([[2, 7]], [1.0, 2.0])
    """
    before = getattr(table, "sparse_grad", None)
    if before is not None:
        rows = torch.cat([before.indices()[0], grad.indices()[0]])
        rows, values = sum_rows(rows, torch.cat([before.values(), grad.values()]))
        grad = sparse(rows, values, table.shape[0])
    table.sparse_grad = grad  # type: ignore[attr-defined]
