"""Suite `embedding`: look-ups and bags of 1-bit tables against torch's float ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from bincompile.api import optimize
from bincompile.nn import BinaryEmbedding, BinaryEmbeddingBag
from bincompile.suites import limits
from bincompile.suites.rows import EAGER, INT8, OURS, Case, Row, timed

WIDTH, TABLES = 768, (50_000, 1_000_000)
LOOK_UPS = (512, 8192)
BAGS, BAG = 1024, 32
MODES = ("sum", "mean", "weighted sum", "majority")
BYTES = "table_share"


def cases() -> list[Case]:
    """Look-ups of each table, bags of the smaller one."""
    found = [Case(f"look-up of {count} in {table}", partial(_look_up, table, count))
             for table in TABLES for count in LOOK_UPS]
    return found + [Case(f"{mode} of {BAG}, {BAGS} bags", partial(_bag, mode)) for mode in MODES]


def _float(table: int) -> torch.Tensor:
    return torch.empty(table, WIDTH).uniform_(-1.0, 1.0)


def _in_bytes(table: torch.Tensor, x: torch.Tensor,
              offsets: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """torch's sum of bags over a table of 8 bits a number; bags of one row are look-ups."""
    packed = torch.ops.quantized.embedding_bag_byte_prepack(table)
    return {INT8: partial(torch.ops.quantized.embedding_bag_byte_rowwise_offsets, packed,
                          x.reshape(-1), offsets)}


def _look_up(table: int, count: int) -> Iterator[Row]:
    """The limit is a copy of the result: memory that is written once and was read somewhere."""
    x, binary = torch.randint(table, (count,)), BinaryEmbedding(table, WIDTH).eval()
    plain = nn.Embedding.from_pretrained(_float(table))
    compiled = optimize(binary, (x,), choices={})
    yield timed(f"look-up of {count} in {table} x {WIDTH}",
                {OURS: partial(compiled, x), EAGER: partial(plain, x),
                 **_in_bytes(plain.weight, x, torch.arange(count)),
                 **limits.copying(4 * count * WIDTH)},
                {BYTES: compiled.nbytes / plain.weight.nbytes})


class _Weighted(nn.Module):
    """A bag whose entries have weights."""

    def __init__(self, bag: nn.Module) -> None:
        super().__init__()
        self.bag = bag

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.bag(x, per_sample_weights=weights)


def _bag(mode: str) -> Iterator[Row]:
    """The majority, which torch does not have, is compared with its mean."""
    table, weighted = TABLES[0], mode == "weighted sum"
    inputs = (torch.randint(table, (BAGS, BAG)), *([torch.rand(BAGS, BAG)] if weighted else []))
    name = mode.removeprefix("weighted ")
    binary: nn.Module = BinaryEmbeddingBag(table, WIDTH, mode=name)
    weight = _float(table)
    plain: nn.Module = nn.EmbeddingBag.from_pretrained(
        weight, mode="mean" if mode == "majority" else name)
    if weighted:
        binary, plain = _Weighted(binary), _Weighted(plain)
    bytewise = _in_bytes(weight, inputs[0], torch.arange(0, BAGS * BAG, BAG)) \
        if mode == "sum" else {}
    compiled = optimize(binary.eval(), inputs, choices={})
    yield timed(f"{mode} of {BAG}, {BAGS} bags of {table} x {WIDTH}",
                {OURS: partial(compiled, *inputs), EAGER: partial(plain.eval(), *inputs),
                 **bytewise})
