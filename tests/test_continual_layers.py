"""The continual attention layers against a float64 window, and the defects C1 to C19."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bincompile.errors import ConfigError, InputError, InputTypeError
from bincompile.nn import (
    RetroactiveMultiheadAttention,
    SingleOutputMultiheadAttention,
    StreamState,
    call_mode,
    two_stacks,
)

SINGLE, RETRO = SingleOutputMultiheadAttention, RetroactiveMultiheadAttention
CLASSES = pytest.mark.parametrize("cls", [SINGLE, RETRO])
E, H, N = 8, 2, 3
LAYOUTS = [(True, False), (True, True), (False, False), (False, True)]
TO_LAYOUT = {(True, False): (0, 1, 2), (True, True): (0, 2, 1), (False, False): (1, 0, 2),
             (False, True): (1, 2, 0)}  # from (N, T, E)


def layer_of(cls: type, sequence_len: int, **options: Any) -> Any:
    """A layer in float64, eval mode, with every parameter random, biases too."""
    options = {"dtype": torch.float64, "batch_first": True, **options}
    layer = cls(E, H, sequence_len=sequence_len, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def tokens(layer: Any, steps: int, batch: int = N) -> list[torch.Tensor]:
    """Query, key and value (N, T, features)."""
    return [torch.randn(batch, steps, n, dtype=layer.out_proj.weight.dtype)
            for n in (E, layer.kdim, layer.vdim)]


def plain(layer: Any) -> nn.MultiheadAttention:
    """torch's attention with the same parameters, on (N, T, E)."""
    module = nn.MultiheadAttention(
        E, layer.num_heads, bias=layer.in_proj_bias is not None,
        add_bias_kv=layer.bias_k is not None, add_zero_attn=layer.add_zero_attn, kdim=layer.kdim,
        vdim=layer.vdim, batch_first=True, dtype=layer.out_proj.weight.dtype)
    module.load_state_dict(layer.state_dict())
    return module.eval()


def stream(layer: Any, xs: list[torch.Tensor], **masks: Any) -> list[torch.Tensor | None]:
    """forward_step for each token; a padding mask (N, T) is given token by token."""
    padding = masks.pop("key_padding_mask", None)
    return [layer.forward_step(*(x[:, t] for x in xs), **masks, **(
        {} if padding is None else {"key_padding_mask": padding[:, t]}))
        for t in range(xs[0].shape[1])]


def answer(layer: Any, full: torch.Tensor) -> torch.Tensor:
    """What a step should give, from all outputs (N, S, E) of its window."""
    if isinstance(layer, SINGLE):
        return full[:, layer.query_index]
    return full.permute(TO_LAYOUT[layer.batch_first, layer.embed_dim_second])


def run_padded(layer: Any, steps: int, padding: torch.Tensor | None, mask: torch.Tensor | None,
               ) -> None:
    """Every step equals torch on its window."""
    xs, window, whole = tokens(layer, steps), layer.sequence_len, plain(layer)
    found = stream(layer, xs, attn_mask=mask, key_padding_mask=padding)
    for t, y in enumerate(found):
        if t < window - 1:
            assert y is None
            continue
        past = slice(t - window + 1, t + 1)
        ignored = None if padding is None else torch.where(
            padding[:, past], -math.inf, torch.zeros((), dtype=torch.float64))
        wanted, _ = whole(*(x[:, past] for x in xs), key_padding_mask=ignored, attn_mask=(
            torch.where(mask, -math.inf, torch.zeros((), dtype=torch.float64))
            if mask is not None and mask.dtype == torch.bool else mask))
        torch.testing.assert_close(y, answer(layer, wanted), rtol=1e-10, atol=1e-12)


@st.composite
def layers(draw: st.DrawFn) -> Any:
    cls = draw(st.sampled_from([SINGLE, RETRO]))
    window = draw(st.integers(1, 6))
    options = draw(st.fixed_dictionaries({
        "bias": st.booleans(), "add_bias_kv": st.booleans(), "add_zero_attn": st.booleans(),
        "kdim": st.sampled_from([None, 5]), "vdim": st.sampled_from([None, 3])}))
    options["batch_first"], options["embed_dim_second"] = draw(st.sampled_from(LAYOUTS))
    if cls is SINGLE:
        options["query_index"] = draw(st.integers(-window, window - 1))
        options["single_output_forward"] = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return layer_of(cls, window, **options)


@given(layer=layers(), extra=st.integers(0, 14), padded=st.booleans(), stacks=st.booleans(),
       masked=st.sampled_from(["no", "bool", "float", "heads"]))
def test_every_option_streams_as_torch_on_the_window(
        layer: Any, extra: int, padded: bool, stacks: bool, masked: str) -> None:
    window = layer.sequence_len
    mask = {"no": None, "bool": torch.rand(window, window) < 0.4,
            "float": torch.randn(window, window, dtype=torch.float64),
            "heads": torch.rand(N * H, window, window) < 0.4}[masked]
    if mask is not None and mask.dtype == torch.bool:
        mask.diagonal(dim1=-2, dim2=-1).fill_(False)  # torch has NaN where nothing is seen
    padding = torch.rand(N, window + extra) < 0.3 if padded else None
    if padding is not None:
        mask = None if mask is None or mask.dtype == torch.bool else mask
        padding[:, ::window] = False
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_stacks, "SHORTEST", 1 if stacks else 99)
        run_padded(layer, window + extra, padding, mask)


@given(layer=layers(), length=st.integers(1, 9), causal=st.booleans(), weights=st.booleans())
def test_forward_is_torch(layer: Any, length: int, causal: bool, weights: bool) -> None:
    if isinstance(layer, SINGLE):
        layer.query_index = max(-length, min(layer.query_index, length - 1))
    rows = layer._rows(length)
    xs = tokens(layer, length)
    past = torch.ones(length, length, dtype=torch.bool).triu(1)
    wanted, shares = plain(layer)(*xs, attn_mask=past if causal else None,
                                  average_attn_weights=False)
    to = TO_LAYOUT[layer.batch_first, layer.embed_dim_second]
    found, given_weights = layer(*(x.permute(to) for x in xs), is_causal=causal,
                                 need_weights=weights, average_attn_weights=False)
    torch.testing.assert_close(found, wanted[:, rows].permute(to), rtol=1e-10, atol=1e-12)
    if weights:
        torch.testing.assert_close(given_weights, shares[:, :, rows], rtol=1e-10, atol=1e-12)
    else:
        assert given_weights is None


@CLASSES
def test_example_of_the_page(cls: type) -> None:
    mha = cls(embed_dim=512, num_heads=8, sequence_len=32, dropout=0.0, batch_first=True,
              embed_dim_second=True)
    x = torch.rand(10, 512, 32)
    out, _ = mha.forward(x)
    firsts = mha.forward_steps(x[:, :, :-1])
    last = mha.forward_step(x[:, :, -1])
    assert firsts is None
    assert torch.allclose(out if cls is RETRO else out[:, :, -1], last, atol=1e-6)


@CLASSES
@pytest.mark.parametrize("warm", [0, 2, 7])
def test_c01_update_state_false_from_cold_and_warm(cls: type, warm: int) -> None:
    layer = layer_of(cls, 3)
    xs = tokens(layer, warm + 4)
    with torch.no_grad():
        stream(layer, [x[:, :warm] for x in xs])
        before = layer.get_state()
        now = [x[:, warm:] for x in xs]
        peeked = layer.forward_steps(*now, update_state=False)
        peek = layer.forward_step(*(x[:, 0] for x in now), update_state=False)
        after = layer.get_state()
        assert (before is None and after is None) or all(
            torch.equal(a, b) for a, b in zip(before, after, strict=True) if a is not None)
        taken = layer.forward_step(*(x[:, 0] for x in now))
        assert (peek is None) == (taken is None) == (warm < 2)
        assert peek is None or torch.equal(peek, taken)
        layer.set_state(before)
        assert torch.equal(layer.forward_steps(*now), peeked)


@CLASSES
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("batch_first", "second"), LAYOUTS)
def test_c02_steps_have_the_layout_of_the_layer(
        cls: type, batch: int, batch_first: bool, second: bool) -> None:
    layer = layer_of(cls, 3, batch_first=batch_first, embed_dim_second=second)
    xs = tokens(layer, 7, batch)
    with torch.no_grad():
        each = [y for y in stream(copy.deepcopy(layer), xs) if y is not None]
        to = TO_LAYOUT[batch_first, second]
        found = layer.forward_steps(*(x.permute(to) for x in xs))
    if cls is SINGLE:
        assert found.shape == torch.empty(batch, 5, E).permute(to).shape
        assert torch.equal(found, torch.stack(each, 1).permute(to))
    else:
        assert torch.equal(found, torch.stack(each, to.index(1)))


@CLASSES
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 3}])
def test_c03_warm_up_makes_the_next_step_answer(cls: type, options: dict) -> None:
    for window in (1, 4):
        layer = layer_of(cls, window, **options)
        with torch.no_grad():
            layer.warm_up((N, E))
            assert layer.forward_step(*(x[:, 0] for x in tokens(layer, 1))) is not None
    with pytest.raises(InputError, match="step_shape"):
        layer.warm_up((N, E + 1))


@CLASSES
def test_c04_a_snapshot_is_not_changed_by_the_next_step(cls: type) -> None:
    layer = layer_of(cls, 4)
    xs = tokens(layer, 9)
    with torch.no_grad():
        stream(layer, [x[:, :2] for x in xs])
        snapshot = layer.get_state()
        kept = copy.deepcopy(snapshot)
        wanted = stream(layer, [x[:, 2:] for x in xs])
        assert all(torch.equal(a, b) for a, b in zip(snapshot, kept, strict=True) if a is not None)
        layer.set_state(snapshot)
        found = stream(layer, [x[:, 2:] for x in xs])
        assert all(torch.equal(a, b) for a, b in zip(snapshot, kept, strict=True) if a is not None)
    assert [y is None for y in found] == [True] + [False] * 6
    for a, b in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@CLASSES
@pytest.mark.parametrize("call", ["forward_step", "forward_steps"])
def test_c05_nothing_is_swallowed(cls: type, call: str) -> None:
    layer = layer_of(cls, 4)
    x = tokens(layer, 5)[0]
    for name in ("pad_end", "mask", "need_weights"):
        with pytest.raises(TypeError, match=name):
            getattr(layer, call)(x if call == "forward_steps" else x[:, 0], **{name: None})


@CLASSES
def test_c05_masks_count_in_steps(cls: type) -> None:
    layer = layer_of(cls, 4)
    mask = torch.zeros(4, 4, dtype=torch.float64)
    mask[:, 1] = -math.inf
    padding = torch.zeros(N, 11, dtype=torch.bool)
    padding[1, 5] = padding[2, 7:] = True
    padding[:, 10] = False
    padding[2, ::3] = False
    with torch.no_grad():
        run_padded(layer, 11, None, mask)
        layer.clean_state()
        run_padded(layer, 11, padding, None)
        assert layer.get_state().padding is not None


def test_c05_a_mask_of_every_query_is_read_at_the_answered_one() -> None:
    layer = layer_of(SINGLE, 4, query_index=-2, single_output_forward=False)
    with torch.no_grad():
        run_padded(layer, 9, None, 3 * torch.randn(4, 4, dtype=torch.float64))


@CLASSES
def test_c06_kdim_and_vdim_stream(cls: type) -> None:
    with torch.no_grad():
        run_padded(layer_of(cls, 3, kdim=5, vdim=7), 8, None, None)


@CLASSES
def test_c07_bias_kv_and_zero_attn_stream(cls: type) -> None:
    with torch.no_grad():
        run_padded(layer_of(cls, 3, add_bias_kv=True), 8, None, None)
        run_padded(layer_of(cls, 3, add_bias_kv=True, add_zero_attn=True), 8, None,
                   torch.randn(3, 3, dtype=torch.float64))


@CLASSES
def test_c08_dropout_in_training_only(cls: type) -> None:
    layer = layer_of(cls, 8, dropout=0.5)
    xs = tokens(layer, 8)
    with torch.no_grad():
        run_padded(layer, 20, None, None)
        layer.clean_state()
        layer.forward_steps(*(x[:, :-1] for x in xs))
        layer.train()
        last = [x[:, -1] for x in xs]
        a, b = (layer.forward_step(*last, update_state=False) for _ in range(2))
        assert not torch.equal(a, b)


@pytest.mark.parametrize("query_index", [-5, 4, True, 1.0, None])
def test_c09_query_index_is_checked_on_both_sides(query_index: Any) -> None:
    with pytest.raises(ConfigError, match="query_index"):
        SINGLE(E, H, sequence_len=4, query_index=query_index)
    assert [SINGLE(E, H, sequence_len=4, query_index=i).delay for i in range(-4, 4)] == [
        3, 2, 1, 0, 3, 2, 1, 0]
    with pytest.raises(InputError, match="query_index"):
        SINGLE(E, H, sequence_len=4, query_index=3)(torch.rand(1, 3, E))


@pytest.mark.parametrize("query_index", [-1, -2, 0])
def test_c10_a_partial_window_attends_to_what_was_seen(query_index: int) -> None:
    layer = layer_of(SINGLE, 4, query_index=query_index, partial_window=True)
    xs, whole = tokens(layer, 9), plain(layer)
    with torch.no_grad():
        for t, y in enumerate(stream(layer, xs)):
            if t < layer.delay:
                assert y is None
                continue
            past = slice(max(0, t - 3), t + 1)
            wanted = whole(xs[0][:, t - layer.delay:t - layer.delay + 1],
                           *(x[:, past] for x in xs[1:]))[0][:, 0]
            torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shortest", [1, 99])
def test_c10_a_partial_retroactive_window_has_no_answer_where_no_token_is(
        shortest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_stacks, "SHORTEST", shortest)
    layer = layer_of(RETRO, 4, partial_window=True)
    xs, whole = tokens(layer, 13), plain(layer)
    with torch.no_grad():
        for t in range(13):
            y = layer.forward_step(*(x[:, t] for x in xs))
            assert t >= 3 or not hasattr(layer._stacks, "_front")
            past = slice(max(0, t - 3), t + 1)
            wanted, _ = whole(*(x[:, past] for x in xs))
            assert y[:, :4 - wanted.shape[1]].isnan().all()
            torch.testing.assert_close(y[:, 4 - wanted.shape[1]:], wanted, rtol=1e-10, atol=1e-12)


@CLASSES
def test_c11_each_stream_has_its_clock(cls: type) -> None:
    layer, alone = layer_of(cls, 4), layer_of(cls, 4)
    alone.load_state_dict(layer.state_dict())
    xs = tokens(layer, 14)
    with torch.no_grad():
        stream(layer, [x[:, :6] for x in xs])
        layer.clean_state(rows=[1])
        found = stream(layer, [x[:, 6:] for x in xs])
        wanted = stream(alone, [x[1:2, 6:] for x in xs])
        for t, (y, w) in enumerate(zip(found, wanted, strict=True)):
            assert not y[[0, 2]].isnan().any()
            if t < 3:
                assert w is None and y[1].isnan().all()
            else:
                torch.testing.assert_close(y[1:2], w, rtol=1e-12, atol=1e-12)


@CLASSES
def test_c11_streams_join_and_leave(cls: type) -> None:
    layer = layer_of(cls, 3)
    xs = tokens(layer, 10, batch=4)
    with torch.no_grad():
        one, rest = copy.deepcopy(layer), copy.deepcopy(layer)
        stream(one, [x[:1, :5] for x in xs])
        stream(rest, [x[1:, 2:5] for x in xs])
        pairs = zip(one.get_state(), rest.get_state(), strict=True)
        joined = [None if a is None else torch.cat([a, b]) for a, b in pairs]
        layer.set_state(StreamState(*joined))
        a = layer.forward_step(*(x[:, 5] for x in xs))
        layer.set_state(StreamState(*(None if x is None else x[[3, 1]] for x in layer.get_state())))
        b = layer.forward_step(*(x[[3, 1], 6] for x in xs))
        wanted_a = plain(layer)(*(x[:, 3:6] for x in xs))[0]
        wanted_b = plain(layer)(*(x[[3, 1], 4:7] for x in xs))[0]
    torch.testing.assert_close(a, answer(layer, wanted_a), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(b, answer(layer, wanted_b), rtol=1e-10, atol=1e-12)


class _NewStorage(TorchDispatchMode):
    """The sizes of the tensors that operators allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and (
                result.untyped_storage().data_ptr() not in given):
            self.sizes.append(result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"query_index": 5}])
def test_c12_a_step_writes_one_slot_and_copies_no_window(options: dict) -> None:
    layer = layer_of(SINGLE, 64, **options)
    xs = tokens(layer, 70)
    with torch.no_grad():
        stream(layer, [x[:, :69] for x in xs])
        place, before = layer.ring_key.data_ptr(), layer.ring_key.clone()
        with _NewStorage() as allocated:
            layer.forward_step(*(x[:, 69] for x in xs))
    changed = (layer.ring_key != before).any(3).any(1)
    assert layer.ring_key.data_ptr() == place
    assert changed.sum(1).tolist() == [1] * N
    window = N * 64 * E * 8  # bytes of one ring
    assert allocated.sizes and max(allocated.sizes) < window // 3


@CLASSES
def test_c13_a_stream_is_saved_and_moved(cls: type, tmp_path: Any) -> None:
    layer = layer_of(cls, 4, dtype=torch.float32)
    assert set(layer.state_dict()) == set(plain(layer).state_dict())
    xs = tokens(layer, 9)
    with torch.no_grad():
        stream(layer, [x[:, :6] for x in xs])
        assert set(layer.state_dict()) == set(plain(layer).state_dict())
        torch.save(tuple(layer.get_state()), tmp_path / "stream")
        other = layer_of(cls, 4, dtype=torch.float32)
        other.load_state_dict(layer.state_dict())
        other.set_state(torch.load(tmp_path / "stream", weights_only=True))
        now = [x[:, 6] for x in xs]
        torch.testing.assert_close(other.forward_step(*now, update_state=False),
                                   layer.forward_step(*now), rtol=1e-6, atol=1e-6)
        other.double()
        assert other.forward_step(*(x.double() for x in now)).dtype == torch.float64
        assert other.get_state().key.dtype == torch.float64
        with pytest.raises(InputTypeError, match="float32"):
            other.forward_step(*now)


@CLASSES
def test_c14_flops_follow_the_formula(cls: type) -> None:
    n, d = 6, E // H
    layer = cls(E, H, sequence_len=n, **({"single_output_forward": False} if cls is SINGLE else {}))
    adds = H * (2 * n * n * d - n * d - n) + 4 * n * E * (E - 1)
    assert layer.flops(include_muls=False, include_adds=True) == adds
    assert layer.flops(False, False, True) == H * n * n
    whole = layer.flops()
    layer.call_mode = "forward_step"
    assert 3 * E * E + H * 2 * n * d < layer.flops() < whole
    assert layer.flops(True, True, True) > layer.flops()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("norm_first", [False, True])
@CLASSES
def test_c15_c16_encoders_keep_gelu_norm_first_and_depth(
        cls: type, norm_first: bool, depth: int) -> None:
    # there is no factory of encoders here to get these wrong: a layer stands in torch's own
    layer = nn.TransformerEncoderLayer(E, H, 16, 0.0, "gelu", batch_first=True,
                                       norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    x = torch.randn(N, 5, E)
    wanted = encoder(x)
    options = {"single_output_forward": False} if cls is SINGLE else {}
    for block in encoder.layers:
        block.self_attn = cls.build_from(block.self_attn, 5, **options)
    torch.testing.assert_close(encoder(x), wanted)


def test_c17_call_mode_by_name_and_number() -> None:
    layer = layer_of(SINGLE, 3)
    x = tokens(layer, 5)[0]
    seen = []
    layer.register_forward_hook(lambda module, args, result: seen.append(type(result)))
    with torch.no_grad():
        layer.call_mode = 1
        assert layer.call_mode == "forward_steps"
        assert layer(x).shape == (N, 3, E)
        with call_mode(2):
            assert layer(x[:, 0]).shape == (N, E)
            with call_mode("forward"):
                assert isinstance(layer(x), tuple)
            assert layer(x[:, 1]).shape == (N, E)
        assert layer.get_state().clock.tolist() == [7] * N
    assert seen == [torch.Tensor, torch.Tensor, tuple, torch.Tensor]
    for wrong in (3, "steps", True, None):
        with pytest.raises(ConfigError, match="call_mode"):
            layer.call_mode = wrong


class _Step(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, state: StreamState, x: torch.Tensor) -> Any:
        return self.layer.step(state, x)


@CLASSES
@pytest.mark.parametrize("options", [{}, {"partial_window": True, "add_zero_attn": True}])
def test_c18_c19_a_step_exports_and_always_gives_a_tensor(cls: type, options: dict) -> None:
    layer = layer_of(cls, 3, **options)
    batch = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(
        _Step(layer), (layer.initial_state(N), torch.randn(N, E).double()),
        dynamic_shapes=(StreamState(batch, batch, batch, None, batch), batch)).module()
    state = layer.initial_state(5)
    with torch.no_grad():
        for _ in range(8):
            x = torch.randn(5, E, dtype=torch.float64)
            y, state = exported(state, x)
            wanted = layer.forward_step(x)
            assert y.isnan().all() if wanted is None else torch.equal(
                y.nan_to_num(7), wanted.nan_to_num(7))
