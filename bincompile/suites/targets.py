"""Suite `targets`: what the project promises of its speed, each figure beside its limit."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from bincompile.suites import stream, stream_errors, stream_models
from bincompile.suites.layers import BEST
from bincompile.suites.peers import CONTINUAL, WINDOW
from bincompile.suites.rows import COPY, EAGER, HALF, INDUCTOR, INT8, OURS, PEAK, PRODUCTS, Row
from bincompile.suites.stream_parts import BINARY, FLOAT

SPEED, SHARE, VALUE = "speedup", "share", "values"
STREAM = "stream"
FORMS = {SPEED: "{:.2f} x", SHARE: "{:.1%}", VALUE: "{:.3g}"}
NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Target:
    """A limit on one figure of one row.

    Args:
        what: the promise, for people.
        suite: the suite that has the row.
        case: the name of the case in that suite, for `--only`.
        row: the row's own name.
        kind: "speedup" (over a peer), "share" (of a limit of the machine) or "values".
        figure: the name of the peer, the limit or the value.
        limit: the figure is at least this; at most, where `most` is true.
        most: whether the limit is an upper one.
    """

    what: str
    suite: str
    case: str
    row: str
    kind: str
    figure: str
    limit: float
    most: bool = False

    def measured(self, rows: Iterable[Row]) -> float | None:
        """The figure, or None where it was not measured."""
        return next((r[self.kind].get(self.figure) for r in rows if r["case"] == self.row), None)

    def verdict(self, value: float | None) -> str:
        """"reached" or "missed"; "not measured" without a value."""
        if value is None:
            return NOT_MEASURED
        holds = operator.le if self.most else operator.ge
        return "reached" if holds(value, self.limit) else "missed"


def _speed(what: str, suite: str, case: str, row: str, **limits: float) -> list[Target]:
    """Targets of one row against several peers."""
    return [Target(what, suite, case, row, SPEED, PEERS[peer], limit)
            for peer, limit in limits.items()]


PEERS = {"eager": EAGER, "inductor": INDUCTOR, "half": HALF, "int8": INT8, "best": BEST,
         "one": "1 thread", "continual": CONTINUAL, "window": WINDOW, "singles": stream.SINGLES}


def _linears() -> list[Target]:
    found = []
    for size, share, eager, int8 in ((768, 0.82, 18.0, 4.8), (4096, 0.88, 23.0, 5.5)):
        name = f"w1a1 {size} -> {size}, 512 rows"
        found += [Target(name, "kernels", name, name, SHARE, PEAK, share),
                  *_speed(name, "kernels", name, name, eager=eager, int8=int8)]
    small, large = (f"w1a1 {size} -> {size}, 1 row" for size in (768, 4096))
    found += _speed(f"{small}, called as a model", "kernels", small, small, eager=6.0)
    found.append(Target(f"{small}, the kernel alone", "kernels", small, small, VALUE,
                        "kernel_speedup", 10.0))
    found += _speed(f"{large}, called as a model", "kernels", large, large, eager=60.0)
    for rows, limit in (("1 row", 18.0), ("512 rows", 2.8)):
        name = f"w1a32 4096 -> 4096, {rows}"
        found += _speed(name, "kernels", name, name, eager=limit)
    return found


def _attentions() -> list[Target]:
    case = "attention core, 512 tokens"
    found = []
    for values, limit in (("float", 2.4), ("binary", 4.0)):
        name = f"{case}, {values} values"
        found += _speed(f"{name}, 1-bit query and key", "kernels", case, name, eager=limit)
    for length, form, limit in ((128, "float", 6.0), (128, "binary", 10.0), (512, "binary", 6.0)):
        name = f"BMHA 768, 12 heads, {length} tokens, {form} attention"
        found += _speed(name, "layers", f"BMHA, {length} tokens", name, best=limit)
    return found


def _look_ups() -> list[Target]:
    look_up = "look-up of 8192 in 50000"
    found = _speed(look_up, "embedding", look_up, f"{look_up} x 768", eager=4.5)
    found.append(Target("bytes of a table over float32", "embedding", look_up, f"{look_up} x 768",
                        VALUE, "table_share", 1 / 30, most=True))
    for mode in ("sum", "mean"):
        case = f"{mode} of 32, 1024 bags"
        found += _speed(case, "embedding", case, f"{case} of 50000 x 768", eager=4.5)
    return found


def _encoders() -> list[Target]:
    found = []
    for form, limits in (
            ("float attention", {"eager": 12.0, "inductor": 10.0, "half": 6.0, "int8": 3.5}),
            ("1-bit attention", {"eager": 20.0, "inductor": 17.0, "half": 9.0, "int8": 5.5})):
        found += _speed(f"BERT-base encoder, 128 tokens, w1a1, {form}", "models", "bert binary",
                        f"bert binary, {form}", **limits)
    for name in ("minilm", "bert"):
        found += _speed(f"{name}, exact", "models", f"{name} exact", f"{name} exact", eager=1.0,
                        inductor=0.95)
    found += _speed("BERT-base all binary, 2 threads over 1", "models", "bert threads",
                    "bert threads, float attention", one=1.6)
    for what, figure, limit in (
            ("compile BERT-base, cold cache, s", "cold_s", 25.0),
            ("compile BERT-base, warm cache, s over the capture", "warm_over_capture_s", 2.0)):
        found.append(Target(what, "models", "bert compile", "bert compile", VALUE, figure, limit,
                            most=True))
    found.append(Target("bytes held by BERT-base all binary over float32", "models", "bert bytes",
                        "bert bytes", VALUE, "held_share", 1 / 20, most=True))
    return found


STEPS = {  # of each shape and form: over continual-inference, the window, and single steps
    (FLOAT, 512): (2.0, 14.0, 2.4), (FLOAT, 768): (2.0, 25.0, 1.7),
    (BINARY, 512): (20.0, 140.0, 1.9), (BINARY, 768): (25.0, 300.0, 1.3)}
ERRORS = {1: (stream_errors.LARGEST, 1e-5), 4: (stream_errors.LARGEST, 1e-5),
          16: (stream_errors.LARGEST, 1e-5), 100: (stream_errors.OVER_SDPA, 2.0)}


def _streams() -> list[Target]:
    found = []
    for form in (FLOAT, BINARY):
        for shape in stream.SHAPES:
            peer, window, singles = STEPS[form, shape[0]]
            step, batch = stream.attention_name(*shape), stream.batch_name(*shape)
            found += _speed(f"{step}, {form}", STREAM, step, f"{step}, {form}", continual=peer,
                            window=window)
            found += _speed(f"{batch}, {form}", STREAM, batch, f"{batch}, {form}",
                            singles=singles)
        longer = stream.longer_name()
        found.append(Target(f"{longer}, {form}, over reading what is added", STREAM, longer,
                            f"{longer}, {form}", VALUE, stream.EXCESS, 1.5, most=True))
    block = stream_models.block_name()
    found += _speed(f"{block}, {FLOAT}", STREAM, block, f"{block}, {FLOAT}", window=12.0)
    found.append(Target(f"{block}, {FLOAT}", STREAM, block, f"{block}, {FLOAT}", SHARE, PRODUCTS,
                        0.8))
    found += _speed(f"{block}, {BINARY}", STREAM, block, f"{block}, {BINARY}", window=100.0)
    found.append(Target(f"{stream.FLOOR}, us", STREAM, stream.FLOOR, stream.FLOOR, VALUE,
                        stream.MICROSECONDS, 5.0, most=True))
    for spread, (figure, limit) in ERRORS.items():
        name = stream_errors.name(spread)
        found.append(Target(name, STREAM, name, name, VALUE, figure, limit, most=True))
    return found


CALL = "call of a linear 64 -> 64"
TARGETS = (*_linears(), *_attentions(), *_look_ups(), *_encoders(), *_streams(),
           Target("call of a model over its kernel, us", "calls", CALL, CALL, VALUE, "overhead_us",
                  5.0, most=True))


def needed(targets: Sequence[Target] = TARGETS) -> dict[str, list[str]]:
    """The cases that the targets read, by suite."""
    found: dict[str, list[str]] = {}
    for target in targets:
        names = found.setdefault(target.suite, [])
        if target.case not in names:
            names.append(target.case)
    return found


def judged(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
    """Each target with what was measured, as plain values."""
    found = []
    for target in targets:
        value = target.measured(rows)
        found.append({**dataclasses.asdict(target), "measured": value,
                      "verdict": target.verdict(value)})
    return found


def cells(judgement: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """A line of the table: the promise, against what, the limit, the measured figure, the verdict.

    Example:
        >>> target = dataclasses.asdict(TARGETS[0])
        >>> cells({**target, "measured": 0.9, "verdict": "reached"})[2:]
        ('>= 82.0%', '90.0%', 'reached')
    """
    form, value = FORMS[judgement["kind"]], judgement["measured"]
    limit = f"{'<=' if judgement['most'] else '>='} {form.format(judgement['limit'])}"
    against = {OURS: "", COPY: "copy"}.get(judgement["figure"], judgement["figure"])
    return (judgement["what"], against, limit, "-" if value is None else form.format(value),
            judgement["verdict"])
