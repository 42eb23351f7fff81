"""The command line: each verb is a thin call of the Python interface, `--json` on all."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bincompile.errors import BincompileError, ConfigError
from bincompile.report import plain

DONE, FAILED, MISUSED = 0, 1, 2  # exit codes: success, the work failed, the command is wrong


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a verb did: for a program to read, for a person to read, and whether it is good."""

    document: dict[str, Any]
    text: str
    good: bool = True


@dataclasses.dataclass(frozen=True)
class Verb:
    """A word of the command line: its options and what it does."""

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Outcome]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns 0, 1 (the work failed) or 2 (the command is wrong).

    Example:
        >>> main(["inspect", "no-such-model"])  # the error goes to stderr
        2
    """
    try:
        options = _parser().parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr):  # a model that prints can't spoil the result
            outcome = VERBS[options.verb].run(options)
    except BincompileError as error:
        print(f"bincompile: {error}", file=sys.stderr)
        return MISUSED if isinstance(error, ConfigError) else FAILED
    _show(json.dumps(plain(outcome.document), indent=2) if options.json else outcome.text)
    return DONE if outcome.good else FAILED


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise ConfigError(message, usage, f"see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bincompile", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        options = verbs.add_parser(name, help=verb.summary, description=verb.summary)
        options.add_argument("--json", action="store_true", help="print one JSON document")
        verb.add_options(options)
    return parser


def _no_options(parser: argparse.ArgumentParser) -> None:
    pass


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, default=1, metavar="N",
                        help="threads of torch and of our kernels (default: 1)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL",
                        help="digits, minilm, bert, or path/to/file.py:factory, where factory() "
                             "returns (model, args, kwargs)")


def _add_continual(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--continual", type=_positive, metavar="TOKENS",
                        help="also one token at a time, attention over so many")


def _add_patterns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pattern", action="append", default=[], metavar="FILE.py",
                        help="a file with patterns of your own; can be repeated")


def _own_patterns(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """The patterns of the files that --pattern names, known inside the `with` block."""
    if not options.pattern:
        return contextlib.nullcontext()
    from bincompile.patterns import load_patterns, registered

    return registered(*(p for file in options.pattern for p in load_patterns(file)))


def _add_optimize(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_patterns(parser)
    _add_continual(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE",
                        help="where to save the compiled model, e.g. out.bcz")
    parser.add_argument("--binary", metavar="PRECISION", help="w1a32 or w1a1: lossy, guarded")
    parser.add_argument("--layers", metavar="GLOB", help="layers to make binary (default: all)")
    parser.add_argument("--keep", action="append", default=[], metavar="GLOB",
                        help="layers that stay float; can be repeated")
    parser.add_argument("--calibration", metavar="FILE.py:FUNCTION",
                        help="function that returns calibration= of bincompile.optimize")
    parser.add_argument("--holdout", metavar="FILE.py:FUNCTION",
                        help="function that returns holdout= of bincompile.optimize")
    parser.add_argument("--no-guard", action="store_true",
                        help="keep lossy rewrites whatever they cost")
    parser.add_argument("--choices", type=Path, metavar="FILE.json",
                        help="make the choices of this file again instead of measuring: "
                             "\"choices\" of what --json printed")


LOSSY_OPTIONS = ("layers", "keep", "calibration", "holdout", "no_guard")


def _lossy_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `optimize` that make float layers binary; none without --binary."""
    from bincompile.config import Binary
    from bincompile.source import call_factory

    if options.binary is None:
        idle = [f"--{name.replace('_', '-')}" for name in LOSSY_OPTIONS if getattr(options, name)]
        if idle:
            raise ConfigError(f"{', '.join(idle)} without --binary", "--binary w1a32 or w1a1",
                              "add --binary, or leave the others out")
        return {}
    data = {name: call_factory(text) for name in ("calibration", "holdout")
            if (text := getattr(options, name))}
    binary = Binary(options.binary, layers=options.layers or "*", keep=tuple(options.keep))
    return {"binary": binary, **data, **({"guard": None} if options.no_guard else {})}


def _demo(options: argparse.Namespace) -> Outcome:
    import torch

    from bincompile import demo

    torch.set_num_threads(options.threads)
    result = demo.run()
    return Outcome(result, demo.text(result), demo.succeeded(result))


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_patterns(parser)
    _add_continual(parser)
    parser.add_argument("--html", type=Path, metavar="FILE",
                        help="also write the report as one page, with the graphs side by side")
    parser.add_argument("--dot", type=Path, metavar="FILE",
                        help="also write the graph before as DOT, for Graphviz")


def _inspect(options: argparse.Namespace) -> Outcome:
    from bincompile.api import inspect
    from bincompile.source import load_source
    from bincompile.views.page import write_whole

    source = load_source(options.model)
    with _own_patterns(options):
        report = inspect(source.model, source.args, source.kwargs, continual=options.continual)
    if options.html:
        report.to_html(options.html)
    if options.dot:
        write_whole(options.dot, report.to_dot() + "\n")
    return Outcome({"model": source.name, **report.to_dict()}, str(report))


def _optimize(options: argparse.Namespace) -> Outcome:
    from bincompile.api import optimize
    from bincompile.source import load_source

    asked, source = _lossy_options(options), load_source(options.model)
    with _own_patterns(options):
        compiled = optimize(source.model, source.args, source.kwargs,
                            choices=_choices(options.choices), continual=options.continual,
                            **asked)
    compiled.save(options.output)
    size = options.output.stat().st_size
    document = {"model": source.name, "output": str(options.output), "bytes": size,
                "choices": compiled.choices}
    return Outcome(document | compiled.report.to_dict(),
                   f"{compiled.report}\n\nsaved {options.output}: {size:,} bytes")


def _choices(path: Path | None) -> dict[str, str] | None:
    """The choices of a JSON file: a mapping of texts, alone or under "choices"."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text())
        found = found.get("choices", found)
        if not all(isinstance(choice, str) for choice in found.values()):
            raise ValueError("a choice that is no text")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{str(path)!r} has no choices: {error}",
                          "a JSON object of node: choice", "the --choices option") from error
    return found


def _verify(options: argparse.Namespace) -> Outcome:
    from bincompile.patterns import check_pattern, load_patterns, patterns, registered

    own = [p for file in options.pattern for p in load_patterns(file)]
    with registered(*own):
        checks = [c for p in own or patterns().values() for c in check_pattern(p)]
    good = sum(c.good for c in checks)
    lines = [f"{'ok  ' if c.good else 'FAIL'}  {c}, {c.calls} calls the same" for c in checks]
    document = {"checks": [{**dataclasses.asdict(dataclasses.replace(c, match=None)),
                            "match": None if c.match is None else c.match.path} for c in checks]}
    return Outcome(document, "\n".join([*lines, f"{good} of {len(checks)} as they should be"]),
                   good == len(checks))


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", default="kernels", metavar="SUITE | MODEL | FILE.bcz",
                        help="kernels (default), layers, models, embedding, calls, stream, "
                             "targets, validate, import or match; or a model to time as it is and "
                             "compiled; or a saved one")
    parser.add_argument("--threads", type=_positive, nargs="+", default=[1, 2], metavar="N",
                        help="numbers of threads to measure with (default: 1 2)")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME",
                        help="beginnings of names of cases, such as w1a1 of kernels or "
                             "transformers/bert of match (default: all)")
    parser.add_argument("--quick", action="store_true",
                        help="follow the errors of the suite stream for fewer steps")
    parser.add_argument("--markdown", action="store_true", help="tables as a README has them")


def _bench(options: argparse.Namespace) -> Outcome:
    from bincompile import bench, bench_model

    if options.what in bench.NAMES:
        result = bench.run(options.what, options.threads, options.only, quick=options.quick)
        text = bench.table(result, markdown=options.markdown)
        return Outcome(result, text, not bench.failed(result))
    result = bench_model.run(options.what, options.threads)
    return Outcome(result, bench_model.text(result))


def _env(options: argparse.Namespace) -> Outcome:
    from bincompile import environment

    found = environment.describe()
    return Outcome(found, environment.text(found))


VERBS = {
    "demo": Verb("compile a bundled binary model and measure it", _add_threads, _demo),
    "inspect": Verb("what would be found, proven, rewritten and refused", _add_inspect,
                    _inspect),
    "optimize": Verb("compile a model and save it", _add_optimize, _optimize),
    "verify": Verb("run patterns on their own examples and near misses", _add_patterns, _verify),
    "bench": Verb("times against the float peers, measured in one run", _add_bench, _bench),
    "env": Verb("versions, instruction set, kernels and why not", _no_options, _env),
}
