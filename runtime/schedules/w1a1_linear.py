"""Linear layer with 1-bit weights and activations: the row program of that one statement.

Each block of rows is packed to sign bits and scaled, then multiplied panel by panel: a vector holds
32 bits of 16 outputs, the word of activations is broadcast, and popcounts add up lane by lane.
Method: XNOR-Net, arXiv:1603.05279.

Arguments: step (rows of one block), x (..., features), weight (panels, words, 4, 16) uint32 with
bit 1 where negative, weight_scale (panels * 64), [bias (panels * 64)], [activation_scale (1)],
[shift (features)], out (..., outputs). Padding bits are 0 on both sides, so that they never differ.
"""

from __future__ import annotations

from typing import Any

from bincompile.runtime.schedules import rows
from bincompile.runtime.schedules.common import MODES

BLOCK = 32  # most rows of one block: their packed bits stay in the first-level cache
SKIPPED = rows.SKIPPED


def build(features: int, outputs: int, bias: bool, shift: bool, row_scale: bool,
          rank: int = 1) -> Any:
    """The IRModule, with one function for each of `MODES`.

    Args:
        rank: how many leading axes x has.
    """
    inputs: list[tuple[Any, ...]] = [("rows", (*[None] * rank, features)),
                                     ("panels", (outputs, features), "uint32"),
                                     ("padded", (outputs,))]

    def optional(wanted: bool, *given: Any) -> str:
        inputs.extend([given] if wanted else [])
        return f"x{len(inputs) - 1}" if wanted else "None"

    added = optional(bias, "padded", (outputs,))
    scale = optional(not row_scale, "columns", (1,))
    shifted = optional(shift, "columns", (features,))
    body = (f"t0 = binary_linear(x0, x1, x2, {added}, {features}, 'binary', {scale}, {shifted})\n"
            "return t0")
    return rows.build(body, tuple(inputs), rank, BLOCK, tuple(MODES))
