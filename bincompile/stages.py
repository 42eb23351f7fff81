"""Stages that are kept to be read: their graphs stay, what they compute with is held weakly.

A compiled model runs its kernels. Its program and the earlier stages are there to be printed, saved
and compared, so they must not keep memory that nothing else needs: weights of the user's model are
looked up in that model while it lives, and what a kernel holds in a layout of its own is made again
from there when somebody asks.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils.weak import WeakIdKeyDictionary

from bincompile.errors import WeightsGoneError
from bincompile.program import Program, attribute, copied

Source = Callable[[], Any]  # gives a stored value when it is asked for

_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # stored tensor -> weak tensor of the model


class StageModule(fx.GraphModule):
    """A graph whose stored values come from `sources`, by path; it runs and prints like any."""

    sources: Mapping[str, Source]

    @classmethod
    def of(cls, module: fx.GraphModule, sources: Mapping[str, Source]) -> StageModule:
        """The module's own graph with these sources; the module itself must not be used again."""
        made = cls(nn.Module(), fx.Graph())
        object.__setattr__(made, "sources", sources)
        made.graph, made.meta, made.training = module.graph, module.meta, module.training
        return made

    def __getattr__(self, name: str) -> Any:
        sources = self.__dict__.get("sources", {})
        return _at(sources, name) if name in _heads(tuple(sources)) else super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        return strong(self)

    def __reduce__(self) -> Any:
        return strong(self).__reduce__()


class _Path:
    """What stands at a path that leads to stored values."""

    def __init__(self, sources: Mapping[str, Source], path: str) -> None:
        self._sources, self._path = sources, path

    def __getattr__(self, name: str) -> Any:
        return _at(self._sources, f"{self._path}.{name}")


def _at(sources: Mapping[str, Source], path: str) -> Any:
    if path in sources:
        return sources[path]()
    if not any(known.startswith(f"{path}.") for known in sources):
        raise AttributeError(path)
    return _Path(sources, path)


@functools.lru_cache(maxsize=64)
def _heads(paths: tuple[str, ...]) -> frozenset[str]:
    return frozenset(path.partition(".")[0] for path in paths)


def strong(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a stage's graph that holds its stored values itself."""
    return fx.GraphModule({path: attribute(module, path) for path in _stored(module)},
                          copied(module.graph))


def _stored(module: fx.GraphModule) -> list[str]:
    """The paths that the graph reads."""
    return [n.target for n in module.graph.nodes if n.op in ("get_attr", "call_module")]


def own(program: Program, model: nn.Module | ExportedProgram) -> None:
    """Remember which stored tensors of a captured program are memory of the user's model."""
    places = {_place(t): t for t in _tensors(model) if t.numel()}
    for tensor in program.tensors().values():
        owner = places.get(_place(tensor)) if isinstance(tensor, torch.Tensor) else None
        if owner is not None and owner is not tensor:
            _owners[tensor] = weakref.ref(owner)


def _tensors(model: nn.Module | ExportedProgram) -> Iterable[torch.Tensor]:
    if isinstance(model, ExportedProgram):
        found: Iterable[Any] = (*model.state_dict.values(), *model.constants.values())
    else:
        found = (value for part in model.modules()
                 for values in (part._parameters, part._buffers, part.__dict__)
                 for value in values.values())
    return (value for value in found if isinstance(value, torch.Tensor))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def settled(program: Program, restore: Callable[[torch.Tensor], Source | None]) -> Program:
    """The program with every stage a `StageModule`.

    What `restore` has a source for comes from there. Tensors of the user's model that the last
    stage does not read are held weakly; all others are held as they are.

    Args:
        program: the last stage; its parents come with it. They must not be used again.
        restore: for a stored tensor, how to make it again, or None.
    """
    final = {id(v) for v in program.tensors().values()}
    modules: dict[int, StageModule] = {}
    known: dict[int, Source] = {}

    def source(value: Any) -> Source:
        if id(value) not in known:
            made = restore(value) if isinstance(value, torch.Tensor) else None
            weak = _weakly(value) if made is None and id(value) not in final else None
            known[id(value)] = made or weak or functools.partial(_itself, value)
        return known[id(value)]

    parent = None
    for stage in program.stages:
        module = stage.graph_module
        if isinstance(module, StageModule):  # settled before
            modules[id(module)] = module
        elif id(module) not in modules:
            modules[id(module)] = StageModule.of(
                module, {path: source(attribute(module, path)) for path in _stored(module)})
        parent = dataclasses.replace(stage, graph_module=modules[id(module)], parent=parent)
    assert parent is not None
    return parent


def _itself(value: Any) -> Any:
    return value


def _weakly(tensor: Any) -> Source | None:
    """The tensor by way of the model that owns it; None if none does."""
    owner = _owners.get(tensor) if isinstance(tensor, torch.Tensor) else None
    if owner is None:
        return None
    place = _place(tensor)

    def source() -> torch.Tensor:
        found = owner()
        if found is None or _place(found) != place:
            raise WeightsGoneError(
                "an earlier stage of a program whose model has been dropped or given new weights",
                "stages before \"lowered\" as long as the model itself is there",
                "keep the model, or read the stage before it goes")
        return found.detach()

    return source
