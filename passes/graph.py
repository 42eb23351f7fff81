"""Reading and writing graphs: where a value comes from, and building nodes or values alike."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from bincompile.program import attribute

aten = torch.ops.aten
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Forms of operators whose own fake kernel would settle what a symbolic size is.
SYMBOLIC: Mapping[Any, Callable[..., Any]] = {
    aten.constant_pad_nd.default: torch._refs.constant_pad_nd}
SIZES = (aten.sym_size.int, aten.sym_numel.default)


def value_of(node: Any) -> Any:
    """The fake value of a node; the argument itself if it is not a node."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a tensor node: ints and SymInts."""
    return tuple(value_of(node).shape)


def is_tensor(node: Any) -> bool:
    """Whether a node holds a tensor."""
    return isinstance(node, fx.Node) and isinstance(value_of(node), torch.Tensor)


def weight_bytes(nodes: Iterable[fx.Node]) -> int:
    """Bytes of stored tensors, those of indices and flags left out."""
    values = (value_of(n) for n in nodes)
    return sum(v.nbytes for v in values if v.dtype not in (torch.int32, torch.int64, torch.bool))


def activations(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value depends on the values of an input (not just on its sizes)."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (
                node.target not in SIZES and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def number(graph_module: fx.GraphModule, arg: Any) -> float | None:
    """A Python number, or the value of a stored or filled tensor of one element; else None."""
    if isinstance(arg, bool | int | float):
        return float(arg)
    if not isinstance(arg, fx.Node):
        return None
    if arg.op == "get_attr":
        tensor = attribute(graph_module, arg.target)
        return float(tensor) if tensor.numel() == 1 and not tensor.dtype.is_complex else None
    if arg.target in (aten.scalar_tensor.default, aten.full.default, aten.full_like.default):
        fill = arg.args[0] if arg.target is aten.scalar_tensor.default else arg.args[1]
        return number(graph_module, fill)
    if arg.target in (aten._to_copy.default, aten.to.dtype, aten.reshape.default,
                      aten.expand.default):
        return number(graph_module, arg.args[0])
    return None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an aten node by name, defaults filled in."""
    schema = node.target._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update(zip((a.name for a in schema), node.args, strict=False), **node.kwargs)
    return bound


class Build:
    """Writes nodes into a graph before `at`, with fake values and the records of `like`."""

    def __init__(self, graph: fx.Graph, at: fx.Node, like: fx.Node) -> None:
        self.graph, self.at, self.like = graph, at, like
        self.mode: FakeTensorMode | None = fake_mode(graph)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator; returns its node."""
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.like.meta.items()
                     if k in ("nn_module_stack", "stack_trace")}
        fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), value_of)
        shaped = SYMBOLIC.get(target, target)
        if self.mode is None:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        else:
            with self.mode, torch.no_grad():
                node.meta["val"] = shaped(*fake_args, **fake_kwargs)
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One result of a node that has several."""
        return self.call(operator.getitem, node, index)

    def size(self, node: fx.Node, axis: int) -> Any:
        """The size of an axis: an int, or a node if it is symbolic."""
        size = shape_of(node)[axis]
        axis = axis % len(shape_of(node))
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, axis)

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """All sizes of a node."""
        return tuple(self.size(node, axis) for axis in range(len(shape_of(node))))


class Evaluate:
    """The same interface on real tensors: what `Build` would write, run at once."""

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs an operator."""
        return target(*args, **kwargs)

    def item(self, value: Any, index: int) -> Any:
        """One of several results."""
        return value[index]

    def size(self, tensor: torch.Tensor, axis: int) -> int:
        """The size of an axis."""
        return tensor.shape[axis]

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """All sizes."""
        return tuple(tensor.shape)


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that the fake values of this graph belong to."""
    for node in graph.nodes:
        found = getattr(value_of(node), "fake_mode", None)
        if found is not None:
            return found
    return None


def between(outputs: tuple[fx.Node, ...], inputs: set[fx.Node]) -> list[fx.Node]:
    """The nodes that compute `outputs` from `inputs`, in order; sizes of inputs stay outside."""
    seen: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node in seen or node in inputs:
            continue
        seen.add(node)
        pending += [n for n in node.all_input_nodes if is_tensor(n) or is_sequence(n)]
    order = {n: i for i, n in enumerate(next(iter(seen)).graph.nodes)} if seen else {}
    return sorted(seen, key=order.__getitem__)


def depends(node: fx.Node, on: fx.Node) -> bool:
    """Whether a node is computed from another one."""
    seen, pending = {node}, [node]
    while pending:
        found = set(pending.pop().all_input_nodes) - seen
        if on in found:
            return True
        seen |= found
        pending += found
    return False


def put_in_order(graph: fx.Graph) -> None:
    """Move every node behind what it reads; else nodes stay in the order that they have.

    What reads or writes a value stays behind those that write it before.
    """
    nodes = list(graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    behind = {node: {*node.users, *_later(node)} for node in nodes}
    missing = dict.fromkeys(nodes, 0)
    for node in nodes:
        for user in behind[node]:
            missing[user] += 1
    ready = [index for index, node in enumerate(nodes) if not missing[node]]
    last: fx.Node | None = None
    while ready:
        node = nodes[heapq.heappop(ready)]
        if last is not None:
            last.append(node)
        last = node
        for user in behind[node]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, order[user])


def _later(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes behind one in the graph that it must not change places with: either writes what
    the other reads.
    """
    for source in node.all_input_nodes:
        for user in source.users:
            if user is not node and node < user and (
                    writes(node, source) or writes(user, source)):
                yield user


def writes(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    return any(given.get(a.name) is source for a in schema.arguments
               if a.alias_info is not None and a.alias_info.is_write)


def is_sequence(node: fx.Node) -> bool:
    """Whether a node holds several tensors (a split, for example)."""
    return isinstance(value_of(node), tuple | list)


def in_double(arg: Any) -> Any:
    """An argument with float dtypes raised to float64, for proofs."""
    if isinstance(arg, torch.dtype) and arg in FLOATS:
        return torch.float64
    if isinstance(arg, tuple | list):
        return type(arg)(map(in_double, arg))
    return arg


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any,
               **kwargs: Any) -> torch.Tensor:
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"{key.shape[-2]} keys and {value.shape[-2]} values")
    return aten.scaled_dot_product_attention.default(query, key, value, *args, **kwargs)


# What torch runs at sizes that it should refuse: it reads behind the values.
CHECKED = {aten.scaled_dot_product_attention.default: _attention}


def run_nodes(nodes: list[fx.Node], env: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Run nodes on real values in float64; `env` holds the values that they read."""
    for node in nodes:
        args = in_double(fx.node.map_arg(node.args, env.__getitem__))
        kwargs = {k: in_double(v)
                  for k, v in fx.node.map_arg(dict(node.kwargs), env.__getitem__).items()}
        target = CHECKED.get(node.target, node.target)
        made = target(*args, **kwargs)  # a creation without a dtype is in torch's default
        env[node] = made.double() if getattr(made, "dtype", None) in FLOATS else made
    return env


def run_as_is(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """The value of a node at the dtypes of the graph."""
    with torch.no_grad():
        return node.target(*fx.node.map_arg(node.args, env.__getitem__),
                           **fx.node.map_arg(dict(node.kwargs), env.__getitem__))


def copy_module(graph_module: fx.GraphModule,
                tensors: Mapping[str, torch.Tensor] | None = None,
                ) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of the graph that shares the stored tensors, and where each node went."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph_module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    stored = {n.target: attribute(graph_module, n.target)
              for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule({**stored, **(tensors or {})}, graph), copies


def store(graph_module: fx.GraphModule, name: str, tensor: torch.Tensor) -> fx.Node:
    """A new get_attr node at the head of the graph for a new stored tensor."""
    stored = graph_module.graph.find_nodes(op="get_attr", sort=False)
    taken = {n.target for n in stored}
    unique = name
    for index in range(1, len(taken) + 2):
        if unique not in taken and not hasattr(graph_module, unique):
            break
        unique = f"{name}_{index}"
    parent, _, leaf = unique.rpartition(".")
    try:
        graph_module.get_submodule(parent)
    except AttributeError:
        graph_module.add_submodule(parent, torch.nn.Module())
    graph_module.get_submodule(parent).register_buffer(leaf, tensor)
    first = next(iter(graph_module.graph.nodes))
    with graph_module.graph.inserting_before(first):
        node = graph_module.graph.get_attr(unique)
    mode = fake_mode(graph_module.graph)
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode is not None else tensor
    return node


def finish(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Drop what nothing reads, check the graph, and make it callable again."""
    drop_unread(graph_module.graph)
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def drop_unread(graph: fx.Graph) -> None:
    """Drop every node that nothing reads; assertions on sizes stay.

    torch counts operators that may draw random numbers as impure, so attention would stay behind.
    """
    asserts = (aten._assert_scalar.default, aten._assert_async.msg)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or n.target in asserts)


def users(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read this one, except those that only ask for its sizes."""
    return (n for n in node.users if n.target not in SIZES)
