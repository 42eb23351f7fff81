"""The packages that ours is compared with: tests/peers.txt names them.

A test that needs one is skipped where it is not installed, and fails there if
BINCOMPILE_REQUIRE_PEERS is 1: a check that no one misses a comparison unawares.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import NoReturn

import pytest

HOW = "pip install --no-deps -r tests/peers.txt"


def peer(name: str) -> ModuleType:
    """The module of a peer; without it the test that asks for it is skipped, or fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's own warnings at import are not ours to mend
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        _missing(name, str(error))


def installed(name: str) -> None:
    """Skip the test, or let it fail, where a package is not there; it is not imported."""
    if importlib.util.find_spec(name) is None:
        _missing(name, "no such package")


def _missing(name: str, why: str) -> NoReturn:
    if os.environ.get("BINCOMPILE_REQUIRE_PEERS") == "1":
        pytest.fail(f"{name} is required here and missing ({why}): {HOW}", pytrace=False)
    pytest.skip(f"{name} is not installed: {HOW}")
