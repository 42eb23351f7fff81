"""The thirteen known defects of Zeta's MultiheadAttention, Z1 to Z13: none is in ours."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from formulas import array
from torch import fx, nn
from zeta_formula import (
    OPTIONS,
    B,
    E,
    H,
    T,
    assert_same,
    check,
    dropped,
    formula,
    layer,
    tokens,
    whole,
)

import bincompile as bc
from bincompile.nn import MultiheadAttention
from bincompile.nn.multiway import MultiwayNetwork, set_split_position

BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"embed_dim": 10}, "num_heads"), ({"embed_dim": None}, "embed_dim"),
    ({"num_heads": 0}, "num_heads"), ({"num_heads": None}, "num_heads"),
    ({"num_heads": 8, "xpos_rel_pos": True}, "even head_dim"), ({"dropout": 1.5}, "dropout"),
    ({"encoder_decoder_attention": True}, "at most one"), ({"subln": 1}, "subln"),
    ({"multiway": "yes"}, "multiway"), ({"layernorm_eps": -1.0}, "layernorm_eps"),
    ({"xpos_rel_pos": True, "xpos_scale_base": 0}, "scale_base"), ({"args": 512}, "args=512"),
    ({"args": {"xpos_rel_pos": 2}}, "xpos_rel_pos"), ({"dtype": torch.int8}, "dtype")]


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
