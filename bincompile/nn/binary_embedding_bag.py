"""An embedding bag whose rows are 1 bit a number."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from bincompile.errors import ConfigError
from bincompile.nn import arguments
from bincompile.nn.binary_table import BinaryTable
from bincompile.ops.binary_embedding_bag import (
    MAJORITY,
    MODES,
    binary_embedding_bag,
    check_bags,
    reduce_rows,
    torch_bags,
)
from bincompile.ops.embedding import check_indices
from bincompile.ops.fake_binary_rows import fake_binary_rows
from bincompile.ops.fake_signs import fake_signs

TIES = {"positive": 1.0, "zero": 0.0}


class BinaryEmbeddingBag(BinaryTable):
    """Sum, mean, maximum or majority of several 1-bit rows.

    The majority of a bag is, in each column, the sign that more of its rows have, as a float -1
    or +1. As many of both, which an empty bag has too, is a tie: +1 with ties="positive", as in
    bitorch_engine, or 0 with ties="zero", which favours neither sign. Entries at `padding_idx`
    take no part: they neither vote nor count. In the other modes a bag without entries is zero.

    Args:
        num_embeddings: V.
        embedding_dim: D, any size.
        padding_idx: a row that takes no part and gets no gradient; counted from the end if < 0.
        mode: "majority", "sum", "mean" or "max"; the last three as in `nn.EmbeddingBag`.
        ties: "positive" or "zero", for the majority.
        include_last_offset: the last offset is the number of indices, and starts no bag.
        bases: binary bases of a row, 1 to 4; the majority has one.
        packed: hold bits, trained by `bincompile.optim.BinaryOptimizer`; False holds float
            masters, trained straight-through by any optimizer, at the cost of the whole table in
            each step.
        learn_scale: make `embed_scale` a parameter; not with the majority, which has no scale.
        device: where the table is made.
        dtype: float dtype of the masters or scales, and of the result.

    Shape:
        input (B, L) without offsets, or (n,) with offsets (B,), or (B + 1,) with
        include_last_offset, to (B, D). Weights per sample, with mode="sum", have the input's shape.

    Raises:
        ConfigError: an argument of the wrong kind, or a majority with several bases.
        InputTypeError: indices that aren't int32 or int64.
        InputError: an index out of range, or offsets or weights that don't fit.

    Gradients of the majority are those of the mean of the votes (straight-through).

    Source: bitorch_engine's BinaryEmbeddingBag; `torch.nn.EmbeddingBag`; arXiv:1308.3432.

    Example:
        >>> rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        >>> bag = BinaryEmbeddingBag.from_pretrained(rows)
        >>> bag(torch.tensor([[0, 1, 2], [2, 2, 0]])).tolist()
        [[1.0, -1.0], [-1.0, -1.0]]
        >>> bag(torch.tensor([0, 2]), torch.tensor([0, 0])).tolist()  # an empty bag, and a tie
        [[1.0, 1.0], [1.0, 1.0]]
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *,
                 mode: str = MAJORITY, ties: str = "positive", include_last_offset: bool = False,
                 bases: int = 1, packed: bool = True, learn_scale: bool = False,
                 device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        name = "BinaryEmbeddingBag"
        self.mode = arguments.choice(name, "mode", mode, MODES)
        self.ties = arguments.choice(name, "ties", ties, tuple(TIES))
        self.include_last_offset = arguments.flag(name, "include_last_offset", include_last_offset)
        if mode == MAJORITY and (bases != 1 or learn_scale):
            raise ConfigError(f"{name}(mode={mode!r}, bases={bases!r}, learn_scale={learn_scale})",
                              "one base and no scale, or a mode of 'sum', 'mean' or 'max'",
                              "the mode argument, or leave bases and learn_scale out")
        super().__init__(num_embeddings, embedding_dim, padding_idx, bases=bases, packed=packed,
                         learn_scale=learn_scale, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor, offsets: torch.Tensor | None = None,
                per_sample_weights: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L), or (n,) and offsets, to (B, embedding_dim)."""
        if not self.packed:
            return self._from_masters(input, offsets, per_sample_weights)
        if self._differentiates(input):
            check_bags(input, offsets, per_sample_weights, self.mode, self.include_last_offset)
            out = reduce_rows(self.look_up(input.reshape(-1)), input, offsets, self._reduction,
                              per_sample_weights, self.include_last_offset, self.padding_idx)
            return self._voted(out)
        return binary_embedding_bag.overload(
            self.qweight, input, offsets, self.row_scale(), self.embedding_dim, self.mode,
            per_sample_weights, self.include_last_offset, self.padding_idx, TIES[self.ties])

    def _from_masters(self, input: torch.Tensor, offsets: torch.Tensor | None,
                      weights: torch.Tensor | None) -> torch.Tensor:
        check_bags(input, offsets, weights, self.mode, self.include_last_offset)
        check_indices(input, self.num_embeddings)
        flat, starts, last = torch_bags(input, offsets, self.mode, self.include_last_offset)
        table = fake_signs.overload(self.weight) if self.mode == MAJORITY else \
            fake_binary_rows.overload(self.weight, self.bases)
        return self._voted(F.embedding_bag(
            flat.long(), table, starts, mode=self._reduction,
            padding_idx=self.padding_idx,
            per_sample_weights=None if weights is None else weights.reshape(-1).to(table.dtype),
            include_last_offset=last))

    @property
    def _reduction(self) -> str:
        return "mean" if self.mode == MAJORITY else self.mode

    def _voted(self, out: torch.Tensor) -> torch.Tensor:
        return fake_signs.overload(out, TIES[self.ties]) if self.mode == MAJORITY else out

    @torch.no_grad()
    def assign_rows(self, rows: torch.Tensor) -> None:
        """Take over rows (V, D); a majority keeps their signs alone."""
        super().assign_rows(rows)
        if self.packed and self.mode == MAJORITY:
            self.embed_scale.fill_(1.0)
            self._clear_padding()

    def _kept_scales(self, scales: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(scales) if self.mode == MAJORITY else scales

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "mode": self.mode, "ties": self.ties,
                "include_last_offset": self.include_last_offset}

    def extra_repr(self) -> str:
        """The sizes and the mode, and every option that is not at its default."""
        parts = [super().extra_repr(), f"mode={self.mode!r}"]
        parts += [f"ties={self.ties!r}"] * (self.ties != "positive")
        parts += ["include_last_offset=True"] * self.include_last_offset
        return ", ".join(parts)
