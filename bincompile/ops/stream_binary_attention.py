"""Attention of a stream's newest token to keys that a ring remembers as bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bits
from bincompile.ops.binary_attention import DOUBTFUL, LEVELS, VALUES
from bincompile.ops.stream_attention import BLOCK, check_heads, check_ring, distances, seen
from bincompile.ops.ticks import CASES, check_clock, check_state

PROBABILITIES = ("float", "binary", "int8")
WORD = 32  # bits of one word of a key


def words_for(features: int) -> int:
    """The words that hold so many bits.

    Example:
        >>> words_for(64), words_for(65)
        (2, 3)
    """
    return -(-features // WORD)


def negative_words(x: torch.Tensor) -> torch.Tensor:
    """Words of bits (..., D) -> (..., words) int32, least significant first, 1 where negative.

    A nan is negative; bits behind the last feature are 0.
    """
    flags = torch.nn.functional.pad(~(x >= 0), (0, -x.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    places = torch.arange(WORD, device=x.device)
    whole = (flags.long() << places).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int()


def _signs(words: torch.Tensor, features: int, dtype: torch.dtype) -> torch.Tensor:
    """Words (..., words) as +1 and -1 (..., features)."""
    flags = (words[..., None] >> torch.arange(WORD, device=words.device)) & 1
    return 1 - 2 * flags.flatten(-2)[..., :features].to(dtype)


def _shown(value: torch.Tensor, values: str) -> torch.Tensor:
    return value if values == "float" else (bits.sign(value) * bits.row_scale(value)).to(
        value.dtype)


def _powers(query, key, key_bits, key_scales, rows, clock, scale, window, rate, delay):
    """The powers (M, H, slots) of the scores, 0 where a token is not seen; writes the new key."""
    (m, heads, features), slots = query.shape, key_bits.shape[2] * BLOCK
    index, distance = distances(rows, clock, slots, rate, delay)
    visible, slot = seen(index, distance, window), index % slots
    key_bits[rows, :, slot // BLOCK, :, slot % BLOCK] = negative_words(key)
    key_scales[rows, :, slot // BLOCK, slot % BLOCK] = bits.row_scale(key)[..., 0].to(
        key_scales.dtype)
    held = _signs(key_bits[rows].transpose(3, 4), features, key_scales.dtype)
    products = bits.sign(query).to(held.dtype)[:, :, None] @ held.reshape(
        m, heads, slots, features).mT
    sizes = key_scales[rows].reshape(m, heads, 1, slots)
    scores = (products * (bits.row_scale(query)[:, :, None] * scale) * sizes)[:, :, 0]
    scores = torch.where(visible[:, None], scores, -math.inf)
    top = scores.amax(-1, keepdim=True)
    return (scores - torch.where(top == -math.inf, 0.0, top)).exp(), visible, slot


def _counted(powers, probabilities, threshold):
    if probabilities == "int8":
        return (powers * LEVELS["int8"]).round()
    if probabilities == "binary":
        kept = (powers >= threshold.to(powers.dtype).clamp(max=1.0)[:, None]) & (powers > 0)
        return torch.where(powers.isnan(), powers, kept.to(powers.dtype))
    return powers


def _reference(query, key, value, key_bits, key_scales, held, rows, clock, threshold, scale,
               window=None, rate=1, delay=0, probabilities="float", values="float"):
    """(c / sum(c)) @ v over the last `window` tokens of each row, as `binary_attention` has it.

    query, key (M, H, D) and value (M, H, E). The ring: key_bits (N, H, slots / 16, words, 16)
    int32, a bit for each feature that is 1 where it is negative; key_scales (N, H, slots / 16, 16),
    the mean |k| of each; held (N, H, slots, E), the values, or with values="binary" their signs
    times their mean. The rest is as in `stream_attention`; c, threshold (H), probabilities and
    values are as in `binary_attention`, "uint8" excepted. A token of an index below 0 gives zeros.
    """
    powers, visible, slot = _powers(query, key, key_bits, key_scales, rows, clock, scale, window,
                                    rate, delay)
    held[rows, :, slot] = _shown(value, values)
    counts = _counted(powers, probabilities, threshold)
    total = counts.sum(-1, keepdim=True)
    weights = torch.where(total == 0, 0.0, counts / total)
    shown = torch.where(visible[:, None, :, None], held[rows], 0.0)
    return (weights[:, :, None] @ shown.to(weights.dtype))[:, :, 0].to(value.dtype)


def _shape(query, key, value, *rest: Any, **named: Any):
    return value.new_empty((*query.shape[:2], value.shape[2]))


def _check(query, key, value, key_bits, key_scales, held, rows, clock, threshold, scale,
           window=None, rate=1, delay=0, probabilities="float", values="float"):
    check_clock(rows, clock, rate, delay)
    check_heads(query, key, value, rows)
    heads, slots = query.shape[1], held.shape[2] if held.ndim == 4 else 0
    if key.shape[1] != heads:
        raise InputError(f"{heads} heads of the query, {key.shape[1]} of the key", "as many",
                         "the heads")
    wide = torch.promote_types(query.dtype, torch.float32)
    check_state("held", held, clock, (heads, None, value.shape[2]), value.dtype)
    check_ring(window, slots)
    tiles = slots // BLOCK
    check_state("key_bits", key_bits, clock, (heads, tiles, words_for(query.shape[2]), BLOCK),
                torch.int32)
    check_state("key_scales", key_scales, clock, (heads, tiles, BLOCK), wide)
    for name, found, allowed in (("probabilities", probabilities, PROBABILITIES),
                                 ("values", values, VALUES)):
        if found not in allowed:
            raise InputError(f"{name}={found!r}", " or ".join(map(repr, allowed)),
                             f"the {name} argument")
    given = None if threshold is None else tuple(threshold.shape)
    if given != ((heads,) if probabilities == "binary" else None):
        raise InputError(f"threshold of shape {given} with probabilities={probabilities!r}",
                         f"({heads},) with 'binary', and None otherwise", "the threshold")


def _doubtful_rows(bound: Mapping[str, Any]) -> torch.Tensor | None:
    """Rows with a probability that other rounding before it may take to the next level."""
    kind = bound["probabilities"]
    if kind == "float":
        return None
    names = ("query", "key", "key_bits", "key_scales", "rows", "clock", "scale", "window", "rate",
             "delay")
    states = {name: bound[name].clone() for name in ("key_bits", "key_scales")}
    powers = _powers(**{name: bound[name] for name in names} | states)[0]
    if kind == "binary":
        limit = bound["threshold"].to(powers.dtype).clamp(max=1.0)[:, None]
        return (((powers - limit).abs() < DOUBTFUL) & (powers < 1)).any(-1).flatten()
    levels = powers * LEVELS["int8"]
    return ((levels - levels.floor() - 0.5).abs() < DOUBTFUL).any(-1).flatten()


FORMS = ((2, 8, 4, 5, 16), (1, 33, 17, 16, 16), (3, 64, 16, 40, 48))  # H, D, E, window, slots


def _arguments(form: tuple[int, ...], case: Any, generator: torch.Generator) -> tuple[Any, ...]:
    """Tokens and a ring that holds tokens already."""
    heads, features, width, _, slots = form
    m, n = case.rows.shape[0], case.clock.shape[0]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    old = normal(n, heads, slots // BLOCK, BLOCK, features)
    return (normal(m, heads, features), normal(m, heads, features), normal(m, heads, width),
            negative_words(old).transpose(3, 4).contiguous(), bits.row_scale(old)[..., 0],
            normal(n, heads, slots, width), case.rows, case.clock)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    kinds = (("float", "float"), ("int8", "float"), ("binary", "binary"))
    for number, (kind, values) in enumerate(kinds):
        form = FORMS[number]
        limit = torch.rand(form[0], generator=generator) if kind == "binary" else None
        for case in CASES[number % 2::2]:
            yield Sample((*_arguments(form, case, generator), limit, 0.4, form[3]),
                         {**case.timing, "probabilities": kind, "values": values})
    form = FORMS[2]
    given = _arguments(form, CASES[1], generator)
    yield Sample((*given, None, 0.4, None))
    query = given[0].clone()
    query[0, 0, 5] = math.nan
    yield Sample((query, *given[1:], None, 0.4, 30))
    yield Sample((*(t.double() if t.is_floating_point() else t for t in given), None, 0.4, 30))
    joined = torch.randn(2, 3 * (64 + 64 + 16), generator=generator)
    views = [joined[:, :192], joined[:, 192:384], joined[:, 384:]]
    yield Sample((*(v.unflatten(1, (3, -1)) for v in views), *given[3:], None, 0.4, 30))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    good = (*_arguments(FORMS[0], CASES[1], generator), None, 1.0, 5)

    def but(place: int, value: Any, error: str, **named: Any) -> Sample:
        changed = [*good]
        changed[place] = value
        return Sample(tuple(changed), named, error=error)

    yield but(6, torch.tensor([2, 9]), "row 9")
    yield but(1, good[1][:, :1], "heads")
    yield but(3, good[3].long(), "key_bits of dtype")
    yield but(3, good[3][:, :, :, :, :8], "key_bits of shape")
    yield but(4, good[4][:, :1], "key_scales")
    yield but(5, good[5][:, :, :9], "9 slots")
    yield but(10, 17, "window")
    yield but(8, torch.ones(2), "threshold")
    yield but(9, 1.0, "threshold", probabilities="binary")
    yield but(9, 1.0, "uint8", probabilities="uint8")
    yield but(9, 1.0, "ternary", values="ternary")


stream_binary_attention = Operator(
    name="stream_binary_attention",
    schema="(Tensor query, Tensor key, Tensor value, Tensor(a!) key_bits, Tensor(b!) key_scales, "
           "Tensor(c!) held, Tensor rows, Tensor clock, Tensor? threshold, float scale, "
           "int? window=None, int rate=1, int delay=0, str probabilities='float', "
           "str values='float') -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    signs_of=lambda bound: [bound["query"], bound["key"]],
    doubtful_rows=_doubtful_rows,
    tolerance=Tolerance(rtol=2e-5, atol=2e-5),
    source="1-bit query and key: BinaryAttention, arXiv:2603.09582, for one query over a ring: "
           "arXiv:2201.06268",
)
