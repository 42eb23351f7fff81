"""How near the outputs of two models are."""

from __future__ import annotations

import torch


def cosines(found: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Mean and least cosine of corresponding rows: (N, D) and (N, D), computed in float64.

    Example:
        >>> cosines(torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
        {'cosine_mean': 0.5, 'cosine_min': 0.0}
    """
    each = torch.cosine_similarity(found.double(), wanted.double(), dim=-1)
    return {"cosine_mean": each.mean().item(), "cosine_min": each.min().item()}


def spearman(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Rank correlation of two vectors (N,) without ties.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([9.0, 2.0, 1.0]))
        -1.0
    """
    ranks = torch.stack([found, wanted]).argsort(-1).argsort(-1).double()
    return torch.corrcoef(ranks)[0, 1].item()
