"""The operators, one file each; every file here that holds an `Operator` is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from bincompile.op import Operator


def _discover() -> dict[str, Operator]:
    found: dict[str, Operator] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Operator):
                found[value.name] = value
    return dict(sorted(found.items()))


OPERATORS: dict[str, Operator] = _discover()


def operator_of(target: object) -> Operator | None:
    """The operator behind a graph node's target, or None if it is not ours."""
    if getattr(target, "namespace", None) != "bincompile":
        return None
    return OPERATORS.get(target._schema.name.split("::")[1])  # type: ignore[attr-defined]
