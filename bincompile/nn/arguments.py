"""Checks of constructor arguments: each returns the value or raises `ConfigError`."""

from __future__ import annotations

import torch

from bincompile.errors import ConfigError


def size(layer: str, name: str, value: object) -> int:
    """An int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{layer}({name}={value!r})", "an int of at least 1",
                          f"the {name} argument")
    return value


def flag(layer: str, name: str, value: object) -> bool:
    """A bool, and no other kind of truth."""
    if not isinstance(value, bool):
        raise ConfigError(f"{layer}({name}={value!r})", "True or False", f"the {name} argument")
    return value


def choice(layer: str, name: str, value: object, allowed: tuple[str, ...]) -> str:
    """One of the allowed strings."""
    if isinstance(value, str) and value in allowed:
        return value
    raise ConfigError(f"{layer}({name}={value!r})", " or ".join(map(repr, allowed)),
                      f"the {name} argument")


def probability(layer: str, name: str, value: object) -> float:
    """A number from 0 up to, not including, 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ConfigError(f"{layer}({name}={value!r})", "a number p with 0 <= p < 1",
                          f"the {name} argument")
    return float(value)


def float_dtype(layer: str, value: object) -> torch.dtype:
    """A float dtype; None stands for torch's default."""
    dtype = torch.get_default_dtype() if value is None else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"{layer}(dtype={value!r})", "a float dtype, e.g. torch.float32",
                          "the dtype argument")
    return dtype


def compat(layer: str, value: object) -> str | None:
    """None, or the name of the package whose formulas a layer keeps."""
    if value is None:
        return None
    if isinstance(value, str) and value == "bitorch":
        return value
    raise ConfigError(f"{layer}(compat={value!r})", "None or 'bitorch'", "the compat argument")


def without(layer: str, reason: str, **given: tuple[object, object]) -> None:
    """Raise for the first option, given as name=(found, allowed), that `reason` does not allow."""
    for name, (found, allowed) in given.items():
        if found != allowed:
            raise ConfigError(f"{layer}({name}={found!r}) with {reason}", f"{name}={allowed!r}",
                              f"the {name} argument")
