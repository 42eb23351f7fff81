"""Training of packed tables at size, in several processes, and under compilers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import ddp_worker
import pytest
import torch
from torch.nn import functional as F

import bincompile as bc
from bincompile.models import digits, recommender, words
from bincompile.nn import BinaryEmbedding, BinaryEmbeddingBag, BinaryEmbeddingForward
from bincompile.nn.binary_table import BinaryTable
from bincompile.ops import row_gradient
from bincompile.optim import BinaryOptimizer

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

PEAK = """
import json, torch
from bincompile.nn import BinaryEmbedding, BinaryEmbeddingBag
from bincompile.optim import BinaryOptimizer
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
MIB = 1 << 20


def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                self.size = max(self.size, value.untyped_storage().nbytes())
        return out


layer = BinaryEmbedding(256_000, 1_024)
optimizer = BinaryOptimizer([layer.qweight])
warm = BinaryEmbedding(10, 8)
warm(torch.tensor([1])).sum().backward()
indices = torch.randint(256_000, (4_096,))
figures = {"table": layer.qweight.nbytes + layer.embed_scale.nbytes}
before = resident("VmRSS")
reset_peak()
out = layer(indices)
upstream = torch.ones_like(out)
with Largest() as largest:
    out.backward(upstream)
    figures["backward"] = resident("VmHWM") - before
    optimizer.step()
figures["largest"] = largest.size
figures["touched"] = layer.qweight.sparse_grad._nnz()
figures["state"] = sum(t.nbytes for t in optimizer.state[layer.qweight].values())
print(json.dumps(figures))
"""


def run(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           check=False, timeout=120, env=ENVIRONMENT)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_e15_a_backward_into_a_large_table_stays_under_64_mib_above_it() -> None:
    figures = json.loads(run(PEAK))
    assert figures["table"] < 34 * MIB
    assert figures["backward"] < 64 * MIB  # with the result and its gradient, 16 MiB each
    assert figures["largest"] <= figures["table"]  # nothing of (V, D) floats, which is 1000 MiB
    assert 4_000 < figures["touched"] <= 4_096
    assert figures["state"] < 17 * MIB


def test_g7_rows_of_all_bags_never_stand_side_by_side() -> None:
    layer = BinaryEmbeddingBag(50, 64).eval()
    bags, length = 512, 256  # 32 MiB of rows
    compiled = bc.optimize(layer, (torch.randint(50, (4, 4)),))
    indices = torch.randint(50, (bags, length))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    with Watch():
        found = compiled(indices)
    assert torch.equal(found, layer(indices))
    assert 0 < largest <= 2 * MIB < bags * length * 64 * 4


def test_gradients_survive_accumulation_in_a_loop_that_steps() -> None:
    torch.manual_seed(2)
    whole, parts = (BinaryEmbedding(30, 12, dtype=torch.float64) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    steppers = [BinaryOptimizer([layer.qweight], lr=0.3) for layer in (whole, parts)]
    for _ in range(10):
        indices, target = torch.randint(30, (16,)), torch.randn(16, 12, dtype=torch.float64)
        for layer, optimizer, size in zip((whole, parts), steppers, (16, 4), strict=True):
            optimizer.zero_grad()
            for place in range(0, 16, size):
                part = slice(place, place + size)
                (layer(indices[part]) - target[part]).square().sum().backward()
            optimizer.step()
        assert torch.equal(whole.qweight, parts.qweight)


def test_the_scale_gradient_refuses_bits_that_changed_in_between() -> None:
    layer = BinaryEmbedding(6, 8, learn_scale=True)
    out = layer(torch.tensor([1]))
    layer.qweight[1] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_bare_function_says_what_has_to_require_a_gradient() -> None:
    table, scale = torch.zeros(4, 1, dtype=torch.uint8), torch.ones(4, 1)
    with pytest.raises(TypeError, match="embed_scale that requires grad"):
        BinaryEmbeddingForward.apply(torch.tensor([1]), table, scale, 8, True)
    scale.requires_grad_()
    out = BinaryEmbeddingForward.apply(torch.tensor([[1, 2], [2, 2]]), table, scale, 8, True)
    out.sum().backward()
    assert scale.grad.flatten().tolist() == [0.0, -8.0, -24.0, 0.0]
    assert table.sparse_grad.to_dense()[:, 0].tolist() == [0.0, 1.0, 3.0, 0.0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_a_model_trains_under_torch_compile() -> None:
    layer = BinaryEmbedding(9, 8)
    compiled = torch.compile(layer, backend="eager")
    indices = torch.tensor([2, 5, 2])
    assert torch.equal(compiled(indices), layer(indices))
    compiled(indices).sum().backward()
    assert layer.qweight.sparse_grad.indices().tolist() == [[2, 5]]
    assert layer.qweight.sparse_grad.values()[:, 0].tolist() == [2.0, 1.0]


def test_a_gradient_keeps_wide_floats() -> None:
    layer = BinaryEmbedding(5, 3, dtype=torch.float16)
    layer(torch.zeros(4000, dtype=torch.int64)).sum().backward()
    assert layer.qweight.sparse_grad.dtype == torch.float32
    assert layer.qweight.sparse_grad.values()[0, 0].item() == 4000.0
    rows, _ = row_gradient.sum_rows(torch.tensor([3, 3], dtype=torch.int32), torch.ones(2, 1))
    assert rows.dtype == torch.int64


# several processes

@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[list[list]]:
    """What `ddp_worker.train` gives in each of two processes."""
    command = [sys.executable, str(ROOT / "tests" / "ddp_worker.py")]
    store = str(tmp_path_factory.mktemp("gloo") / "store")
    started = [subprocess.Popen([*command, str(rank), "2", store], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
               for rank in range(2)]
    outputs = [process.communicate(timeout=240) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return [json.loads(out) for out, _ in outputs]


def test_e11_g9_two_processes_do_what_one_does_with_all_the_data(two_processes: list) -> None:
    one, two = (found[0] for found in two_processes)
    alone = ddp_worker.train(0, 1, "bop", False, -1)
    assert one[0] == two[0] == alone[0] and one[2] == two[2] == alone[2]
    assert one[1] == pytest.approx(two[1], rel=1e-12) and one[1] == pytest.approx(alone[1])
    assert len(one[2]) > 20 and 0 not in one[2]  # 0 is the padding row


def test_e11_g9_a_process_without_a_gradient_takes_part(two_processes: list) -> None:
    one, two = (found[1] for found in two_processes)
    assert one[0] == two[0] and one[2] == two[2] and len(one[2]) > 20


def test_tables_stay_out_of_what_is_broadcast_in_each_forward(two_processes: list) -> None:
    for found in two_processes:
        assert [run[3] for run in found] == [["words.embed_scale"],
                                             ["words.qweight", "words.embed_scale"]]


# models


@pytest.mark.parametrize("module", [recommender, words], ids=lambda m: m.__name__)
def test_small_models_learn_compile_and_travel(module: ModuleType, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    model = module.build()
    assert torch.equal(torch.random.get_rng_state(), state)
    figure, = module.evaluate(model).values()
    assert figure >= 0.9 and not any(part.training for part in model.modules())
    args, _ = module.example_inputs()
    compiled = bc.optimize(model, args)
    assert module.evaluate(compiled) == module.evaluate(model)
    tables = [r for r in compiled.report.rewrites
              if r.operator not in ("binary_linear", "fused_rows")]
    assert len(tables) == sum(isinstance(part, BinaryTable) for part in model.modules())
    compiled.save(tmp_path / "model.bc")
    assert torch.equal(bc.load(tmp_path / "model.bc")(*args), compiled(*args))


@pytest.mark.slow
def test_digits_with_one_bit_attention_and_table_reach_87_percent() -> None:
    torch.manual_seed(0)
    images, labels = digits.split("train")
    model, tokens, epochs = digits.Digits(), digits.tokenize(images), 14
    model.table = BinaryEmbedding(digits.VOCABULARY, 64)
    matrices = [p for n, p in model.named_parameters() if ".attention." in n]
    sizes = [p.detach().abs() for p in matrices]
    kept = {id(p) for p in matrices}
    floats = [p for p in model.parameters() if id(p) not in kept and p.numel()]
    optimizer = BinaryOptimizer(
        [{"params": [model.table.qweight, *matrices], "lr": 0.01, "threshold": 0.1},
         {"params": floats, "rule": "ste", "lr": 2e-3}])
    batches = len(tokens) // 16
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(tokens)).split(16)[:batches]:
            loss = F.cross_entropy(model(tokens[batch]), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    assert all(torch.equal(p.abs(), size) for p, size in zip(matrices, sizes, strict=True))
    assert digits.evaluate(model.eval())["accuracy"] >= 0.87
    compiled = bc.optimize(model, (tokens[:8],))
    rewritten = [r.operator for r in compiled.report.rewrites]
    assert rewritten.count("binary_linear") == 8 and rewritten.count("binary_embedding") == 1
    test_tokens, _ = digits.test_split()
    with torch.no_grad():
        assert torch.equal(compiled(test_tokens).argmax(1), model(test_tokens).argmax(1))
