"""The float peers: a model as torch runs it, in bf16, in dynamic int8 and under torch.compile.

For streams: the window computed anew for each token, and continual-inference's steps.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bincompile.runtime.native import compiler
from bincompile.suites.rows import EAGER, HALF, INDUCTOR, INT8

CONTINUAL, WINDOW, NEWEST = "continual-inference", "window", "window, one query"


def peers(model: nn.Module, *args: torch.Tensor, half: bool = True, int8: bool = True,
          inductor: bool = True) -> dict[str, Callable[[], Any]]:
    """Candidates that run this float model on these inputs.

    Args:
        model: a float32 model in eval mode.
        args: its inputs; floats are cast for bf16.
        half: with one in bf16.
        int8: with one whose linears are dynamic int8 (torch.ao, quantize_dynamic).
        inductor: with torch.compile in its default mode, where there is a C compiler.
    """
    found: dict[str, Callable[[], Any]] = {EAGER: lambda: model(*args)}
    if inductor and compiler() is not None:
        compiled = torch.compile(model)
        found[INDUCTOR] = lambda: compiled(*args)
    if half:
        small = copy.deepcopy(model).to(torch.bfloat16)
        cast = [x.bfloat16() if x.is_floating_point() else x for x in args]
        found[HALF] = lambda: small(*cast)
    if int8:
        quantised = _quantised(model)
        found[INT8] = lambda: quantised(*args)
    return found


def _quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its own quantisation will move
        inside = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(copy.deepcopy(model)), {nn.Linear}, dtype=torch.qint8)
    return inside


def window_attention(layer: nn.MultiheadAttention, window: torch.Tensor,
                     ) -> dict[str, Callable[[], Any]]:
    """Candidates that attend within the whole window (B, T, E) anew: all of its queries, as a
    model in whose middle the layer stands has to, and the newest one alone."""
    last = window[:, -1:].contiguous()
    return {WINDOW: lambda: layer(window, window, window, need_weights=False),
            NEWEST: lambda: layer(last, window, window, need_weights=False)}


def continual_attention(layer: nn.MultiheadAttention, window: torch.Tensor,
                        ) -> dict[str, Callable[[], Any]]:
    """continual-inference's step of this layer after the tokens (B, T, E); none without it."""
    if (co := _continual()) is None:
        return {}
    with _quiet():
        made = co.SingleOutputMultiheadAttention.build_from(
            layer, sequence_len=window.shape[1], forward_returns_attn_mask=False,
            embed_dim_second=True).eval()
    return {CONTINUAL: _warm(made.forward_step, window)}


def continual_encoder(encoder: nn.TransformerEncoder, window: torch.Tensor,
                      embed: nn.Module | None = None, positions: nn.Embedding | None = None,
                      head: nn.Module | None = None) -> dict[str, Callable[[], Any]]:
    """continual-inference's step of a post-norm encoder of one or two layers; none without it.

    Args:
        encoder: with the weights.
        window: the tokens (B, T, F) that it has seen.
        embed: what makes them tokens of the encoder.
        positions: a table that is added, and recycled.
        head: what reads the output.
    """
    if (co := _continual()) is None:
        return {}
    with _quiet():
        made = co.TransformerEncoder.build_from(encoder, sequence_len=window.shape[1]).eval()
    table = None
    if positions is not None:
        table = co.RecyclingPositionalEncoding(positions.embedding_dim, positions.num_embeddings)
        table.pe.load_state_dict(positions.state_dict())

    def step(token: torch.Tensor) -> torch.Tensor | None:
        x = token if embed is None else embed(token)
        x = x if table is None else table.forward_step(x)
        y = made.forward_step(x)
        return y if head is None or y is None else head(y)

    return {CONTINUAL: _warm(step, window)}


def _continual() -> Any:
    """The package continual-inference, or None."""
    with _quiet():
        try:
            import continual
        except ImportError:
            return None
    return continual


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a peer's own warnings, which are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _warm(step: Callable[[torch.Tensor], Any], window: torch.Tensor) -> Callable[[], Any]:
    """The step of the last token, after all of the window: what it costs from then on."""
    with torch.inference_mode(), _quiet():
        for token in window.unbind(1):
            step(token)
    last = window[:, -1].contiguous()
    return lambda: step(last)
