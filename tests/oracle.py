"""What one eager call of a model really runs: attention instances and look-ups, counted by value.

The oracle watches every operator below the dispatcher. It knows nothing of graphs or patterns, so
that it can't share a mistake with the compiler. An attention is a softmax of a product of two
computed tensors whose result, summing to one along that axis, weighs a third. A look-up is
`embedding`, a bag, one index tensor into a table, or a product of one-hot rows with one; a table
is what stored tensors alone have made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FUSED = {aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_attention_math,
         aten._scaled_dot_product_attention_math_for_mps, aten.scaled_dot_product_attention}
SOFTMAXES = {aten._softmax, aten._safe_softmax, aten.softmax}
PRODUCTS = {aten.bmm: (0, 1), aten.mm: (0, 1), aten.mv: (0, 1), aten.baddbmm: (1, 2),
            aten.addmm: (1, 2)}
LAYOUT = {aten.view, aten._unsafe_view, aten.reshape, aten.expand, aten.permute, aten.transpose,
          aten.t, aten.clone, aten._to_copy, aten.squeeze, aten.unsqueeze, aten.alias, aten.detach,
          aten.copy_, aten.contiguous, aten.repeat, aten._reshape_alias, aten.as_strided}
PARTIAL = {aten.slice, aten.select, aten.cat, aten.split, aten.split_with_sizes, aten.unbind,
           aten.mul, aten.constant_pad_nd, aten.index, aten.nan_to_num, aten.where, aten.diagonal,
           aten.masked_fill, aten.zero_, aten.stack, aten.add, aten.mul_, aten.masked_fill_,
           aten.convolution}
ON_SCORES = LAYOUT | PARTIAL | {
    aten.sub, aten.div, aten.add_, aten.sub_, aten.div_, aten.tanh, aten.clamp, aten.clamp_min,
    aten.clamp_max, aten.maximum, aten.gather, aten.neg, aten.rsub, aten.unfold, aten.scatter,
    aten.index_put_, aten.minimum, aten.tril, aten.pow, aten.abs}
LOOK_UPS = {aten.embedding, aten._embedding_bag, aten._embedding_bag_forward_only}


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one call ran."""

    attention: int
    look_ups: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a tensor: whose scores, powers, sums or weights it holds.

    `whole` are softmaxes whose every weight is here; `partial` those that lost or mixed some.
    """

    scores: bool = False
    powers: frozenset[int] = frozenset()
    sums: frozenset[int] = frozenset()
    whole: frozenset[int] = frozenset()
    partial: frozenset[int] = frozenset()
    late: frozenset[int] = frozenset()  # powers already multiplied by values, not yet divided


NOTHING = Facts()


class Oracle(TorchDispatchMode):
    """Counts while the model runs. Every tensor is kept, so that an id is never used twice."""

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.tables = {_address(t) for t in stored.values()}  # and what is made of them alone
        self.facts: dict[int, Facts] = {}
        self.live: set[int] = set()  # addresses of the storages that depend on an input
        self.computed: set[int] = set()  # those that are no stored tensor or view of one
        self.repeats: set[int] = set()  # indices by which torch repeats a tensor's parts
        self.kept: list[Any] = []
        self.attention: set[int] = set()
        self.look_ups = self.serial = self.fused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operator, inputs = func.overloadpacket, _tensors((args, kwargs))
        self.look_ups += self._is_look_up(operator, args)
        facts = self._after(operator, args, inputs, result)
        computed = operator in PRODUCTS or operator in LOOK_UPS | SOFTMAXES | FUSED or any(
            self._is_computed(t) for t in inputs)
        live = any(_address(t) in self.live for t in inputs)
        made = not live and any(_address(t) in self.tables for t in inputs)
        for tensor in _tensors(result):
            self.facts[id(tensor)] = facts
            for holds, addresses in ((computed, self.computed), (live, self.live),
                                     (made, self.tables)):
                if holds:
                    addresses.add(_address(tensor))
            if operator is aten.repeat_interleave:
                self.repeats.add(_address(tensor))
        self.kept += (args, result)
        return result

    def mark(self, inputs: Any) -> None:
        """These tensors are the model's inputs."""
        self.kept.append(inputs)
        self.live |= {_address(t) for t in _tensors(inputs)}
        self.computed |= self.live

    def _is_computed(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and _address(tensor) in self.computed

    def _is_table(self, tensor: torch.Tensor) -> bool:
        return (_address(tensor) in self.tables and _address(tensor) not in self.live
                and (tensor.is_floating_point() or tensor.is_complex()))

    def _known(self, tensors: list[torch.Tensor]) -> Facts:
        each = [self.facts.get(id(t), NOTHING) for t in tensors]
        return Facts(any(f.scores for f in each), *(
            frozenset().union(*(getattr(f, field.name) for f in each))
            for field in dataclasses.fields(Facts)[1:]))

    def _after(self, operator: Any, args: Any, inputs: list[torch.Tensor], result: Any) -> Facts:
        if operator in FUSED:
            self.fused += 1
            return NOTHING
        known = self._known(inputs)
        if operator in PRODUCTS:
            return self._product(*(args[i] for i in PRODUCTS[operator]))
        if operator in SOFTMAXES:
            return Facts(whole=self._new()) if known.scores else NOTHING
        if operator in (aten.exp, aten.exp_):
            return Facts(powers=self._new()) if known.scores else NOTHING
        if operator is aten.sum:
            return Facts(sums=known.powers)
        if operator in (aten.div, aten.div_):
            divided, by = self._known(inputs[:1]), self._known(inputs[1:])
            self.attention |= divided.late & by.sums
            if divided.powers & by.sums:
                return Facts(whole=divided.powers & by.sums)
        kept = dataclasses.replace(known, scores=known.scores and operator in ON_SCORES)
        if operator in LAYOUT:
            return kept
        return dataclasses.replace(kept, whole=frozenset(), partial=(
            known.whole | known.partial if operator in PARTIAL else frozenset()))

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> Facts:
        """Weights times values is an attention; anything else of two computed tensors, scores."""
        for weights, values, axis in ((left, right, -1), (right, left, -2)):
            known = self.facts.get(id(weights), NOTHING)
            if not self._is_computed(values) or not known.whole | known.partial | known.powers:
                continue
            self.attention |= known.partial
            if known.whole and _sums_to_one(weights, axis):
                self.attention |= known.whole
            return Facts(scores=True, late=known.powers)
        return Facts(scores=self._is_computed(left) and self._is_computed(right))

    def _new(self) -> frozenset[int]:
        self.serial += 1
        return frozenset({self.serial})

    def _is_look_up(self, operator: Any, args: Any) -> bool:
        if operator in LOOK_UPS:
            return True
        if operator is aten.index:
            return self._is_table(args[0]) and len(_tensors(args[1])) == 1 and (
                _tensors(args[1])[0].dtype in (torch.int32, torch.int64))
        if operator is aten.index_select:
            return self._is_table(args[0]) and _address(args[2]) not in self.repeats
        if operator in (aten.gather, aten.take):
            return self._is_table(args[0]) and (operator is aten.take or _takes_rows(*args[:3]))
        if operator in PRODUCTS:
            rows, table = (args[i] for i in PRODUCTS[operator])
            return self._is_table(table) and not self._is_table(rows) and _is_one_hot(rows)
        return False


def count(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Counts:
    """What one eager call of the model runs.

    Example:
        >>> x = torch.randn(2, 5, 16)
        >>> count(nn.MultiheadAttention(16, 4).eval(), (x, x, x), {})
        Counts(attention=1, look_ups=0)
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it computes an encoder layer in one call
    try:
        with torch.no_grad(), Oracle(_stored(model)) as oracle:
            oracle.mark((args, dict(kwargs)))
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return Counts(oracle.fused + len(oracle.attention), oracle.look_ups)


def _stored(model: nn.Module) -> dict[str, torch.Tensor]:
    plain = {f"{path}.{name}": value for path, module in model.named_modules()
             for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **plain}


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _sums_to_one(weights: torch.Tensor, axis: int) -> bool:
    """Whether every row of weights sums to one; a row that is masked whole is 0 or nan."""
    sums = weights.double().sum(axis)
    return bool(((sums - 1).abs() < 0.02).logical_or(sums == 0).logical_or(sums.isnan()).all())


def _takes_rows(table: torch.Tensor, axis: int, index: torch.Tensor) -> bool:
    """Whether the other axes of a gather are copied: the index or the table is alike along them."""
    return all(_alike(index, other) or _alike(table, other)
               for other in range(table.ndim) if other != axis % table.ndim)


def _alike(tensor: torch.Tensor, axis: int) -> bool:
    return bool((tensor == tensor.narrow(axis, 0, 1)).all())


def _is_one_hot(rows: torch.Tensor) -> bool:
    return rows.shape[-1] > 1 and bool((rows != 0).sum(-1).eq(1).all()) and bool(
        rows.sum(-1).eq(1).all())
