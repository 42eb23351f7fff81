"""A family is an architecture of transformers; its variants are the ways it spells attention."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from bincompile.models.corpus import Case
from bincompile.models.corpus.transformers_inputs import Inputs

SEED, SPREAD = 0, 0.15
SEQUENCES = ((2, 7), (3, 11), (1, 4))
SLIDING = "the number of chunks is computed as a tensor"
CHUNKS = {"attention": "the weights are padded, skewed and cut into chunks before the values"}
IMAGES = ((2, 1), (3, 1), (1, 1))  # no length


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture in a tiny configuration, and the truth about a call of it.

    Args:
        name: the family's name, "bert".
        model: the class of transformers, "BertModel".
        settings: what its configuration is made of.
        inputs: `inputs(batch, length)`: the arguments of a call.
        attention: attention instances that one call runs.
        look_ups: table look-ups that one call runs.
        variants: values of `attn_implementation` that the class supports.
        sizes: (batch, length) of the example, then of further calls.
        unusual: facets that make the family worth having, in words.
        uncapturable: why torch can't export the model; empty where it can.
        unseen: what a count at run time can't see, and why.
        declined: for each attention instance that is refused on purpose, why.
        like: the family that writes attention the same way and comes first in its place, if any.
    """

    name: str
    model: str
    settings: Mapping[str, Any]
    inputs: Inputs
    attention: int
    look_ups: int = 0
    variants: tuple[str, ...] = ("eager", "sdpa")
    sizes: tuple[tuple[int, int], ...] = SEQUENCES
    unusual: tuple[str, ...] = ()
    uncapturable: str = ""
    unseen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    declined: tuple[str, ...] = ()
    like: str = ""

    def build(self, variant: str) -> nn.Module:
        """The model in eval mode; the same weights each time.

        Every parameter is moved by normal noise: as transformers draws them, scores are so near
        to 0, and biases are 0, that an attention without its scale would look right.
        """
        import transformers

        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(SEED)
                kind = getattr(transformers, self.model)
                config = kind.config_class(**self.settings)
                config._attn_implementation = variant
                model: nn.Module = kind(config).eval()
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
                return model
        finally:
            transformers.logging.set_verbosity(verbosity)

    def cases(self, first: int = 0) -> Iterator[Case]:
        """One case for each variant, the variant of this index first."""
        for variant in (*self.variants[first:], *self.variants[:first]):
            name = f"{self.like}/{self.name}-{variant}" if self.like else f"{self.name}/{variant}"
            yield Case(
                f"transformers/{name}", functools.partial(self.build, variant),
                self.inputs, self.attention, self.look_ups, self.sizes, ("transformers",),
                self.uncapturable, self.unusual, self.unseen, self.declined)


def cases_of(families: Iterable[Family]) -> tuple[Case, ...]:
    """The cases of these families: of those of two variants, every other one has "sdpa" first."""
    turns = itertools.count()
    return tuple(case for family in families
                 for case in family.cases(next(turns) % 2 if len(family.variants) > 1 else 0))
