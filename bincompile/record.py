"""What the compiler says of its work: matches, refusals, rewrites, and the evidence for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The result of comparing two forms of a subgraph on random and adversarial inputs.

    Args:
        trials: inputs tried.
        seed: seed of the first random input.
        dtype: dtype of the comparison.
        max_error: largest relative difference seen.
        limit: largest difference allowed.
        milliseconds: time that the proof took; 0 where it was shared with an identical subgraph.
    """

    trials: int
    seed: int
    dtype: str
    max_error: float
    limit: float
    milliseconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the difference stayed within its limit."""
        return self.max_error <= self.limit


@dataclasses.dataclass(frozen=True)
class Match:
    """A subgraph that was recognised as an operator.

    Args:
        operator: "attention", "embedding", "embedding_bag" or "linear".
        path: module path of the owner.
        attrs: what is known of it: heads, scale, causal, ...
        node: name of the node that it ends in.
        evidence: the proof; None if it was not tried.
        pattern: name of the pattern that found it.
        nodes: names of the nodes that it stands for, in the order of the graph.
        source: the user's source line.
    """

    operator: str
    path: str
    attrs: Mapping[str, Any]
    node: str
    evidence: Evidence | None = None
    pattern: str = ""
    nodes: tuple[str, ...] = ()
    source: str = ""

    @property
    def validated(self) -> bool:
        """Whether the proof was made and passed."""
        return self.evidence is not None and self.evidence.passed

    @property
    def max_error(self) -> float | None:
        """Largest relative difference that the proof saw."""
        return None if self.evidence is None else self.evidence.max_error


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A candidate that was not rewritten, and why.

    Args:
        operator: the operator that it might have been.
        path: module path of the owner: the longest that its nodes share.
        reason: why it was declined.
        node: name of the first node that an operator of this kind does not have.
        source: the user's source line of that node.
    """

    operator: str
    path: str
    reason: str
    node: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A change of the graph.

    Args:
        operator: the operator that was put in.
        path: module path of the owner.
        kind: "exact" or "lossy".
        kernel: the kernel that runs it; empty until it is lowered.
        bytes_before: bytes of stored weights that the subgraph read before.
        bytes_after: bytes of stored weights that it reads now.
        max_error: largest relative difference seen, None where it was not measured.
        node: name of the node that was put in.
        replaces: name of the node that it stands for, in the graph before any rewrite.
    """

    operator: str
    path: str
    kind: str
    kernel: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    max_error: float | None = None
    node: str = ""
    replaces: str = ""


def origin(node: str, rewrites: Iterable[Rewrite]) -> str:
    """The node that a node stands for: what the rewrite that put it in replaced, or itself.

    Example:
        >>> origin("ours", [Rewrite("embedding", "", "exact", node="ours", replaces="embedding")])
        'embedding'
    """
    return next((r.replaces for r in rewrites if r.node == node and r.replaces), node)


def spelled(name: str, reason: str = "") -> str:
    """A choice as text: what was chosen and, where it was measured, why.

    Example:
        >>> spelled("float", "2 ms against 1 ms"), parsed("float (2 ms against 1 ms)")
        ('float (2 ms against 1 ms)', ('float', '2 ms against 1 ms'))
    """
    return f"{name} ({reason})" if reason else name


def parsed(choice: str) -> tuple[str, str]:
    """The name and the reason of a choice."""
    name, _, reason = choice.partition(" ")
    return name, reason.removeprefix("(").removesuffix(")")
