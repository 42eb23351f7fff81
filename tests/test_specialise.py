"""Masks that sizes alone settle become attributes, exactly, and no others do."""

from __future__ import annotations

import math

import facet_models as spelled
import pytest
import torch
from facet_models import LEAST, WIDTH, added, back, hidden, masked

import bincompile as bc
from bincompile.ops import operator_of

CAUSAL, IDLE = "a causal mask became an attribute", "a mask that keeps every key is left out"
CASES: dict[str, tuple[spelled.Core, str, dict[str, bool]]] = {
    "filled": (hidden(lambda m, x: back(x) >= 0), CAUSAL, {"causal": True}),
    "filled with the least number": (hidden(lambda m, x: back(x) >= 0, LEAST), CAUSAL,
                                     {"causal": True}),
    "added": (added(lambda m, x: back(x) >= 0), CAUSAL, {"causal": True}),
    "added, least": (added(lambda m, x: back(x) >= 0, LEAST), CAUSAL, {"causal": True}),
    "two masks": (masked(lambda m, s, x: (s + torch.where(back(x) >= 0, 0.0, LEAST)).masked_fill(
        back(x) < 0, -math.inf)), CAUSAL, {"causal": True}),
    "nothing hidden": (added(lambda m, x: back(x) < x.shape[1]), IDLE, {"causal": False}),
    "-1e4 may still be seen": (added(lambda m, x: back(x) >= 0, -1e4), "", {"bias": True}),
    "a window": (hidden(lambda m, x: (back(x) >= 0) & (back(x) < 3)), "", {"mask": True}),
    "a long window": (hidden(lambda m, x: (back(x) >= 0) & (back(x) < 5000)), "", {"mask": True}),
    "one off": (hidden(lambda m, x: back(x) >= -1), "", {"mask": True}),
    "a bias and a mask": (masked(spelled.sloped), "", {"mask": True, "bias": True}),
}


def canonical(compiled: bc.CompiledModel) -> dict[str, object]:
    """The arguments of the one attention in the compiled program."""
    nodes = [n for n in compiled.program.graph.nodes
             if (found := operator_of(n.target)) and found.name == "attention"]
    (node,) = nodes
    given = operator_of(node.target).bind(node.args, dict(node.kwargs))
    return {name: value if isinstance(value, bool) else value is not None
            for name, value in given.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_mask_of_sizes_becomes_an_attribute(name: str) -> None:
    core, note, expected = CASES[name]
    model = spelled.Spelled(core).eval()
    compiled = bc.optimize(model, (torch.randn(2, 6, WIDTH),))
    assert [n for n in compiled.report.notes if CAUSAL in n or IDLE in n] == (
        [f"1 attention: {note}"] if note else [])
    given = canonical(compiled)
    wanted = {"causal": False, "bias": False, "mask": False, **expected}
    assert {key: given[key] for key in wanted} == wanted
    with torch.no_grad():
        for shape in ((2, 6), (3, 17), (1, 1)):
            x = 2 * torch.randn(*shape, WIDTH)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_masks_of_inputs_stay() -> None:
    core = hidden(lambda m, x, pad: (back(x) >= 0) & pad[:, None, None])
    x, pad = torch.randn(2, 6, WIDTH), torch.ones(2, 6, dtype=torch.bool)
    compiled = bc.optimize(spelled.Spelled(core).eval(), (x, pad))
    assert canonical(compiled)["mask"] and not canonical(compiled)["causal"]


def test_the_last_queries_of_longer_keys_stay_masked() -> None:
    model = spelled.Spelled(spelled.last_queries).eval()
    compiled = bc.optimize(model, (torch.randn(2, 4, WIDTH), torch.randn(2, 7, WIDTH)))
    assert canonical(compiled)["mask"] and not canonical(compiled)["causal"]
    args = torch.randn(3, 5, WIDTH), torch.randn(3, 9, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-5, atol=1e-5)
