"""The shape of BERT-base with random weights: 12 layers, 768 features, 12 heads.

For measuring time and bytes, not accuracy. Source: arXiv:1810.04805, built by transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bincompile.errors import ConfigError, MissingPackageError
from bincompile.models.similarity import cosines

ATTENTIONS = ("sdpa", "eager")
SEED, BATCH, TOKENS, PADDED = 0, 2, 24, 6


def encoder(attn: str, **config: Any) -> nn.Module:
    """transformers' BertModel of this configuration without pooler, seeded, in eval mode."""
    if attn not in ATTENTIONS:
        raise ConfigError(f"attn={attn!r}", " or ".join(map(repr, ATTENTIONS)), "the attn argument")
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise MissingPackageError(
            f"the package transformers can't be imported: {error}", "an installed transformers",
            "install bincompile with its extra: bincompile[minilm]") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return BertModel(BertConfig(**config, attn_implementation=attn),
                         add_pooling_layer=False).eval()


def build(attn: str = "sdpa") -> nn.Module:
    """The encoder, in eval mode; the same weights each time.

    Args:
        attn: "sdpa" or "eager": how transformers spells attention.

    Returns:
        A BertModel: input_ids and attention_mask, each (B, L) int64, to an output whose first
        item, `last_hidden_state`, is (B, L, 768) float32.

    Raises:
        ConfigError: an unknown `attn`.
        MissingPackageError: transformers is not installed.
    """
    return encoder(attn)


def example_inputs() -> tuple[tuple[()], dict[str, torch.Tensor]]:
    """Random tokens (2, 24), the last 6 of the second row padding."""
    generator = torch.Generator().manual_seed(SEED)
    kept = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    kept[1, -PADDED:] = 0
    tokens = torch.randint(1000, 30000, (BATCH, TOKENS), generator=generator)
    return (), {"input_ids": tokens * kept, "attention_mask": kept}


@torch.no_grad()
def evaluate(model_like: Callable[..., Any]) -> dict[str, float]:
    """Mean and least cosine of the hidden states of real tokens to those of the float model."""
    return cosines(_states(model_like), _reference())


def _states(model_like: Callable[..., Any]) -> torch.Tensor:
    _, inputs = example_inputs()
    return model_like(**inputs)[0][inputs["attention_mask"].bool()]


@functools.cache
def _reference() -> torch.Tensor:
    return _states(build())
