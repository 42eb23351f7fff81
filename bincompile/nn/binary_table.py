"""What the embedding layers share: a table of 1-bit rows, packed or behind float masters."""

from __future__ import annotations

import functools
from typing import Any, Self

import torch
from torch import fx, nn
from torch.nn import functional as F

from bincompile.errors import ConfigError, InputError, InputTypeError
from bincompile.nn import arguments
from bincompile.nn.look_up import BinaryEmbeddingForward
from bincompile.ops import bases, bits
from bincompile.ops.binary_linear import binary_linear
from bincompile.ops.fake_binary_rows import fake_binary_rows

BLOCK = 4096  # rows that are packed at a time
ANCHOR = "anchor"


class BinaryTable(nn.Module):
    """A table (V, D) whose rows are sums of 1 to 4 binary bases; the base of the layers.

    A packed table is the uint8 buffer `qweight` (V, bases * ceil(D/8)) with `embed_scale`
    (V, bases). Its gradient is `qweight.sparse_grad`, for `bincompile.optim.BinaryOptimizer`; it
    joins autograd through `anchor`, a parameter without elements that no state dict holds, so
    `requires_grad_(False)` freezes the table like any other. With `packed=False` the table is the
    float parameter `weight` (V, D), and any optimizer trains it.
    """

    qweight: torch.Tensor
    embed_scale: torch.Tensor
    weight: nn.Parameter

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *,
                 bases: int = 1, packed: bool = True, learn_scale: bool = False,
                 device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        self.num_embeddings = arguments.size(name, "num_embeddings", num_embeddings)
        self.embedding_dim = arguments.size(name, "embedding_dim", embedding_dim)
        self.padding_idx = _row(name, padding_idx, num_embeddings)
        self.bases = _bases(name, bases)
        self.packed = arguments.flag(name, "packed", packed)
        dtype = arguments.float_dtype(name, dtype)
        if arguments.flag(name, "learn_scale", learn_scale) and not packed:
            raise ConfigError(f"{name}(packed=False, learn_scale=True)",
                              "learn_scale with a packed table",
                              "leave learn_scale out: the scales of float masters follow them")
        if packed:
            width = bases * bits.packed_width(embedding_dim)
            self.register_buffer("qweight", torch.empty(num_embeddings, width, dtype=torch.uint8,
                                                        device=device))
            scale = torch.empty(num_embeddings, bases, dtype=dtype, device=device)
            if learn_scale:
                self.embed_scale = nn.Parameter(scale)
            else:
                self.register_buffer("embed_scale", scale)
            self.register_parameter(ANCHOR, nn.Parameter(torch.empty(0, device=device)))
        else:
            self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device,
                                                   dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh random rows of mean 0 and variance 1; a padding row of zeros."""
        if not self.packed:
            nn.init.normal_(self.weight)
            self._clear_padding()
            return
        self.qweight.random_(0, 256).bitwise_and_(self._full_row())
        steps = 0.5 ** torch.arange(self.bases, dtype=torch.float64)
        self.embed_scale.copy_((steps / steps.square().sum().sqrt()).expand_as(self.embed_scale))
        self._clear_padding()

    @torch.no_grad()
    def _clear_padding(self) -> None:
        if self.padding_idx is None:
            return
        if self.packed:
            self.qweight[self.padding_idx] = self._full_row()  # +1, so that the row is +0.0
        (self.embed_scale if self.packed else self.weight)[self.padding_idx] = 0

    def _full_row(self) -> torch.Tensor:
        """The bytes of a row of +1: every bit that counts, and no padding bit."""
        row = torch.ones(self.embedding_dim, device=self.qweight.device)
        return bits.pack(row).repeat(self.bases)

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, embeddings: torch.Tensor, freeze: bool = True,
                        padding_idx: int | None = None, **options: Any) -> Self:
        """A layer that holds the closest bases to given rows.

        Args:
            embeddings: (V, D) float, copied; NaN and infinity are refused.
            freeze: keep the table from being trained, as in `nn.Embedding.from_pretrained`.
            padding_idx: a row to be zero.
            options: keyword options of the constructor. `packed=False` keeps the floats as masters.

        Raises:
            InputTypeError: not a float tensor.
            InputError: a wrong rank, or a NaN or infinity.

        Source: alternating multi-bit quantisation, arXiv:1802.00150.

        Example:
            >>> rows = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
            >>> from bincompile.nn import BinaryEmbedding
            >>> BinaryEmbedding.from_pretrained(rows)(torch.tensor([0, 1])).tolist()
            [[2.0, -2.0], [0.5, 0.5]]
        """
        if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
            found = getattr(embeddings, "dtype", type(embeddings).__name__)
            raise InputTypeError(f"from_pretrained of {found}", "a float tensor (V, D)",
                                 "the embeddings argument")
        if embeddings.ndim != 2 or not bool(embeddings.isfinite().all()):
            found = f"shape {tuple(embeddings.shape)}" if embeddings.ndim != 2 else \
                "NaN or infinity in the data"
            raise InputError(f"from_pretrained found {found}", "finite numbers (V, D)",
                             "the embeddings argument")
        options = {"device": embeddings.device, "dtype": embeddings.dtype, **options}
        with torch.random.fork_rng(devices=[]):  # nothing random is kept
            layer = cls(embeddings.shape[0], embeddings.shape[1], padding_idx, **options)
        layer.assign_rows(embeddings)
        return layer.requires_grad_(not arguments.flag(cls.__name__, "freeze", freeze))

    @torch.no_grad()
    def assign_rows(self, rows: torch.Tensor) -> None:
        """Take over rows (V, D): as masters, or the closest bases of each."""
        if not self.packed:
            self.weight.copy_(rows)
        else:
            wide = torch.promote_types(rows.dtype, torch.float32)
            for start in range(0, self.num_embeddings, BLOCK):
                place = slice(start, start + BLOCK)
                signs, scales = bases.fitted(rows[place].to(wide), self.bases)
                self.qweight[place] = bases.join(signs)
                self.embed_scale[place] = scales
        self._clear_padding()

    @torch.no_grad()
    def pack(self) -> Self:
        """A packed layer of the same values; the layer itself where it is packed already.

        Example:
            >>> from bincompile.nn import BinaryEmbedding
            >>> layer, indices = BinaryEmbedding(9, 5, bases=2, packed=False), torch.arange(9)
            >>> torch.equal(layer.pack()(indices), layer(indices))
            True
        """
        if self.packed:
            return self
        with torch.random.fork_rng(devices=[]):
            layer = type(self)(**{**self._options(), "packed": True})
        for start in range(0, self.num_embeddings, BLOCK):
            place = slice(start, start + BLOCK)
            signs, scales = bases.residual(self.weight[place].detach(), self.bases)
            layer.qweight[place] = bases.join(signs)
            layer.embed_scale[place] = self._kept_scales(scales)
        layer._clear_padding()
        return layer.train(self.training).requires_grad_(self.weight.requires_grad)

    def _kept_scales(self, scales: torch.Tensor) -> torch.Tensor:
        return scales

    def _options(self) -> dict[str, Any]:
        stored = self.embed_scale if self.packed else self.weight
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim,
                "padding_idx": self.padding_idx, "bases": self.bases, "packed": self.packed,
                "device": stored.device, "dtype": stored.dtype}

    def row_scale(self) -> torch.Tensor:
        """The scales of a packed table as the operators take them: (V,), or (V, bases)."""
        return self.embed_scale.squeeze(1) if self.bases == 1 else self.embed_scale

    @staticmethod
    def _differentiates(input: torch.Tensor) -> bool:
        """Whether a call has to be open to autograd: not where it is written into a graph."""
        return torch.is_grad_enabled() and not torch.compiler.is_exporting() \
            and not isinstance(input, fx.Proxy)

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of a packed table (..., D) that carry a gradient to it where it isn't frozen."""
        trains = self.embed_scale.requires_grad or self.anchor.requires_grad
        return BinaryEmbeddingForward.apply(indices, self.qweight, self.embed_scale,
                                            self.embedding_dim, trains, self.anchor)

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of rows of the table: hidden @ table.T, the output head tied to it.

        Args:
            hidden: (..., D) float.
            rows: indices (n,) of the rows to score, all if None. Training a packed table on all
                rows makes a gradient of V * D floats; on some rows, of n * D.

        Returns:
            (..., V), or (..., n); 0 for a padding row.

        Example:
            >>> from bincompile.nn import BinaryEmbedding
            >>> table = BinaryEmbedding.from_pretrained(torch.tensor([[2.0, -2.0], [1.0, 1.0]]))
            >>> table.logits(torch.tensor([1.0, 0.5])).tolist()
            [1.0, 1.5]
        """
        if not self.packed:
            weight = self.weight if rows is None else F.embedding(rows, self.weight,
                                                                  self.padding_idx)
            return F.linear(hidden, fake_binary_rows.overload(weight, self.bases))
        if rows is not None or self._differentiates(hidden):
            every = torch.arange(self.num_embeddings, device=self.qweight.device)
            return F.linear(hidden, self.look_up(every if rows is None else rows))
        width = bits.packed_width(self.embedding_dim)
        scores = [binary_linear.overload(hidden, self.qweight[:, base * width:(base + 1) * width],
                                         self.embed_scale[:, base], None, self.embedding_dim,
                                         "float") for base in range(self.bases)]
        return functools.reduce(torch.add, scores)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str,
                            keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + ANCHOR, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local: dict[str, Any],
                              strict: bool, missing: list[str], *rest: Any) -> None:
        theirs, scale = prefix + "scale_w", prefix + "embed_scale"  # of bitorch_engine
        if self.packed and scale not in state_dict and theirs in state_dict:
            state_dict[scale] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, local, strict, missing, *rest)
        if prefix + ANCHOR in missing:
            missing.remove(prefix + ANCHOR)
        self._clear_padding()

    def extra_repr(self) -> str:
        """The sizes, and every option that is not at its default."""
        parts = [f"{self.num_embeddings}, {self.embedding_dim}"]
        parts += [f"padding_idx={self.padding_idx}"] * (self.padding_idx is not None)
        parts += [f"bases={self.bases}"] * (self.bases != 1)
        parts += ["packed=False"] * (not self.packed)
        return ", ".join(parts)


def _row(layer: str, value: object, rows: int) -> int | None:
    """A row from -rows to rows - 1, counted from 0; None stays."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -rows <= value < rows:
        raise ConfigError(f"{layer}(num_embeddings={rows}, padding_idx={value!r})",
                          f"None or an int from {-rows} to {rows - 1}", "the padding_idx argument")
    return value % rows


def _bases(layer: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= bases.MOST:
        raise ConfigError(f"{layer}(bases={value!r})", f"an int from 1 to {bases.MOST}",
                          "the bases argument")
    return value
