"""Examples: a model and one call of it, checked, named and made fit for a capture."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from bincompile.errors import ConfigError, InputTypeError
from bincompile.passes.fast_path import PLAIN

# Modules whose own training flag nothing reads.
_CONTAINERS = (nn.Module, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def check_model(model: Any) -> None:
    """Raise unless this is a model in eval mode, all of whose layers are ready."""
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise InputTypeError("a TorchScript module, whose code torch.export does not see",
                             "nn.Module, fx.GraphModule or torch.export.ExportedProgram",
                             "pass the nn.Module that it was scripted or traced from")
    if not isinstance(model, nn.Module):
        change = "put the call into the forward of an nn.Module" if callable(model) \
            else "the model argument"
        raise InputTypeError(f"a model of type {type(model).__name__}",
                             "nn.Module, fx.GraphModule or torch.export.ExportedProgram", change)
    training = next((name or "the model" for name, m in model.named_modules()
                     if m.training and not _flag_is_idle(m)), None)
    if training is not None:
        raise ConfigError(f"{training} is in training mode", "a model in eval mode",
                          "call model.eval() before optimize")
    _check_weights(model)
    for module in model.modules():
        check = getattr(type(module), "check_before_capture", None)  # of layers that may not be
        if check is not None:  # called before they are ready, or the call would change them
            check(module)


def _flag_is_idle(module: nn.Module) -> bool:
    """Whether the code of a module can't read its training flag."""
    return isinstance(module, fx.GraphModule) or type(module) in _CONTAINERS


def _check_weights(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(f"{name} has no shape yet: its layer is lazy", "weights with values",
                              "call the model once before optimize")
        if tensor.is_meta:
            raise ConfigError(f"{name} is on the meta device", "weights with values",
                              "model.to_empty(device='cpu'), and load its weights")


def parameters(model: nn.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the positional parameters of forward, and the defaults of all parameters."""
    found = inspect.signature(model.forward).parameters.values()
    named = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (tuple(p.name for p in named),
            {p.name: p.default for p in found if p.default is not p.empty})


def labels_of(args: tuple[Any, ...], kwargs: Mapping[str, Any],
              names: tuple[str, ...]) -> list[str]:
    """A name for each flat input: of its parameter, and its place in it."""
    tops = [*itertools.islice(itertools.chain(names, (f"arg{i}" for i in itertools.count())),
                              len(args)), *kwargs]
    found = []
    for top, value in zip(tops, [*args, *kwargs.values()], strict=True):
        found += [top + pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(value)]
    return found


def grown(model: Callable[..., Any], example: list[Any]) -> list[Any]:
    """The example with sizes of 1 in the first two axes doubled, where the model runs with it.

    `torch.export` fixes an axis whose example size is 1 or 0. The model runs on shapes alone.
    """
    for axis in (0, 1):
        wider = [torch.cat((v, v), axis)
                 if isinstance(v, torch.Tensor) and v.ndim > axis and v.shape[axis] == 1 else v
                 for v in example]
        tensors = [v for v in wider if isinstance(v, torch.Tensor)]
        if all(a is b for a, b in zip(wider, example, strict=True)):
            continue
        with contextlib.suppress(Exception), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(*map(mode.from_tensor, tensors))  # raises where a size has to be 1
            example = wider
    return example


def axes_to_try(tensors: tuple[torch.Tensor, ...]) -> list[Any]:
    """Which axes of each input may vary, the most first, then the first axis alone, then none.

    The most are the first two and others of the same size. A size of 1 is left: torch would fix it.
    """
    sizes = {size for t in tensors for size in t.shape[:2]}
    most = tuple({axis: Dim.AUTO for axis, size in enumerate(t.shape)
                  if size > 1 and (axis < 2 or size in sizes)} for t in tensors)
    rows = tuple({0: Dim.AUTO} if t.ndim and t.shape[0] > 1 else {} for t in tensors)
    return [(most,), (rows,), None]


def more_axes(tensors: tuple[torch.Tensor, ...], tried: Any, exported: ExportedProgram) -> Any:
    """The same choice with the third axis where it may be time: None if there is no such input.

    Those are (batch, features, time), where the model fixed the second axis, and (batch, heads,
    time, features), which images are not: those have 1 or 3 channels in the second axis.
    """
    free = free_axes(exported)

    def third(index: int, t: torch.Tensor) -> bool:
        if not 3 <= t.ndim <= 4 or t.shape[2] < 2 or 2 in tried[0][index]:
            return False
        return (index, 1) not in free if t.ndim == 3 else t.shape[1] not in (1, 3)

    found = [third(index, t) for index, t in enumerate(tensors)]
    if not any(found):
        return None
    return (tuple({a: d for a, d in axes.items() if (index, a) in free} | {2: Dim.AUTO}
                  if more else axes
                  for index, (axes, more) in enumerate(zip(tried[0], found, strict=True))),)


def free_axes(exported: ExportedProgram) -> set[tuple[int, int]]:
    """The axes of each input that vary; a symbol that was fixed prints as its number."""
    given = set(exported.graph_signature.user_inputs)
    values = [n.meta["val"] for n in exported.graph.nodes
              if n.op == "placeholder" and n.name in given]
    return {(index, axis) for index, v in enumerate(values) for axis, size in enumerate(v.shape)
            if not str(size).isdecimal()}


def is_open_ended(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether forward takes `*args`, or the call uses its `**kwargs`: torch can't name those."""
    found = inspect.signature(model.forward).parameters
    kinds = {p.kind for p in found.values()}
    return inspect.Parameter.VAR_POSITIONAL in kinds or (
        inspect.Parameter.VAR_KEYWORD in kinds and not set(kwargs) <= set(found))


def stated_axes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any],
                dynamic_shapes: Any) -> tuple[Any, ...]:
    """What the caller said of the axes of each tensor of a call, in flat order.

    Args:
        dynamic_shapes: by name of a parameter, entries of `**kwargs` by their own names or inside
            of that parameter; or a sequence in the order of the call.

    Raises:
        InputTypeError: it does not fit the call.
    """
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    spread = {name: None for name, p in bound.signature.parameters.items()
              if p.kind is p.VAR_KEYWORD}
    by_name = dynamic_shapes
    if isinstance(dynamic_shapes, list | tuple):
        by_name = dict(zip(bound.arguments, dynamic_shapes, strict=False))
    for name in spread:
        by_name = {k: v for k, v in by_name.items() if k != name} | (by_name.get(name) or {})
    given = {**{k: v for k, v in bound.arguments.items() if k not in spread},
             **{k: v for k, v in kwargs.items() if k not in bound.arguments}}
    if unknown := sorted(set(by_name) - set(given)):
        raise InputTypeError(f"dynamic_shapes for {unknown[0]!r}", ", ".join(given),
                             "the dynamic_shapes= argument")
    order = [*(k for k in given if k not in kwargs), *kwargs]
    return tuple(itertools.chain.from_iterable(
        _axes(given[name], by_name.get(name), name) for name in order))


def _axes(value: Any, stated: Any, name: str) -> Iterator[Any]:
    """What is stated for each tensor in a tree."""
    children, spec = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    if spec.is_leaf():
        if isinstance(value, torch.Tensor):
            yield stated
        return
    parts = [None] * len(children) if stated is None else \
        pytree.tree_leaves(stated, is_leaf=lambda v: v is not stated)
    if len(parts) != len(children):
        raise InputTypeError(f"dynamic_shapes with {len(parts)} parts for {name}",
                             f"{len(children)} parts, as the input has",
                             "the dynamic_shapes= argument")
    for child, part in zip(children, parts, strict=True):
        yield from _axes(child, part, name)


def run_recorded(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Call a graph; while it is captured, nodes keep the module and source line that they have.

    Calls of torch.nn's fast path are made in plain operators.
    """
    if type(module.graph._codegen) is not fx.graph.CodeGen:  # its inputs are not the placeholders
        return module(*args, **kwargs)
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    with fx.traceback.preserve_node_meta():
        return _Recorded(module).run(*bound.args, **bound.kwargs)


class _Recorded(fx.Interpreter):
    """Runs nodes under their own records, except modules: what is inside of those has its own."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(PLAIN.get(target, target), args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "item" and isinstance(args[0], float):  # a number that dynamo held as a tensor
            return args[0]
        return super().call_method(target, args, kwargs)

    def _set_current_node(self, node: fx.Node) -> Any:
        return contextlib.nullcontext() if node.op == "call_module" \
            else super()._set_current_node(node)
