"""Patterns: how operators are spelled. A pattern is a value; a new spelling is a file here.

Users write patterns of their own the same way, in one file, and everything that happens to ours
happens to theirs: matching, proof, report and tests. `bincompile.patterns` holds all that such a
file needs. This one recognises a root-mean-square norm that was written out by hand:

    >>> import torch
    >>> from torch import nn
    >>> from bincompile.patterns import (Candidate, Example, Pattern, Refusal, arguments, aten,
    ...                                  check_pattern, is_tensor, number, owner_of, registered,
    ...                                  shape_of)
    >>> class Written(nn.Module):
    ...     def __init__(self, axis=-1):
    ...         super().__init__()
    ...         self.gain, self.axis = nn.Parameter(torch.randn(8)), axis
    ...     def forward(self, x):
    ...         square = x.pow(2).mean(self.axis, keepdim=True)
    ...         return x * torch.rsqrt(square + 1e-6) * self.gain
    >>> def match_norm(node, context):
    ...     shifted = node.args[0]
    ...     if shifted.target is not aten.add.Tensor or not is_tensor(shifted.args[0]):
    ...         return None                                      # nothing like a norm
    ...     mean, epsilon = shifted.args[0], number(context.graph_module, shifted.args[1])
    ...     if mean.target is not aten.mean.dim or arguments(mean.args[0]).get("exponent") != 2:
    ...         return None
    ...     if mean.args[1] != [-1]:
    ...         return Refusal("rms_norm", owner_of((node,)), "the mean is not of the last axis",
    ...                        mean.name)
    ...     x = mean.args[0].args[0]
    ...     [scaled] = node.users
    ...     [output] = scaled.users
    ...     def emit(build, values):
    ...         return (build.call(aten.rms_norm.default, values["x"], [shape_of(x)[-1]],
    ...                            values["gain"], epsilon),)
    ...     return Candidate("rms_norm", node, {"x": x, "gain": output.args[1]}, (output,), emit,
    ...                      {"epsilon": epsilon}, owner_of((node, output)))
    >>> def inputs():
    ...     return (torch.randn(2, 3, 8),)
    >>> norm = Pattern("my_norm", "rms_norm", (aten.rsqrt.default,), match_norm,
    ...                examples=(Example(Written, inputs),),
    ...                near_misses=(Example(lambda: Written(1), inputs),))

The checker runs its examples and near misses, here and with `bincompile verify --pattern FILE.py`:

    >>> for record in check_pattern(norm):
    ...     print(record)
    my_norm example 0: matched once and proven
    my_norm near miss 0: not matched: the mean is not of the last axis

    >>> import bincompile as bc
    >>> with registered(norm):                          # or register_pattern(norm), for good
    ...     report = bc.inspect(Written().eval(), inputs())
    >>> [(m.operator, m.pattern, m.validated) for m in report.matches]
    [('rms_norm', 'my_norm', True)]

A pattern that is wrong does no harm: the proof compares the cut subgraph with what `emit` writes
and refuses it, with the reason in the report. An installed package offers its patterns by the
entry-point group "bincompile.patterns": each entry names a `Pattern`, a tuple of them, or a module
that holds some.

Where proven candidates overlap (one would replace a node that another is made of), the one whose
pattern has the higher `priority` is rewritten, then the one of more nodes, then the first by name;
never both. One that lies within the winner is part of it; any other is refused, with the reason.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.metadata
import pkgutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import fx

from bincompile.errors import ConfigError
from bincompile.passes.graph import activations
from bincompile.program import Program, module_paths
from bincompile.record import Refusal

STAGES = ("canonical", "packed")
GROUP = "bincompile.patterns"  # entry points of installed packages


@dataclasses.dataclass(frozen=True)
class Context:
    """What patterns may ask about the graph that they look at.

    Args:
        graph_module: the graph and its stored tensors.
        activations: the nodes whose value depends on the values of an input.
    """

    graph_module: fx.GraphModule
    activations: frozenset[fx.Node]

    @classmethod
    def of(cls, program: Program) -> Context:
        """The context of a program's graph."""
        return cls(program.graph_module, frozenset(activations(program.graph)))


@dataclasses.dataclass(frozen=True)
class TableUse:
    """How the role "indices" of a candidate selects from its role "table".

    Args:
        axis: the axis of the table that is indexed.
        shortened: the axis that a proof may shorten, since no result depends on its size; None
            for none.
        indices: which may come: "rows" (0 to the last), "negative" (these count from the end
            too) or "any" (none raises).
        ended: whether the last of "offsets" is where the last bag ends, so that there are two.
    """

    axis: int = 0
    shortened: int | None = 0
    indices: str = "rows"
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A subgraph that looks like an operator, and what would stand in its place.

    Args:
        operator: "attention", "embedding", "embedding_bag", "linear", or a name of one's own.
        anchor: the node that the pattern started from.
        inputs: the nodes that feed the subgraph, by role; a role ends in a number if it repeats.
        outputs: the nodes that are replaced.
        emit: `emit(build, values) -> results`: writes the operator through a `Build`, or runs it
            through an `Evaluate`; `values` maps roles to nodes or tensors.
        attrs: what is known of the operator.
        path: module path of the owner.
        fixed: roles whose stored value matters, so that a proof may not draw another.
        table_use: how a proof may draw the roles "table" and "indices".
    """

    operator: str
    anchor: fx.Node
    inputs: Mapping[str, fx.Node]
    outputs: tuple[fx.Node, ...]
    emit: Callable[[Any, Mapping[str, Any]], tuple[Any, ...]]
    attrs: Mapping[str, Any]
    path: str
    fixed: tuple[str, ...] = ()
    table_use: TableUse = TableUse()


@dataclasses.dataclass(frozen=True)
class Example:
    """A model and a call of it, for the tests of a pattern."""

    model: Callable[[], torch.nn.Module]
    args: Callable[[], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """How one operator is recognised.

    Args:
        name: its name.
        operator: the operator that it finds.
        anchors: the node targets that it starts from.
        match: the candidate at a node, a refusal with a reason, or None where there is nothing.
        examples: models in which it must match exactly once.
        near_misses: models in which it must not.
        stage: "canonical", or "packed" for what is binary already.
        priority: of two candidates that overlap, the higher one is rewritten.

    Raises:
        ConfigError: a name that is empty, a stage that does not exist, no anchors.

    Example:
        >>> import torch
        >>> from bincompile.patterns import aten
        >>> Pattern("never", "attention", (aten.softmax.int,), lambda node, context: None,
        ...         examples=(), near_misses=()).stage
        'canonical'
    """

    name: str
    operator: str
    anchors: tuple[Any, ...]
    match: Callable[[fx.Node, Context], Candidate | Refusal | None]
    examples: tuple[Example, ...]
    near_misses: tuple[Example, ...]
    stage: str = "canonical"
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.name or not self.operator:
            raise ConfigError(f"pattern {self.name!r} of operator {self.operator!r}",
                              "a name and an operator", "the first arguments of Pattern")
        if self.stage not in STAGES:
            raise ConfigError(f"stage={self.stage!r} of pattern {self.name!r}",
                              " or ".join(map(repr, STAGES)), "the stage= argument")
        for name in ("anchors", "examples", "near_misses"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or (name == "anchors" and not value):
                raise ConfigError(f"{name}={value!r} of pattern {self.name!r}",
                                  "a tuple" + (" of node targets" if name == "anchors" else ""),
                                  f"the {name}= argument: a comma makes one value a tuple")
            object.__setattr__(self, name, tuple(value))  # a list would not be hashable


def owner_of(nodes: Iterable[fx.Node]) -> str:
    """The longest module path that all these nodes were traced in."""
    stacks = [module_paths(n) for n in nodes if n.op == "call_function"]
    shared = ""
    for level in zip(*stacks, strict=False):
        if len(set(level)) != 1:
            break
        shared = level[0]
    return shared


class _PatternSet:
    """Patterns that do not change any more, by stage and by where they start."""

    def __init__(self, found: Iterable[Pattern]) -> None:
        self.all: dict[str, Pattern] = {}
        for pattern in found:
            if pattern.name in self.all:
                raise ConfigError(f"a second pattern of the name {pattern.name!r}",
                                  "names that differ from: " + ", ".join(sorted(self.all)),
                                  "the name= of the pattern, or unregister the first one")
            self.all[pattern.name] = pattern
        ordered = dict(sorted(self.all.items()))
        self.stages: dict[str | None, Mapping[str, Pattern]] = {
            stage: MappingProxyType({name: p for name, p in ordered.items()
                                     if stage in (None, p.stage)})
            for stage in (None, *STAGES)}
        self.anchored: dict[tuple[str, Any], tuple[Pattern, ...]] = {}
        for pattern in ordered.values():
            for target in dict.fromkeys(pattern.anchors):
                key = (pattern.stage, target)
                self.anchored[key] = (*self.anchored.get(key, ()), pattern)

    def plus(self, added: Iterable[Pattern]) -> _PatternSet:
        """These patterns and more."""
        return _PatternSet((*self.all.values(), *added))


_lock = threading.RLock()
_added: dict[str, Pattern] = {}
_everywhere: _PatternSet | None = None  # built at the first use
_here: contextvars.ContextVar[_PatternSet | None] = contextvars.ContextVar("patterns", default=None)


def _current() -> _PatternSet:
    global _everywhere
    found = _here.get() or _everywhere
    if found is None:
        with _lock:
            found = _everywhere = _everywhere or _PatternSet((*_discovered(), *_added.values()))
    return found


@functools.cache
def _discovered() -> tuple[Pattern, ...]:
    """The patterns of every file here and of every installed package that offers some."""
    found: dict[int, Pattern] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        found.update((id(p), p) for p in patterns_in(module))
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            offered = patterns_in(point.load())
        except Exception as error:
            raise ConfigError(f"the patterns {point.value!r} of an installed package fail: {error}",
                              f"an entry point of {GROUP!r} that loads",
                              "the package that offers it") from error
        found.update((id(p), p) for p in offered)
    return tuple(found.values())


def patterns_in(held: Any) -> tuple[Pattern, ...]:
    """The patterns that a module, a tuple or a list holds; or the pattern itself."""
    if isinstance(held, Pattern):
        return (held,)
    values = vars(held).values() if isinstance(held, ModuleType) else held
    return tuple(dict.fromkeys(v for v in values if isinstance(v, Pattern)))


def patterns(stage: str | None = None) -> Mapping[str, Pattern]:
    """The patterns of a stage, or all, by name.

    Every file here that holds a `Pattern` is found by itself, and so are those of installed
    packages; `register_pattern` adds more.
    """
    return _current().stages[stage]


def starting_at(target: Any, stage: str) -> tuple[Pattern, ...]:
    """The patterns of a stage that start from nodes of this target, by name."""
    return _current().anchored.get((stage, target), ())


def register_pattern(pattern: Pattern) -> Pattern:
    """Let a pattern take part in every compilation from now on; returns it.

    Raises:
        ConfigError: its name is taken.

    Example:
        >>> from bincompile.patterns import Pattern, aten, register_pattern, unregister_pattern
        >>> own = register_pattern(Pattern("own", "attention", (aten.tanh.default,),
        ...                        lambda node, context: None, examples=(), near_misses=()))
        >>> own.name in patterns("canonical")
        True
        >>> unregister_pattern("own")
    """
    global _everywhere
    if not isinstance(pattern, Pattern):
        raise ConfigError(f"{pattern!r} registered as a pattern", "a Pattern", "the argument")
    with _lock:
        _everywhere = _PatternSet((*_discovered(), *_added.values(), pattern))
        _added[pattern.name] = pattern
    return pattern


def unregister_pattern(name: str) -> None:
    """Take back a pattern that was registered by `register_pattern`.

    Raises:
        ConfigError: there is none of this name.
    """
    global _everywhere
    with _lock:
        if name not in _added:
            raise ConfigError(f"no registered pattern {name!r}",
                              ", ".join(sorted(_added)) or "nothing is registered", "the name")
        del _added[name]
        _everywhere = _PatternSet((*_discovered(), *_added.values()))


@contextlib.contextmanager
def registered(*added: Pattern) -> Iterator[None]:
    """Let patterns take part inside the `with` block only, and only in this thread.

    With none, the patterns of now stay as they are inside, whatever others register.

    Raises:
        ConfigError: a name is taken.
    """
    token = _here.set(_current().plus(added) if added else _current())
    try:
        yield
    finally:
        _here.reset(token)
