"""Cells: what the tables of a report say of each record, the same in text, HTML and notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bincompile.record import Evidence, Match, Refusal, Rewrite

HEADERS = {
    "matches": ("path", "operator", "attributes", "proof"),
    "rewrites": ("path", "operator", "kind", "kernel", "bytes", "now", "error"),
    "refusals": ("path", "operator", "node", "reason", "source"),
    "streaming": ("what", "value"),
}


def match_cells(match: Match) -> tuple[str, ...]:
    """The cells of a match."""
    return match.path or "(root)", match.operator, attributes(match.attrs), proof(match.evidence)


def rewrite_cells(rewrite: Rewrite) -> tuple[Any, ...]:
    """The cells of a rewrite."""
    error = "" if rewrite.max_error is None else f"{rewrite.max_error:.1e}"
    return (rewrite.path or "(root)", rewrite.operator, rewrite.kind, rewrite.kernel,
            rewrite.bytes_before, rewrite.bytes_after, error)


def refusal_cells(refusal: Refusal) -> tuple[str, ...]:
    """The cells of a refusal."""
    return (refusal.path or "(root)", refusal.operator, refusal.node, refusal.reason,
            refusal.source)


def attributes(attrs: Mapping[str, Any]) -> str:
    """What is known of an operator, as one text.

    Example:
        >>> attributes({"heads": 4, "scale": 0.35355, "causal": True, "window": None})
        'heads=4, scale=0.3535, causal'
    """
    return ", ".join(attribute_texts(attrs))


def attribute_texts(attrs: Mapping[str, Any]) -> list[str]:
    """What is known of an operator, one text each; what it does not have is left out."""
    def one(name: str, value: Any) -> str:
        if value is True:
            return name
        return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"

    return [one(k, v) for k, v in attrs.items()
            if v is not None and v is not False and v != () and v != ""]


def proof(evidence: Evidence | None) -> str:
    """The evidence as one text."""
    if evidence is None:
        return "not tried"
    verdict = "" if evidence.passed else "failed: "
    return (f"{verdict}{evidence.max_error:.1e} of {evidence.limit:.0e}, "
            f"{evidence.trials} trials in {evidence.dtype}")


def match_facts(match: Match) -> tuple[tuple[str, str], ...]:
    """All that is known of a match, each fact with its name."""
    return (("attributes", attributes(match.attrs)), ("proof", proof(match.evidence)),
            ("found by", match.pattern), ("source", match.source))


def rewrite_text(rewrite: Rewrite) -> str:
    """A rewrite as one text.

    Example:
        >>> rewrite_text(Rewrite("embedding", "table", "exact", "torch-embedding", 64, 64, 0.0))
        'exact, run by torch-embedding, reads 64 bytes of weights (were 64), error 0.0e+00'
    """
    parts = [rewrite.kind, f"run by {rewrite.kernel}" if rewrite.kernel else ""]
    if rewrite.bytes_before or rewrite.bytes_after:
        parts.append(f"reads {rewrite.bytes_after:,} bytes of weights "
                     f"(were {rewrite.bytes_before:,})")
    if rewrite.max_error is not None:
        parts.append(f"error {rewrite.max_error:.1e}")
    return ", ".join(filter(None, parts))


def short_source(source: str) -> str:
    """A source line without the folders of its file, but the last.

    Example:
        >>> short_source("/home/me/models/bert.py:12: y = q @ k.mT")
        'models/bert.py:12: y = q @ k.mT'
    """
    file, separator, rest = source.partition(".py:")
    return "/".join(file.replace("\\", "/").split("/")[-2:]) + separator + rest
