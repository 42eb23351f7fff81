"""A digits model with 1-bit attention weights and table, the table packed from the start."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import bincompile as bc
from bincompile.models import digits, train_digits
from bincompile.nn import BinaryEmbedding
from bincompile.optim import BinaryOptimizer


def trained(rule: str, epochs: int) -> tuple[digits.Digits, list[float]]:
    model = digits.Digits()
    model.table = BinaryEmbedding(digits.VOCABULARY, 64, learn_scale=True)
    optimizer = BinaryOptimizer.for_model(model, rule=rule, float_lr=3e-3)
    floats = next(group for group in optimizer.param_groups if group["rule"] == "ste")
    generator, losses = torch.Generator().manual_seed(0), []
    for epoch in range(epochs):
        for tokens, labels in train_digits.batches(*digits.split("train"), generator):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(tokens), labels, label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        floats["lr"] = 3e-3 * (1 - (epoch + 1) / epochs) + 1e-5
    return model.eval(), losses


def test_the_loss_falls_and_bits_flip():
    before = trained("bop", 0)[0].table.qweight
    torch.manual_seed(0)
    model, losses = trained("bop", 2)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert model.table.qweight.dtype == torch.uint8
    assert bool((model.table.qweight != before).any())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["bop", "sign_momentum"])
def test_it_reaches_087_compiles_and_predicts_the_same(rule, tmp_path):
    model, _ = trained(rule, 30)
    tokens, labels = digits.test_split()
    with torch.no_grad():
        predicted = model(tokens).argmax(-1)
    assert (predicted == labels).float().mean() >= 0.87
    compiled = bc.optimize(model, (tokens[:4],))
    packed = [r.operator for r in compiled.report.rewrites if r.operator.startswith("binary")]
    assert sorted(packed) == ["binary_embedding"] + ["binary_linear"] * 8
    assert torch.equal(compiled(tokens).argmax(-1), predicted)
    compiled.save(tmp_path / "digits.bcz")
    assert torch.equal(bc.load(tmp_path / "digits.bcz")(tokens), compiled(tokens))
