"""The rules of `bincompile.optim.BinaryOptimizer`, as values: what each keeps, and what it does.

A flip rule decides from the gradient by the signs which of them change; magnitudes never do. The
direction is always descent: a sign may only flip against its own gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

State = dict[str, torch.Tensor]
Group = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way to train binary weights.

    Args:
        name: what a parameter group calls it.
        options: the options that it has, with their defaults.
        begin: `begin(signs, grad, group)`: the state of rows that are seen for the first time,
            tensors that have a row for each.
        flips: `flips(signs, grad, state, group)`: which signs flip; changes the state in place.
            None for a rule that moves floats.
        source: the paper that it is from.
    """

    name: str
    options: Mapping[str, Any]
    begin: Callable[[torch.Tensor, torch.Tensor, Group], State]
    flips: Callable[[torch.Tensor, torch.Tensor, State, Group], torch.Tensor] | None
    source: str


def _power(grad: torch.Tensor) -> torch.Tensor:
    """The mean square of each row, with its axes kept."""
    return grad.square().mean(tuple(range(1, grad.ndim)), keepdim=True)


def _begin_bop(signs: torch.Tensor, grad: torch.Tensor, group: Group) -> State:
    return {"momentum": torch.zeros_like(grad), "power": _power(grad)}


def _bop(signs: torch.Tensor, grad: torch.Tensor, state: State, group: Group) -> torch.Tensor:
    """m += lr (g - m); flip where w m > threshold * the root mean square gradient of the row."""
    momentum = state["momentum"].lerp_(grad, group["lr"])
    power = state["power"].lerp_(_power(grad), 1.0 - group["beta"])
    return signs * momentum > group["threshold"] * power.sqrt()


def _begin_sign_momentum(signs: torch.Tensor, grad: torch.Tensor, group: Group) -> State:
    return {"gradient": torch.zeros_like(grad),
            "direction": -group["inertia"] * group["lr"] * signs}


def _sign_momentum(signs: torch.Tensor, grad: torch.Tensor, state: State,
                   group: Group) -> torch.Tensor:
    """l += (1-b1)(g - l); s += (1-b2)(lr sign(l) - s); w becomes -sign(s), where s is not 0."""
    first, second = group["betas"]
    gradient = state["gradient"].lerp_(grad, 1.0 - first)
    direction = state["direction"].lerp_(group["lr"] * gradient.sign(), 1.0 - second)
    return signs * direction > 0


def _begin_ste(signs: torch.Tensor, grad: torch.Tensor, group: Group) -> State:
    return {"mean": torch.zeros_like(grad), "square": torch.zeros_like(grad)}


RULES = {rule.name: rule for rule in (
    Rule("bop", {"lr": 0.1, "threshold": 0.3, "beta": 0.99}, _begin_bop, _bop,
         "Bop, arXiv:1906.02107, with the threshold in units of the row's own gradients"),
    Rule("sign_momentum", {"lr": 1e-3, "betas": (0.9, 0.99), "inertia": 0.1},
         _begin_sign_momentum, _sign_momentum,
         "DiodeMix of bitorch_engine, with descent and a start that isn't random"),
    Rule("ste", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0,
                 "clip": None}, _begin_ste, None, "AdamW, arXiv:1711.05101"),
)}


def adamw(param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: Group) -> None:
    """One AdamW step on float masters, then clipped to +-clip if that is given."""
    first, second = group["betas"]
    state["step"] = state.get("step", 0) + 1
    param.mul_(1.0 - group["lr"] * group["weight_decay"])
    mean = state["mean"].lerp_(grad, 1.0 - first)
    square = state["square"].mul_(second).addcmul_(grad, grad, value=1.0 - second)
    spread = (square / (1.0 - second ** state["step"])).sqrt_().add_(group["eps"])
    param.addcdiv_(mean, spread, value=-group["lr"] / (1.0 - first ** state["step"]))
    if group["clip"] is not None:
        param.clamp_(-group["clip"], group["clip"])
