"""Continual attention over long streams, under gradients, after failures, and against its peer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peers import peer
from test_continual_layers import (
    CLASSES,
    RETRO,
    SINGLE,
    E,
    H,
    N,
    answer,
    layer_of,
    plain,
    stream,
)
from test_continual_layers import tokens as random_tokens
from torch import nn
from torch.nn import functional as F

import bincompile as bc
from bincompile.errors import ConfigError, InputError, InputTypeError
from bincompile.nn import two_stacks

LENGTHS = [300, pytest.param(3000, marks=pytest.mark.slow)]


@pytest.fixture(params=["single", "retroactive", "two stacks"])
def cls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """A layer's class; "two stacks" is the form in which long retroactive windows are kept."""
    monkeypatch.setattr(two_stacks, "SHORTEST", 1 if request.param == "two stacks" else 999)
    return SINGLE if request.param == "single" else RETRO


def assert_same(found: list, wanted: list) -> None:
    """The same bits, or nearly where sums are kept: their rounding depends on when they began."""
    limit = 1e-6 if two_stacks.SHORTEST == 1 else 0.0
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


def scored(cls: type, std: float, window: int, width: int = 64) -> Any:
    """A float32 layer whose scores have this standard deviation on normal tokens."""
    layer = cls(width, 2, sequence_len=window, batch_first=True).eval()
    with torch.no_grad():
        for i, gain in enumerate((math.sqrt(std), math.sqrt(std), 1.0)):
            nn.init.orthogonal_(layer.in_proj_weight[i * width:(i + 1) * width], gain)
        layer.in_proj_bias.normal_(std=0.1)
        nn.init.orthogonal_(layer.out_proj.weight)
    return layer


def stream_errors(cls: type, std: float, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per step, the relative error of the stream, and of float32 SDPA on the same window."""
    layer = scored(cls, std, 32)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(1, length, 64)
    errors = []
    with torch.no_grad():
        for t, y in enumerate(stream(layer, [x])):
            if y is None:
                continue
            rows = slice(0 if cls is RETRO else 31, 32)
            window = x[:, t - 31:t + 1]
            wanted = windowed(exact, window.double())[:, rows]
            plainly = windowed(layer, window)[:, rows]
            errors.append([(z.reshape(wanted.shape) - wanted).norm() / wanted.norm()
                           for z in (y, plainly)])
    ours, theirs = torch.tensor(errors).T
    return ours, theirs


def windowed(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """All outputs (N, T, E) by SDPA, in the dtype of the layer."""
    q, k, v = (layer._split(p) for p in layer._project(x, x, x))
    return layer._merge(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("std", [1, 4, 16])
def test_long_streams_stay_exact(cls: type, std: float, length: int) -> None:
    ours, _ = stream_errors(cls, std, length)
    assert len(ours) == length - 31
    assert ours.max() <= 1e-5


@pytest.mark.parametrize("length", LENGTHS)
def test_long_streams_of_huge_scores_are_as_exact_as_sdpa(cls: type, length: int) -> None:
    ours, theirs = stream_errors(cls, 100, length)
    assert ours.max() <= 2 * theirs.max()
    assert ours.mean() <= 2 * theirs.mean()


def test_scores_beyond_the_range_of_exp_are_finite(cls: type) -> None:
    layer = scored(cls, 1e6, 8)
    with torch.no_grad():
        for y in stream(layer, [torch.randn(2, 40, 64)])[7:]:
            assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_stream_as_their_own_forward(cls: type, dtype: torch.dtype) -> None:
    layer = layer_of(cls, 4, dtype=dtype)
    xs = random_tokens(layer, 9)
    with torch.no_grad():
        for t, y in enumerate(stream(layer, xs)):
            if y is not None:
                wanted = answer(layer, plain(layer)(*(x[:, t - 3:t + 1] for x in xs))[0])
                assert y.dtype == dtype
                torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.05)


def test_any_split_into_steps_gives_the_same_bits(cls: type) -> None:
    layer = layer_of(cls, 5, dtype=torch.float32)
    x = torch.randn(N, 20, E)
    with torch.no_grad():
        each = torch.stack([y for y in stream(copy.deepcopy(layer), [x]) if y is not None], 1)
        parts = [layer.forward_steps(x[:, a:b]) for a, b in ((0, 3), (3, 4), (4, 4), (4, 15),
                                                             (15, 20))]
    assert parts[0] is None and parts[1] is None and parts[2] is None
    assert_same([torch.cat(parts[3:], 1)], [each])


def test_a_query_that_sees_nothing_has_no_part_of_any_value(cls: type) -> None:
    layer = layer_of(cls, 3)
    xs = random_tokens(layer, 3)
    hidden = torch.ones(N, 3, dtype=torch.bool)
    nothing = layer.out_proj.bias.expand(N, -1)
    output, weights = layer(*xs, key_padding_mask=hidden)
    assert torch.equal(output, nothing[:, None].expand_as(output)) and weights.eq(0).all()
    fused, _ = layer(*xs, key_padding_mask=hidden, need_weights=False)
    assert torch.equal(fused, output)
    (output + fused).sum().backward()
    assert layer.in_proj_weight.grad.isfinite().all()
    with torch.no_grad():
        last = stream(layer, xs, key_padding_mask=hidden)[-1]
        torch.testing.assert_close(last, nothing if cls is SINGLE else nothing[:, None].expand_as(
            last), rtol=0, atol=0)
        layer.clean_state()
        dropped = torch.full((3, 3), -math.inf, dtype=torch.float64)
        assert stream(layer, xs, attn_mask=dropped)[-1].isfinite().all()


def test_gradients_of_training_flow_through_the_window(cls: type) -> None:
    layer = layer_of(cls, 4).train()
    xs = [x.requires_grad_() for x in random_tokens(layer, 6)]
    whole = plain(layer)
    upstream = torch.randn(N, 4, E, dtype=torch.float64)
    for t, y in enumerate(stream(layer, xs)):
        if y is None:
            continue
        past = [x[:, t - 3:t + 1] for x in xs]
        both = zip(torch.autograd.grad((y * answer(layer, upstream)).sum(), xs, retain_graph=True),
                   torch.autograd.grad((answer(layer, whole(*past)[0]) * answer(
                       layer, upstream)).sum(), xs), strict=True)
        for found, wanted in both:
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    layer.set_state(layer.get_state())
    assert not layer.ring_key.requires_grad


def test_a_step_without_gradient_spares_what_a_graph_needs(cls: type) -> None:
    layer = layer_of(cls, 3).train()
    xs = random_tokens(layer, 5)
    last = stream(layer, [x[:, :4] for x in xs])[-1]
    with torch.no_grad():
        layer.forward_step(*(x[:, 4] for x in xs))
    last.sum().backward()
    assert layer.in_proj_weight.grad.isfinite().all()


def test_dropout_acts_on_kept_sums_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_stacks, "SHORTEST", 1)
    layer = layer_of(RETRO, 4, dropout=0.5)
    xs = random_tokens(layer, 9)
    with torch.no_grad():
        plainly = stream(copy.deepcopy(layer), xs)
        dropped = stream(layer.train(), xs)
    assert not any(torch.equal(a, b) for a, b in zip(plainly[3:], dropped[3:], strict=True))


def test_eval_mode_keeps_no_graph(cls: type) -> None:
    layer = layer_of(cls, 3)
    xs = random_tokens(layer, 8)
    last = stream(layer, xs)[-1]
    assert last.requires_grad and not layer.ring_key.requires_grad
    last.sum().backward()
    assert layer.in_proj_weight.grad.isfinite().all()


def test_inference_mode_and_back(cls: type) -> None:
    layer = layer_of(cls, 3)
    xs = random_tokens(layer, 9)
    with torch.no_grad():
        wanted = stream(copy.deepcopy(layer), xs)
    with torch.inference_mode():
        stream(layer, [x[:, :4] for x in xs])
    with torch.no_grad():
        found = stream(layer, [x[:, 4:] for x in xs])
    assert_same(found, wanted[4:])


def bad_calls(layer: Any) -> list[tuple[Any, type, str]]:
    x, long = torch.rand(N, E).double(), torch.rand(N, 4, E).double()
    step, steps, fresh = layer.forward_step, layer.forward_steps, layer.initial_state(2)
    return [
        (lambda: step(x[:2]), InputError, "streams"),
        (lambda: step(x[:, 1:]), InputError, "query"),
        (lambda: step(x[0]), InputError, "query"),
        (lambda: step(x.float()), InputTypeError, "float32"),
        (lambda: step(x.long()), InputTypeError, "int64"),
        (lambda: step(None), InputTypeError, "None"),
        (lambda: step(x, x[:2], x), InputError, "key"),
        (lambda: step(x, x, x[:, :3]), InputError, "value"),
        (lambda: step(x, attn_mask=torch.ones(3, 4) > 0), InputError, "attn_mask"),
        (lambda: step(x, attn_mask=torch.ones(5, 4, 4)), InputError, "attn_mask"),
        (lambda: step(x, attn_mask=torch.ones(4, 4).byte()), InputTypeError, "attn_mask"),
        (lambda: step(x, key_padding_mask=torch.ones(N, 4) > 0), InputError, "key_padding_mask"),
        (lambda: step(x, key_padding_mask=[0, 0, 1]), InputTypeError, "key_padding_mask"),
        (lambda: steps(x), InputError, "query"), (lambda: steps(long[:2]), InputError, "streams"),
        (lambda: steps(long, long[:, :3], long[:, :3]), InputError, "keys"),
        (lambda: steps(long, key_padding_mask=torch.ones(N, 3) > 0), InputError, "padding"),
        (lambda: layer.set_state((x, x)), InputTypeError, "state"),
        (lambda: layer.set_state(fresh._replace(key=x)), InputError, "state.key"),
        (lambda: layer.set_state(fresh._replace(clock=fresh.key)), InputTypeError, "clock"),
        (lambda: layer.set_state(fresh._replace(key=None)), InputTypeError, "state.key"),
        (lambda: layer.set_state(fresh._replace(clock=fresh.clock[0])), InputError, "state"),
        (lambda: layer.clean_state([N]), InputError, "rows"),
        (lambda: layer.clean_state([True]), InputError, "rows"),
        (lambda: layer(long, attn_mask=torch.ones(3, 3) > 0), InputError, "attn_mask"),
        (lambda: layer(long, long[:, :3], long), InputError, "value"),
        (lambda: layer(x), InputError, "query"),
        (lambda: layer.initial_state(0), ConfigError, "batch"),
    ]


def test_a_failed_call_leaves_the_stream(cls: type) -> None:
    layer = layer_of(cls, 4)
    with torch.no_grad():
        stream(layer, random_tokens(layer, 6))
        before = layer.get_state()
        for i, (call, error, words) in enumerate(bad_calls(layer)):
            with pytest.raises(error, match=words) as caught:
                call()
            assert caught.value.allowed and caught.value.change, i
            assert all(torch.equal(a, b) for a, b in zip(before, layer.get_state(), strict=True)
                       if a is not None), i


def test_a_failure_within_a_call_leaves_the_stream(cls: type, monkeypatch: Any) -> None:
    layer = layer_of(cls, 4)
    xs = random_tokens(layer, 12)
    with torch.no_grad():
        wanted = stream(copy.deepcopy(layer), xs)
        stream(layer, [x[:, :6] for x in xs])
        for call in (lambda: layer.forward_step(*(x[:, 6] for x in xs)),
                     lambda: layer.forward_steps(*(x[:, 6:] for x in xs))):
            with monkeypatch.context() as patch:
                patch.setattr(layer, "_merge", lambda mixed: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    call()
        found = stream(layer, [x[:, 6:] for x in xs])
    assert_same(found, wanted[6:])


BAD = [{"sequence_len": None}, {"sequence_len": 0}, {"embed_dim": 7}, {"num_heads": 0},
       {"dropout": 1.0}, {"bias": 1}, {"add_bias_kv": None}, {"add_zero_attn": "no"}, {"kdim": 0},
       {"vdim": 2.0}, {"batch_first": 0}, {"dtype": torch.int32}, {"embed_dim_second": None},
       {"forward_returns_attn_mask": 2}, {"partial_window": None}]


@CLASSES
@pytest.mark.parametrize("wrong", BAD, ids=str)
def test_wrong_arguments_are_named(cls: type, wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        cls(**{"embed_dim": E, "num_heads": H, "sequence_len": 4, **wrong})


@CLASSES
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 3}, {"bias": False},
                                     {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_build_from_and_state_dicts_are_bit_equal(cls: type, options: dict) -> None:
    module = nn.MultiheadAttention(E, H, 0.25, batch_first=True, **options).eval()
    layer = cls.build_from(module, 5, forward_returns_attn_mask=False)
    assert not layer.training and layer.dropout == 0.25 and layer.batch_first
    assert layer.receptive_field == layer.sequence_len == 5
    assert list(layer.state_dict()) == list(module.state_dict())
    back = nn.MultiheadAttention(E, H, batch_first=True, **options)
    back.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(),
                                                 module.state_dict().values(), strict=True))
    assert isinstance(layer(*random_tokens(layer, 5)), torch.Tensor)
    with pytest.raises(InputTypeError, match="Linear"):
        cls.build_from(nn.Linear(2, 2), 5)


@CLASSES
@pytest.mark.parametrize(("mask", "weights"), [("none", True), ("padding", True), ("float", True),
                                               ("none", False), ("padding", False)])
def test_optimize_recognises_the_forward(cls: type, mask: str, weights: bool) -> None:
    layer = layer_of(cls, 6, dtype=torch.float32)
    x = torch.randn(N, 6, E)
    masks = {"none": {}, "padding": {"key_padding_mask": torch.rand(N, 6) < 0.5},
             "float": {"attn_mask": torch.randn(6, 6)}}[mask]
    with torch.no_grad():
        layer.forward_steps(x)  # the memory of a running stream is no part of the forward
    masks["need_weights"] = weights
    compiled = bc.optimize(layer, (x,), masks)
    assert [(m.operator, m.validated) for m in compiled.report.matches] == [("attention", True)]
    for found, wanted in zip(compiled(x, **masks), layer(x, **masks), strict=True):
        if wanted is None:
            assert found is None
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_sums_are_kept_where_they_pay_and_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [two_stacks.block_size(n) for n in (1, 2, 12, 256, 300, 1024, 127)] == [
        1, 2, 3, 16, 20, 32, None]
    layer = layer_of(RETRO, 12)
    xs = random_tokens(layer, 60)

    def kept() -> bool:
        return layer._stacks._clock is layer.ring_clock

    with torch.no_grad():
        stream(layer, [x[:, :14] for x in xs])
        assert not kept()
        monkeypatch.setattr(two_stacks, "SHORTEST", 12)
        whole = plain(layer)

        def check(t: int, wanted_kept: bool, **options: Any) -> None:
            y = layer.forward_step(*(x[:, t] for x in xs), **options)
            wanted, _ = whole(*(x[:, t - 11:t + 1] for x in xs))
            torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
            assert kept() == wanted_kept

        for t in range(14, 30):
            check(t, True)
            check(t + 1, True, update_state=False)
        check(30, False, attn_mask=torch.zeros(12, 12))
        check(31, True)
        layer.set_state(layer.get_state())
        assert not kept()
        check(32, True)
        layer.double().forward_steps(*(x[:, 33:37] for x in xs))
        assert kept()
        check(37, True)
        layer.clean_state([0])
        stream(layer, [x[:, 38:50] for x in xs])
        assert not kept()  # clocks differ
        check(50, False)
        assert hasattr(layer._stacks, "_front")
        assert not hasattr(copy.deepcopy(layer)._stacks, "_front")
        layer.clean_state()
        assert not hasattr(layer._stacks, "_front")


@pytest.mark.parametrize("batch_first", [True, False])
def test_streams_as_the_peer(cls: type, batch_first: bool) -> None:
    continual = peer("continual")
    for window, index in ((2, -1), (4, -1), (5, 0), (5, -3)):
        options = {"batch_first": batch_first, "sequence_len": window,
                   **({"query_index": index} if cls is SINGLE else {})}
        theirs = getattr(continual, cls.__name__)(E, H, **options).eval()
        ours = cls(E, H, **options).eval()
        ours.load_state_dict(theirs.state_dict())
        assert ours.receptive_field == theirs.receptive_field
        assert ours.delay == theirs.delay
        x = torch.randn(N, 3 * window + 2, E)
        seen = x if batch_first else x.transpose(0, 1)
        with torch.no_grad():
            for found, wanted in zip(ours(seen), theirs(seen), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
            for t in range(x.shape[1]):
                found, wanted = ours.forward_step(x[:, t]), theirs.forward_step(x[:, t])
                assert (found is None) == (wanted is None)
                if found is not None:
                    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
