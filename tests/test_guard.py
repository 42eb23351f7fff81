"""Lossy rewrites: only on request, only with data, only as far as the guard allows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bincompile as bc

GENERATOR = torch.Generator().manual_seed(2)


class Net(nn.Module):
    """A look-up and linear layers, of which the residual ones hardly matter and the last does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.small = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 24)
        for layer in self.small:
            layer.weight.data *= 0.02

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.small:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def batches(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(40, (8, 5), generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return Net().eval()


def cosines(model: nn.Module, compiled: bc.CompiledModel, data: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        pairs = [(model(x).double().flatten(1), compiled(x).double().flatten(1)) for x in data]
    return torch.cat([torch.cosine_similarity(a, b, dim=-1) for a, b in pairs])


def test_without_data_there_is_no_lossy_program(model):
    with pytest.raises(bc.AccuracyUnknownError, match="calibration"):
        bc.optimize(model, (batches(1, 0)[0],), binary="w1a32")
    with pytest.raises(bc.AccuracyUnknownError, match="hold-out"):
        bc.optimize(model, (batches(1, 0)[0],), binary="w1a32", calibration=batches(1, 0))
    compiled = bc.optimize(model, (batches(1, 0)[0],), binary="w1a32", guard=None)
    assert compiled.report.lossy and "not measured" in " ".join(compiled.report.notes)
    assert [r.kind for r in compiled.report.rewrites].count("lossy") == 6


@pytest.mark.parametrize("precision", ["w1a1", "w1a32"])
def test_the_guard_holds_on_both_data_sets_and_every_step_is_reported(model, precision):
    calibration, holdout = batches(4, 0), batches(4, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = bc.optimize(model, (calibration[0],), binary=precision, calibration=calibration,
                           holdout=holdout)
    for data in (calibration, holdout):
        found = cosines(model, compiled, data)
        assert found.mean() >= 0.98 and found.min() >= 0.90
    report = compiled.report
    lossy = {r.path for r in report.rewrites if r.kind == "lossy"}
    reverted = {r.path for r in report.refusals if "reverted" in r.reason}
    assert reverted and lossy | reverted == {
        "table", "head", *(f"small.{i}" for i in range(4))} and not lossy & reverted
    assert report.lossy == bool(lossy)
    assert any("calibration" in n for n in report.notes)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if precision == "w1a32":
        assert lossy >= {f"small.{i}" for i in range(4)}


def test_a_wider_guard_keeps_more_layers(model):
    kept = []
    for limit in (0.999, 0.9, -1.0):
        compiled = bc.optimize(model, (batches(1, 0)[0],), binary="w1a32",
                               calibration=batches(4, 0), guard=bc.Guard(limit, limit))
        kept.append(sum(r.kind == "lossy" for r in compiled.report.rewrites))
    assert kept == sorted(kept) and kept[-1] == 6


def test_violation_can_raise_or_warn(model):
    options = dict(binary="w1a1", calibration=batches(4, 0), guard=bc.Guard(0.9999, 0.9999))
    with pytest.raises(bc.AccuracyError, match="cosine"):
        bc.optimize(model, (batches(1, 0)[0],), on_violation="raise", **options)
    with pytest.warns(UserWarning, match="cosine"):
        compiled = bc.optimize(model, (batches(1, 0)[0],), on_violation="warn", **options)
    assert sum(r.kind == "lossy" for r in compiled.report.rewrites) == 6


def test_layers_and_metric_are_honoured(model):
    wanted = bc.Binary("w1a32", layers="small.*", keep=("small.2",))
    compiled = bc.optimize(model, (batches(1, 0)[0],), binary=wanted, calibration=batches(4, 0))
    assert {r.path for r in compiled.report.rewrites if r.kind == "lossy"} == {
        "small.0", "small.1", "small.3"}
    calls = []

    def metric(candidate) -> float:
        calls.append(candidate)
        exact = candidate(batches(1, 0)[0])
        with torch.no_grad():
            return 1.0 if torch.equal(exact, model(batches(1, 0)[0])) else 0.5

    guard = bc.Guard(-1.0, -1.0, metric=metric, max_drop=0.1)
    compiled = bc.optimize(model, (batches(1, 0)[0],), binary="w1a32", calibration=batches(4, 0),
                           guard=guard)
    assert calls and not compiled.report.lossy


def test_bytes_fall_and_the_values_are_those_of_the_formula(model):
    ids = batches(1, 5)[0]
    compiled = bc.optimize(model, (ids,), binary=bc.Binary("w1a32", layers="head"), guard=None)
    weight = model.head.weight.double()
    packed = torch.where(weight >= 0, 1.0, -1.0).double() * weight.abs().mean(1, keepdim=True)
    with torch.no_grad():
        x = model.table(ids)
        for layer in model.small:
            x = x + torch.tanh(layer(x))
        expected = x.double() @ packed.T + model.head.bias.double()
    torch.testing.assert_close(compiled(ids).double(), expected, rtol=1e-5, atol=1e-5)
    rewrite = next(r for r in compiled.report.rewrites if r.kind == "lossy")
    assert rewrite.bytes_after < rewrite.bytes_before / 8 or rewrite.bytes_before < 4096


def test_bad_options_say_what_is_allowed(model):
    args = (batches(1, 0)[0],)
    for options, error, word in (
            ({"binary": "w2"}, bc.ConfigError, "w1a32"),
            ({"binary": "auto"}, bc.ConfigError, "not available yet"),
            ({"binary": 3}, bc.ConfigError, "a string"),
            ({"calibration": batches(2, 0)}, bc.ConfigError, "binary="),
            ({"binary": "w1a1", "calibration": []}, bc.AccuracyUnknownError, "at least one"),
            ({"binary": "w1a1", "calibration": batches(1, 0)[0]}, bc.ConfigError, "iterable"),
            ({"on_violation": "ignore"}, bc.ConfigError, "fallback"),
            ({"guard": 3}, bc.ConfigError, "Guard"),
            ({"continual": 0}, bc.ConfigError, "a window length"),
            ({"target": "tpu"}, bc.ConfigError, "cpu")):
        with pytest.raises(error, match=word):
            bc.optimize(model, args, **options)


def test_nan_in_calibration_data_is_an_error():
    model = nn.Linear(4, 4).eval()
    bad = torch.tensor([[1.0, float("nan"), 0.0, 2.0]])
    with pytest.raises(bc.InputError, match="nan"):
        bc.optimize(model, (torch.ones(2, 4),), binary="w1a1", calibration=[torch.ones(2, 4), bad])


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"ids": x}])
def test_batches_come_in_three_forms(model, form):
    data = [form(x) for x in batches(3, 0)]
    compiled = bc.optimize(model, (batches(1, 0)[0],), calibration=data,
                           binary=bc.Binary("w1a32", layers="small.*"))
    assert compiled.report.lossy
