"""Attention is recognised however it is written, and compiled models give the models' results."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import bincompile as bc

transformers = pytest.importorskip("transformers")
FEATURES, HEADS = 32, 4
MHA = nn.MultiheadAttention


@pytest.fixture(autouse=True)
def slow_path() -> Iterator[None]:
    """The models run as they are written, not through torch's fused inference path."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


def assert_same(expected: Any, found: Any) -> None:
    left, left_spec = pytree.tree_flatten(expected)
    right, right_spec = pytree.tree_flatten(found)
    assert left_spec == right_spec
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, equal_nan=True)


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def causal(size: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size)


def padded(*lengths: int) -> torch.Tensor:
    """True behind each length, as key_padding_mask has it."""
    return torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]


def cases(forms: Iterable[str], slow: Collection[str]) -> list[Any]:
    """The names of forms as parameters; some are left to the long run."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in forms]


# nn.MultiheadAttention: options, the call, and a later call of other sizes.

Call = tuple[tuple[torch.Tensor, ...], dict[str, Any]]


def batch(rows: int, queries: int, keys: int | None = None, **named: Any) -> Call:
    key = tensor(rows, keys or queries, FEATURES)
    return (tensor(rows, queries, FEATURES), key, key.clone()), named


FORMS: dict[str, tuple[dict[str, Any], Callable[[], list[Call]], dict[str, Any]]] = {
    "self": ({}, lambda: [batch(2, 6), batch(3, 4), batch(1, 1)], {"weights": True}),
    "without weights": ({}, lambda: [batch(2, 6, need_weights=False),
                                     batch(3, 4, need_weights=False)], {"weights": False}),
    "time first": ({"batch_first": False}, lambda: [batch(6, 2), batch(4, 3)], {}),
    "cross": ({}, lambda: [batch(2, 6, 9), batch(3, 5, 7)], {"mask": "none"}),
    "other widths": ({"kdim": 16, "vdim": 24}, lambda: [
        ((tensor(2, 6, 32), tensor(2, 9, 16), tensor(2, 9, 24)), {}),
        ((tensor(3, 5, 32), tensor(3, 4, 16), tensor(3, 4, 24)), {})], {}),
    "padding": ({}, lambda: [batch(2, 6, 9, key_padding_mask=padded(9, 4)),
                             batch(3, 5, 7, key_padding_mask=padded(7, 1, 3))],
                {"mask": "padding"}),
    "padding as floats": ({}, lambda: [batch(2, 6, 9, key_padding_mask=tensor(2, 9))], {}),
    "nothing but padding": ({}, lambda: [
        batch(2, 6, 9, key_padding_mask=torch.ones(2, 9, dtype=torch.bool))], {}),
    "mask": ({}, lambda: [batch(2, 6, 9, attn_mask=torch.rand(6, 9) > 0.7),
                          batch(3, 5, 7, attn_mask=torch.rand(5, 7) > 0.7)], {}),
    "mask as floats": ({}, lambda: [batch(2, 6, 9, attn_mask=tensor(6, 9))], {}),
    "mask for each head": ({}, lambda: [batch(2, 6, 9, attn_mask=tensor(8, 6, 9)),
                                        batch(3, 5, 7, attn_mask=tensor(12, 5, 7))], {}),
    "bool mask for each head": ({}, lambda: [
        batch(2, 6, 9, attn_mask=torch.rand(8, 6, 9) > 0.7)], {}),
    "mask and padding": ({}, lambda: [batch(
        2, 6, 9, attn_mask=torch.rand(8, 6, 9) > 0.7, key_padding_mask=padded(9, 4),
        need_weights=False)], {}),
    "weights of each head": ({}, lambda: [batch(2, 6, 9, average_attn_weights=False)], {}),
    "causal": ({}, lambda: [batch(2, 6, attn_mask=causal(6), is_causal=True, need_weights=False),
                            batch(3, 8, attn_mask=causal(8), is_causal=True,
                                  need_weights=False)], {"causal": True}),
    "causal with weights": ({}, lambda: [batch(2, 6, attn_mask=causal(6), is_causal=True)], {}),
    "bias of keys": ({"add_bias_kv": True}, lambda: [batch(2, 6, 9), batch(3, 5, 7)], {}),
    "zero attention": ({"add_zero_attn": True}, lambda: [batch(2, 6, 9), batch(3, 5, 7)], {}),
    "all of it": ({"add_bias_kv": True, "add_zero_attn": True}, lambda: [batch(
        2, 6, 9, attn_mask=torch.rand(6, 9) > 0.7, key_padding_mask=padded(9, 4))], {}),
    "one sequence": ({}, lambda: [((tensor(6, 32),) * 3, {}), ((tensor(9, 32),) * 3, {})], {}),
    "without bias": ({"bias": False}, lambda: [batch(2, 6)], {}),
}


SLOW_FORMS = ("without weights", "cross", "padding as floats", "mask as floats", "without bias",
              "bool mask for each head", "weights of each head", "bias of keys", "zero attention",
              "causal with weights", "mask")


@pytest.mark.parametrize("name", cases(FORMS, SLOW_FORMS))
def test_multihead_attention_in_every_form(name: str) -> None:
    options, make, expected = FORMS[name]
    model = MHA(FEATURES, HEADS, **{"batch_first": True, **options}).eval()
    first, *others = make()
    compiled = bc.optimize(model, *first)
    (match,) = compiled.report.matches
    assert match.operator == "attention" and match.validated and not compiled.report.refusals
    assert {"heads": HEADS, "head_dim": 8, **expected}.items() <= dict(match.attrs).items()
    assert match.attrs["scale"] == pytest.approx(8 ** -0.5)
    with torch.no_grad():
        for args, kwargs in (first, *others):
            assert_same(model(*args, **kwargs), compiled(*args, **kwargs))


def test_encoder_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(FEATURES, HEADS, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    compiled = bc.optimize(model, (tensor(2, 6, 32),), {"src_key_padding_mask": padded(6, 4)})
    assert [m.path for m in compiled.report.matches] == ["layers.0.self_attn", "layers.1.self_attn"]
    x, mask = tensor(3, 8, 32), padded(8, 2, 5)
    with torch.no_grad():
        found = compiled(x, src_key_padding_mask=mask)
        assert_same(model(x, src_key_padding_mask=mask), found)
        torch.backends.mha.set_fastpath_enabled(True)  # it writes zeros at padded tokens
        fast = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found[~mask], fast[~mask], rtol=1e-5, atol=1e-5)


def test_causal_encoder() -> None:
    layer = nn.TransformerEncoderLayer(FEATURES, HEADS, 48, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    compiled = bc.optimize(model, (tensor(2, 6, 32),), {"mask": causal(6), "is_causal": True})
    assert compiled.report.matches[0].attrs["causal"]
    x = tensor(3, 8, 32)
    with torch.no_grad():
        assert_same(model(x, mask=causal(8), is_causal=True),
                    compiled(x, mask=causal(8), is_causal=True))


def test_encoder_and_decoder_with_masks() -> None:
    model = nn.Transformer(FEATURES, HEADS, 1, 1, 48, batch_first=True).eval()
    compiled = bc.optimize(model, (tensor(2, 9, 32), tensor(2, 6, 32)), {
        "tgt_mask": causal(6), "memory_key_padding_mask": padded(9, 4)})
    assert [m.path for m in compiled.report.matches] == [
        "encoder.layers.0.self_attn", "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn"]
    args = tensor(3, 4, 32), tensor(3, 5, 32)
    named = {"tgt_mask": causal(5), "memory_key_padding_mask": padded(4, 1, 2)}
    with torch.no_grad():
        assert_same(model(*args, **named), compiled(*args, **named))


# Models of the transformers library, small and with random weights.

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert(attention: str) -> None:
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=64, **SMALL,
                                     attn_implementation=attention)
    model = transformers.BertModel(config).eval()
    indices, mask = torch.randint(50, (2, 6)), (~padded(6, 4)).long()
    compiled = bc.optimize(model, (), {"input_ids": indices, "attention_mask": mask})
    assert [(m.operator, m.path) for m in compiled.report.matches] == [
        ("embedding", "embeddings.word_embeddings"),
        ("embedding", "embeddings.token_type_embeddings"),
        ("embedding", "embeddings.position_embeddings"),
        ("attention", "encoder.layer.0.attention.self"),
        ("attention", "encoder.layer.1.attention.self")]
    assert all(m.validated for m in compiled.report.matches) and not compiled.report.refusals
    call = {"input_ids": torch.randint(50, (3, 9)), "attention_mask": (~padded(9, 1, 5)).long()}
    with torch.no_grad():
        expected, found = model(**call), compiled(**call)
    assert type(found) is type(expected)
    assert_same(expected, found)
    assert_same(expected.pooler_output, found.pooler_output)


def assert_right_and_explained(model: nn.Module, first: torch.Tensor, other: torch.Tensor,
                               attentions: int) -> None:
    """The results are the model's; each attention is matched, or refused with a reason."""
    compiled = bc.optimize(model.eval(), (first,))
    with torch.no_grad():
        assert_same(model(other), compiled(other))
    matches = [m for m in compiled.report.matches if m.operator == "attention"]
    refusals = [r for r in compiled.report.refusals if r.operator == "attention"]
    assert len(matches) + len(refusals) == attentions
    assert all(m.validated for m in matches) and all(r.reason and r.node for r in refusals)


@pytest.mark.parametrize("attention", cases(["eager", "sdpa"], ["sdpa"]))
def test_gpt2(attention: str) -> None:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False,
        bos_token_id=0, eos_token_id=0, attn_implementation=attention)
    assert_right_and_explained(transformers.GPT2Model(config), torch.randint(50, (2, 6)),
                               torch.randint(50, (3, 9)), 2)


@pytest.mark.slow
def test_vit() -> None:
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SMALL)
    assert_right_and_explained(transformers.ViTModel(config), tensor(2, 3, 16, 16),
                               tensor(3, 3, 16, 16), 2)


# Forms written by hand: the core, and how many attentions it holds; a text is the reason why
# there is none.

Core = Callable[["HandWritten", torch.Tensor], Any]


class HandWritten(nn.Module):
    """The parts that hand-written attention is made of."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.fused, self.grouped = nn.Linear(32, 96), nn.Linear(32, 32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.slopes = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def flat(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)) for layer in (self.q, self.k, self.v))
        return q, k, v

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> Any:
        return self.core(self, x)


def soft(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, -1)


def near(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def distances(x: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(x.shape[1])
    return steps[:, None] - steps


def on_heads(attend: Callable[..., torch.Tensor]) -> Core:
    """A core over (batch, heads, tokens, features), with its scores made by `attend`."""
    def core(m: HandWritten, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.heads(x)
        return m.merge(soft(attend(m, x, q, k)) @ v)

    return core


def packed(m: HandWritten, x: torch.Tensor) -> torch.Tensor:
    return m.fused(x).view(*x.shape[:2], 3, HEADS, 8).permute(2, 0, 3, 1, 4)


def by_chunk(m, x):
    q, k, v = map(m.split, m.fused(x).chunk(3, -1))
    return m.merge(soft(q @ k.mT * 8 ** -0.5) @ v)


def by_unbind(m, x):
    q, k, v = packed(m, x).unbind(0)
    return m.merge(soft(q @ k.mT * 8 ** -0.5) @ v)


def by_select(m, x):
    together = packed(m, x)
    return m.merge(soft(together[0] @ together[1].mT * 8 ** -0.5) @ together[2])


def einsum_heads_last(m, x):
    q, k, v = m.flat(x)
    weights = soft(torch.einsum("bnhd,bmhd->bhnm", q, k) / 8 ** 0.5)
    return m.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))


def einsum_keys_first(m, x):
    q, k, v = m.flat(x)
    weights = torch.softmax(torch.einsum("bmhd,bnhd->bmnh", k, q) / 8 ** 0.5, 1)
    return m.out(torch.einsum("bmnh,bmhd->bnhd", weights, v).flatten(2))


def einsum_heads_first(m, x):
    q, k, v = m.flat(x)
    weights = soft(torch.einsum("b i h d, b j h d -> h b i j", q, k) * 0.3)
    return m.out(torch.einsum("hbij,bjhd->bihd", weights, v).flatten(2))


def einsum_with_dots(m, x):
    q, k, v = m.q(x), m.k(x), m.v(x)
    weights = soft(torch.einsum("...ic,...jc->...ij", q, k) * 0.2)
    return torch.einsum("...ij,...jc->...ic", weights, v)


def grouped(repeat: Callable[[torch.Tensor], torch.Tensor]) -> Core:
    def core(m: HandWritten, x: torch.Tensor) -> torch.Tensor:
        k, v = (repeat(t.unflatten(-1, (2, 8)).transpose(1, 2)) for t in m.grouped(x).chunk(2, -1))
        return m.merge(soft(m.split(m.q(x)) @ k.mT * 0.3) @ v)

    return core


def expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], 4, t.shape[2], 8)


def one_key_head(m, x):
    k, v = m.k(x)[:, None, :, :8], m.v(x)[:, None, :, :8]
    return m.merge(soft(m.split(m.q(x)) @ k.mT * 0.3) @ v)


def head_by_head(m, x):
    parts = zip(*(layer(x).split(8, -1) for layer in (m.q, m.k, m.v)), strict=True)
    return m.out(torch.cat([soft(q @ k.mT * 8 ** -0.5) @ v for q, k, v in parts], -1))


def rotary(m, x):
    angles = torch.outer(torch.arange(x.shape[1]).float(), 10000 ** (-torch.arange(4) / 4))
    cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turn(t: torch.Tensor) -> torch.Tensor:
        return t * cosine + torch.cat((-t[..., 4:], t[..., :4]), -1) * sine

    q, k, v = m.heads(x)
    return m.merge(soft(turn(q) @ turn(k).mT * 8 ** -0.5) @ v)


def also_returned(m, x):
    q, k, v = m.heads(x)
    weights = soft(q @ k.mT * 0.3)
    entropy = -(weights * weights.clamp_min(1e-9).log()).sum(-1).mean()
    return m.merge(weights @ v), weights, entropy, weights @ k


def twice(m, x):
    q, k, v = m.heads(x)
    weights = soft(q @ k.mT * 0.3)
    return m.merge(weights @ (weights @ v))


def values_of_weights(m, x):
    q, k, v = m.heads(x)
    weights = soft(q @ k.mT * 0.3)
    return weights @ (weights.tanh().mT @ v)


def scores_returned(m, x):
    q, k, v = m.heads(x)
    scores = q @ k.mT * 0.3
    return m.merge(soft(scores) @ v), scores


def values_transposed(m, x):
    q, k, v = m.heads(x)
    return m.merge((v.mT @ torch.softmax(k @ q.mT * 0.3, -2)).mT)


def weights_masked(m, x):
    q, k, v = m.heads(x)
    return m.merge((soft(q @ k.mT * 0.3) * near(x)) @ v)


def sink(m, x):
    q, k, v = m.heads(x)
    scores = torch.cat((q @ k.mT * 0.3, torch.zeros(x.shape[0], HEADS, x.shape[1], 1)), -1)
    return m.merge(soft(scores)[..., :-1] @ v)


def channels(m, x):
    q, k, v = m.heads(x)
    return m.merge((soft(q.mT @ k * 0.3) @ v.mT).mT)


def stored_keys(m, x):
    q, k, v = m.heads(x)
    memory = m.q.weight[:2, :8].expand(x.shape[0], HEADS, 2, 8)
    return m.merge(soft(q @ torch.cat((memory, k), 2).mT * 0.3) @ torch.cat((memory, v), 2))


def one_tensor(m, x):
    return soft(x @ x.mT / 32 ** 0.5) @ x


def ranked(m, x, q, k):
    scores = q @ k.mT * 0.3
    return scores.masked_fill(scores < scores.topk(2, -1).values[..., -1:], -math.inf)


def scores(m, x, q, k):
    return q @ k.mT * 0.3


HAND: dict[str, tuple[Core, int | str]] = {
    "chunk": (by_chunk, 1), "unbind": (by_unbind, 1), "select": (by_select, 1),
    "einsum bnhd": (einsum_heads_last, 1), "einsum bmnh": (einsum_keys_first, 1),
    "einsum hbij": (einsum_heads_first, 1), "einsum ...": (einsum_with_dots, 1),
    "grouped, expanded": (grouped(expanded), 1),
    "grouped, repeated": (grouped(lambda t: t.repeat_interleave(2, 1)), 1),
    "one key head": (one_key_head, 1), "head by head": (head_by_head, 4), "rotary": (rotary, 1),
    "normed": (on_heads(lambda m, x, q, k: m.norm(q) @ m.norm(k).mT), 1),
    "cosine": (on_heads(lambda m, x, q, k: functional.normalize(q, dim=-1)
                        @ functional.normalize(k, dim=-1).mT * m.slopes.exp()), 1),
    "capped": (on_heads(lambda m, x, q, k: torch.tanh(scores(m, x, q, k) / 20) * 20), 1),
    "scale on k": (on_heads(lambda m, x, q, k: q @ (k * 8 ** -0.5).mT), 1),
    "scale on both": (on_heads(lambda m, x, q, k: (q * 0.5) @ (k.mT / 2)), 1),
    "temperature": (on_heads(lambda m, x, q, k: q @ k.mT / m.slopes), 1),
    "where, kept": (on_heads(lambda m, x, q, k: torch.where(
        near(x), scores(m, x, q, k), torch.finfo(torch.float32).min)), 1),
    "where, dropped": (on_heads(lambda m, x, q, k: torch.where(
        ~near(x), torch.tensor(-math.inf), scores(m, x, q, k))), 1),
    "filled": (on_heads(lambda m, x, q, k: scores(m, x, q, k).masked_fill(
        near(x) == 0, -math.inf)), 1),
    "filled, then scaled": (on_heads(lambda m, x, q, k: (q @ k.mT).masked_fill(
        ~near(x), -1e4) * 0.3), 1),
    "added": (on_heads(lambda m, x, q, k: scores(m, x, q, k) + (1 - near(x).float()) * -1e4), 1),
    "nested": (on_heads(lambda m, x, q, k: scores(m, x, q, k).masked_fill(
        ~near(x), -math.inf).masked_fill(distances(x) > 2, -math.inf)), 1),
    "nested with two fills": (on_heads(lambda m, x, q, k: scores(m, x, q, k).masked_fill(
        ~near(x), -1e4).masked_fill(distances(x) > 2, -math.inf)), 1),
    "linear bias": (on_heads(lambda m, x, q, k: (
        scores(m, x, q, k) - distances(x).abs() * m.slopes).masked_fill(~near(x), -math.inf)), 1),
    "bias behind a mask": (on_heads(lambda m, x, q, k: scores(m, x, q, k).masked_fill(
        ~near(x), -math.inf) + distances(x).abs() * -m.slopes), 1),
    "bias behind a finite mask": (on_heads(lambda m, x, q, k: scores(m, x, q, k).masked_fill(
        ~near(x), -1e4) - distances(x).abs() * m.slopes), 1),
    "two best": (on_heads(ranked), 1),
    "maximum subtracted": (on_heads(lambda m, x, q, k: scores(m, x, q, k) - scores(
        m, x, q, k).amax(-1, keepdim=True)), 1),
    "scores of keys by queries": (on_heads(lambda m, x, q, k: (k @ q.mT * 0.3).mT), 1),
    "values transposed": (values_transposed, 1), "also returned": (also_returned, 1),
    "twice": (twice, 1), "values of weights": (values_of_weights, "from the probabilities"),
    "scores returned": (scores_returned, 1), "one tensor": (one_tensor, 1),
    "stored keys": (stored_keys, 1),
    "weights masked": (weights_masked, "multiplied"),
    "a sink": (sink, 1), "channels": (channels, "over tokens"),
    "a number added": (on_heads(lambda m, x, q, k: scores(m, x, q, k) + 3.0), 1),
    "rounded": (on_heads(lambda m, x, q, k: scores(m, x, q, k).half().float()), "rounded"),
}


SLOW_HAND = ("unbind", "einsum bnhd", "grouped, repeated", "one key head", "normed", "cosine",
             "scale on k", "where, dropped", "filled", "nested", "two best", "maximum subtracted",
             "scores of keys by queries", "scores returned", "stored keys", "a number added",
             "a sink", "bias behind a mask", "twice", "head by head")


@pytest.mark.parametrize("name", cases(HAND, SLOW_HAND))
def test_a_hand_written_form(name: str) -> None:
    core, expected = HAND[name]
    model = HandWritten(core).eval()
    compiled = bc.optimize(model, (tensor(2, 6, 32),))
    report = compiled.report
    if isinstance(expected, str):
        assert not report.matches and len(report.refusals) == 1
        assert expected in report.refusals[0].reason
    else:
        assert len(report.matches) == expected and not report.refusals
        assert all(m.operator == "attention" and m.validated for m in report.matches)
    with torch.no_grad():
        for shape in ((1, 9, 32), (5, 3, 32), (2, 8, 32)):
            x = tensor(*shape) * 2
            assert_same(model(x), compiled(x))


CAUSAL = ("where, kept", "where, dropped", "filled", "added", "linear bias")
NOT_CAUSAL = ("chunk", "also returned", "filled, then scaled")  # a fill of -3e3 hides nothing


@pytest.mark.parametrize("name", cases([*NOT_CAUSAL, *CAUSAL], [NOT_CAUSAL[-1], *CAUSAL[1:-1]]))
def test_only_what_is_causal_is_called_causal(name: str) -> None:
    report = bc.inspect(HandWritten(HAND[name][0]).eval(), (tensor(2, 6, 32),))
    assert report.matches[0].attrs["causal"] == (name in CAUSAL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_a_softmax_in_float32(dtype: torch.dtype) -> None:
    def core(m: HandWritten, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.heads(x)
        return m.merge(soft((q @ k.mT * 0.3).float()).to(dtype) @ v)

    model = HandWritten(core).to(dtype).eval()
    compiled, x = bc.optimize(model, (tensor(2, 6, 32).to(dtype),)), tensor(3, 7, 32).to(dtype)
    assert [m.operator for m in compiled.report.matches] == ["attention"]
    limit = 8 * torch.finfo(dtype).eps
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=limit, atol=limit)
