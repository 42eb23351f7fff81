"""The backend of `torch.compile(model, backend="bincompile")`.

Dynamo hands over one graph after another; each is compiled at its first call, on the values of
that call, exactly as `optimize` would. A graph that can't be compiled runs as it was, and so does
a call that needs gradients; `reports()` and the log of this module say which and why.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bincompile.api import Options
from bincompile.compiled import CompiledModel, run
from bincompile.config import Guard
from bincompile.dynamo import GraphModel, Weights, lift, numbers_of
from bincompile.errors import (
    AccuracyError,
    AccuracyUnknownError,
    BincompileError,
    CaptureError,
    ConfigError,
    InputError,
    InputTypeError,
    ProofError,
)
from bincompile.passes.check import disagreement, rounding
from bincompile.passes.exporting import one_at_a_time
from bincompile.report import Report

log = logging.getLogger(__name__)

MOST_VARIANTS = 8  # compilations of one graph, after which other calls run it as it was
ALLOWED = ("binary", "guard")

_counter = itertools.count()
_alive: weakref.WeakValueDictionary[int, CompiledGraph] = weakref.WeakValueDictionary()


def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any], *,
                  mode: str | None = None,
                  options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The backend itself: a graph of dynamo as a compiled function of the same inputs.

    Weights are read where they are at each call, so an optimizer step or `load_state_dict` shows.

    Args:
        graph_module: what dynamo traced; its parameters are among its inputs.
        example_inputs: not read: the graph is compiled at its first call, on the values of it.
        mode: None or "default".
        options: `binary` and `guard`, as `optimize` takes them. A graph has no calibration data,
            so `binary` needs `guard=None`.

    Raises:
        ConfigError: (at the first call) a mode or an option that does not exist.
        AccuracyUnknownError: (at the first call) `binary` without `guard=None`.

    Example:
        >>> import torch
        >>> model = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        >>> compiled, x = torch.compile(model, backend=compile_graph), torch.randn(2, 5, 16)
        >>> with torch.no_grad():
        ...     same = torch.allclose(compiled(x), model(x), atol=1e-5)
        >>> same, [m.operator for m in reports()[-1].matches]
        (True, ['attention'])
    """
    return CompiledGraph(graph_module, mode, options)


def reports() -> tuple[Report, ...]:
    """The reports of all graphs that dynamo holds, oldest first; the last capture of each."""
    return tuple(_alive[key].report for key in sorted(_alive))


class CompiledGraph:
    """One graph of dynamo, compiled at its first call and again for calls of another kind."""

    def __init__(self, graph_module: fx.GraphModule, mode: str | None,
                 options: Mapping[str, Any] | None) -> None:
        self._eager, self._asked = graph_module, (mode, options)
        self._numbers = numbers_of(graph_module)
        self._variants: list[tuple[CompiledModel, Weights]] = []
        self._notes: list[str] = []
        self._captures = 0
        self._given_up = False
        self._lock = threading.RLock()
        _alive[next(_counter)] = self

    @property
    def report(self) -> Report:
        """What was found and rewritten at the last capture, and why calls ran as they were."""
        found = self._variants[0][0].report if self._variants else Report()
        return Report(found.matches, found.rewrites, found.refusals, (*found.notes, *self._notes))

    def __call__(self, *inputs: Any) -> Any:
        if _needs_gradients(inputs):
            self._note("gradients are needed: the graph runs as it is; call it under "
                       "torch.no_grad() or torch.inference_mode() to have it compiled")
            return self._eager(*inputs)
        found = self._find(inputs) or self._compile(inputs)
        if found is None:
            return self._eager(*inputs)
        compiled, flat = found
        try:
            return run(compiled.executable, flat)
        except BincompileError:  # the graph as it was raises what its own operators raise
            return self._eager(*inputs)

    def _find(self, inputs: Sequence[Any]) -> tuple[CompiledModel, list[Any]] | None:
        """A variant that holds these weights and takes these inputs, and its flat inputs."""
        for compiled, weights in self._variants:
            try:
                flat = compiled.program.signature.flatten(weights.model.given(inputs), {})
            except (InputError, InputTypeError):
                continue
            if weights.agree(inputs):
                return compiled, [*flat, *weights.taken(inputs)]
        return None

    def _compile(self, inputs: Sequence[Any]) -> tuple[CompiledModel, list[Any]] | None:
        with self._lock:
            found = self._find(inputs)  # another thread may have compiled it
            if found is not None or self._given_up:
                return found
            options = _options(*self._asked)
            if self._captures == MOST_VARIANTS:
                self._give_up(f"it was compiled {MOST_VARIANTS} times, for other inputs or weights")
                return None
            self._captures += 1
            try:
                self._variants.insert(0, _compiled(self._model(inputs), inputs, options))
            except (AccuracyError, AccuracyUnknownError):
                raise
            except BincompileError as error:
                self._give_up(str(error))
                return None
            log.info("compiled a graph: %s", self._variants[0][0].report.summary())
            return self._find(inputs)

    def _model(self, inputs: Sequence[Any]) -> GraphModel:
        return GraphModel(self._eager, inputs, self._numbers)

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self._note(f"a graph runs as it is: {reason}")

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            log.warning("%s", text)


def _compiled(model: GraphModel, inputs: Sequence[Any],
              options: Options) -> tuple[CompiledModel, Weights]:
    with one_at_a_time, torch.no_grad():
        options = dataclasses.replace(options, dynamic_shapes=model.dynamic_shapes)
        captured = options.capture(model, model.given(inputs), {})
        expected = model.graph(*inputs)
        _check_memory(expected, inputs)
        program, lifted = lift(options.rewrite(captured.program, captured.example), model)
        weights = Weights(model, inputs, lifted)
        compiled = options.finish(captured, program, weights.taken(inputs))
        if not program.lossy:
            _check_results(expected, compiled, [*model.given(inputs), *weights.taken(inputs)])
        return compiled, weights


def _check_memory(results: Sequence[Any], inputs: Sequence[Any]) -> None:
    """Raise if results share memory: those of a compiled program have their own."""
    places = [v.untyped_storage().data_ptr() for v in results if isinstance(v, torch.Tensor)]
    taken = {v.untyped_storage().data_ptr() for v in inputs if isinstance(v, torch.Tensor)}
    if len(set(places)) < len(places) or taken & set(places):
        raise CaptureError("a result shares memory with an input or another result",
                           "results with memory of their own", "clone it in the model")


def _check_results(expected: Sequence[Any], compiled: CompiledModel, flat: list[Any]) -> None:
    """Raise unless the compiled program gives what the graph itself gave, in the same layout."""
    found = run(compiled.executable, flat)
    worst = disagreement(expected, found, rounding(compiled.program))
    if worst is not None:
        raise ProofError(f"the compiled graph differs from the graph of dynamo: {worst}",
                         "results within rounding of the graph's", "report the model")
    strides = [[v.stride() for v in values if isinstance(v, torch.Tensor)]
               for values in (expected, found)]
    if strides[0] != strides[1]:
        raise ProofError(f"results have the strides {strides[1]}", f"{strides[0]}, the graph's",
                         "report the model")


def _needs_gradients(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad
                                           for v in inputs)


def _options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    if mode not in (None, "default"):
        raise ConfigError(f"mode={mode!r}", "None or 'default'", "the mode= of torch.compile")
    given = dict(options or {})
    if given.get("continual") is not None:
        raise ConfigError("the option 'continual' of torch.compile, whose function takes whole "
                          "calls", " and ".join(ALLOWED),
                          "bincompile.optimize(model, args, continual=...).stream()")
    if unknown := sorted(set(given) - set(ALLOWED)):
        raise ConfigError(f"the option {unknown[0]!r}", " and ".join(ALLOWED),
                          "the options= of torch.compile")
    return Options.of(binary=given.get("binary"), guard=given.get("guard", Guard()))
