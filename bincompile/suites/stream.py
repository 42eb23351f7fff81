"""Suite `stream`: a step of a stream against the window computed anew and continual-inference.

The candidates of a row are of one process and the same rounds. Streams are full when they are
timed: every key and value that a window has is in its ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bincompile.api import optimize
from bincompile.config import Continual
from bincompile.suites import stream_errors, stream_models
from bincompile.suites.peers import continual_attention, window_attention
from bincompile.suites.rows import OURS, PRODUCTS, READ, Case, Row, row, times_of
from bincompile.suites.stream_parts import (
    FLOAT,
    FORMS,
    SelfAttention,
    Streams,
    full,
    least,
    products,
)

SHAPES = ((512, 8, 64), (768, 12, 128))  # features, heads, tokens of the window
BATCH, SINGLES = 16, "single steps"
LONGER = (512, 8, 64, 1024)  # features, heads, and the two windows
TINY = (16, 2, 4)
FLOOR, EXCESS, MICROSECONDS = "step of a tiny model", "over_reads", "us"


def cases() -> list[Case]:
    """Attention steps, batches, a longer window, the floor, whole models, and errors."""
    return [*(Case(attention_name(*shape), partial(_attention, *shape)) for shape in SHAPES),
            *(Case(batch_name(*shape), partial(_batch, *shape)) for shape in SHAPES),
            Case(longer_name(), _longer), Case(FLOOR, _floor), *stream_models.cases(),
            *stream_errors.cases()]


def attention_name(width: int, heads: int, tokens: int) -> str:
    """The case of one attention step."""
    return f"attention step {width}, {heads} heads, {tokens} tokens"


def batch_name(width: int, heads: int, tokens: int) -> str:
    """The case of a batch of streams."""
    return f"{BATCH} streams, {width}, {heads} heads, {tokens} tokens"


def longer_name() -> str:
    """The case of the longer window."""
    width, heads, short, long = LONGER
    return f"longer window {width}, {heads} heads, {long} less {short} tokens"


def _streams(width: int, heads: int, tokens: int) -> tuple[SelfAttention, torch.Tensor, Streams]:
    """An attention layer, a window, and full streams."""
    model, x = SelfAttention(width, heads).eval(), torch.randn(1, tokens, width)
    return model, x, Streams(model, x, Continual(tokens), FORMS)


def _attention(width: int, heads: int, tokens: int) -> Iterator[Row]:
    model, x, streams = _streams(width, heads, tokens)
    layer = model.attention
    bare = products([(layer.in_proj_weight, layer.in_proj_bias), layer.out_proj])
    times = times_of(streams.candidates | bare | window_attention(layer, x)
                     | continual_attention(layer, x))
    yield from streams.rows(attention_name(width, heads, tokens), least(times, PRODUCTS, bare),
                            of_float=[PRODUCTS])


def _batch(width: int, heads: int, tokens: int) -> Iterator[Row]:
    """A step of a batch against as many streams of one row, each with a state of its own."""
    model, x = SelfAttention(width, heads).eval(), torch.randn(BATCH, tokens, width)
    token = x[:, -1].contiguous()
    for form, options in FORMS.items():
        compiled = optimize(model, (x,), continual=Continual(tokens), **options)
        singles = [(full(compiled, own).step, own[:, -1].contiguous()) for own in x.split(1)]
        times = times_of({OURS: partial(full(compiled, x).step, token),
                          SINGLES: partial(_run_all, singles)})
        yield row(f"{batch_name(width, heads, tokens)}, {form}", times,
                  values={"steps_per_s": 1e3 * BATCH / times[OURS]})


def _run_all(calls: Sequence[tuple[Callable[..., Any], torch.Tensor]]) -> None:
    for call, token in calls:
        call(token)


def _longer() -> Iterator[Row]:
    """What more keys and values cost, over reading as many bytes in the fastest way there is."""
    width, heads, *lengths = LONGER
    short, long = lengths
    streams = {length: _streams(width, heads, length)[2] for length in lengths}
    added = torch.randn(2 * (long - short), width)
    reads: dict[str, Callable[[], Any]] = {
        f"{READ}, sum": added.sum, f"{READ}, dot": partial(torch.dot, *added.view(2, -1)),
        f"{READ}, mv": partial(torch.mv, added, torch.randn(width))}
    steps = {f"{form}, {length}": call for length, found in streams.items()
             for form, call in found.candidates.items()}
    times = least(times_of(steps | reads), READ, reads)
    for form in FORMS:
        fewer, more = (times[f"{form}, {length}"] for length in lengths)
        yield row(f"{longer_name()}, {form}", {OURS: more, f"{short} tokens": fewer,
                                               READ: times[READ]},
                  values={EXCESS: (more - fewer) / times[READ],
                          "read_gigabytes": added.nbytes / times[READ] / 1e6}) | {"speedup": {}}


def _floor() -> Iterator[Row]:
    """A step of a model that has next to nothing to do: the call itself, in microseconds."""
    width, heads, tokens = TINY
    model, x = SelfAttention(width, heads).eval(), torch.randn(1, tokens, width)
    streams = Streams(model, x, Continual(tokens), {FLOAT: {}})
    times = times_of({OURS: streams.candidates[FLOAT], **continual_attention(model.attention, x)})
    yield row(FLOOR, times, values={MICROSECONDS: 1e3 * times[OURS]})
