"""Float attention made binary on request: which ones, in what form, and what stays float."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bincompile as bc
from bincompile.nn import BMHA
from bincompile.ops.binary_attention import binary_attention

B, T, H, D = 2, 9, 4, 8
ALL = bc.Binary("w1a1", attention="binary", values="binary")
ONLY = {form: bc.Binary(linear=False, embedding=False, attention="binary", values=form)
        for form in ("float", "binary")}
PROBABILITIES = {"float": "float", "binary": "uint8"}


class Attention(nn.Module):
    """Attention of a sequence to itself, with whatever else its scores go through."""

    def __init__(self, groups: int = 1, softcap: float | None = None, mean: bool = False) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(H * D, H * D), nn.Linear(H * D, H * D)
        self.kv = nn.Linear(H * D, 2 * H * D // groups)
        self.groups, self.softcap, self.mean = groups, softcap, mean

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None,
                causal: bool = False) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = (t.unflatten(-1, (H // self.groups, D)).transpose(1, 2)
                for t in self.kv(x).chunk(2, -1))
        if self.softcap is None:
            found = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal,
                                                   enable_gqa=self.groups > 1)
        else:
            scores = self.softcap * torch.tanh(q @ k.mT / D**0.5 / self.softcap)
            found = torch.softmax(scores, -1) @ v
        return self.out(found.transpose(1, 2).flatten(2))

    def expected(self, x: torch.Tensor, mask: torch.Tensor | None, causal: bool,
                 values: str) -> torch.Tensor:
        """What it gives with its attention, and nothing else, binary."""
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = (t.unflatten(-1, (H // self.groups, D)).transpose(1, 2).repeat_interleave(
            self.groups, 1) for t in self.kv(x).chunk(2, -1))
        keep, bias = (mask, None) if mask is None or mask.dtype == torch.bool else (None, mask)
        found = binary_attention.reference(q, k, v, bias, keep, None, None, D**-0.5, causal,
                                           PROBABILITIES[values], values)[0]
        return self.out(found.transpose(1, 2).flatten(2))


def compiled(model: nn.Module, *args: object, binary: bc.Binary = ALL, **kwargs: object):
    return bc.optimize(model.eval(), args, kwargs, binary=binary, guard=None)


def masks(rows: int = T) -> list[torch.Tensor | None]:
    kept = torch.rand(B, 1, rows, rows) > 0.3
    kept[..., 0] = True
    return [None, kept, torch.randn(1, H, rows, rows)]


@pytest.mark.parametrize(("values", "kind", "causal", "groups"), [
    ("binary", 0, True, 2), ("binary", 2, False, 1), ("float", 1, False, 2)])
@torch.no_grad()
def test_attention_alone_is_the_operator_between_the_same_layers(
        values: str, kind: int, causal: bool, groups: int) -> None:
    model, mask = Attention(groups).eval(), masks()[kind]
    found = compiled(model, torch.randn(B, T, H * D), mask, causal, binary=ONLY[values])
    lossy = [r for r in found.report.rewrites if r.kind == "lossy"]
    assert [r.operator for r in lossy] == ["binary_attention"]
    assert "tvm-binary-attention" in lossy[0].kernel
    for rows in (T, 5):
        x, mask = torch.randn(B, rows, H * D), masks(rows)[kind]
        wanted = model.expected(x, mask, causal, values)
        assert (found(x, mask, causal) - wanted).abs().max() < 2e-3  # a level of 255 at most
        assert (found(x, mask, causal) - wanted).abs().median() < 1e-6


def test_every_part_is_made_binary_and_nothing_between_is_copied() -> None:
    found = compiled(nn.Sequential(Attention(), Attention()), torch.randn(B, T, H * D))
    lossy = [r.operator for r in found.report.rewrites if r.kind == "lossy"]
    assert lossy.count("binary_attention") == 2 and lossy.count("binary_linear") == 6
    targets = {str(n.target) for n in found.program.graph.nodes}
    assert not any("clone" in t or "contiguous" in t for t in targets)


def test_a_facet_that_binary_attention_lacks_keeps_it_float_and_is_named() -> None:
    found = compiled(Attention(softcap=5.0), torch.randn(B, T, H * D))
    assert "binary_attention" not in {r.operator for r in found.report.rewrites}
    (refusal,) = [r for r in found.report.refusals if "stays float" in r.reason]
    assert refusal.operator == "attention" and "capped scores" in refusal.reason
    alone = compiled(Attention(softcap=5.0), torch.randn(B, T, H * D), binary=ONLY["float"])
    assert any("capped scores" in r.reason for r in alone.report.refusals)


def test_layers_that_are_kept_keep_their_attention() -> None:
    model = nn.Sequential(Attention(), Attention())
    binary = bc.Binary(attention="binary", linear=False, keep=("1",))
    found = compiled(model, torch.randn(B, T, H * D), binary=binary)
    assert [r.path for r in found.report.rewrites if r.kind == "lossy"] == ["0"]


def test_the_guard_gives_attention_back() -> None:
    torch.manual_seed(0)
    model, data = Attention().eval(), [torch.randn(B, T, H * D) * 4 for _ in range(4)]
    for limit, kept in ((0.99999, 0), (-1.0, 1)):
        found = bc.optimize(model, (data[0],), binary=ONLY["binary"], calibration=data,
                            guard=bc.Guard(limit, limit))
        assert len([r for r in found.report.rewrites if r.kind == "lossy"]) == kept
    assert found.report.lossy


def test_a_fully_masked_row_gives_zeros_not_nan() -> None:
    model, x = Attention().eval(), torch.randn(B, T, H * D)
    mask = torch.ones(B, 1, T, T, dtype=torch.bool)
    found = compiled(model, x, mask, binary=ONLY["binary"])
    mask[0, 0, 3] = False
    torch.testing.assert_close(found(x, mask)[0, 3], model.out.bias)


@pytest.mark.parametrize("bad", [{"attention": "int8"}, {"values": "ternary"},
                                 {"values": "binary"}], ids=str)
def test_wrong_options_are_named(bad: dict[str, str]) -> None:
    with pytest.raises(bc.ConfigError, match=r"values|attention"):
        bc.Binary("w1a1", **bad)


def test_bmha_with_8_bit_probabilities_runs_the_compiled_kernel() -> None:
    layer = BMHA(32, 32, 4, attention="binary", probabilities="uint8", values="binary").eval()
    x, kept = torch.randn(B, T, 32), torch.rand(B, T) > 0.2
    found = bc.optimize(layer, (x, kept), {"need_weights": False})
    assert "tvm-binary-attention" in str(found.report)
    wanted = layer(x, kept, need_weights=False)[0]
    assert (found(x, kept, need_weights=False)[0] - wanted).abs().median() < 1e-5
    with pytest.raises(bc.ConfigError, match="uint8"):
        BMHA(32, 32, 4, attention="binary", probabilities="uint8")


def test_8_bit_probabilities_learn() -> None:
    torch.manual_seed(0)
    layer = BMHA(8, 16, 2, dropout=0.0, attention="binary", probabilities="uint8", values="binary")
    x = torch.randn(4, 6, 8)
    layer(x)[0].square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.ne(0).any() for p in layer.parameters())
    assert torch.allclose(layer(x)[1].sum(-1), torch.ones(4, 2, 6), atol=0.02)
