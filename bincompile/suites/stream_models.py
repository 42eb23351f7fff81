"""Whole models of the suite `stream`: a block, one that listens, and one that sees actions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from bincompile.config import Continual
from bincompile.models import action_stream, audio_stream
from bincompile.suites.peers import WINDOW, continual_encoder, peers
from bincompile.suites.rows import EAGER, INDUCTOR, PRODUCTS, Case, Row, times_of
from bincompile.suites.stream_parts import FLOAT, Streams, least, products

BLOCK = (512, 8, 512, 64)  # features, heads, features within, tokens of the window
ACTION: dict[str, Any] = {}  # other sizes of the model than its own
SECONDS = 3.0  # of sound


def cases() -> list[Case]:
    """The block of the targets, and the models that come with the package."""
    return [Case(block_name(), _block), Case("audio_stream", _audio),
            *(Case(f"action_stream, {blocks} blocks", partial(_action, blocks))
              for blocks in (1, 2))]


def block_name() -> str:
    """The case of the encoder of one block."""
    width, heads, _, tokens = BLOCK
    return f"encoder of one block {width}, {heads} heads, {tokens} tokens"


def _anew(model: nn.Module, window: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Candidates that run the model on the window, as torch does it and under torch.compile."""
    found = peers(model, window, half=False, int8=False)
    names = {EAGER: WINDOW, INDUCTOR: f"{WINDOW}, {INDUCTOR}"}
    return {names[name]: call for name, call in found.items()}


def _block() -> Iterator[Row]:
    width, heads, within, tokens = BLOCK
    layer = nn.TransformerEncoderLayer(width, heads, within, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x, own = torch.randn(1, tokens, width), model.layers[0]
    streams = Streams(model, x, Continual(tokens))
    bare = products([(own.self_attn.in_proj_weight, own.self_attn.in_proj_bias),
                     own.self_attn.out_proj, own.linear1, own.linear2])
    times = times_of(streams.candidates | bare | _anew(model, x) | continual_encoder(model, x))
    yield from streams.rows(block_name(), least(times, PRODUCTS, bare), of_float=[PRODUCTS])


def _audio() -> Iterator[Row]:
    """Against the model on all frames that a decision depends on, which gives the same one."""
    model = audio_stream.build()
    heard = audio_stream.frames(audio_stream.synthesise(SECONDS, seed=10**6)[0])[None]
    streams = Streams(model, heard, Continual(), {FLOAT: {}})
    field = streams.streams[FLOAT].receptive_field
    wanted, stream = model(heard), streams.compiled[FLOAT].stream(1)
    found = torch.stack([stream.step(frame) for frame in heard.unbind(1)], 1)
    times = times_of(streams.candidates | _anew(model, heard[:, -field:].contiguous()))
    yield from streams.rows("audio_stream", times, values={
        "frames": heard.shape[1], "receptive_field": field,
        "same_decisions": (found.argmax(-1) == wanted.argmax(-1)).sum().item(),
        "largest_error": (found - wanted).abs().max().item()})


def _action(blocks: int) -> Iterator[Row]:
    """The peer's block of two is timed only: after as many steps as its window it is wrong."""
    torch.manual_seed(0)
    model = action_stream.ActionStream(blocks=blocks, **ACTION).eval()
    window = (model.positions.num_embeddings + 1) // 2
    x = torch.randn(1, window, model.embed.in_features)
    streams = Streams(model, x, Continual(window, positions="recycle"))
    times = times_of(streams.candidates | _anew(model, x) | continual_encoder(
        model.encoder, x, model.embed, model.positions, model.head))
    yield from streams.rows(f"action_stream, {blocks} blocks", times)
