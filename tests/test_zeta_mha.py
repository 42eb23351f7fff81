"""MultiheadAttention against torchscale and a float64 formula; Z1 to Z13 are known defects."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from formulas import array
from hypothesis import given
from hypothesis import strategies as st
from peers import peer
from torch import fx, nn

import bincompile as bc
from bincompile.nn import MultiheadAttention
from bincompile.nn.multiway import MultiwayNetwork, set_split_position
from bincompile.nn.xpos import XPOS

B, T, E, H = 3, 7, 24, 4
OPTIONS = {"multiway": False, "layernorm_eps": 1e-5, "xpos_rel_pos": False, "xpos_scale_base": 512}
KINDS = list(itertools.product((False, True), repeat=3))
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"embed_dim": 10}, "num_heads"), ({"embed_dim": None}, "embed_dim"),
    ({"num_heads": 0}, "num_heads"), ({"num_heads": None}, "num_heads"),
    ({"num_heads": 8, "xpos_rel_pos": True}, "even head_dim"), ({"dropout": 1.5}, "dropout"),
    ({"encoder_decoder_attention": True}, "at most one"), ({"subln": 1}, "subln"),
    ({"multiway": "yes"}, "multiway"), ({"layernorm_eps": -1.0}, "layernorm_eps"),
    ({"xpos_rel_pos": True, "xpos_scale_base": 0}, "scale_base"), ({"args": 512}, "args=512"),
    ({"args": {"xpos_rel_pos": 2}}, "xpos_rel_pos"), ({"dtype": torch.int8}, "dtype")]


def layer(*, self_attention: bool = True, dtype: torch.dtype = torch.float64,
          **options: Any) -> MultiheadAttention:
    made = MultiheadAttention(None, E, H, self_attention=self_attention, dtype=dtype, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval()


def tokens(length: int = T, batch: int = B, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, length, E, dtype=dtype)


def formula(made: MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loops over samples, heads and queries; bias (B, H, T, S) is -inf where a key is dropped."""
    q, k, v = (array(x) @ array(p.weight).T + array(p.bias) for p, x in (
        (made.q_proj, query), (made.k_proj, key), (made.v_proj, value)))
    weights, mixed, size = np.zeros(bias.shape), np.zeros(q.shape), made.head_dim
    for b, h, i in itertools.product(*map(range, bias.shape[:3])):
        part = slice(h * size, (h + 1) * size)
        scores = np.array([
            score(made, q[b, i, part], k[b, j, part], i - j) for j in range(k.shape[1])])
        scores = scores / math.sqrt(size) + bias[b, h, i]
        if np.isfinite(scores).any():
            grown = np.exp(scores - scores.max())
            weights[b, h, i] = grown / grown.sum()
        mixed[b, i, part] = weights[b, h, i] @ v[b, :, part]
    if made.inner_attn_ln is not None:
        norm = made.inner_attn_ln
        centred = mixed - mixed.mean(-1, keepdims=True)
        mixed = centred / np.sqrt(mixed.var(-1, keepdims=True) + norm.eps)
        mixed = mixed * array(norm.weight) + array(norm.bias)
    attn = mixed @ array(made.out_proj.weight).T + array(made.out_proj.bias)
    return attn, weights.transpose(1, 0, 2, 3)


def score(made: MultiheadAttention, query: np.ndarray, key: np.ndarray, distance: int) -> float:
    """Pairs are complex numbers: xpos multiplies their product by a rotation and a decay."""
    if made.xpos is None:
        return float(query @ key)
    half = made.head_dim // 2
    pair = np.arange(half)
    angles = distance * 10000.0 ** (-pair / half)
    decay = array(made.xpos.scale) ** (distance / made.xpos.scale_base)
    left, right = query[::2] + 1j * query[1::2], key[::2] + 1j * key[1::2]
    return float((left * right.conj() * np.exp(1j * angles) * decay).real.sum())


def check(made: MultiheadAttention, inputs: tuple[torch.Tensor, ...], bias: np.ndarray,
          **call: Any) -> None:
    wanted = formula(made, *inputs, bias)
    attn, weights = made(*inputs, **call)
    np.testing.assert_allclose(array(attn), wanted[0], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(array(weights), wanted[1], rtol=1e-9, atol=1e-11)
    attn, none = made(*inputs, **call, need_weights=False)
    assert none is None
    np.testing.assert_allclose(array(attn), wanted[0], rtol=1e-9, atol=1e-10)


def dropped(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, -np.inf, 0.0)


def whole(bias: np.ndarray, keys: int = T) -> np.ndarray:
    return np.broadcast_to(bias, (B, H, T, keys))


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


def assert_same(found: tuple, wanted: tuple, tolerance: float = 2e-6) -> None:
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        torch.testing.assert_close(f, w, rtol=tolerance, atol=tolerance)


# -- torchscale


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


# -- the formula


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


# -- Z1 to Z13


def test_z1_the_documented_constructor_and_pair_of_results() -> None:
    args = ...  # as the page has it
    attention = MultiheadAttention(args, embed_dim=512, num_heads=8, dropout=0.1,
                                   self_attention=True)
    query, key, value = (torch.rand((4, 10, 512)) for _ in range(3))
    attn, attn_weights = attention(query, key, value)
    assert attn.shape == (4, 10, 512) and attn_weights.shape == (8, 4, 10, 10)
    attention = MultiheadAttention(args, embed_dim=512, num_heads=8, dropout=0.1,
                                   encoder_decoder_attention=True)
    key, value = (torch.rand((4, 20, 512)) for _ in range(2))
    attn, attn_weights = attention(query, key, value)
    assert attn.shape == (4, 10, 512) and attn_weights.shape == (8, 4, 10, 20)


@pytest.mark.parametrize("args", [
    SimpleNamespace(**OPTIONS | {"xpos_rel_pos": True, "unrelated": 3}), {"xpos_rel_pos": True}],
    ids=["object", "mapping"])
def test_z1_args_may_be_an_object_or_a_mapping_and_a_keyword_goes_first(args: Any) -> None:
    made = MultiheadAttention(args, 8, 2, self_attention=True)
    assert made.xpos is not None and made.xpos.scale_base == 512
    assert MultiheadAttention(args, 8, 2, self_attention=True, xpos_rel_pos=False).xpos is None
    assert MultiheadAttention(args, 8, 2, self_attention=True, xpos_scale_base=9).xpos \
        .scale_base == 9
    subln = MultiheadAttention({"layernorm_eps": 1e-3}, 8, 2, self_attention=True, subln=True)
    assert subln.inner_attn_ln.eps == 1e-3


def test_z2_parameters_are_doubled_only_for_multiway() -> None:
    single, double = (MultiheadAttention(None, 16, 4, multiway=m) for m in (False, True))
    counts = [sum(p.numel() for p in made.parameters()) for made in (single, double)]
    assert counts == [1088, 2176]
    x = torch.randn(2, 6, 16)
    double.apply(set_split_position(4))
    double(x, x, x)[0].sum().backward()
    assert all(p.grad is not None for p in double.parameters())


def test_z2_tokens_go_to_their_way() -> None:
    network = MultiwayNetwork(nn.Linear(4, 4))
    x = torch.randn(2, 5, 4)
    first, second = network.A(x), network.B(x)
    assert not torch.equal(first, second)
    for position, wanted in ((-1, first), (0, second), (5, first),
                             (2, torch.cat([first[:, :2], second[:, 2:]], 1))):
        assert torch.allclose(network.apply(set_split_position(position))(x), wanted)
    with pytest.raises(bc.InputError, match="split_position=6"):
        network.apply(set_split_position(6))(x)
    for bad in (-2, True, 1.0):
        with pytest.raises(bc.ConfigError, match="set_split_position"):
            set_split_position(bad)
    with pytest.raises(bc.ConfigError, match="reset_parameters"):
        MultiwayNetwork(nn.GELU())


@pytest.mark.parametrize("multiway", [False, True])
def test_z3_parameters_are_reset_and_the_constructor_has_done_so(multiway: bool) -> None:
    made = MultiheadAttention(None, 64, 4, self_attention=True, subln=True, multiway=multiway)
    for again in (False, True):
        if again:
            for parameter in made.parameters():
                nn.init.constant_(parameter, 7.0)
            made.reset_parameters()
        for name, p in made.named_parameters():
            bound = math.sqrt(3 / 64) / (1 if "out_proj" in name else math.sqrt(2))
            if "inner_attn_ln" in name:
                assert p.eq(1.0 if name.endswith("weight") else 0.0).all()
            elif name.endswith("weight"):
                assert 0.9 * bound < p.abs().max() <= bound, name
            elif "out_proj" in name:
                assert p.eq(0).all()
            else:
                assert 0 < p.abs().max() <= 1 / 8
    if multiway:
        assert not torch.equal(made.q_proj.A.weight, made.q_proj.B.weight)


@pytest.mark.parametrize(("name", "shapes"), [
    ("query", ((B, T), (B, T, E), (B, T, E))), ("query", ((B, T, E + 1), (B, T, E), (B, T, E))),
    ("key", ((B, T, E), (B + 1, T, E), (B, T, E))), ("value", ((B, T, E), (B, T, E), (T, B, E))),
    ("key and value", ((B, T, E), (B, T, E), (B, T + 1, E)))])
def test_z4_every_shape_is_checked(name: str, shapes: tuple) -> None:
    with pytest.raises(bc.InputError, match=f"^{name} of "):
        layer(self_attention=False)(*(torch.zeros(s, dtype=torch.float64) for s in shapes))


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("wrong", [None, torch.zeros(B, T, E, dtype=torch.int64)], ids=str)
def test_z4_what_is_no_float_tensor_is_refused(position: int, wrong: Any) -> None:
    inputs = [tokens()] * 3
    inputs[position] = wrong
    with pytest.raises(bc.InputTypeError, match=("query", "key", "value")[position]):
        layer()(*inputs)


def test_z5_a_bool_mask_drops_and_the_mask_of_the_page_means_what_it_says() -> None:
    made, x = layer(), tokens()
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = made(x, x, x, attn_mask=later)[1]
    assert weights[..., later].eq(0).all() and weights[..., ~later].gt(0).all()
    assert_same(made(x, x, x, attn_mask=later), made(x, x, x, is_causal=True), 0.0)
    wanted = made(x, x, x, attn_mask=torch.zeros(T, T).masked_fill(later, -math.inf))
    assert_same(made(x, x, x, attn_mask=later), wanted, 0.0)
    page = torch.ones((T, T)).triu_() * -1e9  # the diagonal is masked too: row 0 has nothing left
    weights = made.float()(x.float(), x.float(), x.float(), attn_mask=page)[1]
    torch.testing.assert_close(weights[:, :, 0], torch.full((H, B, T), 1 / T))
    assert weights[:, :, 1, 1:].eq(0).all()


@pytest.mark.parametrize(("call", "error"), [
    ({"attn_mask": torch.ones(T, T, dtype=torch.int64)}, bc.InputTypeError),
    ({"attn_mask": torch.ones(T, T + 1)}, bc.InputError),
    ({"attn_mask": torch.ones(H, T, T)}, bc.InputError),
    ({"attn_mask": torch.ones(T)}, bc.InputError), ({"attn_mask": [0.0]}, bc.InputTypeError),
    ({"key_padding_mask": torch.ones(T, B)}, bc.InputError),
    ({"key_padding_mask": torch.ones(B, 1, T)}, bc.InputError),
    ({"key_padding_mask": torch.ones(B, T).cfloat()}, bc.InputTypeError),
    ({"rel_pos": torch.ones(B, T, T)}, bc.InputError), ({"rel_pos": torch.ones(2)}, bc.InputError),
    ({"rel_pos": torch.ones(T, T).bool()}, bc.InputTypeError)], ids=lambda p: str(p)[:30])
def test_z5_a_wrong_mask_is_refused_by_name(call: dict, error: type[Exception]) -> None:
    x = tokens()
    with pytest.raises(error, match=next(iter(call))):
        layer()(x, x, x, **call)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("subln", [False, True])
def test_z6_a_query_that_sees_nothing_gives_zeros(subln: bool, need_weights: bool) -> None:
    made = MultiheadAttention(None, E, H, self_attention=True, subln=subln).eval()
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    drop = torch.zeros(T, T)
    drop[2] = -math.inf
    x = tokens(dtype=torch.float32).requires_grad_()
    attn, weights = made(x, x, x, key_padding_mask=padding, attn_mask=drop,
                         need_weights=need_weights)
    assert attn[1].eq(0).all() and attn[:, 2].eq(0).all() and attn[[0, 2], 3].ne(0).all()
    if weights is not None:
        assert weights[:, 1].eq(0).all() and weights[:, :, 2].eq(0).all()
    attn.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize(("xpos", "biased"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("chunks", [(1,) * T, (2, 4, 1), (3, 3, 1), (6, 1), (T,)], ids=str)
def test_z7_chunks_of_any_size_give_what_the_whole_gives(
        chunks: tuple[int, ...], need_weights: bool, xpos: bool, biased: bool) -> None:
    made, x = layer(xpos_rel_pos=xpos, xpos_scale_base=8, subln=True), tokens()
    rel_pos = torch.randn(H, T, T, dtype=torch.float64) if biased else None
    wanted, weights = made(x, x, x, is_causal=True, rel_pos=rel_pos)
    state: dict[str, Any] = {}
    end = 0
    for part in x.split(chunks, 1):
        start, end = end, end + part.shape[1]
        found, part_weights = made(part, part, part, state, is_causal=True,
                                   need_weights=need_weights, is_first_step=start == 0,
                                   rel_pos=rel_pos[:, start:end, :end] if biased else None)
        torch.testing.assert_close(found, wanted[:, start:end])
        assert state["prev_key"].shape == (B, H, end, E // H)
        if part_weights is not None:
            torch.testing.assert_close(part_weights, weights[:, :, start:end, :end])


def test_z8_the_keys_of_an_encoder_are_projected_once_and_kept() -> None:
    made = layer(self_attention=False, encoder_decoder_attention=True)
    encoded, padding, state = tokens(7), torch.arange(7).repeat(B, 1) > 4, {}
    projected = []
    made.k_proj.register_forward_hook(lambda *call: projected.append(call))
    for step in range(3):
        x = tokens(1)
        given_ = (encoded, encoded) if step != 1 else (None, None)
        found = made(x, *given_, state, key_padding_mask=padding)
        assert state["prev_key"].shape[2] == 7 and len(projected) == 1
        with_hooks_off = copy.deepcopy(made)
        with_hooks_off.k_proj._forward_hooks.clear()
        assert_same(found, with_hooks_off(x, encoded, encoded, key_padding_mask=padding), 1e-12)
    with pytest.raises(bc.InputError, match="as in the state"):
        made(x, tokens(8), tokens(8), state)


@torch.no_grad()
def test_z8_a_step_copies_no_tokens_and_a_forked_state_goes_its_own_way() -> None:
    made, x = layer(), tokens(12)
    first, state = x[:, :4], {}
    made(first, first, first, state)
    forks, places = [], set()
    for end in range(5, 9):
        part = x[:, end - 1:end]
        forks.append((end - 1, dict(state)))
        made(part, part, part, state)
        places.add(state["prev_key"].data_ptr())
    assert len(places) == 1
    forks.append((8, copy.deepcopy(state)))
    for length, fork in forks:
        other = tokens(2)
        found = made(other, other, other, fork)[0]
        again = torch.cat([x[:, :length], other], 1)
        torch.testing.assert_close(found, made(again, again, again)[0][:, -2:])
    last = x[:, 8:]
    torch.testing.assert_close(made(last, last, last, state)[0], made(x, x, x)[0][:, 8:])


@torch.no_grad()
def test_z8_a_long_stream_moves_its_state_now_and_then() -> None:
    made, x, state = layer(), tokens(120, 1), {}
    found, places = [], set()
    for part in x.split(1, 1):
        found.append(made(part, part, part, state)[0])
        places.add(state["prev_value"].data_ptr())
    assert len(places) <= 6
    torch.testing.assert_close(torch.cat(found, 1), made(x, x, x, is_causal=True)[0])


def test_z8_a_state_passes_between_modes_and_through_a_file(tmp_path: Any) -> None:
    made, x, state = layer(), tokens(7), {}
    modes = [torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode,
             torch.no_grad, torch.enable_grad, torch.no_grad]
    for part, mode in zip(x.split(1, 1), modes, strict=True):
        with mode():
            found = made(part, part, part, state)[0]
        if mode is torch.enable_grad:
            made.zero_grad()
            kept = found
    kept.sum().backward()  # later steps wrote nothing that this gradient reads
    assert all(p.grad.isfinite().all() for p in made.parameters())
    torch.testing.assert_close(found, made(x, x, x)[0][:, -1:])
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(loaded[n], state[n]) for n in state)


def test_z8_a_state_is_reordered_for_beam_search() -> None:
    made, x, state = layer(), tokens(), {}
    made.reorder_incremental_state(state, torch.tensor([0]))
    assert state == {}
    made(x, x, x, state)
    order = torch.tensor([2, 0, 0, 1])
    made.reorder_incremental_state(state, order)
    step = tokens(1, 4)
    found = made(step, step, step, state)
    again = torch.cat([x[order], step], 1)
    torch.testing.assert_close(found[0], made(again, again, again)[0][:, -1:])


def test_z8_a_state_may_be_cut_to_a_window() -> None:
    made, x, state = layer(xpos_rel_pos=True), tokens(), {}
    for part in x.split(1, 1):
        for name, kept in state.items():
            state[name] = kept[:, :, -3:]
        found = made(part, part, part, state)[0]
    torch.testing.assert_close(found, made(*[x[:, -4:]] * 3, is_causal=True)[0][:, -1:])


@pytest.mark.parametrize(("state", "message"), [
    ({"prev_key": torch.zeros(B, H, 2, 6)}, "prev_value of NoneType"),
    ({"prev_key": torch.zeros(B, H, 2, 6), "prev_value": torch.zeros(B, H, 3, 6)}, "or neither"),
    ({n: torch.zeros(B + 1, H, 2, 6) for n in ("prev_key", "prev_value")}, "batch of query"),
    ({n: torch.zeros(B * H, 2, 6) for n in ("prev_key", "prev_value")}, "prev_key of")],
    ids=lambda p: str(p)[:20])
def test_z8_a_state_that_does_not_fit_is_refused(state: dict, message: str) -> None:
    x = tokens(2, dtype=torch.float32)
    with pytest.raises(bc.InputError, match=message):
        layer(dtype=torch.float32)(x, x, x, state)


@pytest.mark.parametrize("bad", [
    {"attn_mask": torch.ones(2, 2)}, {"is_first_step": True}, {"key_padding_mask": torch.ones(2)}],
    ids=lambda p: next(iter(p)))
def test_z8_a_call_that_fails_leaves_the_state_as_it_was(bad: dict) -> None:
    made, x, state = layer(), tokens(2), {}
    made(x, x, x, state)
    kept = dict(state)
    with pytest.raises(bc.InputError):
        made(x, x, x, state, **bad)
    assert state.keys() == kept.keys() and all(state[n] is kept[n] for n in kept)


def test_z8_a_state_of_the_wrong_type_and_a_causal_encoder_are_refused() -> None:
    x = tokens()
    with pytest.raises(bc.InputTypeError, match="incremental_state of list"):
        layer()(x, x, x, [])
    with pytest.raises(bc.InputError, match="is_causal"):
        layer(self_attention=False, encoder_decoder_attention=True)(x, x, x, is_causal=True)
    with pytest.raises(bc.InputError, match="compare positions"):
        layer(xpos_rel_pos=True)(x, tokens(T + 1), tokens(T + 1))


@pytest.mark.parametrize("shape", [(T, T), (H, T, T), (1, 1, T), (B * H, T, T), (B, H, T, T),
                                   (1, H, T, T), (B, 1, 1, T)], ids=str)
def test_z9_a_relative_bias_is_broadcast(shape: tuple[int, ...]) -> None:
    rel_pos, x = torch.randn(shape, dtype=torch.float64), tokens()
    bias = rel_pos.numpy()
    check(layer(), (x, x, x), whole(bias.reshape(B, H, T, T) if shape[0] == B * H else bias),
          rel_pos=rel_pos)


@pytest.mark.parametrize(("bad", "message"), BAD_ARGUMENTS, ids=str)
def test_z10_a_wrong_argument_is_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(bc.ConfigError, match=message) as caught:
        MultiheadAttention(**({"embed_dim": E, "num_heads": H, "self_attention": True} | bad))
    assert isinstance(caught.value, ValueError)


def test_z10_no_keyword_is_swallowed() -> None:
    with pytest.raises(TypeError, match="use_xpos"):
        MultiheadAttention(None, E, H, use_xpos=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_z11_padding_causal_and_bias_together(side: str, need_weights: bool) -> None:
    x, padding = tokens(), torch.arange(T) >= torch.tensor([[T], [4], [0]])
    padding = padding.flip(1) if side == "left" else padding  # left: the first queries see nothing
    rel_pos = torch.randn(H, T, T, dtype=torch.float64)
    bias = whole(dropped(padding.numpy())[:, None, None] + rel_pos.numpy()
                 + dropped(np.triu(np.ones((T, T)), 1) > 0))
    made = layer(subln=True)
    found = made(x, x, x, key_padding_mask=padding, rel_pos=rel_pos, is_causal=True,
                 need_weights=need_weights)[0]
    assert found.isfinite().all()
    np.testing.assert_allclose(array(found), formula(made, x, x, x, bias)[0], rtol=1e-9)


def test_z12_a_mask_hides_no_nan() -> None:
    made, x = layer(), tokens()
    x[1, 2, 0] = math.nan
    for call in ({}, {"attn_mask": torch.zeros(T, T)}, {"attn_mask": torch.zeros(T, T).bool()}):
        attn = made(x, x, x, **call)[0]
        assert attn[1].isnan().all() and attn[[0, 2]].isfinite().all()


@pytest.mark.parametrize("multiway", [False, True])
@pytest.mark.parametrize("xpos", [False, True])
def test_z13_symbolic_trace_gives_a_graph_for_every_size(xpos: bool, multiway: bool) -> None:
    made = layer(xpos_rel_pos=xpos, multiway=multiway, dtype=torch.float32, subln=True)
    made.apply(set_split_position(2))
    nothing = ("incremental_state", "key_padding_mask", "attn_mask", "rel_pos")
    graph = fx.symbolic_trace(made, concrete_args={
        **dict.fromkeys(nothing), "is_first_step": False, "is_causal": False, "need_weights": True})
    for length in (T, 11):
        x = tokens(length, dtype=torch.float32)
        assert_same(graph(x, x, x), made(x, x, x), 0.0)
    compiled = bc.optimize(graph.eval(), (x, x, x))
    assert [m.validated for m in compiled.report.matches if m.operator == "attention"] == [True]
    assert_same(compiled(x, x, x), made(x, x, x), 1e-5)


# -- optimize

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
    with pytest.raises(bc.CaptureError, match="changes a list or a dict among its inputs"):
        bc.optimize(made, (x, x, x, state))
    assert state.keys() == kept.keys()


# -- dtypes and modes


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
