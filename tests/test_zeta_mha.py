"""MultiheadAttention against torchscale and a float64 formula, and compiled."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peers import peer
from torch import nn
from zeta_formula import (
    OPTIONS,
    B,
    E,
    H,
    T,
    assert_same,
    check,
    dropped,
    layer,
    tokens,
    whole,
)

import bincompile as bc
from bincompile.nn import MultiheadAttention
from bincompile.nn.multiway import set_split_position
from bincompile.nn.xpos import XPOS

KINDS = list(itertools.product((False, True), repeat=3))


def torchscale_layer(multiway: bool, xpos: bool, subln: bool, **options: Any,
                     ) -> tuple[nn.Module, MultiheadAttention]:
    """torchscale's layer and ours with its weights."""
    theirs = peer("torchscale.component.multihead_attention").MultiheadAttention
    args = SimpleNamespace(**OPTIONS | {"multiway": multiway, "xpos_rel_pos": xpos})
    options = {"self_attention": True, **options}
    given_ = theirs(args, E, H, subln=subln, **options).eval()
    ours = MultiheadAttention(args, E, H, subln=subln, **options).eval()
    ours.load_state_dict(given_.state_dict())
    return given_, ours


@pytest.mark.parametrize(("multiway", "xpos", "subln"), KINDS)
def test_results_and_gradients_are_those_of_torchscale(
        multiway: bool, xpos: bool, subln: bool) -> None:
    theirs, ours = torchscale_layer(multiway, xpos, subln)
    for position in (-1, 0, 3) if multiway else (-1,):
        theirs.apply(set_split_position(position))
        for network in (m for m in theirs.modules() if hasattr(m, "split_position")):
            network.split_position = position  # theirs is not our class
        ours.apply(set_split_position(position))
        x = tokens(dtype=torch.float32)
        padding = torch.arange(T) >= torch.tensor([[T], [4], [2]])
        for call in ({}, {"attn_mask": torch.full((T, T), -math.inf).triu(1)},
                     {"attn_mask": torch.randn(T, T), "key_padding_mask": padding},
                     {"rel_pos": torch.randn(B * H, T, T)},
                     {"rel_pos": torch.randn(B, H, T, T), "key_padding_mask": padding.float(),
                      "attn_mask": torch.randn(T, T)}):
            assert_same(ours(x, x, x, **call), theirs(x, x, x, **call))
    for made in (theirs, ours):
        made.zero_grad()
        made(x, x, x)[0].square().sum().backward()
    for (name, mine), (other, yours) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and (mine.grad is None) == (yours.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-4)


def test_encoder_decoder_attention_is_that_of_torchscale() -> None:
    theirs, ours = torchscale_layer(False, True, True, self_attention=False,
                                    encoder_decoder_attention=True)
    assert ours.xpos is ours.inner_attn_ln is None  # both act in self-attention only
    x, encoded = tokens(5, dtype=torch.float32), tokens(9, dtype=torch.float32)
    padding = torch.arange(9) >= torch.tensor([[9], [4], [1]])
    for call in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.randn(5, 9)}):
        assert_same(ours(x, encoded, encoded, **call), theirs(x, encoded, encoded, **call))


@pytest.mark.parametrize("xpos", [False, True])
def test_decoding_token_by_token_is_that_of_torchscale(xpos: bool) -> None:
    theirs, ours = torchscale_layer(False, xpos, True)
    states: tuple[dict, dict] = ({}, {})
    prefix = tokens(4, dtype=torch.float32)
    causal = torch.full((4, 4), -math.inf).triu(1)
    found, wanted = (made(prefix, prefix, prefix, state, attn_mask=causal, is_first_step=True)
                     for made, state in zip((ours, theirs), states, strict=True))
    assert_same(found, wanted)
    for _ in range(5):
        x = tokens(1, dtype=torch.float32)
        found, wanted = (made(x, x, x, state)
                         for made, state in zip((ours, theirs), states, strict=True))
        assert_same(found, wanted)
        assert set(states[0]) == set(states[1]) == {"prev_key", "prev_value"}
        for name, kept in states[1].items():
            torch.testing.assert_close(states[0][name], kept)
    x = tokens(1, dtype=torch.float32)  # a state of theirs goes on in ours
    assert_same(ours(x, x, x, dict(states[1])), theirs(x, x, x, dict(states[1])))


def test_relative_position_bias_of_torchscale_is_taken() -> None:
    bias = peer("torchscale.component.relative_position_bias").RelativePositionBias(n_heads=H)
    theirs, ours = torchscale_layer(False, False, False)
    x = tokens(dtype=torch.float32)
    rel_pos = bias(B, T, T).detach()
    assert_same(ours(x, x, x, rel_pos=rel_pos), theirs(x, x, x, rel_pos=rel_pos))
    assert_same(ours(x, x, x, rel_pos=rel_pos[:H]), ours(x, x, x, rel_pos=rel_pos), 0.0)


@pytest.mark.parametrize(("offset", "downscale"), [(0, True), (0, False), (5, False), (6, True)])
def test_xpos_is_that_of_torchscale(offset: int, downscale: bool) -> None:
    theirs = peer("torchscale.component.xpos_relative_position").XPOS(6, 32)
    ours, x = XPOS(6, 32), torch.randn(4, T, 6)
    assert torch.equal(ours.scale, theirs.scale)
    torch.testing.assert_close(ours(x, offset, downscale), theirs(x, offset, downscale))


@pytest.mark.parametrize(("multiway", "xpos", "subln"), KINDS)
def test_state_dicts_of_torchscale_load_and_round_trips_are_bit_equal(
        multiway: bool, xpos: bool, subln: bool) -> None:
    theirs, ours = torchscale_layer(multiway, xpos, subln)
    wanted, back = theirs.state_dict(), copy.deepcopy(theirs)
    assert list(ours.state_dict()) == list(wanted)
    assert all(torch.equal(v, wanted[k]) for k, v in ours.state_dict().items())
    back.load_state_dict(ours.state_dict())
    assert all(torch.equal(v, wanted[k]) for k, v in back.state_dict().items())


def test_a_seed_draws_the_weights_of_torchscale_after_its_reset() -> None:
    theirs = peer("torchscale.component.multihead_attention").MultiheadAttention
    torch.manual_seed(5)
    wanted = theirs(SimpleNamespace(**OPTIONS), E, H, self_attention=True)
    wanted.reset_parameters()
    torch.manual_seed(5)
    found = MultiheadAttention(None, E, H, self_attention=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert torch.equal(getattr(found, name).weight, getattr(wanted, name).weight)


@pytest.mark.parametrize("subln", [False, True])
@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_every_kind_is_its_formula(causal: bool, xpos: bool, subln: bool) -> None:
    x = tokens()
    bias = dropped(np.triu(np.ones((T, T)), 1) > 0) if causal else np.zeros((T, T))
    check(layer(xpos_rel_pos=xpos, xpos_scale_base=16, subln=subln), (x, x, x), whole(bias),
          is_causal=causal)


@pytest.mark.parametrize("shape", [
    (T, T), (1, T), (B, T, T), (1, T, T), (B, 1, T), (B * H, T, T), (B, H, T, T), (1, H, 1, T)],
    ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "infinite"])
def test_attention_masks_of_every_shape(shape: tuple[int, ...], kind: str) -> None:
    drop, x = torch.rand(shape) > 0.6, tokens()
    mask = drop if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    if kind == "infinite":
        mask = mask.masked_fill(drop, -math.inf)
    bias = dropped(drop.numpy()) if kind == "bool" else mask.numpy()
    if len(shape) == 3:
        bias = bias.reshape(B, H, T, T) if shape[0] == B * H else bias[:, None]
    check(layer(), (x, x, x), whole(bias), attn_mask=mask)


@given(st.data())
def test_any_sizes_and_masks_are_the_formula(data: st.DataObject) -> None:
    batch, queries, keys, heads, size = (data.draw(st.integers(1, 4)) for _ in range(5))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    made = MultiheadAttention(None, heads * size, heads, dtype=torch.float64).eval()
    query, key, value = (torch.randn(batch, n, heads * size, dtype=torch.float64)
                         for n in (queries, keys, keys))
    call: dict[str, Any] = {}
    bias = np.zeros((batch, heads, queries, keys))
    if data.draw(st.booleans()):
        call["key_padding_mask"] = padding = torch.rand(batch, keys) > 0.6
        bias = bias + dropped(padding.numpy())[:, None, None]
    if data.draw(st.booleans()):
        call["attn_mask"] = mask = torch.rand(queries, keys) > 0.6
        bias = bias + dropped(mask.numpy())
    if data.draw(st.booleans()):
        call["rel_pos"] = rel_pos = torch.randn(batch * heads, queries, keys).double()
        bias = bias + rel_pos.numpy().reshape(bias.shape)
    check(made, (query, key, value), bias, **call)


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "fused": ({}, {"need_weights": False}),
    "causal xpos subln": ({"xpos_rel_pos": True, "subln": True}, {"is_causal": True}),
    "causal xpos fused": ({"xpos_rel_pos": True}, {"is_causal": True, "need_weights": False}),
    "bool mask": ({}, {"attn_mask": lambda b, t: torch.rand(t, t) > 0.5}),
    "float mask, padding": ({}, {"attn_mask": lambda b, t: torch.randn(t, t),
                                 "key_padding_mask": lambda b, t: torch.rand(b, t) > 0.5}),
    "bias of heads": ({"xpos_rel_pos": True}, {"rel_pos": lambda b, t: torch.randn(1, H, t, t)}),
    "bias of batch and heads": ({}, {"rel_pos": lambda b, t: torch.randn(b * H, t, t)}),
    "multiway": ({"multiway": True, "subln": True}, {"is_causal": True}),
    "encoder": ({"self_attention": False, "encoder_decoder_attention": True},
                {"key_padding_mask": lambda b, t: torch.rand(b, t) > 0.5}),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_recognised_proven_and_compiled_for_every_size(name: str) -> None:
    options, call = CALLS[name]
    made = layer(dtype=torch.float32, **options)
    if options.get("multiway"):
        made.apply(set_split_position(3))

    def arguments(batch: int, length: int) -> tuple[tuple, dict]:
        keys = tokens(length, batch, torch.float32)
        query = tokens(length + 2, batch, torch.float32) if name == "encoder" else keys
        return (query, keys, keys), {
            k: v(batch, length) if callable(v) else v for k, v in call.items()}

    args, kwargs = arguments(B, T)
    compiled = bc.optimize(made, args, kwargs)
    found = [m for m in compiled.report.matches if m.operator == "attention"]
    assert len(found) == 1 and found[0].validated and not compiled.report.refusals
    assert found[0].attrs["heads"] == H and found[0].attrs["scale"] == made.scaling
    assert found[0].attrs["causal"] == call.get("is_causal", False)
    for sizes in ((B, T), (5, 11), (1, 5)):
        args, kwargs = arguments(*sizes)
        for f, w in zip(compiled(*args, **kwargs), made(*args, **kwargs), strict=True):
            assert f is w is None or torch.allclose(f, w, atol=1e-5)


@pytest.mark.parametrize("held", [0, 3])
def test_a_state_that_the_call_would_change_is_refused_by_optimize(held: int) -> None:
    made, x, state = layer(), tokens(), {}
    if held:
        made(*[tokens(held)] * 3, state)
    kept = dict(state)
    with pytest.raises(bc.CaptureError, match="changes a list, a dict or an object of its inputs"):
        bc.optimize(made, (x, x, x, state))
    assert state.keys() == kept.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_half_precision_keeps_positions_and_finite_masks(
        dtype: torch.dtype, need_weights: bool) -> None:
    exact = layer(xpos_rel_pos=True, subln=True)
    made = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(made.state_dict())
    x, mask = tokens(40).to(dtype), torch.full((40, 40), -1e9).triu(1)
    mask[20] = -1e9  # finite, though not in float16: all keys alike
    attn, weights = made(x, x, x, attn_mask=mask, need_weights=need_weights)
    wanted = exact(x.double(), x.double(), x.double(), attn_mask=mask.double() * 1e21)
    assert attn.dtype == dtype
    tolerance = 60 * torch.finfo(dtype).eps
    torch.testing.assert_close(attn.double(), wanted[0], atol=tolerance, rtol=tolerance)
    if weights is not None:
        assert weights.dtype == dtype


def test_xpos_refuses_a_sequence_whose_scales_overflow() -> None:
    positions, x = XPOS(4, scale_base=2), torch.randn(1, 265, 4)
    assert positions(x).isfinite().all() and positions(x, downscale=True).isfinite().all()
    with pytest.raises(bc.InputError, match="265 tokens"):
        positions(x.half())
    with pytest.raises(bc.InputError, match="at most"):
        positions(torch.randn(1, 266, 4))


def test_dropout_acts_in_training_and_weights_are_those_before_it() -> None:
    made, x = layer(dropout=0.5).train(), tokens()
    (first, weights), (second, _) = (made(x, x, x) for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(weights, made.eval()(x, x, x)[1])
    assert torch.equal(made(x, x, x)[0], made(x, x, x)[0])


@pytest.mark.parametrize(("batch", "length"), [(0, T), (B, 0)])
def test_empty_batches_and_sequences(batch: int, length: int) -> None:
    x = tokens(length, batch)
    attn, weights = layer(subln=True)(x, x, x)
    assert attn.shape == x.shape and weights.shape == (H, batch, length, length)


def test_a_query_of_an_empty_encoder_gives_zeros() -> None:
    made = MultiheadAttention(None, E, H, encoder_decoder_attention=True).eval()
    x, none = tokens(dtype=torch.float32), tokens(0, dtype=torch.float32)
    assert made(x, none, none)[0].eq(0).all()
