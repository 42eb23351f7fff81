"""Every operator against its own description: schema, shapes, errors, values, gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases_formulas import binary_bases_linear, fit_bases, int8_rows
from stream_formulas import STREAM
from torch.utils import _pytree as pytree

from bincompile.errors import BincompileError
from bincompile.op import Operator, Sample
from bincompile.ops import OPERATORS, bits

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor",
          "test_aot_dispatch_dynamic")


def samples(bad: bool = False) -> list[Any]:
    """Every sample of every operator, with a name that says which."""
    found = []
    for operator in OPERATORS.values():
        make = operator.bad_samples if bad else operator.samples
        found += [pytest.param(operator, sample, id=f"{operator.name}-{number}")
                  for number, sample in enumerate(make(torch.Generator().manual_seed(7)))]
    return found


def flat(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def outcome(operator: Operator, function: Callable[..., Any],
            given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What a function of all arguments gives, and what it has then written to them."""
    given = operator.isolated(given)
    results = flat(function(*given.values()))
    return (*results, *(given[name] for name in operator.mutated))


def wide(value: Any) -> Any:
    """A float tensor in float64, also within a list; anything else as it is."""
    if isinstance(value, list):
        return [wide(v) for v in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


@pytest.mark.parametrize(("operator", "sample"), samples())
def test_opcheck_passes(operator: Operator, sample: Sample) -> None:
    given = operator.isolated(operator.bind(sample.args, sample.kwargs))
    results = flat(operator.overload(**given))
    has_nan = any(r.isnan().any() for r in results)  # opcheck compares without equal_nan
    checks = ("test_schema", "test_faketensor") if has_nan else CHECKS
    torch.library.opcheck(operator.overload, tuple(given.values()), test_utils=checks)


@pytest.mark.parametrize(("operator", "sample"), samples())
def test_the_fake_kernel_gives_the_shapes_of_the_reference(
        operator: Operator, sample: Sample) -> None:
    given = operator.isolated(operator.bind(sample.args, sample.kwargs)).values()
    meta = [pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), v) for v in given]
    found, expected = flat(operator.shape(*meta)), flat(operator.reference(*given))
    assert ([(f.shape, f.dtype) for f in found] == [(e.shape, e.dtype) for e in expected])


@pytest.mark.parametrize(("operator", "sample"), samples(bad=True))
def test_a_bad_call_raises_and_says_what_was_wrong(operator: Operator, sample: Sample) -> None:
    with pytest.raises(BincompileError) as caught:
        operator.overload(*sample.args, **sample.kwargs)
    assert sample.error in str(caught.value)
    assert all((caught.value.found, caught.value.allowed, caught.value.change))


def test_every_operator_has_samples_and_bad_samples() -> None:
    for operator in OPERATORS.values():
        generator = torch.Generator().manual_seed(0)
        assert list(operator.samples(generator)) and list(operator.bad_samples(generator))
        assert operator.source


def signs_of(packed: torch.Tensor, features: int) -> torch.Tensor:
    """The weights of a packed tensor, bit by bit."""
    rows = [[1.0 if int(byte) >> bit & 1 else -1.0 for byte in row for bit in range(8)]
            for row in packed]
    return torch.tensor(rows, dtype=torch.float64)[:, :features]


def linear(x, signs, weight_scale, bias, activation, activation_scale, shift):
    """A binary linear layer, row by row from its definition."""
    x, factor = x if shift is None else x + shift, torch.ones(())
    if activation == "int8":
        x, factor = int8_rows(x)
    if activation == "binary":
        factor = x.abs().mean(-1, keepdim=True) if activation_scale is None else activation_scale
        x = torch.where(x >= 0, 1.0, -1.0).double()
    out = torch.einsum("...k,nk->...n", x, signs) * factor * weight_scale
    return out if bias is None else out + bias


def binary_linear(x, weight, weight_scale, bias, in_features, activation, activation_scale, shift):
    return linear(x, signs_of(weight, in_features), weight_scale, bias, activation,
                  activation_scale, shift)


def fake_binary_linear(x, weight, weight_scale, bias, activation, activation_scale, shift):
    signs = torch.where(weight >= 0, 1.0, -1.0).double()
    return linear(x, signs, weight_scale, bias, activation, activation_scale, shift)


def attention(query, key, value, bias, mask, scale, fill, causal, masked_row, need_weights,
              softcap=None, gain=None, low=None, high=None, late_bias=None, sink=None,
              mix_before=None, mix_after=None, mix_shift=None, groups=1):
    """Attention one score at a time, so that no torch kernel decides what an empty row gives."""
    if groups > 1:
        served = torch.arange(key.shape[-3] * groups) // groups
        key, value = key[..., served, :, :], value[..., served, :, :]
    scores = torch.einsum("...md,...nd->...mn", query, key) * scale
    scores = scores if gain is None else scores * gain
    if mix_before is not None:
        scores = (scores.transpose(-1, -3) @ mix_before.mT).transpose(-1, -3)
    scores = scores if softcap is None else softcap * (1 - 2 / ((2 * scores / softcap).exp() + 1))
    scores = scores if bias is None else scores + bias
    scores = torch.where(scores < (-math.inf if low is None else low), low or 0.0, scores)
    scores = torch.where(scores > (math.inf if high is None else high), high or 0.0, scores)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf if fill is None else fill)
    scores = scores if late_bias is None else scores + late_bias
    if causal:
        m, n = scores.shape[-2:]
        scores = scores.masked_fill(torch.arange(n) > torch.arange(m)[:, None], -math.inf)
    top = scores.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink)
    empty = top == -math.inf
    powers = (scores - torch.where(empty, 0.0, top)).exp()
    total = powers.sum(-1, keepdim=True)
    weights = powers / (total if sink is None else total + (sink - top).exp())
    weights = torch.where(empty, 0.0 if masked_row == "zero" else math.nan, weights)
    weights = weights if masked_row != "hidden" else weights.masked_fill(~mask, 0.0)
    if mix_after is not None:
        weights = (weights.transpose(-1, -3) @ mix_after.mT).transpose(-1, -3)
    weights = weights if mix_shift is None else weights + mix_shift.reshape(-1, 1, 1)
    out = torch.einsum("...mn,...ne->...me", weights, value)
    return (out, weights) if need_weights else (out,)


def binary_attention(query, key, value, bias, mask, drop, threshold, scale, causal,
                     probabilities, values, need_weights):
    """Binary attention, its float counts from the formula of attention."""
    rows = [fake_binary_rows(x, 1) for x in (query, key)]
    shown = fake_binary_rows(value, 1) if values == "binary" else value
    eye = torch.eye(key.shape[-2], dtype=torch.float64).expand(*key.shape[:-1], -1)
    if not key.shape[-2]:
        weights = query.new_zeros(*query.shape[:-1], 0)
    else:
        weights = attention(*rows, eye, bias, mask, scale, None, causal, "zero", False)[0]
    powers = weights / weights.amax(-1, keepdim=True) if weights.numel() else weights
    powers = powers.nan_to_num()
    if probabilities == "uint8":
        sizes = value.abs().mean(-1).unsqueeze(-2)
        most = (powers * sizes).amax(-1, keepdim=True)
        counts = (255 * powers * sizes / most).nan_to_num().round() * most / sizes / 255
        weights = (counts / powers.sum(-1, keepdim=True)).nan_to_num()
    elif probabilities != "float":
        counts = (powers * 127).round() if probabilities == "int8" else (
            (powers >= threshold.clamp(max=1.0)[:, None, None]) & (powers > 0)).double()
        weights = (counts / counts.sum(-1, keepdim=True)).nan_to_num()
    out = (weights if drop is None else weights * drop) @ shown
    return (out, weights) if need_weights else (out,)


def fake_bitorch_linear(x, weight, scale_a, scale_w, shift):
    signs = torch.where(weight >= 0, 1.0, -1.0).double()
    return linear(x, signs, scale_w, None, "binary", scale_a, shift)


def embedding(table, indices, wrap=False):
    out = table.new_empty(indices.numel(), table.shape[1])
    for place, index in enumerate(indices.flatten().tolist()):
        out[place] = table[index]
    return out.reshape(*indices.shape, table.shape[1])


def base_rows(table, row_scale, embedding_dim):
    """The rows that a packed table stands for."""
    scales = row_scale.reshape(table.shape[0], -1)
    width = -(-embedding_dim // 8)
    return sum(signs_of(table[:, base * width:(base + 1) * width], embedding_dim)
               * scales[:, base, None] for base in range(scales.shape[1]))


def binary_embedding(indices, table, row_scale, embedding_dim):
    return embedding(base_rows(table, row_scale, embedding_dim), indices)


def binary_embedding_bag(table, indices, offsets, row_scale, embedding_dim, mode, weights,
                         include_last_offset, padding_idx, tie):
    rows = base_rows(table, row_scale, embedding_dim)
    kind = "mean" if mode == "majority" else mode
    out = embedding_bag(rows, indices, offsets, kind, weights, include_last_offset, padding_idx)
    return fake_signs(out, tie) if mode == "majority" else out


def fake_signs(x, tie):
    return 2.0 * (x >= 0) - 1.0 - (1.0 - tie) * (x == 0)


def pack_bases(x, count):
    packed, scales = [], []
    for _ in range(count):
        scales.append(x.abs().mean(-1))
        packed.append(pack_signs(x))
        x = x - scales[-1].unsqueeze(-1) * torch.where(x >= 0, 1.0, -1.0)
    return torch.cat(packed, -1), scales[0] if count == 1 else torch.stack(scales, -1)


def fake_binary_rows(x, count):
    out = torch.zeros_like(x)
    for _ in range(count):
        rest = x - out
        out = out + rest.abs().mean(-1, keepdim=True) * torch.where(rest >= 0, 1.0, -1.0)
    return out


def embedding_bag(table, indices, offsets, mode, weights, include_last_offset, padding_idx):
    if offsets is None:
        bags = list(indices)
    else:
        ends = offsets.tolist() + ([] if include_last_offset else [indices.numel()])
        bags = [indices[a:b] for a, b in itertools.pairwise(ends)]
    factors = torch.ones(indices.numel()) if weights is None else weights
    out, done = [], 0
    for bag in bags:
        kept = [(table[i], factors[done + n]) for n, i in enumerate(bag) if i != padding_idx]
        done += len(bag)
        rows = torch.stack([r * f for r, f in kept]) if kept else table[:0]
        reduce: dict[str, Callable[[], torch.Tensor]] = {
            "sum": lambda rows=rows: rows.sum(0), "mean": lambda rows=rows: rows.mean(0),
            "max": lambda rows=rows: rows.amax(0)}
        out.append(reduce[mode]() if kept else table.new_zeros(table.shape[1]))
    return torch.stack(out)


def pack_signs(x):
    flags = torch.zeros(*x.shape[:-1], -(-x.shape[-1] // 8) * 8, dtype=torch.uint8)
    flags[..., :x.shape[-1]] = x >= 0
    return sum(flags[..., bit::8] << bit for bit in range(8))


def fused_rows(inputs, body):
    """A body as Python runs it, its operations row by row."""
    def shifted(x):
        return (x - x.amax(-1, keepdim=True)).exp()

    def norm(x, weight, bias, eps):
        middle = x - x.sum(-1, keepdim=True) / x.shape[-1]
        spread = (middle ** 2).sum(-1, keepdim=True) / x.shape[-1]
        return middle / (spread + eps) ** 0.5 * weight + bias

    scope = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
        "gelu": lambda x, kind: x * 0.5 * (1 + (x / 2 ** 0.5).erf()), "gt": lambda a, b: a > b,
        "silu": lambda x: x / (1 + (-x).exp()), "amax": lambda x: x.max(-1, keepdim=True)[0],
        "softmax": lambda x: shifted(x) / shifted(x).sum(-1, keepdim=True),
        "relu": lambda x: torch.where(x.isnan() | (x > 0), x, 0.0), "layer_norm": norm,
        "rms_norm": lambda x, w, eps: x / ((x ** 2).mean(-1, keepdim=True) + eps) ** 0.5 * w,
        "clamp": lambda x, low, high: torch.where(x < low, low, x), "where": torch.where,
        "linear": lambda x, w, b: (x.unsqueeze(-2) * w).sum(-1) + (0 if b is None else b),
        "mean": lambda x: x.sum(-1, keepdim=True) / x.shape[-1],
        "embedding": embedding, "binary_embedding": binary_embedding,
        "binary_linear": binary_linear} | {f"x{i}": x for i, x in enumerate(inputs)}
    *lines, last = body.splitlines()
    exec("\n".join(lines), scope)
    return [scope[name.strip()] for name in last.removeprefix("return").split(",")]


FORMULAS = {f.__name__: f for f in (
    attention, binary_attention, binary_embedding, binary_embedding_bag, binary_linear, embedding,
    embedding_bag, fake_binary_linear, fake_binary_rows, fake_bitorch_linear, fake_signs,
    fused_rows, pack_bases, pack_signs, binary_bases_linear, fit_bases)} | STREAM


def test_every_operator_has_an_independent_formula() -> None:
    assert set(FORMULAS) == set(OPERATORS)


@pytest.mark.parametrize(("operator", "sample"), samples())
def test_the_reference_agrees_with_an_independent_float64_formula(
        operator: Operator, sample: Sample) -> None:
    given = operator.bind(sample.args, sample.kwargs)
    expected = outcome(operator, FORMULAS[operator.name],
                       {name: wide(value) for name, value in given.items()})
    found = outcome(operator, operator.overload, given)
    loose = found[0].dtype in (torch.float16, torch.bfloat16) and operator.name != "embedding"
    limits = {"rtol": 2e-2, "atol": 2e-2} if loose else {"rtol": 2e-5, "atol": 2e-5}
    for f, e in zip(found, expected, strict=False):
        torch.testing.assert_close(f.detach().double(), e.double(), equal_nan=True, **limits)


@pytest.mark.parametrize("activation", ["binary", "float"])
@pytest.mark.parametrize("scaled", [False, True], ids=["row", "tensor"])
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shift"])
def test_gradients_of_fake_binary_linear_are_the_written_formula(
        activation: str, scaled: bool, shifted: bool) -> None:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, scale, bias = leaf(2, 3, 12), leaf(5, 12), leaf(5), leaf(5)
    given = leaf(1) if scaled else None
    shift = leaf(12) if shifted else None
    grad = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    torch.ops.bincompile.fake_binary_linear(x, weight, scale, bias, activation, given,
                                            shift).backward(grad)
    z = (x if shift is None else x + shift).detach()
    signs = torch.where(weight >= 0, 1.0, -1.0).double()
    row = z.abs().mean(-1, keepdim=True) if given is None else given.detach()
    used = z if activation == "float" else row * torch.where(z >= 0, 1.0, -1.0)
    dx = torch.einsum("bmn,nk->bmk", grad * scale, signs)
    if activation == "binary":
        dx = dx * (z.abs() <= 2 * row)
    expected = {
        "x": (x, dx), "bias": (bias, grad.sum((0, 1))),
        "weight": (weight, torch.einsum("bmn,bmk->nk", grad * scale, used)),
        "weight_scale": (scale, torch.einsum("bmn,bmk,nk->n", grad, used, signs)),
    }
    if shift is not None:
        expected["shift"] = (shift, dx.sum((0, 1)))
    if given is not None and activation == "binary":
        products = torch.einsum("bmk,nk->bmn", torch.where(z >= 0, 1.0, -1.0).double(), signs)
        expected["activation_scale"] = (given, (grad * scale * products).sum().reshape(1))
    for name, (tensor, gradient) in expected.items():
        assert torch.allclose(tensor.grad, gradient.detach(), rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("features", [1, 7, 8, 9, 31, 32, 33, 100])
def test_packing_keeps_every_sign_and_leaves_padding_at_zero(features: int) -> None:
    x = torch.randn(5, features)
    x[0], x[1, 0], x[2, 0] = 0.0, -0.0, math.nan
    packed = bits.pack(x)
    expected = torch.where(x >= 0, 1.0, -1.0)
    assert torch.equal(signs_of(packed, features).float(), expected)
    assert torch.equal(bits.unpack(packed, features, torch.float32), expected)
    assert not bool((packed[:, -1].int() >> (features - 1) % 8 + 1).any())


def test_a_row_scale_adds_in_its_documented_order() -> None:
    x = torch.randn(3, 53)
    for row, found in zip(x.abs(), bits.row_scale(x)[:, 0], strict=True):
        lanes = [torch.tensor(0.0)] * 16
        for place, value in enumerate(row):
            lanes[place % 16] = lanes[place % 16] + value
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [a + b for a, b in zip(lanes[:half], lanes[half:], strict=True)]
        assert torch.equal(found, lanes[0] / 53)
