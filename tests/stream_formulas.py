"""The stream operators from their definitions, one row at a time, for the tests of operators.

Each takes all arguments of its operator in order, floats in float64, and writes to its states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stream_attention_formulas import ATTENTIONS
from stream_layer_formulas import LAYERS

STREAM: dict[str, Callable[..., Any]] = LAYERS | ATTENTIONS
