"""Attention whose softmax is written out: powers and their sums, or a logarithm undone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from bincompile.passes import attention_examples as spelled
from bincompile.passes.attention import Softmax, around_softmax
from bincompile.passes.axes import LAYOUTS, contraction
from bincompile.passes.graph import arguments, aten, is_tensor, shape_of
from bincompile.passes.normalise import maximum_of
from bincompile.passes.patterns import Candidate, Context, Pattern


def _match(node: fx.Node, context: Context) -> Candidate | None:
    found = next(iter(_softmaxes(node)), None)
    return None if found is None else around_softmax(found, context)


def _softmaxes(node: fx.Node) -> Iterator[Softmax]:
    if node.target is aten.exp.default and is_tensor(node.args[0]):
        yield from _of_logarithm(node, node.args[0])
    if node.target is aten.div.Tensor and all(map(is_tensor, node.args)):
        yield from _of_powers(node, *node.args)


def _of_logarithm(node: fx.Node, logarithm: fx.Node) -> Iterator[Softmax]:
    """exp(log_softmax(x)), and exp(x - logsumexp(x))."""
    if logarithm.target is aten.log_softmax.int:
        yield Softmax(node, *logarithm.args[:2])
    if logarithm.target is aten.sub.Tensor and not logarithm.kwargs \
            and all(map(is_tensor, logarithm.args)):
        scores, total = logarithm.args
        found = arguments(total) if total.target is aten.logsumexp.default else {}
        if found and found["self"] is scores and found["keepdim"] and len(found["dim"]) == 1:
            yield Softmax(node, scores, found["dim"][0])


def _of_powers(node: fx.Node, top: fx.Node, total: fx.Node) -> Iterator[Softmax]:
    """exp(x) / sum(exp(x)), or the product of exp(x) with the values over that sum."""
    while total.target in LAYOUTS:
        total = total.args[0]
    if total.target is not aten.sum.dim_IntList:
        return
    sums = arguments(total)
    powers, dims = sums["self"], sums["dim"]
    if powers.target is not aten.exp.default or len(dims) != 1 \
            or sums["dtype"] is not None:
        return
    axis = dims[0] % len(shape_of(powers))
    scores, overflows = powers.args[0], True
    if scores.target is aten.sub.Tensor and len(scores.args) == 2 and not scores.kwargs \
            and maximum_of(scores.args[1]) == (scores.args[0], axis):
        scores, overflows = scores.args[0], False
    if top is powers:
        yield Softmax(node, scores, axis, overflows=overflows)
    elif contraction(top) is not None and powers in top.all_input_nodes:
        yield Softmax(powers, scores, axis, totals=(total, node), overflows=overflows)


written_softmax = Pattern(
    "written_softmax", "attention", (aten.div.Tensor, aten.exp.default), _match,
    examples=spelled.examples(
        spelled.without_maximum, spelled.normalised_late, spelled.normalised_late_with_maximum,
        spelled.by_logarithm, spelled.by_logsumexp),
    near_misses=spelled.examples(
        spelled.softened, spelled.sums_of_queries, spelled.logarithm_kept,
        spelled.renormalised),
)
