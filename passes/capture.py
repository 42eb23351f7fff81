"""Capture: a model and one call of it become a program.

The graph is what `torch.export` sees (not strict, sizes symbolic) after `run_decompositions({})`:
functional, yet with linear, matmul, softmax and attention still whole.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from bincompile.errors import CaptureError, InputError, InputTypeError
from bincompile.passes.check import check_sizes
from bincompile.passes.examples import (
    axes_to_try,
    check_model,
    free_axes,
    grown,
    is_open_ended,
    labels_of,
    more_axes,
    parameters,
    run_recorded,
    stated_axes,
)
from bincompile.passes.exporting import exporting, one_at_a_time, without_fast_path
from bincompile.passes.sizes import conditions
from bincompile.passes.unlift import WRAPPER, unlift
from bincompile.program import Program
from bincompile.signature import InputSpec, Signature
from bincompile.stages import own
from bincompile.structure import hold

log = logging.getLogger(__name__)



@dataclasses.dataclass(frozen=True)
class Captured:
    """A captured program beside the model, both over flat inputs; the example may be unknown.

    `doubtful` are conditions on sizes that torch assumed and the graph may not need.
    """

    program: Program
    model: Callable[[list[Any]], list[Any]]
    example: list[Any] | None
    doubtful: tuple[str, ...] = ()


def capture(model: nn.Module | ExportedProgram, args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = "auto") -> Captured:
    """The program of one call, checked against the model at several sizes.

    Raises:
        CaptureError: the model has no graph.
        ProofError: the graph is not the model.
    """
    captured = _checked(_capture(model, args, kwargs, dynamic_shapes), model)
    own(captured.program, model)
    if captured.example is None or isinstance(model, ExportedProgram):
        return captured
    try:
        captured.program.signature.flatten(tuple(args), dict(kwargs or {}))
    except InputError:  # the given sizes of 1 were doubled, and the model treats them apart
        captured = _checked(_capture(model, args, kwargs, dynamic_shapes, grow=False), model)
        own(captured.program, model)
    return captured


def _checked(captured: Captured, model: nn.Module | ExportedProgram) -> Captured:
    if captured.example is None:
        return captured
    with exporting(model), torch.no_grad():
        expected = captured.model([v.clone() if isinstance(v, torch.Tensor) else v
                                   for v in captured.example])
    program = check_sizes(captured.program, captured.model, captured.example, expected,
                          captured.doubtful)
    return dataclasses.replace(captured, program=program)


def _capture(model: nn.Module | ExportedProgram, args: tuple[Any, ...],
             kwargs: Mapping[str, Any] | None, dynamic_shapes: Any,
             grow: bool = True) -> Captured:
    if isinstance(model, ExportedProgram):
        return _from_exported(model, args, kwargs)
    check_model(model)
    args, kwargs = tuple(args), dict(kwargs or {})
    stated = dynamic_shapes not in ("auto", None)
    if stated and not is_open_ended(model, kwargs):
        with exporting(model):
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes,
                                           strict=False)
        return _from_exported(exported, args, kwargs, *parameters(model))
    held = hold((args, kwargs))
    flat, in_spec = pytree.tree_flatten(held)
    example = [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in flat]
    if not any(isinstance(v, torch.Tensor) for v in flat):
        raise InputTypeError(f"a call without tensors: {args} {kwargs}", "at least one tensor",
                             "args= and kwargs= of optimize")
    wrapped = _Flat(model, example, in_spec)
    with exporting(model), torch.no_grad():
        example = grown(wrapped, example) if grow and dynamic_shapes == "auto" else example
        tensors = tuple(v for v in example if isinstance(v, torch.Tensor))
        choices = [(stated_axes(model, args, kwargs, dynamic_shapes),)] if stated else \
            axes_to_try(tensors) if dynamic_shapes == "auto" else [None]
        exported = _export(wrapped, tensors, choices)
        if dynamic_shapes == "auto":
            exported = _widened(wrapped, tensors, choices[0], exported)
    labels = labels_of(held[0], held[1], parameters(model)[0])
    signature, doubtful, graph_module = _signed(exported, wrapped, flat, labels, parameters(model))
    if not stated:
        signature, doubtful = _without_lows(signature, doubtful)
    program = Program(graph_module, signature, notes=_fixed_sizes(signature, choices[0]))
    return Captured(program, _flat_function(model, in_spec), example, doubtful)


def _signed(exported: ExportedProgram, wrapped: _Flat, flat: list[Any], labels: list[str],
            forward: tuple[tuple[str, ...], dict[str, Any]],
            ) -> tuple[Signature, tuple[str, ...], fx.GraphModule]:
    """The signature of a graph, conditions that may not be needed, and the graph."""
    graph_module, values = unlift(exported)
    tensor_values = iter(values)
    inputs = tuple(
        _spec(label, next(tensor_values)) if isinstance(v, torch.Tensor)
        else InputSpec(label, constant=v) for label, v in zip(labels, flat, strict=True))
    _name_inputs(graph_module, flat, labels)
    plain = Signature(inputs, wrapped.in_spec, wrapped.out_spec, *forward,
                      _ranges(exported, inputs))
    return *_conditioned(plain, values), graph_module


def _export(wrapped: _Flat, tensors: tuple[torch.Tensor, ...],
            choices: Sequence[Any]) -> ExportedProgram:
    """The graph with the first of these choices of axes that vary for which torch makes one.

    torch fails on some formulas of sizes that a model asks about; with those fixed it does not.
    """
    first: Exception | None = None
    for shapes in choices:
        try:
            exported = torch.export.export(wrapped, tensors, dynamic_shapes=shapes, strict=False)
            exported = exported.run_decompositions({})
            if _all_written(exported):
                return exported
            first = first or CaptureError(
                "a branch on sizes that can't be written as a comparison of integers",
                "comparisons of sums, products and remainders of sizes",
                "the branch, or dynamic_shapes=None to fix all sizes")
        except (GuardOnDataDependentSymNode, CaptureError):
            raise
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def _widened(wrapped: _Flat, tensors: tuple[torch.Tensor, ...], tried: Any,
             exported: ExportedProgram) -> ExportedProgram:
    """The graph with more axes that vary, if there are such and none is lost for them."""
    wider = more_axes(tensors, tried, exported)
    if wider is None:
        return exported
    try:
        found = _export(wrapped, tensors, [wider])
    except Exception as error:
        log.debug("a third axis stays as it is: %s", error)
        return exported
    return found if free_axes(exported) < free_axes(found) else exported


def _all_written(exported: ExportedProgram) -> bool:
    """Whether each of the model's own questions about sizes can be asked of a call."""
    values = [n.meta["val"] for n in exported.graph.nodes
              if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    sizes = [s for v in values for s in v.shape if isinstance(s, torch.SymInt)]
    if not sizes:
        return True
    used = {str(s) for s in sizes if str(s).isidentifier()}
    return (None, True) not in conditions(sizes[0].node.shape_env, used)


def _without_lows(signature: Signature,
                  doubtful: tuple[str, ...]) -> tuple[Signature, tuple[str, ...]]:
    """Least sizes as doubtful conditions: torch narrows a range for what only it asks, too."""
    lows = {s: low for s, (low, _) in signature.ranges.items() if low > 1}
    ranges = {s: (1, high) for s, (_, high) in signature.ranges.items()}
    return (dataclasses.replace(signature, ranges=ranges),
            (*doubtful, *(f"{s} >= {low}" for s, low in lows.items())))


def _fixed_sizes(signature: Signature, shapes: Any) -> tuple[str, ...]:
    """A note of the sizes that were to vary and that the model fixed."""
    tensors = [spec for spec in signature.inputs if spec.dtype is not None]
    found = [f"dimension {axis} of {spec.name} to {spec.shape[axis]}"
             for spec, axes in zip(tensors, shapes[0] if shapes else (), strict=bool(shapes))
             for axis in (axes if isinstance(axes, dict) else ())
             if isinstance(spec.shape[axis], int)]
    return (f"the model fixes {', '.join(found)}",) if found else ()


def _flat_function(model: nn.Module, in_spec: pytree.TreeSpec) -> Callable[[list[Any]], list[Any]]:
    def run(flat: list[Any]) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(flat, in_spec)
        with one_at_a_time, without_fast_path():
            return pytree.tree_leaves(hold(model(*args, **kwargs), fixed=True))

    return run


def _from_exported(exported: ExportedProgram, args: tuple[Any, ...],
                   kwargs: Mapping[str, Any] | None, names: tuple[str, ...] = (),
                   defaults: Mapping[str, Any] | None = None) -> Captured:
    """The program of an ExportedProgram, with its own sizes."""
    given = (args, dict(kwargs or {})) if args or kwargs else exported.example_inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about torch
        whole = exported.module()
        exported = exported.run_decompositions({})
    graph_module, values = unlift(exported)
    spec = exported.call_spec
    labels = [n.name for n in graph_module.graph.nodes if n.op == "placeholder"]
    inputs = tuple(_spec(label, v) if isinstance(v, torch.Tensor) else InputSpec(label, constant=v)
                   for label, v in zip(labels, values, strict=True))
    signature, doubtful = _conditioned(
        Signature(inputs, spec.in_spec, spec.out_spec, names, defaults or {},
                  _ranges(exported, inputs)), values)
    example = None if given is None else signature.flatten(*given)
    return Captured(Program(graph_module, signature), _flat_function(whole, spec.in_spec), example,
                    doubtful)


class _Flat(nn.Module):
    """The model as a function of its tensors alone, in pytree order, returning a flat tuple.

    `out_spec` is the structure of what the last call returned.
    """

    def __init__(self, model: nn.Module, flat: list[Any], in_spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.training = False
        self.add_module(WRAPPER, model)
        self._constants = tuple(None if isinstance(v, torch.Tensor) else (v,) for v in flat)
        self.in_spec = in_spec
        self.out_spec: pytree.TreeSpec

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        remaining = iter(tensors)
        flat = [next(remaining) if c is None else c[0] for c in self._constants]
        args, kwargs = pytree.tree_unflatten(flat, self.in_spec)
        model = self.get_submodule(WRAPPER)
        call: Callable[..., Any] = model
        if isinstance(model, fx.GraphModule):
            call = functools.partial(run_recorded, model)
        result = hold(call(*args, **kwargs), fixed=True)
        after, spec = pytree.tree_flatten(hold((args, kwargs)))
        if spec != self.in_spec or any(a is not b for a, b in zip(after, flat, strict=True)):
            raise CaptureError("the forward changes a list, a dict or an object of its inputs",
                               "a forward that leaves its inputs as they are",
                               "return the new values, or call the model without that input")
        leaves, self.out_spec = pytree.tree_flatten(result)
        return tuple(leaves)


def _name_inputs(module: fx.GraphModule, flat: list[Any], labels: list[str]) -> None:
    """One placeholder for each input, also those that are not tensors, named as in the call."""
    graph = module.graph
    old = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_before(next(iter(graph.nodes))):
        fresh = [graph.placeholder(re.sub(r"\W+", "_", label).strip("_")) for label in labels]
    for node, value in zip(fresh, flat, strict=True):
        node.meta["val"] = value
    kept = (n for n, value in zip(fresh, flat, strict=True) if isinstance(value, torch.Tensor))
    for node, replaced in zip(kept, old, strict=True):
        node.meta = dict(replaced.meta)
        replaced.replace_all_uses_with(node)
        graph.erase_node(replaced)
    module.recompile()


def _spec(name: str, value: torch.Tensor) -> InputSpec:
    sizes = map(str, value.shape)  # a symbol that the model fixed prints as its number
    return InputSpec(name, value.dtype, tuple(int(s) if s.isdecimal() else s for s in sizes))


def _conditioned(signature: Signature, values: list[Any]) -> tuple[Signature, tuple[str, ...]]:
    """The signature with what the model's code asked of its sizes, and what only torch asked."""
    named, own = _name_sizes(signature)
    used = {s for spec in named.inputs for s in spec.shape if isinstance(s, str)}
    sizes: list[Any] = [s for v in values if isinstance(v, torch.Tensor) for s in v.shape]
    environment = next((s.node.shape_env for s in sizes if isinstance(s, torch.SymInt)), None)
    found = [] if environment is None else list(conditions(environment, used))
    if (None, True) in found:
        raise CaptureError("a branch on sizes that can't be written as a comparison of integers",
                           "comparisons of sums, products and remainders of sizes",
                           "the branch, or dynamic_shapes=None to fix all sizes")
    own += [text for text, asked in found if asked and text is not None]
    doubtful = tuple(text for text, asked in found if text is not None and not asked)
    return dataclasses.replace(named, conditions=tuple(own)), doubtful


def _name_sizes(signature: Signature) -> tuple[Signature, list[str]]:
    """The signature with a symbol for every size that is a formula, and what the symbols are."""
    facts, inputs = [], []
    for index, spec in enumerate(signature.inputs):
        shape = list(spec.shape)
        for axis, size in enumerate(shape):
            if isinstance(size, str) and not size.isidentifier():
                shape[axis] = f"d{index}_{axis}"
                facts.append(f"{shape[axis]} == {size}")
        inputs.append(dataclasses.replace(spec, shape=tuple(shape)))
    return dataclasses.replace(signature, inputs=tuple(inputs)), facts


def _ranges(exported: ExportedProgram, inputs: tuple[InputSpec, ...]) -> dict[str, tuple]:
    """Least and greatest size of each symbol; a least size of 2 is torch's habit, not a fact."""
    used = {s for spec in inputs for s in spec.shape if isinstance(s, str)}
    found: dict[str, tuple[int, int | None]] = {name: (1, None) for name in used}
    for symbol, limits in exported.range_constraints.items():
        if str(symbol) in used:
            low, high = limits.lower, limits.upper
            found[str(symbol)] = (1 if low <= 2 else int(low),
                                  None if not high.is_finite or high > 2**31 else int(high))
    return found
