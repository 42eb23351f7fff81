"""The fuzzer of streams: random stacks of layers over time, stepped and beside the whole model.

Run a thousand models, from any number on:

    python tests/fuzz_streams.py --models 1000 --start 0 --seed 0

Model i of a seed is always the same. What the steps have to equal is the model itself, run in
float64 on the whole sequence with a band put over its masks, or on the last tokens of each step:
nothing of the compiler's own reference takes part. `--quiet` prints failures alone.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import random
import sys
import traceback

import torch
from stream_blocks import (
    Attention,
    Block,
    Buckets,
    CausalConv,
    E,
    Encoder,
    Selective,
    Sliding,
    TokenShift,
    banded,
    rotary,
    rotary_complex,
    slopes,
)
from torch import nn

import bincompile as bc
from bincompile.errors import ContinualError

LIMIT = 2e-5  # of float32, relative to the largest value
EXTRA = 10  # tokens behind the last wrap


class Gru(nn.GRU):
    """nn.GRU whose answer is its tokens alone."""

    def __init__(self) -> None:
        super().__init__(E, E, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class TimeFirst(nn.Module):
    """A layer that works on (T, B, E)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.transpose(0, 1).flatten(0, 1)
        return self.inner(flat).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


# What a stack is made of; the second half can't be a layer of a model that is re-run on a window.
LAYERS = {
    "encoder": lambda r: Encoder(1, norm_first=r.random() < 0.5,
                                 activation=r.choice(("relu", "gelu"))),
    "attention": lambda r: Block(Attention(sdpa=r.random() < 0.5, groups=r.choice((1, 2)))),
    "rotary": lambda r: Block(Attention(turn=r.choice((rotary, rotary_complex)))),
    "alibi": lambda r: Block(Attention(slopes)),
    "buckets": lambda r: Block(Attention(Buckets())),
    "mlp": lambda r: nn.Sequential(nn.Linear(E, 2 * E), nn.SiLU(), nn.Linear(2 * E, E),
                                   nn.LayerNorm(E)),
    "time first": lambda r: TimeFirst(nn.Sequential(nn.Linear(E, E), nn.Tanh())),
    "band": lambda r: Block(Sliding(r.randint(1, 7))),
    "convolution": lambda r: CausalConv(r.randint(1, 4), r.randint(1, 3), r.choice((1, 4))),
    "shift": lambda r: Block(TokenShift()),
    "gru": lambda r: Gru(),
    "scan": lambda r: Block(Selective()),
}
LOCAL = ("mlp", "time first")
ATTENTIONS = ("encoder", "attention", "rotary", "alibi", "buckets")


@dataclasses.dataclass
class Case:
    """One model and how it is streamed.

    Args:
        names: of its layers.
        model: the layers, float32, in eval mode.
        window: of its attentions; None: all tokens.
        semantics: "banded" or "window".
        length: tokens of the example.
    """

    names: tuple[str, ...]
    model: nn.Module
    window: int | None
    semantics: str
    length: int

    def __str__(self) -> str:
        return f"{self.semantics}({self.window}) of {', '.join(self.names)}"


def case_of(seed: int, number: int) -> Case:
    """Model `number` of a seed."""
    r = random.Random(seed * 1_000_003 + number)
    torch.manual_seed(seed * 1_000_003 + number)
    if r.random() < 0.25:
        names = [r.choice(LOCAL) for _ in range(r.randint(0, 2))]
        names.insert(r.randint(0, len(names)), r.choice(ATTENTIONS))
        semantics, window = "window", r.randint(2, 8)
    else:
        names = [r.choice(tuple(LAYERS)) for _ in range(r.randint(1, 4))]
        semantics, window = "banded", r.choice((None, 1, 2, 3, 5, 8, 40))
    model = nn.Sequential(*(LAYERS[name](r) for name in names)).eval()
    return Case(tuple(names), model, window, semantics, r.randint(4, 12))


def check(case: Case) -> str:
    """"streams", or the reason of the refusal; raises AssertionError where a value is wrong."""
    continual = bc.Continual(window=case.window, semantics=case.semantics)
    try:
        compiled = bc.optimize(case.model, (torch.randn(2, case.length, E),), continual=continual)
    except ContinualError as refused:
        return refused.found
    total = 2 * len(case.names) * (case.window or 0) + EXTRA
    x = torch.randn(3, total, E)
    expected, found = whole(case, x), answers(compiled.stream(3), x)
    scale = float(expected[~expected.isnan()].abs().max())
    assert torch.equal(found.isnan(), expected.isnan()), "answers at other steps"
    worst = float((found - expected).nan_to_num().abs().max()) / scale
    assert worst <= LIMIT, f"error {worst:.2g}"
    return "streams"


def whole(case: Case, x: torch.Tensor) -> torch.Tensor:
    """What every step has to answer, nan where nothing: by the model itself in float64."""
    model, x = copy.deepcopy(case.model).double(), x.double()
    with torch.no_grad():
        if case.semantics == "banded":
            return (model if case.window is None else banded(model, case.window))(x)
        found = torch.full_like(x, torch.nan)
        for end in range(case.window, x.shape[1] + 1):
            found[:, end - 1] = model(x[:, end - case.window:end])[:, -1]
        return found


def answers(stream: bc.Stream, x: torch.Tensor) -> torch.Tensor:
    """The answers of three rows, the last of which is a step behind the others."""
    found = torch.full(x.shape, torch.nan, dtype=torch.float64)
    places, total = [0, 0, 0], x.shape[1]
    for turn in range(total + 1):
        rows = [row for row in (2, 1, 0) if places[row] < total and (row < 2 or turn)]
        result = stream.step(torch.stack([x[row, places[row]] for row in rows]), rows=rows)
        for at, row in enumerate(rows):
            if result is not None:
                found[row, places[row]] = result[at].double()
            places[row] += 1
    return found


def main() -> int:
    """Run models; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seen, failed = collections.Counter[str](), 0
    for number in range(given.start, given.start + given.models):
        case = case_of(given.seed, number)
        try:
            outcome = check(case)
            seen["streams" if outcome == "streams" else "refused"] += 1
            if not given.quiet or outcome != "streams":
                print(f"{number}: {case}: {outcome}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED {number}: {case}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc(limit=-3)
    print(f"{dict(seen)}, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
