"""Attention of a stream's newest token to the ones before it, which a ring remembers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from bincompile.errors import InputError, InputTypeError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops.ticks import CASES, check_clock, check_state, index_of

BLOCK = 16  # slots whose keys lie side by side, feature by feature


def slots_for(window: int) -> int:
    """The slots of a ring for so many tokens: the next multiple of `BLOCK`.

    Example:
        >>> slots_for(64), slots_for(65)
        (64, 80)
    """
    return -(-max(window, 1) // BLOCK) * BLOCK


def distances(rows: torch.Tensor, clock: torch.Tensor, slots: int, rate: int,
              delay: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The index (M,) of each row's token, and how far behind it each slot (M, slots) is."""
    index = index_of(rows, clock, rate, delay)
    return index, (index[:, None] - torch.arange(slots, device=rows.device)) % slots


def seen(index: torch.Tensor, distance: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which slots (M, slots) a token sees, itself among them.

    Raises:
        InputError: without a window, when the ring has no slot left.
    """
    slots = distance.shape[1]
    if window is None and bool((index >= slots).any()):
        raise InputError(f"token {int(index.max())} of a ring of {slots} slots, all of them seen",
                         f"tokens 0 to {slots - 1}", "the ring: it has to grow before it is full")
    count = (index + 1).clamp(0, window)
    return distance < count[:, None]


def _reference(query, key, value, keys, values, rows, clock, scale, window=None, rate=1, delay=0,
               softcap=None, sink=None, extra_keys=None, extra_values=None, distance_bias=None,
               slopes=None):
    """softmax(query @ keys^T * scale + ...) @ values over the last `window` tokens of each row.

    query (M, H, D), key (M, G, D), value (M, G, E), of which each of the G heads serves H / G
    heads of the query in turn; keys (N, G, slots / 16, D, 16) and values (N, G, slots, E), of at
    least `window` slots, which the new key and value are written into; None: all slots, and an
    error when there is none left. rows (M,) has each row at most once; clock (N,) says how many
    steps each has taken: its token has the index n = ceil((clock - delay) / rate), in the slot
    n % slots. A token of an index below 0 sees nothing, and gives zeros. The rest, in the order in
    which it takes effect:

    extra_keys (G, X, D) and extra_values (G, X, E): more of them, that every token sees.
    softcap c: c * tanh(scores / c). distance_bias (H or 1, L): distance_bias[h, min(d, L - 1)] is
    added to the score of the token d before. slopes (H,): slopes[h] * d is taken from it.
    sink (H,): one more score, that takes probability but has no value.
    """
    (m, h, _), (_, g, d), slots, e = query.shape, key.shape, values.shape[2], value.shape[2]
    index, distance = distances(rows, clock, slots, rate, delay)
    visible = seen(index, distance, window)
    slot = index % slots
    keys[rows, :, slot // BLOCK, :, slot % BLOCK] = key
    values[rows, :, slot] = value
    held = keys[rows].transpose(3, 4).reshape(m, g, slots, d)
    shown = torch.where(visible[:, None, :, None], values[rows], 0.0)
    if extra_keys is not None:
        held = torch.cat([held, extra_keys.expand(m, *extra_keys.shape)], 2)
        shown = torch.cat([shown, extra_values.expand(m, *extra_values.shape)], 2)
    scores = (query.reshape(m, g, h // g, d) @ held.mT * scale).reshape(m, h, held.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    own = scores[..., :slots]
    if distance_bias is not None:
        own = own + distance_bias[:, distance.clamp(max=distance_bias.shape[1] - 1)].transpose(0, 1)
    if slopes is not None:
        own = own - slopes[:, None] * distance[:, None].to(slopes.dtype)
    scores = torch.cat([torch.where(visible[:, None], own, -math.inf), scores[..., slots:]], 2)
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype)[:, None].expand(m, h, 1)], 2)
    weights = torch.softmax(scores, -1)[..., :shown.shape[2]].to(value.dtype)
    weights = torch.where((index < 0)[:, None, None], 0.0, weights)
    return (weights.reshape(m, g, h // g, shown.shape[2]) @ shown).reshape(m, h, e)


def _shape(query, key, value, *rest: Any, **named: Any):
    return value.new_empty((*query.shape[:2], value.shape[2]))


def check_ring(window: int | None, slots: int) -> None:
    """Raise unless so many slots are a ring for this window."""
    if window is not None and window < 1:
        raise InputError(f"window={window}", "at least 1, or None for all slots", "the window")
    if slots < 1 or slots % BLOCK or slots < (window or 0):
        raise InputError(f"a ring of {slots} slots", f"a multiple of {BLOCK}, at least the window"
                         f"{'' if window is None else f' of {window}'}", "the ring")


def check_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                rows: torch.Tensor) -> None:
    """Raise unless query (M, H, D), key (M, G, D) and value (M, G, E) fit each other."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 3 or x.shape[0] != rows.shape[0]:
            raise InputError(f"{name} of shape {tuple(x.shape)}",
                             f"({rows.shape[0]}, heads, features), one for each row", f"the {name}")
        if not x.dtype.is_floating_point or x.dtype != query.dtype:
            raise InputTypeError(f"{name} of dtype {x.dtype}", "one float dtype for all three",
                                 f"the {name}")
    if query.shape[2] != key.shape[2]:
        raise InputError(f"query with {query.shape[2]} features, key with {key.shape[2]}",
                         "the same number of features", "the query or the key")
    if key.shape[1] != value.shape[1] or key.shape[1] < 1 or query.shape[1] % key.shape[1]:
        raise InputError(f"{query.shape[1]} heads of the query, {key.shape[1]} of the key, "
                         f"{value.shape[1]} of the value",
                         "as many of key and value, and a multiple of it of the query", "the heads")


def check_facets(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 softcap: float | None, sink: Any, extra_keys: Any, extra_values: Any,
                 distance_bias: Any, slopes: Any) -> None:
    """Raise unless the facets have the shapes that they need."""
    heads, (groups, features) = query.shape[1], key.shape[1:]
    if softcap is not None and not (softcap != 0 and math.isfinite(softcap)):
        raise InputError(f"softcap={softcap}", "a finite number that is not 0, or None",
                         "the softcap argument")
    if (extra_keys is None) != (extra_values is None):
        raise InputError("one of extra_keys and extra_values", "both or neither",
                         "the other one of them")
    extras = 0 if extra_keys is None or extra_keys.ndim != 3 else extra_keys.shape[1]
    lengths = 1 if distance_bias is None or distance_bias.ndim != 2 else distance_bias.shape[1]
    spread = 1 if distance_bias is not None and distance_bias.shape[0] == 1 else heads
    for name, given, wanted in (
            ("sink", sink, (heads,)), ("slopes", slopes, (heads,)),
            ("extra_keys", extra_keys, (groups, extras, features)),
            ("extra_values", extra_values, (groups, extras, value.shape[2])),
            ("distance_bias", distance_bias, (spread, max(lengths, 1)))):
        if given is not None and tuple(given.shape) != wanted:
            raise InputError(f"{name} of shape {tuple(given.shape)}", str(wanted), f"the {name}")


def _check(query, key, value, keys, values, rows, clock, scale, window=None, rate=1, delay=0,
           softcap=None, sink=None, extra_keys=None, extra_values=None, distance_bias=None,
           slopes=None):
    check_clock(rows, clock, rate, delay)
    check_heads(query, key, value, rows)
    groups, slots = key.shape[1], values.shape[2] if values.ndim == 4 else 0
    check_state("values", values, clock, (groups, None, value.shape[2]), value.dtype)
    check_ring(window, slots)
    check_state("keys", keys, clock, (groups, slots // BLOCK, key.shape[2], BLOCK), key.dtype)
    check_facets(query, key, value, softcap, sink, extra_keys, extra_values, distance_bias, slopes)


FORMS = ((2, 1, 8, 4, 5, 16), (1, 1, 1, 1, 1, 16), (4, 2, 16, 16, 16, 16), (3, 3, 5, 17, 20, 32),
         (6, 2, 20, 33, None, 64), (8, 1, 64, 64, 48, 48))  # H, G, D, E, window, slots


def ring_arguments(form: tuple[Any, ...], case: Any, normal: Any) -> tuple[torch.Tensor, ...]:
    """Tokens and a ring that holds tokens already, of one of `FORMS` and of `CASES`."""
    heads, groups, features, width, _, slots = form
    m, n = case.rows.shape[0], case.clock.shape[0]
    return (normal(m, heads, features), normal(m, groups, features), normal(m, groups, width),
            normal(n, groups, slots // BLOCK, features, BLOCK), normal(n, groups, slots, width),
            case.rows, case.clock)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    small = [case for case in CASES if not case.clock.numel() or int(case.clock.max()) < 64]
    for number, form in enumerate(FORMS):
        for case in (small if form[4] is None else CASES)[number % 2::2]:
            yield Sample((*ring_arguments(form, case, normal), 0.3, form[4]), dict(case.timing))
    for number, facet in enumerate(_facets(normal)):
        form = (4, 2, 20, 12, (None, 20, 9)[number % 3], 48)
        for case in (small[1], small[2]):
            yield Sample((*ring_arguments(form, case, normal), 0.3, form[4]),
                         {**case.timing, **facet})
    yield from _hostile(normal)


def _facets(normal: Any) -> list[dict[str, Any]]:
    """Each facet, and all together, for 4 heads, 2 of the key, of 20 and 12 features."""
    far = normal(4, 6)
    far[:, 3] = -math.inf
    facets = [{"softcap": 2.0}, {"sink": normal(4)}, {"slopes": normal(4).abs()},
              {"distance_bias": normal(1, 9)}, {"distance_bias": far},
              {"extra_keys": normal(2, 3, 20), "extra_values": normal(2, 3, 12)},
              {"extra_keys": normal(2, 0, 20), "extra_values": normal(2, 0, 12)}]
    return [*facets, dict(itertools.chain.from_iterable(f.items() for f in facets[:6]))]


def _hostile(normal: Any) -> Iterator[Sample]:
    """Large scores, numbers that are not finite, memory that is not in one piece, doubles."""
    case, form = CASES[1], FORMS[2]
    arguments = ring_arguments(form, case, normal)
    query, key, value, keys, values, *rest = arguments
    yield Sample((query * 100, *arguments[1:], 1.0, 16))
    poisoned, infinite = values.clone(), keys.clone()
    poisoned[2, 0, 1], poisoned[2, 1, 9], infinite[2, :, 0, :, 9] = math.nan, math.inf, math.nan
    clock = torch.tensor([5, 3, 17])  # the new token of row 2 is in slot 1; slots 9 and 10 are old
    yield Sample((query, key, value, infinite, poisoned, rest[0], clock, 0.3, 7))
    one = query.clone()
    one[1, 2, 3] = math.nan
    yield Sample((one, key, value, infinite, poisoned, rest[0], clock, 0.3, 16))
    joined = normal(2, 200)[:, 3:]
    yield Sample((joined[:, :64].view(2, 4, 16), joined[:, 64:96].view(2, 2, 16),
                  joined[:, 96:128].view(2, 2, 16), keys[:, :, :, :, :], values, *rest, 0.3, 16))
    yield Sample((query.transpose(0, 1).contiguous().transpose(0, 1), key[:, :1].expand(2, 2, 16),
                  value, keys, values, *rest, 0.3, 16))
    yield Sample((*(t.double() for t in arguments[:5]), *rest, 0.3, 3))
    yield Sample((*(t.half() for t in arguments[:5]), *rest, 0.3, 16))
    unaligned = [torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in arguments[:5]]
    yield Sample((*unaligned, *rest, 0.3, 16))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    good = (normal(1, 4, 8), normal(1, 2, 8), normal(1, 2, 6), normal(2, 2, 1, 8, 16),
            normal(2, 2, 16, 6), torch.tensor([1]), torch.tensor([0, 4]))

    def but(place: int, value: Any, error: str, *rest: Any, **named: Any) -> Sample:
        changed = [*good, 1.0, *rest]
        changed[place] = value
        return Sample(tuple(changed), named, error=error)

    yield but(5, torch.tensor([2]), "row 2")
    yield but(6, torch.tensor([0, 4]).int(), "int64")
    yield but(6, torch.tensor([0, 16]), "16 slots")
    yield but(0, normal(1, 3, 8), "heads")
    yield but(0, normal(1, 4, 7), "features")
    yield but(0, normal(4, 8), "query")
    yield but(2, normal(2, 2, 6), "value")
    yield but(1, normal(1, 2, 8).double(), "key of dtype")
    yield but(3, normal(2, 2, 1, 8, 8), "keys of shape")
    yield but(4, normal(2, 2, 17, 6), "17 slots")
    yield but(4, normal(1, 2, 16, 6), "values of shape")
    yield but(7, 1.0, "16 slots", 17)
    yield but(7, 1.0, "window=0", 0)
    yield but(7, 1.0, "softcap", softcap=0.0)
    yield but(7, 1.0, "sink", sink=normal(2))
    yield but(7, 1.0, "slopes", slopes=normal(2))
    yield but(7, 1.0, "extra_values", extra_keys=normal(2, 1, 8))
    yield but(7, 1.0, "extra_keys", extra_keys=normal(1, 1, 8), extra_values=normal(2, 1, 6))
    yield but(7, 1.0, "distance_bias", distance_bias=normal(2, 3))
    yield but(7, 1.0, "distance_bias", distance_bias=normal(1, 0))


stream_attention = Operator(
    name="stream_attention",
    schema="(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, "
           "Tensor rows, Tensor clock, float scale, int? window=None, int rate=1, int delay=0, "
           "float? softcap=None, Tensor? sink=None, Tensor? extra_keys=None, "
           "Tensor? extra_values=None, Tensor? distance_bias=None, Tensor? slopes=None) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    tolerance=Tolerance(rtol=2e-5, atol=2e-5),
    source="one row of arXiv:1706.03762 with cached keys, in a ring: arXiv:2201.06268; slopes "
           "arXiv:2108.12409; groups arXiv:2305.13245; sink arXiv:2309.17453",
)
