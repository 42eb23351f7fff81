"""Training of binary weights: packed tables by flips, float masters by their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bincompile.errors import ConfigError, InputError, InputTypeError
from bincompile.flip_rules import RULES, Rule, adamw
from bincompile.nn.binary_table import BinaryTable
from bincompile.ops import bases, bits, row_gradient
from bincompile.ops.embedding import check_indices

__all__ = ["BinaryOptimizer", "sparse_update_embedding_qweight"]

_IN_OPEN_RANGE = "a number from 0 up to, not including, 1"
_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda v: v >= 0, "a number of at least 0"),
    "threshold": (lambda v: v >= 0, "a number of at least 0"),
    "inertia": (lambda v: v >= 0, "a number of at least 0"),
    "weight_decay": (lambda v: v >= 0, "a number of at least 0"),
    "eps": (lambda v: v > 0, "a number above 0"),
    "clip": (lambda v: v is None or v > 0, "None or a number above 0"),
    "beta": (lambda v: 0 <= v < 1, _IN_OPEN_RANGE),
    "betas": (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), f"two of {_IN_OPEN_RANGE}"),
}


def sparse_update_embedding_qweight(qweight: torch.Tensor, indices: torch.Tensor,
                                    grad: torch.Tensor) -> torch.Tensor:
    """Set the bits of the touched rows to the sign of descent, in place.

    The gradients of a row that is touched several times are summed. A bit becomes 1 where the sum
    is negative, 0 where it is positive, and stays where it is zero: an XOR with the mask of the
    bits that disagree with the descent and whose gradient isn't zero.

    Args:
        qweight: uint8 (V, k * ceil(D/8)), least significant bit first.
        indices: int32 or int64 (...), rows.
        grad: float (..., D), or (..., k, D) for k bases: the derivative by the signs.

    Returns:
        qweight itself.

    Raises:
        InputTypeError: a dtype that isn't as above.
        InputError: an index out of range, or sizes that don't fit together.

    Source: bitorch_engine's BinaryEmbeddingForward, notes on its backward.

    Example:
        >>> table = torch.tensor([[0b000], [0b101]], dtype=torch.uint8)
        >>> grad = torch.tensor([[0.5, -1.0, 0.0]])
        >>> sparse_update_embedding_qweight(table, torch.tensor([1]), grad).tolist()
        [[0], [6]]
    """
    if qweight.dtype != torch.uint8 or not grad.dtype.is_floating_point:
        raise InputTypeError(f"qweight {qweight.dtype} and grad {grad.dtype}",
                             "uint8, and a float dtype", "the packed table, or its gradient")
    extra = grad.ndim - indices.ndim
    width = bits.packed_width(grad.shape[-1]) if grad.ndim else 0
    count = grad.shape[-2] if extra == 2 else 1
    if qweight.ndim != 2 or extra not in (1, 2) or grad.shape[:indices.ndim] != indices.shape \
            or qweight.shape[1] != count * width:
        raise InputError(
            f"qweight {tuple(qweight.shape)}, indices {tuple(indices.shape)} and grad "
            f"{tuple(grad.shape)}", "(V, k * ceil(D/8)), (...), and (..., D) or (..., k, D)",
            "the sizes of grad")
    check_indices(indices, qweight.shape[0])
    rows, sums = row_gradient.sum_rows(indices, grad.reshape(-1, count, grad.shape[-1]))
    descent, moved = (_join(flags) for flags in (sums < 0, (sums < 0) | (sums > 0)))
    with torch.no_grad():
        before = qweight[rows]
        return qweight.index_copy_(0, rows, before ^ ((before ^ descent) & moved))


def _join(flags: torch.Tensor) -> torch.Tensor:
    return bases.join(torch.where(flags, 1.0, -1.0))


class BinaryOptimizer(torch.optim.Optimizer):
    """Trains packed tables by flipping bits, and float parameters beside them.

    Args:
        params: tensors or parameter groups, as for any optimizer. Packed tables are the buffers
            `qweight` of the embedding layers; `for_model` collects them.
        rule: the rule of groups that name none. Options given here are theirs, too.
            "bop" flips where the mean gradient of a sign is strong against it; "sign_momentum"
            follows a mean of signs of gradients; both keep magnitudes, so weights that are +-a
            stay +-a, and also train float matrices of such weights. "ste" moves floats (AdamW):
            masters behind binary layers and all ordinary parameters.
        lr: how fast the means follow ("bop" 0.1, "sign_momentum" 1e-3), or the step ("ste" 1e-3).
            Schedulers set it.
        threshold: of "bop" (0.3): the strength of a flip, in the row's root mean square gradient.
        beta: of "bop" (0.99): memory of that mean square.
        betas: of "sign_momentum" (0.9, 0.99) and "ste" (0.9, 0.999).
        inertia: of "sign_momentum" (0.1): how sure each sign is at first, in units of lr.
        eps, weight_decay, clip: of "ste" (1e-8, 0, None): as in AdamW; masters stay in +-clip.
        process_group: where the gradients of tables are gathered; None is the default one. All
            its processes have to call `step`.

    Raises:
        ConfigError: a rule or option that does not exist, or a rule that can't train a parameter.

    A table's gradient is `qweight.sparse_grad`, and its state is kept for the rows that were ever
    touched. In a process group of several, `step` averages the rows of all processes, as
    DistributedDataParallel does for its parameters.

    Source: Bop (arXiv:1906.02107); DiodeMix of bitorch_engine; AdamW (arXiv:1711.05101).

    Example:
        >>> from bincompile.nn import BinaryEmbedding
        >>> model = nn.Sequential(BinaryEmbedding(10, 8), nn.Linear(8, 2))
        >>> optimizer = BinaryOptimizer.for_model(model, rule="bop", threshold=0.05, float_lr=0.01)
        >>> model(torch.tensor([1, 2, 2])).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(self, params: Iterable[Any], rule: str = "bop", *,
                 process_group: distributed.ProcessGroup | None = None, **options: Any) -> None:
        self._rule, self._given, self._process_group = rule, options, process_group
        _checked_options(_rule_of(rule), options)
        super().__init__(params, {})
        tensors = [p for group in self.param_groups for p in group["params"]]
        if any(p.numel() == 0 for p in tensors) and not any(map(_is_packed, tensors)):
            raise ConfigError(
                "the parameters of a model with packed tables, but none of its tables",
                "the buffers `qweight` of its embedding layers in a group",
                "BinaryOptimizer.for_model(model)")

    @classmethod
    def for_model(cls, model: nn.Module, rule: str = "bop", *, float_lr: float = 1e-3,
                  process_group: distributed.ProcessGroup | None = None, **options: Any) -> Self:
        """An optimizer of all packed tables of a model, by `rule`, and of its floats, by "ste".

        Call it before the model is wrapped in DistributedDataParallel: it keeps the tables out
        of what that broadcasts in each forward, and makes them equal once, to those of rank 0.

        Args:
            model: tables of layers that are frozen are left out, like frozen parameters.
            rule, process_group, options: as in the constructor.
            float_lr: step of the float parameters.
        """
        tables = {id(m.qweight): m.qweight for m in model.modules()
                  if isinstance(m, BinaryTable) and m.packed and m.anchor.requires_grad}
        floats = [p for p in model.parameters() if p.requires_grad and p.numel()]
        groups = [{"params": list(tables.values()), "rule": rule, **options},
                  {"params": floats, "rule": "ste", "lr": float_lr}]
        optimizer = cls([g for g in groups if g["params"]], rule, process_group=process_group)
        names = {name for name, buffer in model.named_buffers() if id(buffer) in tables}
        names.update(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))
        if optimizer._processes() > 1:
            for table in tables.values():
                distributed.broadcast(table, group_src=0, group=process_group)
        return optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with the options of its rule, its own before the constructor's."""
        group = dict(param_group)
        rule = _rule_of(group.setdefault("rule", self._rule))
        own = {k: v for k, v in group.items() if k not in ("params", "rule")}
        given = self._given if rule.name == self._rule else {}
        group.update(_checked_options(rule, {**given, **own}))
        single = isinstance(group["params"], torch.Tensor)
        group["params"] = [group["params"]] if single else list(group["params"])
        for param in group["params"]:
            _check_trainable(param, rule)
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = RULES[group["rule"]]
            for param in group["params"]:
                if _is_packed(param):
                    self._step_table(param, rule, group)
                elif param.grad is not None:
                    self._step_floats(param, param.grad, rule, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those of the tables included."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for param in filter(_is_packed, group["params"]):
                param.sparse_grad = None

    def _step_floats(self, param: torch.Tensor, grad: torch.Tensor, rule: Rule,
                     group: dict[str, Any]) -> None:
        state, signs = self.state[param], bits.sign(param)
        if grad.is_sparse:
            grad = grad.to_dense()
        if not state:
            state.update(rule.begin(signs, grad, group))
        if rule.flips is None:
            adamw(param, grad, state, group)
            return
        flips = rule.flips(signs, grad, state, group)
        least = torch.finfo(param.dtype).tiny  # 0 counts as +1, and -0 would, too
        param.copy_(torch.where(flips, -signs * param.abs().clamp_min(least), param))

    def _step_table(self, table: torch.Tensor, rule: Rule, group: dict[str, Any]) -> None:
        grad = self._gathered(table)
        if grad is None or not grad._nnz() or rule.flips is None:
            return
        rows, values = grad.indices()[0], grad.values()
        count = values.shape[1] if values.ndim == 3 else 1
        signs = bases.split(table[rows], count, values.shape[-1], values.dtype).view_as(values)
        state = self.state[table]
        slots = _slots(state, rows, lambda new: rule.begin(signs[new], values[new], group))
        kept = {name: tensor[slots] for name, tensor in state.items() if name not in _PLACES}
        flips = rule.flips(signs, values, kept, group)
        for name, tensor in kept.items():
            state[name][slots] = tensor
        changed = _join(flips.view(rows.numel(), count, values.shape[-1]))
        table.index_copy_(0, rows, table[rows] ^ changed)

    def _processes(self) -> int:
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self._process_group)

    def _gathered(self, table: torch.Tensor) -> torch.Tensor | None:
        """The table's gradient, averaged over the processes."""
        grad, processes = getattr(table, "sparse_grad", None), self._processes()
        return grad if processes == 1 else _average(grad, table, processes, self._process_group)


_PLACES = ("rows", "slots")


def _slots(state: dict[str, torch.Tensor], rows: torch.Tensor,
           begin: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> torch.Tensor:
    """Where the state of sorted rows stands; those seen for the first time get a place."""
    if not state:
        state.update({name: rows.new_empty(0) for name in _PLACES})
    known = torch.isin(rows, state["rows"], assume_unique=True)
    if not bool(known.all()):
        used, fresh = state["rows"].numel(), rows[~known]
        for name, first in begin(~known).items():
            state[name] = _extended(state.get(name), used, first)
        places = torch.arange(used, used + fresh.numel(), device=rows.device)
        state["rows"], order = torch.cat([state["rows"], fresh]).sort()
        state["slots"] = torch.cat([state["slots"], places])[order]
    return state["slots"][torch.searchsorted(state["rows"], rows)]


def _extended(tensor: torch.Tensor | None, used: int, more: torch.Tensor) -> torch.Tensor:
    """The first `used` rows and then `more`; room is kept, so that growing copies seldom."""
    if tensor is None:
        return more
    wanted = used + more.shape[0]
    if wanted > tensor.shape[0]:
        larger = tensor.new_zeros(max(wanted, used * 3 // 2), *tensor.shape[1:])
        larger[:used] = tensor[:used]
        tensor = larger
    tensor[used:wanted] = more
    return tensor


def _average(grad: torch.Tensor | None, table: torch.Tensor, processes: int,
             group: distributed.ProcessGroup | None) -> torch.Tensor | None:
    """The mean over processes of gradients of different rows; None if nobody has one."""
    def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(processes)]
        distributed.all_gather(parts, tensor.contiguous(), group=group)
        return parts

    trailing = () if grad is None else grad.shape[1:]
    header = torch.tensor([0 if grad is None else grad._nnz(), *(0,) * (2 - len(trailing)),
                           *trailing, 0 if grad is None else grad.dtype.itemsize],
                          device=table.device)
    headers = torch.stack(gather(header)).tolist()
    most, count, features, item = (max(column) for column in zip(*headers, strict=True))
    if not most:
        return None
    shape = (count, features) if count else (features,)
    rows = torch.zeros(most, dtype=torch.int64, device=table.device)
    values = torch.zeros(most, *shape, device=table.device,
                         dtype=torch.float64 if item == 8 else torch.float32)
    if grad is not None:
        rows[:grad._nnz()], values[:grad._nnz()] = grad.indices()[0], grad.values()
    sizes = [own[0] for own in headers]
    every_row, every_value = (
        torch.cat([part[:size] for part, size in zip(gather(tensor), sizes, strict=True)])
        for tensor in (rows, values))
    every_row, sums = row_gradient.sum_rows(every_row, every_value)
    return row_gradient.sparse(every_row, sums.div_(processes), table.shape[0])


def _is_packed(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.uint8


def _rule_of(name: object) -> Rule:
    if not isinstance(name, str) or name not in RULES:
        raise ConfigError(f"BinaryOptimizer(rule={name!r})", " or ".join(map(repr, RULES)),
                          "the rule argument, or the rule of the parameter group")
    return RULES[name]


def _checked_options(rule: Rule, given: dict[str, Any]) -> dict[str, Any]:
    """All options of a rule, those that were given checked."""
    for name, value in given.items():
        if name == "initial_lr":  # of a scheduler
            continue
        if name not in rule.options:
            raise ConfigError(f"BinaryOptimizer(rule={rule.name!r}, {name}={value!r})",
                              f"the options of this rule: {', '.join(rule.options)}",
                              f"leave {name} out, or give it in a group of another rule")
        accepts, allowed = _BOUNDS[name]
        try:
            good = accepts(value)
        except TypeError:
            good = False
        if not good:
            raise ConfigError(f"BinaryOptimizer({name}={value!r})", allowed,
                              f"the {name} argument")
    return {**rule.options, **given}


def _check_trainable(param: object, rule: Rule) -> None:
    if not isinstance(param, torch.Tensor):
        raise InputTypeError(f"a parameter of type {type(param).__name__}", "tensors",
                             "the params argument")
    found = f"a {param.dtype} tensor of shape {tuple(param.shape)} with rule {rule.name!r}"
    if _is_packed(param) and (rule.flips is None or param.ndim != 2):
        raise ConfigError(found, "a packed table with 'bop' or 'sign_momentum'", "the rule")
    if not _is_packed(param) and not param.dtype.is_floating_point:
        raise ConfigError(found, "packed tables (uint8) and float parameters", "the parameters")
    if param.dtype.is_floating_point and rule.flips is not None and param.ndim < 2:
        raise ConfigError(found, "flips of tables and weight matrices; 'ste' for all else",
                          "give it a group with rule 'ste'")
