"""What is recognised: the corpus through our matcher and through torch.compile's own pass.

torch.compile's count is `counters["inductor"]["fuse_attention"]` after inductor's passes on its
own graphs, in inference on the CPU with fixed sizes; no code is generated for them. It looks for
decomposed attention alone, so that calls of scaled_dot_product_attention are counted apart.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from bincompile.errors import BincompileError, ConfigError
from bincompile.models import bert
from bincompile.models.corpus import Call, Case, cases
from bincompile.ops.embedding import embedding
from bincompile.ops.embedding_bag import embedding_bag
from bincompile.passes.capture import capture, exporting
from bincompile.passes.matching import canonicalise, match, prove
from bincompile.passes.normalise import normalise
from bincompile.passes.pipeline import EXACT, LOWER, run
from bincompile.program import Program
from bincompile.report import Report, table
from bincompile.timing import medians

Row = dict[str, Any]
LOOK_UPS = (embedding.name, embedding_bag.name)
WRONG = 1e-3  # a result of torch.compile further from eager than this is wrong, not rounded
ROUNDS = 3  # of whole captures, which take seconds each
BERT = "BERT-base"


@dataclasses.dataclass(frozen=True)
class Count:
    """What one case, or all cases of a group, declare and what was found in them.

    Args:
        models: models that ran, whether they could be captured or not.
        skipped: models that need a package that is not installed.
        uncaptured: models that no graph could be had of, and the instances in them.
        attention: attention instances declared in the models that were captured.
        found: those that we found and proved.
        sdpa: calls of torch's operator among the instances; the others are decomposed.
        torch_fused: decomposed instances that torch.compile's pass fused.
        torch_wrong: models whose results that pass changed.
        look_ups: look-ups declared, in the models that were captured.
        look_ups_found: those that we found and proved.
        false: matches beyond what is declared, attention and look-ups together.
    """

    models: int = 0
    skipped: int = 0
    uncaptured: int = 0
    attention: int = 0
    found: int = 0
    sdpa: int = 0
    torch_fused: int = 0
    torch_wrong: int = 0
    look_ups: int = 0
    look_ups_found: int = 0
    false: int = 0

    def __add__(self, other: Count) -> Count:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Count(*(a + b for a, b in pairs))


def rows(*only: str) -> Iterator[Row]:
    """The counts of each group and of all, then times at the size of BERT-base.

    Args:
        only: beginnings of names of cases, such as their groups, and "times"; none for all.

    Raises:
        ConfigError: nothing is called that.
    """
    chosen = [c for c in cases() if not only or c.name.startswith(only)]
    if not chosen and "times" not in only:
        raise ConfigError(f"no case of the corpus begins with {' or '.join(only)}",
                          f"{', '.join(dict.fromkeys(c.group for c in cases()))}, times, or the "
                          "beginning of a case's name", "the --only option")
    groups: dict[str, Count] = {}
    for case in chosen:
        groups[case.group] = groups.get(case.group, Count()) + count(case)
    if len(groups) > 1:
        groups["all"] = sum(groups.values(), Count())
    for group, counted in groups.items():
        yield _row(group) | {"counts": dataclasses.asdict(counted)}
    if not only or "times" in only:
        yield from times()


def count(case: Case) -> Count:
    """What one case declares and what was found in it."""
    if any(importlib.util.find_spec(name) is None for name in case.needs):
        return Count(skipped=1)
    torch.manual_seed(0)
    model, (args, kwargs) = case.build(), case.inputs(*case.sizes[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models' packages, about themselves
        try:
            program = run(EXACT, capture(model, args, dict(kwargs)).program)
        except BincompileError:
            if not case.uncapturable:
                raise
            return Count(models=1, uncaptured=1)
        fused, wrong = torch_fusions(model, (args, kwargs))
    found = [m.operator for m in program.matches]
    attention, look_ups = found.count("attention"), sum(map(found.count, LOOK_UPS))
    beyond = max(0, attention - case.attention), max(0, look_ups - case.look_ups)
    return Count(models=1, attention=case.attention, found=attention - beyond[0],
                 sdpa=min(case.attention, sdpa_calls(program)), torch_fused=fused,
                 torch_wrong=int(wrong), look_ups=case.look_ups,
                 look_ups_found=look_ups - beyond[1], false=sum(beyond))


def sdpa_calls(program: Program) -> int:
    """Calls of torch's attention operator in the graph before anything was rewritten."""
    target = torch.ops.aten.scaled_dot_product_attention.default
    return sum(n.target is target for n in program.at("normal").graph.nodes)


def torch_fusions(model: nn.Module, call: Call) -> tuple[int, bool]:
    """How many attentions torch.compile's pass fuses, and whether the result is then wrong."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    def fused(given: nn.Module, args: Any, kwargs: Any) -> Any:
        torch._dynamo.reset()
        counters.clear()
        backend = partial(compile_fx, inner_compile=_not_compiled)
        return torch.compile(given, backend=backend, dynamic=False)(*args, **kwargs)

    args, kwargs = call
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(*args, **kwargs)
        if not _warm:  # at its first use the pass traces its own patterns, which counts too
            fused(nn.Linear(2, 2), (torch.ones(1, 2),), {})
            _warm.append(True)
        found = fused(model, args, dict(kwargs))
    return counters["inductor"]["fuse_attention"], not _agree(expected, found)


_warm: list[bool] = []


def _not_compiled(module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
    """The graph itself in place of generated code, called as inductor calls that."""
    def call(args: list[Any]) -> Any:
        given = list(args)
        args.clear()
        return module(*given)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _agree(expected: Any, found: Any) -> bool:
    pairs = zip(*(filter(torch.is_tensor, torch.utils._pytree.tree_leaves(r))
                  for r in (expected, found)), strict=True)
    return all(a.shape == b.shape and (
        torch.allclose(a.double(), b.double(), WRONG, WRONG, equal_nan=True)
        if a.is_floating_point() else torch.equal(a, b)) for a, b in pairs)


def times() -> Iterator[Row]:
    """Matching, proofs and the whole of inspect, at the size of BERT-base."""
    for attn in bert.ATTENTIONS:
        model, (args, kwargs) = bert.build(attn), bert.example_inputs()
        captured = capture(model, args, kwargs).program
        normal = normalise(captured)
        matched = match(normal)
        proven = prove(matched)
        found = medians({"match": partial(match, normal), "prove": partial(prove, matched),
                         "canonicalise": partial(canonicalise, proven)}, rounds=7, seconds=0)
        proofs = [m.evidence.milliseconds for m in proven.matches
                  if m.evidence is not None and m.evidence.milliseconds]
        found |= {"proof, median": statistics.median(proofs), "proof, longest": max(proofs)}
        case = f"{BERT} {attn}: {len(list(normal.graph.nodes))} nodes, {len(proofs)} proofs"
        yield _row(case) | {"ms": found}
        yield _row(f"{BERT} {attn}: inspect") | _inspect_against_export(model, args, kwargs)


def _inspect_against_export(model: nn.Module, args: Any, kwargs: Any) -> Row:
    """A dry run against torch's own capture with the same sizes dynamic."""
    def ours() -> None:
        Report.of(run((*EXACT, *LOWER), capture(model, args, kwargs).program))

    def torchs() -> None:
        shapes = {name: dict.fromkeys((0, 1), Dim.AUTO) for name in kwargs}
        with exporting(model), torch.no_grad():
            torch.export.export(model, args, kwargs, dynamic_shapes=shapes,
                                strict=False).run_decompositions({})

    spent: dict[str, list[float]] = {"bincompile": [], "torch.export": []}
    for _ in range(ROUNDS):
        for name, call in (("bincompile", ours), ("torch.export", torchs)):
            start = time.perf_counter()
            call()
            spent[name].append(1e3 * (time.perf_counter() - start))
    found = {name: statistics.median(each) for name, each in spent.items()}
    return {"ms": found, "speedup": {"torch.export": found["torch.export"] / found["bincompile"]}}


def _row(case: str) -> Row:
    return {"case": case, "threads": torch.get_num_threads(), "ms": {}, "speedup": {}}


HEADS = {"models": "models", "skipped": "not installed", "uncaptured": "no graph",
         "attention": "attention", "found": "found", "sdpa": "by SDPA",
         "torch_fused": "torch fuses", "torch_wrong": "torch wrong", "look_ups": "look-ups",
         "look_ups_found": "found", "false": "false"}


def text(counted: Sequence[Row]) -> str:
    """The counts as a table, and what the shares are."""
    lines = [(r["case"], *(r["counts"][name] for name in HEADS)) for r in counted]
    whole = sum((Count(**r["counts"]) for r in counted if r["case"] != "all"), Count())
    decomposed = whole.attention - whole.sdpa
    return (f"{table(('group', *HEADS.values()), lines)}\n"
            f"attention found: {_share(whole.found, whole.attention)} of all; torch.compile fuses "
            f"{_share(whole.torch_fused, decomposed)} of the {decomposed} decomposed\n")


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} ({100 * part / whole:.1f} %)" if whole else "0/0"
