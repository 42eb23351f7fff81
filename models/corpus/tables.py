"""Tables: every way to read rows of one, and the recommender models that do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from bincompile.models.corpus import Call
from bincompile.models.corpus.parts import cases_of, ids
from bincompile.models.corpus.written_projections import attend

ROWS, COLUMNS = 30, 16


class Table(nn.Module):
    """A stored table that `read(table, ids)` reads in its own way."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], stored: bool = True) -> None:
        super().__init__()
        self.read = read
        table = torch.randn(ROWS, COLUMNS)
        if stored:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, found: Tensor) -> Tensor:
        return self.read(self.table, found) * 2.0


def _indexed(table: Tensor, found: Tensor) -> Tensor:
    return table[found]


def _selected(table: Tensor, found: Tensor) -> Tensor:
    return table.index_select(0, found.flatten()).view(*found.shape, COLUMNS)


def _gathered(table: Tensor, found: Tensor) -> Tensor:
    index = found.flatten()[:, None].expand(-1, COLUMNS)
    return torch.gather(table, 0, index).view(*found.shape, COLUMNS)


def _one_hot(table: Tensor, found: Tensor) -> Tensor:
    return functional.one_hot(found, ROWS).float() @ table


def _compared(table: Tensor, found: Tensor) -> Tensor:
    return (found[..., None] == torch.arange(ROWS)).to(table.dtype) @ table


def _functional(table: Tensor, found: Tensor) -> Tensor:
    return functional.embedding(found, table, padding_idx=1)


def _taken(table: Tensor, found: Tensor) -> Tensor:
    return torch.einsum("bnr,rc->bnc", functional.one_hot(found, ROWS).to(table.dtype), table)


class Twice(nn.Module):
    """Two fields share one table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, COLUMNS)

    def forward(self, found: Tensor) -> Tensor:
        return (self.table(found[:, :1]) * self.table(found[:, 1:])).sum(-1)


class Tied(nn.Module):
    """A language model's table is its head too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, COLUMNS)
        self.mix = nn.Linear(COLUMNS, COLUMNS)

    def forward(self, found: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.mix(self.table(found))), self.table.weight)


class SkipGram(nn.Module):
    """word2vec: centre, contexts and negatives from two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.centre, self.context = nn.Embedding(ROWS, COLUMNS), nn.Embedding(ROWS, COLUMNS)

    def forward(self, words: Tensor, others: Tensor) -> Tensor:
        return torch.bmm(self.context(others), self.centre(words).unsqueeze(2)).squeeze(2)


class FastText(nn.Module):
    """A bag of n-grams and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.classify = nn.EmbeddingBag(ROWS, COLUMNS, mode="mean"), nn.Linear(16, 4)

    def forward(self, text: Tensor, starts: Tensor) -> Tensor:
        return self.classify(self.bag(text, starts)).log_softmax(-1)


class Collaborative(nn.Module):
    """NCF: a product and a network over two pairs of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, 8) for _ in range(4))
        self.deep, self.top = nn.Linear(16, 8), nn.Linear(16, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        user_wide, item_wide, user_deep, item_deep = self.tables
        deep = torch.relu(self.deep(torch.cat((user_deep(user), item_deep(item)), -1)))
        return self.top(torch.cat((user_wide(user) * item_wide(item), deep), -1)).squeeze(-1)


class TwoTowers(nn.Module):
    """Users are bags of what they saw, items rows; every user meets every item."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.EmbeddingBag(ROWS, COLUMNS, mode="sum", padding_idx=0)
        self.items, self.user = nn.Embedding(ROWS, COLUMNS), nn.Linear(COLUMNS, COLUMNS)

    def forward(self, seen: Tensor, item: Tensor) -> Tensor:
        user = functional.normalize(self.user(self.seen(seen)), dim=-1)
        return user @ functional.normalize(self.items(item), dim=-1).T


class Ranking(nn.Module):
    """DLRM: a bag for each field, products of all pairs below the diagonal."""

    def __init__(self, fields: int = 3) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(ROWS, 8, mode="sum") for _ in range(fields))
        self.bottom, self.top = nn.Linear(5, 8), nn.Linear(8 + 6, 1)

    def forward(self, dense: Tensor, fields: list[Tensor]) -> Tensor:
        base = torch.relu(self.bottom(dense))
        rows = torch.stack([base, *(bag(f) for bag, f in zip(self.bags, fields, strict=True))], 1)
        row, column = torch.tril_indices(rows.shape[1], rows.shape[1], -1)
        pairs = torch.bmm(rows, rows.mT)[:, row, column]
        return torch.sigmoid(self.top(torch.cat((base, pairs), 1)))


class Factorisation(nn.Module):
    """A factorisation machine: all fields in one table, by offsets."""

    starts: Tensor

    def __init__(self, fields: int = 3) -> None:
        super().__init__()
        self.rows, self.weights = nn.Embedding(ROWS * fields, 8), nn.Embedding(ROWS * fields, 1)
        self.register_buffer("starts", torch.arange(fields) * ROWS)

    def forward(self, found: Tensor) -> Tensor:
        x = self.rows(found + self.starts)
        pairs = (x.sum(1).square() - x.square().sum(1)).sum(-1) / 2
        return torch.sigmoid(self.weights(found + self.starts).sum((1, 2)) + pairs)


class Interest(nn.Module):
    """DIN: a network scores each item of the history against the candidate; no product."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ROWS, 8, padding_idx=0)
        self.score = nn.Sequential(nn.Linear(32, 8), nn.Sigmoid(), nn.Linear(8, 1))

    def forward(self, history: Tensor, candidate: Tensor) -> Tensor:
        past, now = self.items(history), self.items(candidate)[:, None].expand(
            -1, history.shape[1], -1)
        scores = self.score(torch.cat((past, now, past - now, past * now), -1)).mT
        weights = scores.masked_fill((history == 0)[:, None], -1e9).softmax(-1)
        return (weights @ past).squeeze(1)


class Sequential(nn.Module):
    """SASRec: items and positions, causal blocks, scores of all items by the same table."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.items = nn.Embedding(ROWS, COLUMNS, padding_idx=0)
        self.places = nn.Embedding(20, COLUMNS)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(COLUMNS, 2) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(COLUMNS) for _ in range(layers))

    def forward(self, history: Tensor) -> Tensor:
        n = history.shape[1]
        x = self.items(history) * COLUMNS ** 0.5 + self.places(torch.arange(n))
        hidden = ~torch.ones(n, n, dtype=torch.bool).tril()
        for norm, block in zip(self.norms, self.blocks, strict=True):
            y = x.transpose(0, 1)
            x = x + block(norm(y), y, y, attn_mask=hidden)[0].transpose(0, 1)
        return x @ self.items.weight.T


class FieldAttention(nn.Module):
    """AutoInt: fields attend to each other, without a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, COLUMNS)
        self.query, self.key, self.value, self.rest = (
            nn.Parameter(torch.randn(COLUMNS, COLUMNS) * 0.3) for _ in range(4))

    def forward(self, found: Tensor) -> Tensor:
        x = self.rows(found)
        q, k, v = (torch.stack(torch.split(torch.tensordot(x, w, dims=([-1], [0])), 8, dim=2))
                   for w in (self.query, self.key, self.value))
        weights = torch.einsum("hbik,hbjk->hbij", q, k).softmax(-1)
        heads = torch.split(torch.matmul(weights, v), 1)
        out = torch.cat(heads, dim=-1).squeeze(0)
        return torch.relu(out + torch.tensordot(x, self.rest, dims=([-1], [0])))


class Target(nn.Module):
    """A candidate attends to the history, BST-like, with one head."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.project = nn.Embedding(ROWS, COLUMNS), nn.Linear(COLUMNS, 3 * COLUMNS)

    def forward(self, history: Tensor, candidate: Tensor) -> Tensor:
        x = self.items(torch.cat((history, candidate[:, None]), 1))
        return attend(*self.project(x).chunk(3, -1)).mean(1)


class Quotients(nn.Module):
    """The QR trick: two small tables stand for a large one."""

    def __init__(self, parts: int = 7) -> None:
        super().__init__()
        self.parts = parts
        self.high, self.low = nn.Embedding(ROWS // parts + 1, 8), nn.Embedding(parts, 8)

    def forward(self, found: Tensor) -> Tensor:
        high = torch.div(found, self.parts, rounding_mode="floor")
        return self.high(high) * self.low(found % self.parts)


class Hashed(nn.Module):
    """Several hashes of an id, each with a row of one table; learned weights sum them."""

    factors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weights = nn.Embedding(ROWS, 8), nn.Embedding(ROWS, 2)
        self.register_buffer("factors", torch.tensor([31, 57]))

    def forward(self, found: Tensor) -> Tensor:
        rows = self.table((found[..., None] * self.factors + 7) % ROWS)
        return (rows * self.weights(found)[..., None]).sum(-2)


class Weighted(nn.Module):
    """A bag with a weight for each id, and offsets that include the last."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, 8, mode="sum", include_last_offset=True)

    def forward(self, found: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
        return self.bag(found, starts, per_sample_weights=weights)


def _found(batch: int, length: int) -> Call:
    return (ids(ROWS, batch, length),), {}


def _fields(batch: int, length: int) -> Call:
    return (ids(ROWS, batch, 3),), {}


def _pair(batch: int, length: int) -> Call:
    return (ids(ROWS, batch), ids(ROWS, batch)), {}


def _row_and_rows(batch: int, length: int) -> Call:
    return (ids(ROWS, batch), ids(ROWS, batch, length)), {}


def _rows_and_row(batch: int, length: int) -> Call:
    return (ids(ROWS - 1, batch, length) + 1, ids(ROWS, batch)), {}


def _bags(batch: int, length: int) -> Call:
    return (ids(ROWS, batch * length), torch.arange(batch) * length), {}


def _weighted(batch: int, length: int) -> Call:
    starts = torch.arange(batch + 1) * length
    return (ids(ROWS, batch * length), starts, torch.rand(batch * length)), {}


def _dense_and_fields(batch: int, length: int) -> Call:
    return (torch.randn(batch, 5), [ids(ROWS, batch, size) for size in (length, 2, 3)]), {}


CASES = (
    *cases_of("tables", (
        ("read/index", partial(Table, _indexed)),
        ("read/index-select", partial(Table, _selected)),
        ("read/gather", partial(Table, _gathered)),
        ("read/functional", partial(Table, _functional)),
        ("read/buffer", partial(Table, _indexed, stored=False)),
        ("read/padding-row", partial(nn.Embedding, ROWS, COLUMNS, padding_idx=2)),
        ("one-hot/product", partial(Table, _one_hot)),
        ("one-hot/compared", partial(Table, _compared)),
        ("one-hot/einsum", partial(Table, _taken)),
        ("bags/max", partial(nn.EmbeddingBag, ROWS, COLUMNS, mode="max")),
        ("shared/tied-head", Tied),
    ), _found, look_ups=1),
    *cases_of("tables", (
        ("shared/twice", Twice), ("hashing/quotients", Quotients), ("hashing/hashes", Hashed),
    ), _found, look_ups=2),
    *cases_of("tables", (("bags/fasttext", FastText),), _bags, look_ups=1),
    *cases_of("tables", (("bags/weighted", Weighted),), _weighted, look_ups=1),
    *cases_of("tables", (("words/word2vec", SkipGram),), _row_and_rows, look_ups=2),
    *cases_of("tables", (("pairs/ncf", Collaborative),), _pair, look_ups=4),
    *cases_of("tables", (("pairs/two-towers", TwoTowers),), _rows_and_row, look_ups=2),
    *cases_of("tables", (("fields/dlrm", Ranking),), _dense_and_fields, look_ups=3,
              sizes=((2, 7), (3, 11), (4, 4))),  # a batch of 1 needs a capture of its own
    *cases_of("tables", (("fields/factorisation", Factorisation),), _fields, look_ups=2),
    *cases_of("tables", (("fields/autoint", FieldAttention),), _fields, attention=1, look_ups=1),
    *cases_of("tables", (("history/din", Interest),), _rows_and_row, look_ups=2),
    *cases_of("tables", (("history/target", Target),), _rows_and_row, attention=1, look_ups=1),
    *cases_of("tables", (("history/sasrec", Sequential),), _found, attention=2, look_ups=2),
)
