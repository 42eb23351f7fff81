"""Facets say what an attention is, however it is spelled, and claim nothing that is not proven."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import facet_models as spelled
import pytest
import torch
from facet_models import FEATURES, HEADS, LEAST, WIDTH, added, back, hidden, masked
from torch.nn import functional

from bincompile.models.corpus import cases
from bincompile.passes.capture import capture
from bincompile.passes.pipeline import EXACT, run

MATCHING = EXACT[:2]


def facets(model: torch.nn.Module, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """The attributes of every attention that is matched."""
    program = run(MATCHING, capture(model.eval(), args, kwargs).program)
    return [dict(m.attrs) for m in program.matches if m.operator == "attention"]


def tokens(length: int = 6) -> torch.Tensor:
    return torch.randn(2, length, WIDTH)


def padded(*lengths: int) -> torch.Tensor:
    return (torch.arange(6) < torch.tensor(lengths)[:, None]).long()


def check(core: spelled.Core, inputs: tuple[torch.Tensor, ...], expected: dict[str, Any]) -> None:
    expected, (found,) = dict(expected), facets(spelled.Spelled(core), tokens(), *inputs)
    scale = expected.pop("scale", found["scale"])
    assert {name: found[name] for name in expected} == expected
    assert found["scale"] == pytest.approx(scale)


Kept = Callable[..., torch.Tensor]
CAUSAL = {"mask": "causal", "causal": True, "window": None, "bias": None}
OPAQUE = {"mask": "opaque", "causal": False, "window": None}

BY_SIZES: dict[str, tuple[spelled.Core, dict[str, Any]]] = {
    "nothing": (masked(lambda m, s, x: s), {"mask": "none", "mask_form": None, "causal": False}),
    "added, -inf": (added(lambda m, x: back(x) >= 0), {**CAUSAL, "mask_form": "additive"}),
    "added, least": (added(lambda m, x: back(x) >= 0, LEAST), CAUSAL),
    "added, -1e4": (added(lambda m, x: back(x) >= 0, -1e4), CAUSAL),
    "upper triangle": (masked(lambda m, s, x: s + torch.full(
        (x.shape[1], x.shape[1]), -math.inf).triu(1)), CAUSAL),
    "filled": (hidden(lambda m, x: back(x) >= 0), {**CAUSAL, "mask_form": "boolean"}),
    "filled, -1e4": (hidden(lambda m, x: back(x) >= 0, -1e4), CAUSAL),
    "where": (masked(lambda m, s, x: torch.where(back(x) >= 0, s, LEAST)), CAUSAL),
    "lower triangle": (hidden(lambda m, x: torch.ones(
        x.shape[1], x.shape[1], dtype=torch.bool).tril()), CAUSAL),
    "stored": (hidden(lambda m, x: m.past[:x.shape[1], :x.shape[1]]), CAUSAL),
    "causal by the operator": (spelled.by_operator(is_causal=True), CAUSAL),
    "window": (hidden(lambda m, x: (back(x) >= 0) & (back(x) < 3)),
               {"mask": "window", "window": 3, "causal": True}),
    "window in two masks": (
        masked(lambda m, s, x: s.masked_fill(back(x) < 0, -math.inf).masked_fill(
            back(x) > 2, -math.inf)), {"mask": "window", "window": 3, "causal": True}),
    "window and causal in two forms": (
        masked(lambda m, s, x: (s + torch.where(back(x) >= 0, 0.0, -math.inf)).masked_fill(
            back(x) > 2, -math.inf)),
        {"mask": "window", "window": 3, "mask_form": "additive+boolean"}),
    "symmetric window": (hidden(lambda m, x: back(x).abs() <= 2),
                         {"mask": "window", "window": (2, 2), "causal": False}),
    "long window": (hidden(lambda m, x: (back(x) >= 0) & (back(x) < 4096)),
                    {"mask": "window", "window": 4096, "causal": True}),
    "long symmetric window": (hidden(lambda m, x: back(x).abs() <= 100000),
                              {"mask": "window", "window": (100000, 100000)}),
    "everything kept": (hidden(lambda m, x: back(x) < x.shape[1]),
                        {"mask": "none", "mask_form": None, "bias": None}),
    "causal in short texts only": (hidden(lambda m, x: (back(x) >= 0) | (
        torch.arange(x.shape[1]) > 8)), OPAQUE),
    "causal but one off": (hidden(lambda m, x: back(x) >= -1), OPAQUE),
    "the past alone": (hidden(lambda m, x: back(x) > 0), {"mask": "opaque", "causal": True}),
    "stored, causal but in one column": (
        hidden(lambda m, x: m.nearly[:x.shape[1], :x.shape[1]]), OPAQUE),
    "blocks": (hidden(lambda m, x: torch.arange(x.shape[1])[:, None] // 4
                      == torch.arange(x.shape[1]) // 4), OPAQUE),
    "long blocks": (hidden(lambda m, x: torch.arange(x.shape[1])[:, None] // 1000
                           == torch.arange(x.shape[1]) // 1000), OPAQUE),
    "every second key": (hidden(lambda m, x: back(x) % 2 == 0), OPAQUE),
    "hardly hidden": (hidden(lambda m, x: back(x) >= 0, -1.0), OPAQUE),
    "hardly hidden, added": (added(lambda m, x: back(x) >= 0, -100.0),
                             {"mask": "none", "bias": 1, "causal": False}),
    "slopes": (masked(spelled.sloped), {**CAUSAL, "bias": 1}),
    "table and mask in one sum": (masked(spelled.biased), {**CAUSAL, "bias": 1}),
}


@pytest.mark.parametrize("name", BY_SIZES)
def test_masks_that_follow_from_sizes(name: str) -> None:
    core, expected = BY_SIZES[name]
    check(core, (), expected)


PAD = padded(6, 3)
LENGTHS = torch.tensor([6, 3])
IDS = torch.tensor([[4, 5, 9, 3, 7, 7], [8, 2, 7, 7, 7, 7]])
BY_INPUTS: dict[str, tuple[spelled.Core, tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "padding, added": (masked(lambda m, s, x, pad: s + (1.0 - pad[:, None, None]) * -1e4), (PAD,),
                       {"mask": "padding", "mask_form": "additive", "causal": False}),
    "padding, filled": (hidden(lambda m, x, pad: pad[:, None, None]), (PAD > 0,),
                        {"mask": "padding", "mask_form": "boolean"}),
    "padding by lengths": (hidden(lambda m, x, n: torch.arange(
        x.shape[1])[None, None, None] < n[:, None, None, None]), (LENGTHS,), {"mask": "padding"}),
    "padding by tokens": (hidden(lambda m, x, ids: (ids != 7)[:, None, None]), (IDS,),
                          {"mask": "padding"}),
    "padding by a rare token": (hidden(lambda m, x, ids: (ids != 50256)[:, None, None].expand(
        -1, -1, x.shape[1], -1)), (IDS,), {"mask": "padding"}),
    "padding of values": (hidden(lambda m, x: (m.q(x).sum(-1) > 0)[:, None, None]), (),
                          {"mask": "padding"}),
    "causal and padding": (
        hidden(lambda m, x, pad: (back(x) >= 0) & (pad[:, None, None] > 0)), (PAD,),
        {"mask": "causal+padding", "causal": True}),
    "causal and padding apart": (
        masked(lambda m, s, x, pad: s.masked_fill(back(x) < 0, -math.inf).masked_fill(
            pad[:, None, None] == 0, -math.inf)), (PAD,), {"mask": "causal+padding"}),
    "window and padding": (
        hidden(lambda m, x, pad: (back(x).abs() < 3) & (pad[:, None, None] > 0)), (PAD,),
        {"mask": "window+padding", "window": (2, 2)}),
    "for the operator": (
        lambda m, x, pad: functional.scaled_dot_product_attention(
            *spelled.heads(m, x), (back(x) >= 0) & (pad[:, None, None] > 0)), (PAD,),
        {"mask": "causal+padding", "mask_form": "boolean", "masked_row": "zero"}),
    "padding of queries too": (
        hidden(lambda m, x, pad: (pad[:, None, None] * pad[:, None, :, None]) > 0, LEAST), (PAD,),
        OPAQUE),
    "window of an input": (
        hidden(lambda m, x, n: (back(x) >= 0) & (back(x) <= n[:, None, None, None])), (LENGTHS,),
        OPAQUE),
    "segments": (hidden(lambda m, x, ids: ids[:, None, None] == ids[:, None, :, None]), (IDS,),
                 OPAQUE),
    "any mask": (hidden(lambda m, x, kept: kept[:, None]),
                 (torch.ones(2, 6, 6, dtype=torch.bool),), OPAQUE),
    "any mask and causal": (
        masked(lambda m, s, x, kept: s.masked_fill(back(x) < 0, -math.inf).masked_fill(
            ~kept[:, None], -math.inf)), (torch.ones(2, 6, 6, dtype=torch.bool),),
        {"mask": "opaque", "causal": True}),
    "any bias": (masked(lambda m, s, x, bias: s + bias), (torch.zeros(6, 6),),
                 {"mask": "none", "bias": 1}),
    "never seen to hide": (
        hidden(lambda m, x, ids: (ids * 3 + 1 != 50000)[:, None, None].expand(
            -1, -1, x.shape[1], -1)), (IDS,), OPAQUE),
}


@pytest.mark.parametrize("name", BY_INPUTS)
def test_masks_of_inputs(name: str) -> None:
    check(*BY_INPUTS[name])


CROSS = (tokens(9),)
ORIGINS: dict[str, tuple[spelled.Core, tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "separate": (spelled.heads_last, (), {"projection": "separate", "heads": 4, "kv_heads": 4,
                                          "cross": False, "rope": None, "norm": None}),
    "fused": (spelled.fused_view, (), {"projection": "fused", "heads": 4, "head_dim": FEATURES}),
    "fused keys and values": (spelled.fused_kept, CROSS, {
        "projection": "fused kv", "cross": True, "heads": 4, "kv_heads": 4}),
    "addmm": (spelled.multiplied, (), {"projection": "addmm", "heads": 4, "cross": False}),
    "convolved": (spelled.convolved, (), {"projection": "conv", "heads": 4, "kv_heads": 4}),
    "einsum": (spelled.einsummed, (), {"projection": "einsum", "heads": 4, "kv_heads": 4}),
    "none": (spelled.unprojected, (), {"projection": "none", "heads": None, "cross": False}),
    "pooled queries": (spelled.pooled, (), {"heads": 4, "kv_heads": 4, "cross": None}),
    "cross": (spelled.cross, CROSS, {"projection": "separate", "cross": True, "mask": "none"}),
    "cross, causal": (spelled.cross_by_operator, CROSS, {
        "mask": "causal", "causal": True, "alignment": "top-left"}),
    "last queries": (spelled.last_queries, CROSS, {
        "mask": "causal", "causal": False, "alignment": "bottom-right"}),
    "one batch axis": (spelled.in_one_batch, (), {"heads": 4, "kv_heads": 4}),
    "repeated": (spelled.grouped(lambda q, k, v: spelled.soft(
        q @ k.repeat_interleave(2, 1).mT * 0.25, v.repeat_interleave(2, 1))), (),
        {"heads": 4, "kv_heads": 2}),
    "expanded": (spelled.grouped(lambda q, k, v: spelled.soft(
        q @ spelled.expanded(k).mT * 0.25, spelled.expanded(v))), (),
        {"heads": 4, "kv_heads": 2}),
    "two axes of heads": (spelled.grouped(spelled.two_axes), (), {"heads": 4, "kv_heads": 2}),
    "groups of the operator": (
        spelled.grouped(lambda q, k, v: functional.scaled_dot_product_attention(
            q, k, v, enable_gqa=True)), (), {"heads": 4, "kv_heads": 2}),
    "one key head": (spelled.one_kept, (), {"heads": 4, "kv_heads": 1}),
    "halves": (spelled.turned(spelled.by_halves), (), {"rope": "half", "projection": "separate"}),
    "halves in parts": (spelled.turned(spelled.by_parts), (), {"rope": "half"}),
    "half of the features": (spelled.turned(spelled.half_of_it), (), {"rope": "half"}),
    "pairs": (spelled.turned(spelled.by_pairs), (), {"rope": "interleaved", "heads": 4}),
    "unbound pairs": (spelled.turned(spelled.by_unbound_pairs), (), {"rope": "interleaved"}),
    "complex": (spelled.turned(spelled.by_numbers), (), {"rope": "complex", "heads": 4}),
    "not turned": (spelled.turned(spelled.scaled_not_turned), (), {"rope": None}),
    "layer norm": (spelled.normed(lambda m, t: m.norm(t)), (), {
        "norm": "layer", "projection": "separate"}),
    "rms norm": (spelled.normed(lambda m, t: t * torch.rsqrt(
        t.pow(2).mean(-1, keepdim=True) + 1e-6) * m.gain), (), {"norm": "rms", "heads": 4}),
    "rms norm of torch": (spelled.normed(lambda m, t: functional.rms_norm(
        t, (FEATURES,), m.gain)), (), {"norm": "rms"}),
    "cosine": (spelled.normed(lambda m, t: functional.normalize(t, dim=-1)), (), {"norm": "l2"}),
    "scales": (spelled.scaled_all_over, (), {"scale": 0.25}),
    "softcap": (masked(lambda m, s, x: torch.tanh(s / 20) * 20), (), {"softcap": 20.0}),
    "sink": (spelled.sunk, (), {"sink": True, "mixing": False}),
    "mixed": (spelled.mixed, (), {"mixing": True, "sink": False}),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_origins_and_cores(name: str) -> None:
    check(*ORIGINS[name])


def test_one_mask_is_proven_once_for_all_layers() -> None:
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    found = facets(model, tokens(), src_key_padding_mask=PAD == 0)
    assert [f["mask"] for f in found] == ["padding"] * 3


def test_sizes_that_are_fixed_are_the_only_ones_tried() -> None:
    program = capture(spelled.Spelled(hidden(lambda m, x: back(x) < 6)).eval(), (tokens(),),
                      dynamic_shapes=None).program
    assert run(MATCHING, program).matches[0].attrs["mask"] == "none"
    (found,) = facets(spelled.Spelled(hidden(lambda m, x: back(x) < 6)), tokens())
    assert found["mask"] == "opaque"


# Case of the corpus, module path of a match, and what it is.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral/sdpa": ("layers.0.self_attn", {
        "mask": "window+padding", "window": 4, "mask_form": "boolean", "rope": "half",
        "kv_heads": 2, "projection": "separate"}),
    "gemma2/eager": ("layers.1.self_attn", {
        "mask": "causal+padding", "softcap": 2.0, "kv_heads": 2}),
    "qwen3/sdpa": ("layers.0.self_attn", {"norm": "rms", "rope": "half", "kv_heads": 2}),
    "moonshine/eager": ("decoder.layers.0.encoder_attn", {"cross": True, "mask": "none"}),
    "gpt_neo/eager": ("h.1.attn.attention", {
        "mask": "window+padding", "window": 4, "mask_form": "additive+boolean"}),
    "gpt_oss/eager": ("layers.1.self_attn", {"sink": True, "mask": "causal+padding"}),
    "mpnet/eager": ("encoder.layer.0.attention.attn", {"mask": "padding", "bias": 1}),
    "squeezebert/eager": ("encoder.layers.0.attention", {"projection": "conv", "heads": 4}),
    "falcon/eager": ("h.0.self_attention", {"kv_heads": 2, "heads": 4}),
    "gpt2/eager": ("h.0.attn", {"projection": "addmm", "mask": "causal+padding"}),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name.startswith("mistral") else pytest.mark.slow)
    for name in TRANSFORMERS])
def test_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    path, expected = TRANSFORMERS[name]
    (case,) = (c for c in cases("transformers") if c.name == f"transformers/{name}")
    args, kwargs = case.inputs(*case.sizes[0])
    program = run(MATCHING, capture(case.build().eval(), args, kwargs).program)
    (found,) = (m.attrs for m in program.matches if m.path == path)
    assert {key: found[key] for key in expected} == expected
