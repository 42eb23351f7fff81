"""An embedding layer whose rows are 1 bit a number."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from bincompile.nn import arguments
from bincompile.nn.binary_table import BinaryTable
from bincompile.nn.look_up import BinaryEmbeddingForward
from bincompile.ops.binary_embedding import binary_embedding
from bincompile.ops.fake_binary_rows import fake_binary_rows

__all__ = ["BinaryEmbedding", "BinaryEmbeddingForward"]


class BinaryEmbedding(BinaryTable):
    """Look-up of rows that are sums of 1 to 4 binary bases: row = a1 s1 + ... + ak sk.

    Args:
        num_embeddings: V.
        embedding_dim: D, any size.
        padding_idx: a row that is exactly zero and gets no gradient; counted from the end if < 0.
        bases: k; a table takes k bits a number, and k scales a row.
        packed: hold `qweight` (V, k * ceil(D/8)) uint8 and `embed_scale` (V, k), trained by
            `bincompile.optim.BinaryOptimizer`; False holds float masters `weight` (V, D), trained
            straight-through by any optimizer (the gradient of a row is that of the masters).
        learn_scale: make `embed_scale` a parameter.
        sparse: for float masters, a sparse gradient, as in `nn.Embedding`.
        device: where the table is made.
        dtype: float dtype of the masters or scales, and of the result.

    Shape:
        int32 or int64 of any shape (...) to (..., D).

    Raises:
        ConfigError: an argument of the wrong kind.
        InputTypeError: indices that aren't int32 or int64.
        InputError: an index out of range, named with the size of the table.

    The table of 256,000 rows of 1,024 takes 33.8 MB instead of 1 GB. There is no max_norm: with
    one base the norm of a row is its scale times sqrt(D).

    Source: bitorch_engine's BinaryEmbeddingCuda; bases of arXiv:1802.00150; straight-through
    estimator, arXiv:1308.3432.

    Example:
        >>> layer = BinaryEmbedding(10, 3, padding_idx=0)
        >>> rows = layer(torch.tensor([[0, 4], [4, 9]]))
        >>> rows.shape, rows[0, 0].tolist(), bool((rows[0, 1].abs() == 1).all())
        (torch.Size([2, 2, 3]), [0.0, 0.0, 0.0], True)
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *,
                 bases: int = 1, packed: bool = True, learn_scale: bool = False,
                 sparse: bool = False, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        self.sparse = arguments.flag("BinaryEmbedding", "sparse", sparse)
        super().__init__(num_embeddings, embedding_dim, padding_idx, bases=bases, packed=packed,
                         learn_scale=learn_scale, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) to (..., embedding_dim)."""
        if not self.packed:
            rows = F.embedding(input, self.weight, self.padding_idx, sparse=self.sparse)
            return fake_binary_rows.overload(rows, self.bases)
        if self._differentiates(input):
            return self.look_up(input)
        return binary_embedding.overload(input, self.qweight, self.row_scale(), self.embedding_dim)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "sparse": self.sparse}
