"""The models that the command line can be given: a bundled name, or `file.py:factory`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from bincompile.errors import BincompileError, ConfigError


@dataclasses.dataclass(frozen=True)
class Source:
    """A model with the inputs of an example call."""

    name: str
    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_source(text: str) -> Source:
    """The model that a command-line argument names.

    Args:
        text: a name of `bincompile.models.NAMES`, or `path/to/file.py:factory`, where `factory()`
            returns `(model, args, kwargs)`.

    Raises:
        ConfigError: the name, the file or the function is not there, or returns something else.
    """
    from bincompile import models

    if text in models.NAMES:
        bundled = importlib.import_module(f"bincompile.models.{text}")
        args, kwargs = bundled.example_inputs()
        return Source(text, bundled.build(), args, kwargs)
    if ":" in text:
        made = call_factory(text)
        if isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], torch.nn.Module):
            return Source(text, made[0], tuple(made[1]), dict(made[2] or {}))
        raise ConfigError(f"{text} returned {_shape_of(made)}", "(model, args, kwargs)",
                          "the return statement of the factory")
    raise ConfigError(f"model {text!r}", f"{', '.join(models.NAMES)} or path/to/file.py:factory",
                      "the MODEL argument")


def call_factory(text: str) -> Any:
    """The result of the function that `path/to/file.py:function` names.

    Raises:
        ConfigError: there is no such file or function, or it fails; the cause is chained.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{file!r} is not a file", "path/to/file.py:factory", "the path")
    try:
        factory = getattr(module_at(path), name, None)
        if callable(factory):
            return factory()
    except BincompileError:
        raise
    except Exception as error:
        raise ConfigError(f"{text} failed: {type(error).__name__}: {error}",
                          "a function that returns without an error", str(path)) from error
    raise ConfigError(f"{path} has no function {name!r}", "path/to/file.py:factory",
                      "the name after the colon")


def module_at(path: Path) -> Any:
    """The module in a Python file; raises `ConfigError` if it is none."""
    name = f"bincompile_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file", "path/to/file.py:factory", "the path")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _shape_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__
