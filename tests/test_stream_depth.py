"""Causal models of depth 1 to 8 and their steps: the same values as the whole sequence's."""

from __future__ import annotations

import pytest
import torch
from stream_blocks import E, Encoder, banded

import bincompile as bc

W = 4
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5}
DAILY = ((2, torch.float32), (4, torch.float64))


def steps_of(stream: bc.Stream, x: torch.Tensor) -> torch.Tensor:
    """The answers of one step after the other (B, T, E)."""
    return torch.stack([stream.step(x[:, i]) for i in range(x.shape[1])], 1)


@pytest.mark.parametrize(("depth", "dtype"), [
    pytest.param(depth, dtype, marks=() if (depth, dtype) in DAILY else pytest.mark.slow)
    for depth in (1, 2, 4, 8) for dtype in LIMITS])
def test_causal_models_of_any_depth_equal_the_banded_sequence(
        depth: int, dtype: torch.dtype) -> None:
    model = Encoder(depth, norm_first=True).eval().to(dtype)
    compiled = bc.optimize(model, (torch.randn(2, 9, E, dtype=dtype),), continual=W)
    x = torch.randn(2, 3 * W * depth, E, dtype=dtype)
    found = steps_of(compiled.stream(2), x).double()
    with torch.no_grad():
        expected = banded(model.double(), W)(x.double())
    assert float((found - expected).abs().max() / expected.abs().max()) <= LIMITS[dtype]
