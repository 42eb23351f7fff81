"""Check: programs against the model that they came from, and kernels against their reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.conditions import broken, names
from bincompile.errors import ProofError
from bincompile.ops import operator_of
from bincompile.ops.bits import row_scale
from bincompile.passes.check_kernels import LIMITS, check_kernels
from bincompile.passes.fuse import before_fusion, signs_within
from bincompile.passes.graph import arguments, aten, shape_of
from bincompile.passes.validate import difference
from bincompile.program import Program
from bincompile.runtime.executor import Executable

OTHER_SIZE = 3  # what sizes that may vary are set to, beside the example's and 1
# Sizes at which conditions are broken on purpose, how many calls are looked at and how many made.
PROBED, MOST_PROBED, MOST_CALLED = (2, 3, 1, 5, 4, 7, 8, 6, 12), 800, 12
FLIPPED_SHARE, FLIPPED_SIZE = 1e-5, 1e-6
MAXIMUM = 2  # torch's number of the mode of embedding_bag

Numbers = tuple[tuple[str, int], ...]  # a size for each symbol



def check_sizes(program: Program, model: Callable[[list[Any]], list[Any]],
                example: Sequence[Any], expected: list[Any],
                doubtful: Sequence[str] = ()) -> Program:
    """The program with sizes fixed where it does not follow the model at other sizes.

    Args:
        model: the user's model as a function of flat inputs to flat outputs.
        example: the flat inputs that it was captured with.
        expected: what the model gives for them.
        doubtful: conditions on sizes that are kept unless the program does without them.

    Raises:
        ProofError: the program is wrong at the example's own sizes.
    """
    worst = _against(expected, program, list(example))
    if worst is not None:
        raise ProofError(f"the captured graph differs from the model: {worst}",
                         "a forward that gives the same results for the same inputs",
                         "dropout or other random numbers in the forward, or state that it reads "
                         "outside of its inputs and weights")
    program = _settled(program, model, example, doubtful)
    notes = list(program.notes)
    for symbols, size in _variants(program, example):
        resized = _resized(program, example, dict.fromkeys(symbols, size))
        worst = None if resized is None else _disagreement(program, model, resized)
        if worst is not None and size == 1:
            program = _least(program, symbols, 2)
            places = ", ".join(map(program.signature.place, sorted(symbols)))
            notes.append(f"a size of 1 is refused for {places}: the model treats it apart "
                         f"({worst})")
        elif worst is not None:
            program = _fixed(program, example)
            notes.append(f"sizes are fixed to the example's: the graph does not follow the "
                         f"model at others ({worst})")
            break
    return dataclasses.replace(program, notes=tuple(notes))


def _variants(program: Program, example: Sequence[Any]) -> Iterator[tuple[frozenset[str], int]]:
    """Sizes to try: every group of sizes that are equal in the example at 1, all at another."""
    groups: dict[int, set[str]] = {}
    for name, size in _sizes(program, example).items():
        groups.setdefault(size, set()).add(name)
    together = frozenset().union(*groups.values())
    if together:
        yield from ((frozenset(group), 1) for group in groups.values())
        yield together, OTHER_SIZE


def _sizes(program: Program, example: Sequence[Any]) -> dict[str, int]:
    """The symbols of a program's inputs, and their sizes in the example."""
    return {want: value.shape[axis]
            for spec, value in zip(program.signature.inputs, example, strict=True)
            for axis, want in enumerate(spec.shape) if isinstance(want, str)}


def _settled(program: Program, model: Callable[[list[Any]], list[Any]], example: Sequence[Any],
             doubtful: Sequence[str]) -> Program:
    """The program with those doubtful conditions that it can't be shown to do without.

    Each is broken on purpose at two sizes that the model allows; it goes if the program follows
    the model there.
    """
    draws = list(itertools.islice(_draws(_sizes(program, example)), MOST_PROBED))
    at_one = {text for text in program.signature.conditions if _only_at_one(text, draws)}
    own = tuple(text for text in program.signature.conditions if text not in at_one)
    doubtful = [*at_one, *doubtful]
    breaks = [({d for d in doubtful if broken((d,), numbers)}, tuple(numbers.items()))
              for numbers in draws if doubtful and not broken(own, numbers)]
    breaks.sort(key=lambda place: len(place[0]))

    @functools.cache
    def follows(numbers: Numbers) -> bool | None:
        resized = _resized(program, example, dict(numbers))
        return None if resized is None else _follows(program, model, resized)

    def needed(text: str) -> bool:
        verdicts = list[bool]()
        places = _apart([numbers for found, numbers in breaks if text in found], names(text))
        for numbers in places[:MOST_CALLED]:
            verdict = follows(numbers)
            if verdict is not None:
                verdicts.append(verdict)
            if verdict is False or len(verdicts) == 2:
                break
        return bool(places) and (not verdicts or False in verdicts)

    kept = tuple(text for text in doubtful if needed(text))
    signature = dataclasses.replace(program.signature, conditions=(*own, *kept))
    return dataclasses.replace(program, signature=signature)


def _draws(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to break conditions at: first those at which what is equal in the example stays so."""
    groups = tuple(dict.fromkeys(sizes.values()))
    for draw in itertools.product(PROBED, repeat=len(groups)):
        yield {name: draw[groups.index(size)] for name, size in sizes.items()}
    for draw in itertools.product(PROBED, repeat=len(sizes)):
        yield dict(zip(sizes, draw, strict=True))


def _only_at_one(text: str, draws: Sequence[Mapping[str, int]]) -> bool:
    """Whether a condition is broken where a size is 1 alone: mostly torch's question of strides."""
    reads = names(text)
    places = [numbers for numbers in draws if broken((text,), numbers)]
    return bool(places) and all(1 in (numbers[name] for name in reads) for numbers in places)


def _apart(places: list[Numbers], reads: set[str]) -> list[Numbers]:
    """Places with those first that differ in these sizes."""
    seen, first, rest = set[Numbers](), list[Numbers](), list[Numbers]()
    for numbers in places:
        part = tuple(item for item in numbers if item[0] in reads)
        (rest if part in seen else first).append(numbers)
        seen.add(part)
    return [*first, *rest]


def _follows(program: Program, model: Callable[[list[Any]], list[Any]],
             flat: list[Any]) -> bool | None:
    """Whether the program gives what the model gives; None where the model itself refuses."""
    expected = _results(model, flat)
    return None if expected is None else _against(expected, program, flat) is None


def _results(model: Callable[[list[Any]], list[Any]], flat: list[Any]) -> list[Any] | None:
    """What the model gives; None at sizes that it does not allow."""
    with torch.no_grad():
        try:
            return model([_copy(v) for v in flat])
        except Exception:
            return None


def _disagreement(program: Program, model: Callable[[list[Any]], list[Any]],
                  flat: list[Any]) -> str | None:
    """How program and model differ on these inputs; None if they agree or the model refuses."""
    expected = _results(model, flat)
    return None if expected is None else _against(expected, program, flat)


def _against(expected: list[Any], program: Program, flat: list[Any]) -> str | None:
    with torch.no_grad():
        try:
            found = program.graph_module(*flat)
        except Exception as error:
            first = str(error).partition("\n")[0][:120]
            return f"the graph fails with {type(error).__name__}: {first}"
    return disagreement(expected, found, rounding(program))


def rounding(program: Program) -> float:
    """The limit of the coarsest float dtype that a program computes in."""
    dtypes = {v.dtype for n in program.graph.nodes
              if isinstance(v := n.meta.get("val"), torch.Tensor)}
    return max((LIMITS[d] for d in dtypes if d in LIMITS), default=0.0)


def disagreement(expected: Sequence[Any], found: Sequence[Any], limit: float = 0.0) -> str | None:
    """How two lists of flat outputs differ by more than rounding; None if they don't.

    Floats may differ by the limit of their dtype, or by `limit` where that is more.
    """
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(left, torch.Tensor):
            if left != right:
                return f"output {index} is {right!r}, not {left!r}"
        elif left.shape != right.shape or left.dtype != right.dtype:
            return (f"output {index} is {right.dtype} {tuple(right.shape)}, "
                    f"not {left.dtype} {tuple(left.shape)}")
        elif (error := difference(left, right)) > max(
                LIMITS.get(left.dtype, 0.0), limit if left.is_floating_point() else 0.0):
            return f"output {index} differs by {error:.2g}"
    return None


def largest_difference(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """The largest relative difference over all tensors."""
    return max((difference(a, b) for a, b in zip(expected, found, strict=True)
                if isinstance(a, torch.Tensor)), default=0.0)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _resized(program: Program, example: Sequence[Any],
             numbers: Mapping[str, int]) -> list[Any] | None:
    """The example with these sizes; None if they are not allowed or change nothing."""
    flat, changed = [], _sizes(program, example) | dict(numbers)
    for name, size in numbers.items():
        low, high = program.signature.ranges.get(name, (1, None))
        if size < low or (high is not None and size > high):
            return None
    if broken(program.signature.conditions, changed) or any(
            changed[name] != size for name, size in _sizes(program, example).items()
            if name in _bag_sizes(program)):
        return None
    for spec, value in zip(program.signature.inputs, example, strict=True):
        for axis, want in enumerate(spec.shape):
            if isinstance(want, str) and changed[want] != value.shape[axis]:
                index = torch.arange(changed[want]) % value.shape[axis]
                value = value.index_select(axis, index.to(value.device))
        flat.append(value)
    same = all(a is b for a, b in zip(flat, example, strict=True))
    return None if same else flat


def _bag_sizes(program: Program) -> set[str]:
    """Sizes of bags by maximum whose last offset is their end.

    Where that offset is not the number of indices torch writes behind its result.
    """
    bags = (arguments(n) for n in program.graph.nodes if n.target is aten.embedding_bag.padding_idx)
    reads = [bag[name] for bag in bags if bag["include_last_offset"] and bag["mode"] == MAXIMUM
             for name in ("indices", "offsets")]
    return {str(size) for node in reads for size in shape_of(node) if not isinstance(size, int)}


def _least(program: Program, symbols: Collection[str], low: int) -> Program:
    ranges = {s: (max(low, least) if s in symbols else least, high)
              for s, (least, high) in program.signature.ranges.items()}
    signature = dataclasses.replace(program.signature, ranges=ranges)
    return dataclasses.replace(program, signature=signature)


def _fixed(program: Program, example: Sequence[Any]) -> Program:
    inputs = tuple(
        dataclasses.replace(spec, shape=tuple(value.shape))
        if isinstance(value, torch.Tensor) else spec
        for spec, value in zip(program.signature.inputs, example, strict=True))
    signature = dataclasses.replace(program.signature, inputs=inputs, ranges={},
                                    conditions=())
    return dataclasses.replace(program, signature=signature)


def flipped_bits(before: Program, after: Program, flat: Sequence[Any],
                 weights: Sequence[torch.Tensor] = ()) -> tuple[float, float]:
    """How many signs differ between two stages of a program, and how near to 0 their values are.

    `weights` are inputs of the later stage alone, behind the others.

    Returns:
        The share of signs that differ, and the largest |x| among them relative to its row's scale.
    """
    left, right = _binarised_inputs(before, flat), _binarised_inputs(after, [*flat, *weights])
    total = flipped = 0
    largest = 0.0
    for a, b in zip(left, right, strict=True):
        differs = (a >= 0) != (b >= 0)
        total += a.numel()
        flipped += int(differs.sum())
        if bool(differs.any()):
            relative = a.abs() / row_scale(a).clamp_min(1e-30)
            largest = max(largest, float(relative[differs].max()))
    return flipped / max(total, 1), largest


def _binarised_inputs(program: Program, flat: Sequence[Any]) -> list[torch.Tensor]:
    """What signs are taken of, in the order in which the program took them before fusion."""
    found: list[tuple[int, torch.Tensor]] = []
    order = {n.name: place for place, n in enumerate(before_fusion(program).graph.nodes)}

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            operator = operator_of(node.target)
            if operator is not None and operator.signs_of is not None:
                taken = operator.signs_of(operator.bind(*self.fetch_args_kwargs_from_env(node)))
                names = signs_within(node) or (node.name,) * len(taken)
                found.extend((order.get(name, 0), x)
                             for name, x in zip(names, taken, strict=True))
            return super().run_node(node)

    with torch.no_grad():
        Watch(program.graph_module).run(*flat)
    return [x for _, x in sorted(found, key=lambda entry: entry[0])]


class ResultError(ProofError):
    """A program whose kernels are all right gives other results than the model."""


def prove_whole(model: Callable[[list[Any]], list[Any]] | None, program: Program,
                executable: Executable, example: Sequence[Any],
                weights: Sequence[torch.Tensor] = ()) -> Whole:
    """Compare what was compiled with the model on the example.

    Kernels are held to their references; the whole model to its dtype's limit, or, where signs
    are taken on the way, to the share of signs that rounding may flip. `weights` are inputs that
    the program takes behind those of the model.

    Raises:
        ProofError: a limit is broken.
        ResultError: the one of the results.
    """
    flat = [*example, *weights]
    check_kernels(program, executable, flat)
    if program.lossy or model is None:
        return Whole("kernels agree with their references on the example")
    share, size = flipped_bits(program.at("normal"), program, example, weights)
    if share > FLIPPED_SHARE or size > FLIPPED_SIZE:
        raise ProofError(f"{share:.1e} of the signs differ from the model's, at up to {size:.1e} "
                         "of their row's scale", f"{FLIPPED_SHARE:.0e}, at {FLIPPED_SIZE:.0e}",
                         "report the model")
    with torch.no_grad():
        expected, found = model([_copy(v) for v in example]), executable(*flat)
    limit = rounding(program)
    worst = disagreement(expected, found, limit)
    if worst is not None and not share and not _signs_differ(
            program, executable, flat, expected, found):
        raise ResultError(f"the compiled program differs from the model: {worst}",
                          f"at most {limit:.0e} relative", "report the model")
    note = (f"whole model at the example's sizes: largest relative difference "
            f"{largest_difference(expected, found):.1e}, flipped signs {share:.1e}")
    return Whole(note, expected, found)


def _signs_differ(program: Program, executable: Executable, flat: Sequence[Any],
                  expected: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether rounding before a sign explains a difference, since nothing else is wrong.

    The program gives the model's results, every kernel is right on the values that it got, and
    the kernels one after the other give what was found.

    Raises:
        ProofError: a kernel is not.
    """
    operators = filter(None, (operator_of(n.target) for n in program.graph.nodes))
    if not any(operator.signs_of is not None for operator in operators) \
            or _against(list(expected), program, list(flat)) is not None:
        return False
    one_by_one = check_kernels(program, executable, flat, on="kernels")
    return disagreement(one_by_one, found, rounding(program)) is None


@dataclasses.dataclass(frozen=True)
class Whole:
    """A note for the report, and the flat results of the model and of what was compiled."""

    note: str
    expected: Sequence[Any] = ()
    found: Sequence[Any] = ()
