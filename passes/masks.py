"""Masks: what a mask is, read from the subgraph that makes it."""

from __future__ import annotations

import torch
from torch import fx

from bincompile.passes.graph import between, run_nodes, shape_of, value_of
from bincompile.passes.patterns import Context
from bincompile.passes.sizes import assignments, concrete
from bincompile.program import attribute

DROPPED = -1e4  # an added value at or below this drops a key


def is_causal(mask: fx.Node, context: Context, inverted: bool) -> bool:
    """Whether a mask that depends on sizes alone keeps key j of query i just where j <= i.

    It is computed at several sizes. `inverted`: True drops a key.
    """
    if mask in context.activations or len(shape_of(mask)) < 2:
        return False
    nodes = between((mask,), set())
    checked = 0
    reads = [n for node in nodes for n in node.all_input_nodes]
    for numbers in assignments([mask, *nodes, *reads]):
        env = {n: concrete(value_of(n), numbers) for n in reads if n not in nodes}
        env.update((n, attribute(context.graph_module, n.target))
                   for n in nodes if n.op == "get_attr")
        try:
            found = run_nodes([n for n in nodes if n.op == "call_function"], env)[mask]
        except RuntimeError:  # sizes that the model itself does not allow tell nothing
            continue
        rows, columns = found.shape[-2:]
        if rows != columns or rows == 1:
            continue
        kept = found != inverted if found.dtype == torch.bool else found > DROPPED
        if not bool((kept == torch.ones(rows, rows, dtype=torch.bool).tril()).all()):
            return False
        checked += 1
    return checked > 0
