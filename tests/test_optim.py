"""BinaryOptimizer and sparse_update_embedding_qweight: formulas, state, bad options, descent."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bincompile as bc
from bincompile.nn import BinaryEmbedding, BinaryEmbeddingBag, BinaryLinear
from bincompile.ops import bits
from bincompile.optim import BinaryOptimizer, sparse_update_embedding_qweight

FLIPS = ("bop", "sign_momentum")


def signs_of(layer: BinaryEmbedding) -> torch.Tensor:
    """The signs of a packed table, (V, k, D)."""
    return bits.unpack(layer.qweight.unflatten(1, (layer.bases, -1)), layer.embedding_dim,
                       torch.float64)


def touch(layer: BinaryEmbedding, rows: list[int], upstream: torch.Tensor) -> None:
    """One backward pass through a few rows."""
    layer(torch.tensor(rows)).backward(upstream)


# sparse_update_embedding_qweight


@given(rows=st.integers(1, 6), dim=st.integers(1, 20), bases=st.integers(1, 3),
       count=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_the_update_is_the_xor_of_the_page_and_the_rule_bit_by_bit(
        rows: int, dim: int, bases: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = BinaryEmbedding(rows, dim, bases=bases)
    before, packed = signs_of(layer), layer.qweight.clone()
    indices = torch.randint(rows, (count,))
    grad = torch.randn(count, bases, dim).round()
    found = sparse_update_embedding_qweight(layer.qweight, indices,
                                            grad[:, 0] if bases == 1 else grad)
    assert found is layer.qweight
    total = torch.zeros(rows, bases, dim).index_add_(0, indices, grad)
    wanted = torch.where(total < 0, 1.0, torch.where(total > 0, -1.0, before))
    assert torch.equal(signs_of(layer), wanted.double())
    mask = bits.pack(torch.where(total != 0, 1.0, -1.0))
    descent = bits.pack(torch.where(total < 0, 1.0, -1.0))
    split = packed.unflatten(1, (bases, -1))
    assert torch.equal(layer.qweight, (split ^ ((split ^ descent) & mask)).flatten(1))


@pytest.mark.parametrize(("qweight", "indices", "grad", "error", "word"), [
    (torch.zeros(4, 1), [0], torch.ones(1, 8), bc.InputTypeError, "uint8"),
    (torch.zeros(4, 1).byte(), [0], torch.ones(1, 8).long(), bc.InputTypeError, "float"),
    (torch.zeros(4, 1).byte(), [0], torch.ones(1, 9), bc.InputError, "sizes"),
    (torch.zeros(4, 1).byte(), [0, 1], torch.ones(1, 8), bc.InputError, "sizes"),
    (torch.zeros(4, 1).byte(), [4], torch.ones(1, 8), bc.InputError, "index 4 into a table of 4")])
def test_a_wrong_update_is_refused(qweight: torch.Tensor, indices: list[int], grad: torch.Tensor,
                                   error: type[Exception], word: str) -> None:
    before = qweight.clone()
    with pytest.raises(error, match=word):
        sparse_update_embedding_qweight(qweight, torch.tensor(indices), grad)
    assert torch.equal(qweight, before)


def test_e4_g9_packed_tables_are_updated_by_the_function_and_by_the_optimizer() -> None:
    layer = BinaryEmbedding(5, 13)
    touch(layer, [1, 3], torch.ones(2, 13))
    grad = layer.qweight.sparse_grad
    sparse_update_embedding_qweight(layer.qweight, grad.indices()[0], grad.values())
    assert signs_of(layer)[[1, 3]].eq(-1).all()
    bag = BinaryEmbeddingBag(5, 13)
    optimizer = BinaryOptimizer([bag.qweight], "bop", lr=1.0, threshold=0.5)
    bag(torch.tensor([[2, 4]])).sum().backward()
    optimizer.step()
    assert bits.unpack(bag.qweight[[2, 4]], 13, torch.float32).eq(-1).all()


# rules


def reference(rule: str, signs: np.ndarray, grads: list[np.ndarray], lr: float) -> np.ndarray:
    """The rules in float64, one element at a time where they are elementwise."""
    w, first = signs.copy(), True
    m, power, gradient = np.zeros_like(w), np.zeros((w.shape[0], 1)), np.zeros_like(w)
    direction = -0.1 * lr * w
    for g in grads:
        if rule == "bop":
            mean = (g**2).mean(1, keepdims=True)
            power = mean if first else 0.99 * power + (1 - 0.99) * mean
            m, first = (1 - lr) * m + lr * g, False
            w = np.where(w * m > 0.3 * np.sqrt(power), -w, w)
        else:
            gradient = 0.9 * gradient + (1 - 0.9) * g
            direction = 0.99 * direction + (1 - 0.99) * lr * np.sign(gradient)
            w = np.where(direction == 0, w, -np.sign(direction))
    return w


@pytest.mark.parametrize("rule", FLIPS)
@pytest.mark.parametrize("dense", [False, True])
def test_a_rule_is_its_formula(rule: str, dense: bool) -> None:
    lr = 0.2 if rule == "bop" else 1e-3
    layer = BinaryEmbedding(6, 10, dtype=torch.float64)
    start = signs_of(layer)[:, 0]
    weight = nn.Parameter(start * 0.5)
    optimizer = BinaryOptimizer([weight if dense else layer.qweight], rule, lr=lr)
    grads = [torch.randn(6, 10, dtype=torch.float64) + 0.5 for _ in range(40)]
    for grad in grads:
        optimizer.zero_grad()
        weight.grad = grad.clone()
        touch(layer, list(range(6)), grad)
        optimizer.step()
    wanted = reference(rule, start.numpy(), [g.numpy() for g in grads], lr)
    found = weight.detach() / 0.5 if dense else signs_of(layer)[:, 0]
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert 0.05 < (found != start).double().mean() < 0.95


def test_ste_is_adamw() -> None:
    linear = BinaryLinear(6, 4)
    twin = copy.deepcopy(linear)
    optimizer = BinaryOptimizer(linear.parameters(), "ste", lr=0.01, weight_decay=0.1)
    peer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(8, 6)
        for layer, stepper in ((linear, optimizer), (twin, peer)):
            stepper.zero_grad()
            layer(x).square().sum().backward()
            stepper.step()
    torch.testing.assert_close(linear.weight, twin.weight, rtol=1e-5, atol=1e-6)
    BinaryOptimizer([linear.weight], "ste", clip=0.1).step()
    assert linear.weight.abs().max() <= 0.1


@pytest.mark.parametrize("rule", FLIPS)
def test_e5_state_has_the_size_of_the_signs_of_touched_rows(rule: str) -> None:
    layer = BinaryEmbedding(1000, 13, bases=2)
    optimizer = BinaryOptimizer([layer.qweight], rule)
    for rows in ([5, 900], [900, 7, 7], [5]):
        optimizer.zero_grad()
        touch(layer, rows, torch.randn(len(rows), 13))
        optimizer.step()
    state = optimizer.state[layer.qweight]
    assert state["rows"].tolist() == [5, 7, 900]
    assert sorted(state["slots"].tolist()) == [0, 1, 2]
    for name, tensor in state.items():
        if name not in ("rows", "slots"):
            assert (tensor.shape[0] <= 4 and tensor.shape[1] == 2) or name == "power"
    assert sum(t.numel() for t in state.values()) <= 2 * 4 * 2 * 13 + 20


@pytest.mark.parametrize("rule", FLIPS)
def test_e6_signs_follow_descent_and_stay_where_the_gradient_is_zero(rule: str) -> None:
    layer = BinaryEmbedding(4, 9)
    before = signs_of(layer)[:, 0]
    upstream = torch.zeros(2, 9)
    upstream[:, :3], upstream[:, 3:6] = 1.0, -1.0
    optimizer = BinaryOptimizer([layer.qweight], rule)
    for _ in range(40):
        optimizer.zero_grad()
        touch(layer, [1, 2], upstream)
        optimizer.step()
    after = signs_of(layer)[:, 0]
    assert after[1:3, :3].eq(-1).all() and after[1:3, 3:6].eq(1).all()
    assert torch.equal(after[1:3, 6:], before[1:3, 6:])
    assert torch.equal(after[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize("rule", FLIPS)
def test_a_sign_that_agrees_with_descent_never_flips(rule: str) -> None:
    layer = BinaryEmbedding(4, 9)
    before = layer.qweight.clone()
    optimizer = BinaryOptimizer([layer.qweight], rule)
    for _ in range(30):
        optimizer.zero_grad()
        touch(layer, [0, 1, 2, 3], -signs_of(layer)[:, 0].float())
        optimizer.step()
    assert torch.equal(layer.qweight, before)


def test_b22_a_run_repeats_without_any_seed_and_no_option_is_ignored() -> None:
    found = []
    start = BinaryEmbedding(6, 10)
    grads = torch.randn(30, 6, 10)
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer = copy.deepcopy(start)
        optimizer = BinaryOptimizer([layer.qweight], "sign_momentum")
        for grad in grads:
            optimizer.zero_grad()
            touch(layer, list(range(6)), grad)
            optimizer.step()
        found.append(layer.qweight)
    assert torch.equal(*found) and not torch.equal(found[0], start.qweight)
    for option in ({"weight_decay": 0.1}, {"eps": 1e-3}):
        with pytest.raises(bc.ConfigError, match="options of this rule"):
            BinaryOptimizer([start.qweight], "sign_momentum", **option)


@pytest.mark.parametrize("rule", FLIPS)
def test_float_matrices_keep_their_magnitudes_and_zero_can_flip(rule: str) -> None:
    linear = BinaryLinear(8, 4)
    with torch.no_grad():
        linear.weight[0, 0] = 0.0
    sizes = linear.weight.detach().abs()
    optimizer = BinaryOptimizer([linear.weight], rule)
    for _ in range(40):
        linear.weight.grad = torch.ones(4, 8)
        optimizer.step()
    torch.testing.assert_close(linear.weight.detach(), -sizes, rtol=0, atol=1e-37)
    assert bits.sign(linear.weight.detach()).eq(-1).all()


# groups, schedulers, state


def mixed() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    model = nn.Sequential(BinaryEmbedding(20, 16), nn.Flatten(1), BinaryLinear(48, 8),
                          nn.Linear(8, 3))
    indices = torch.randint(20, (60, 3))
    return model, indices, indices.sum(1) % 3


def train(model: nn.Module, optimizer: BinaryOptimizer, indices: torch.Tensor,
          labels: torch.Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(indices), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_for_model_groups_tables_and_floats_and_both_learn() -> None:
    model, indices, labels = mixed()
    optimizer = BinaryOptimizer.for_model(model, float_lr=0.01)
    tables, floats = optimizer.param_groups
    assert [p.shape for p in tables["params"]] == [(20, 2)] and tables["rule"] == "bop"
    assert len(floats["params"]) == 3 and (floats["rule"], floats["lr"]) == ("ste", 0.01)
    before = copy.deepcopy(model.state_dict())
    losses = train(model, optimizer, indices, labels, 60)
    assert losses[-1] < 0.5 * losses[0]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.qweight", "2.weight", "3.weight", "3.bias"}
    model[0].requires_grad_(False)
    assert len(BinaryOptimizer.for_model(model).param_groups) == 1


@pytest.mark.parametrize("rule", FLIPS)
def test_state_dict_resumes_bit_for_bit(rule: str) -> None:
    model, indices, labels = mixed()
    optimizer = BinaryOptimizer.for_model(model, rule)
    train(model, optimizer, indices[:30], labels[:30], 5)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, indices, labels, 8)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    again, _, _ = mixed()
    again.load_state_dict(stored["model"])
    resumed = BinaryOptimizer.for_model(again, rule)
    resumed.load_state_dict(stored["optimizer"])
    train(again, resumed, indices, labels, 8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_schedulers_set_the_rate_of_every_group() -> None:
    model, indices, labels = mixed()
    optimizer = BinaryOptimizer.for_model(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    for _ in range(2):
        train(model, optimizer, indices, labels, 1)
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    tables = model[0].qweight.clone(), model[3].weight.detach().clone()
    optimizer.state.clear()
    train(model, optimizer, indices, labels, 3)
    assert torch.equal(tables[0], model[0].qweight) and torch.equal(tables[1], model[3].weight)


def test_a_group_of_another_rule_has_its_own_options() -> None:
    model, _, _ = mixed()
    optimizer = BinaryOptimizer([
        {"params": [model[0].qweight]}, {"params": model[3].parameters(), "rule": "ste"},
        {"params": model[2].weight, "lr": 0.5}], lr=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 1e-3, 0.5]
    assert "betas" not in optimizer.param_groups[0]


def test_step_runs_a_closure() -> None:
    layer = BinaryEmbedding(4, 8)
    optimizer = BinaryOptimizer([layer.qweight])

    def closure() -> torch.Tensor:
        loss = layer(torch.tensor([1])).sum()
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), torch.Tensor)
    assert layer.qweight.sparse_grad is not None
    optimizer.zero_grad()
    assert layer.qweight.sparse_grad is None
    before = layer.qweight.clone()
    optimizer.step()
    assert torch.equal(layer.qweight, before)


TABLE = torch.zeros(4, 1, dtype=torch.uint8)
BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([TABLE], {"rule": "adam"}, "adam"), ([TABLE], {"rule": None}, "None"),
    ([TABLE], {"rule": "ste"}, "packed table"), ([TABLE], {"lr": -1.0}, "lr=-1.0"),
    ([TABLE], {"lr": "fast"}, "lr='fast'"), ([TABLE], {"betas": (0.9, 0.9)}, "betas"),
    ([TABLE], {"rule": "sign_momentum", "betas": (0.9,)}, "betas"),
    ([TABLE], {"rule": "sign_momentum", "betas": (0.9, 1.0)}, "betas"),
    ([TABLE], {"beta": 1.0}, "beta=1.0"), ([TABLE], {"momentum": 0.9}, "momentum"),
    ([nn.Parameter(torch.ones(3))], {}, "flips"), ([torch.ones(2, 2).long()], {}, "int64"),
    ([{"params": [TABLE], "rule": "bop", "weight_decay": 1.0}], {}, "weight_decay"),
    ([nn.Parameter(torch.ones(3))], {"rule": "ste", "eps": 0.0}, "eps"),
]


@pytest.mark.parametrize(("params", "options", "word"), BAD)
def test_a_wrong_option_is_named(params: Any, options: dict[str, Any], word: str) -> None:
    with pytest.raises(bc.ConfigError, match=word) as caught:
        BinaryOptimizer(params, **options)
    assert isinstance(caught.value, ValueError)


def test_parameters_without_their_tables_are_refused() -> None:
    model, _, _ = mixed()
    with pytest.raises(bc.ConfigError, match="for_model"):
        BinaryOptimizer(model.parameters(), "ste")
    with pytest.raises(bc.InputTypeError, match="str"):
        BinaryOptimizer(["weight"])


@pytest.mark.parametrize("rule", FLIPS)
@pytest.mark.parametrize("bases", [1, 2])
def test_descent_learns_a_table(rule: str, bases: int) -> None:
    layer = BinaryEmbedding(32, 24, bases=bases)
    teacher, head = torch.randn(32, 24).sign(), torch.randn(24, 8) / math.sqrt(24)
    every, steps = torch.arange(32), 200
    optimizer = BinaryOptimizer([layer.qweight], rule)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    sizes = layer(every).abs().unique()
    losses = []
    for _ in range(steps):
        indices = torch.randint(32, (32,))
        loss = ((layer(indices) - teacher[indices]) @ head).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(((layer(every) - teacher) @ head).square().mean().item())
    assert losses[-1] < 0.35 * losses[0]
    assert set(layer(every).abs().unique().tolist()) <= set(sizes.tolist())
