"""Tables as aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned text columns, numbers to the right; a column without a value is left out.

    Example:
        >>> print(table(("name", "note", "us"), [("bits", "", 12), ("float", "", 340)]))
          name    us
          bits    12
          float  340
    """
    given = [list(row) for row in rows]
    used = [i for i in range(len(header)) if not given or any(row[i] != "" for row in given)]
    header, given = [header[i] for i in used], [[row[i] for i in used] for row in given]
    numeric = [bool(given) and all(not isinstance(row[i], str) for row in given)
               for i in range(len(header))]
    lines = [list(header), *([cell if isinstance(cell, str) else f"{cell:,}" for cell in row]
                             for row in given)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def show(line: list[str]) -> str:
        cells = (cell.rjust(width) if number else cell.ljust(width)
                 for cell, width, number in zip(line, widths, numeric, strict=True))
        return ("  " + "  ".join(cells)).rstrip()

    return "\n".join(map(show, lines))
