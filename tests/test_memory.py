"""What a compiled model keeps: bits, not the float weights that they were made from."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.compiled import CompiledModel
from bincompile.errors import WeightsGoneError
from bincompile.ops import bits
from bincompile.runtime import fresh
from bincompile.runtime.executor import bind

X = torch.linspace(-1, 1, 3 * 70).view(3, 70)


class Net(nn.Module):
    """Two linears that share a weight's bits, a constant of the graph and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(70, 70), nn.Linear(70, 33)
        self.second_again = nn.Linear(70, 33)
        self.second_again.weight = self.second.weight
        self.register_buffer("shift", torch.full((33,), 0.5))

    def forward(self, x):
        y = torch.relu(self.first(x)) + torch.arange(70.0)
        return self.second(y) * self.shift + self.second_again(y)


def compiled(model: nn.Module, **options):
    return compiled_at(model, X, **options)


def compiled_at(model: nn.Module, x: torch.Tensor, **options):
    return bc.optimize(model, (x,), **options)


@pytest.fixture(scope="module")
def binary():
    model = Net().eval()
    found, expected = compiled(model, binary="w1a1", guard=None), list(model.parameters())
    alive = [weakref.ref(p) for p in expected if p.ndim == 2]
    weight = model.second.weight.detach().clone()
    del model, expected
    gc.collect()
    return found, alive, weight


def test_float_weights_go_with_the_model(binary):
    found, alive, _ = binary
    assert len(alive) == 2 and not any(ref() is not None for ref in alive)
    assert found.nbytes < 70 * 70 * 4
    assert found.nbytes == found.holdings["bits"] + found.holdings["numbers"]
    assert found(X).shape == (3, 33)


def test_holdings_count_what_is_really_there():
    model = nn.Linear(640, 320).eval()
    found = compiled_at(model, torch.ones(2, 640), binary="w1a1", guard=None)
    assert found.holdings["bits"] == 640 * 320 // 8  # once, though graph and kernel both read it
    assert 2 * 320 * 4 <= found.holdings["numbers"] <= 5 * 320 * 4
    exact = compiled_at(model, torch.ones(2, 640))
    assert exact.holdings == {"bits": 0, "numbers": 320 * 4 + 640 * 320 * 4, "planned": 0}
    assert exact.nbytes == sum(p.nbytes for p in model.parameters())


def test_earlier_stages_still_print_and_say_that_their_weights_are_gone(binary):
    found, _, _ = binary
    assert "linear" in str(found.program.at("normal"))
    with pytest.raises(WeightsGoneError, match="keep the model"):
        found.program.at("normal")(X)
    with pytest.raises(WeightsGoneError):
        found.program.at("captured").tensors()
    assert found.report.to_dict()["rewrites"]


def test_packed_weights_are_made_again_bit_for_bit(binary, tmp_path):
    found, _, weight = binary
    again = [t for t in found.program.tensors().values()
             if t.dtype == torch.uint8 and t.shape[0] == 33]
    assert again and all(torch.equal(t, bits.pack(weight)) for t in again)
    with torch.no_grad():
        torch.testing.assert_close(found.program(X), found(X))
    found.save(tmp_path / "net.bcz")
    loaded = bc.load(tmp_path / "net.bcz")
    assert torch.equal(loaded(X), found(X))
    assert found.explain() == loaded.explain() and "chosen" in str(found.explain())
    loaded.save(tmp_path / "again.bcz")
    assert (tmp_path / "again.bcz").read_bytes() == (tmp_path / "net.bcz").read_bytes()


def test_a_weight_is_held_once_in_the_layout_of_its_kernel():
    model = nn.Linear(70, 35).eval()
    found = compiled(model, binary="w1a1", guard=None)
    assert list(found.executable.kernels.values()) == ["tvm-w1a1"]
    gc.collect()
    held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.uint8
            and t.shape == (35, 9)]
    assert not held
    (packed,) = [t for t in found.program.tensors().values() if t.dtype == torch.uint8]
    assert torch.equal(packed, bits.pack(model.weight.detach()))


def test_a_program_can_be_bound_again_after_its_model_is_gone(binary):
    found, _, _ = binary
    again = CompiledModel(found.program, bind(found.program, found.target), found.target)
    assert torch.equal(again(X), found(X))
    with pytest.raises(WeightsGoneError):
        again.program.at("normal")(X)


def test_stages_work_as_before_while_the_model_lives():
    model = Net().eval()
    found = compiled(model)
    with torch.no_grad():
        expected = model(X)
    for stage in found.program.stages:
        with torch.no_grad():
            torch.testing.assert_close(stage(X), expected)
    stage = found.program.at("captured")
    with torch.no_grad():
        torch.testing.assert_close(stage.exported.module()(X), (expected,))
        torch.testing.assert_close(copy.deepcopy(stage.graph_module)(X), (expected,))
    kept = model.first.weight.data_ptr()
    assert kept in {t.data_ptr() for t in stage.tensors().values()}  # shared, never copied


def test_weights_that_were_exchanged_are_never_taken_for_the_old_ones():
    model = Net().eval()
    found = compiled(model, binary="w1a1", guard=None)
    model.first.weight.data = torch.zeros(70, 70)
    with pytest.raises(WeightsGoneError):
        found.program.at("normal")(X)
    model.first.weight = nn.Parameter(torch.zeros(70, 70))
    with pytest.raises(WeightsGoneError):
        found.program.at("normal")(X)


def test_an_exact_program_keeps_the_weights_that_it_reads():
    model = Net().eval()
    with torch.no_grad():
        expected = model(X)
    found = compiled(model)
    del model
    gc.collect()
    torch.testing.assert_close(found(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(found.program.at("normal")(X), expected)


def test_bits_that_were_written_over_are_not_taken_from_a_kernel_that_has_the_old_ones():
    layer = bc.nn.BinaryLinear(70, 33).eval()
    before = compiled(layer)
    first = before(X)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.neg_()
    after = compiled(layer)
    with torch.no_grad():
        torch.testing.assert_close(after(X), layer(X), rtol=1e-4, atol=1e-4)
    assert torch.equal(before(X), first)


BERT = '''
import ctypes, gc, torch, bincompile as bc
from transformers import BertConfig, BertModel

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

def make(layers):
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()
    binary = bc.Binary("w1a1", embedding=True)
    size = sum(p.nbytes for p in model.parameters())
    return bc.optimize(model, (ids,), binary=binary, guard=None), size

ids = torch.randint(0, 30000, (1, 128))
first, _ = make(1)  # what every compilation in a process loads and keeps
first(ids), first(ids)
before = resident()
compiled, size = make(12)
compiled(ids), compiled(ids)
print(size, compiled.nbytes, resident() - before)
'''


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="counts resident pages")
def test_compiled_bert_base_holds_a_twentieth_of_its_float_weights():
    done = subprocess.run([sys.executable, "-c", BERT], capture_output=True, text=True, timeout=900)
    assert not done.returncode, done.stderr[-2000:]
    size, held, resident = map(int, done.stdout.split()[-3:])
    assert held * 20 <= size, (held, size)
    assert resident * 4 <= size, (resident, size)


def test_large_results_are_in_memory_that_nothing_holds_any_more() -> None:
    fresh._free.clear()
    size = (1024, 2048)
    first = fresh.fresh(size, torch.float32).fill_(1)
    assert first._base is None and first.is_contiguous() and first.shape == size
    place, part = first.data_ptr(), first[3]
    other = fresh.fresh(size, torch.float32).fill_(2)
    del first  # a view of it lives
    assert fresh.fresh(size, torch.float32).data_ptr() not in (place, other.data_ptr())
    assert bool((part == 1).all())
    array = part.numpy()
    del part
    fresh.fresh(size, torch.float32).fill_(3)
    assert (array == 1).all()
    del array
    assert place in {fresh.fresh(size, torch.float32).data_ptr(), *(
        block.data_ptr() for block in fresh._free)}
    many = [fresh.fresh((1024, 2048 + 512 * place), torch.float32) for place in range(9)]
    del many
    assert len(fresh._free) <= fresh.KEPT_BLOCKS
    assert sum(block.numel() for block in fresh._free) <= fresh.KEPT_BYTES


def test_threads_never_share_a_large_result() -> None:
    def write(number: int) -> bool:
        held = []
        for _ in range(60):
            held = [*held[-1:], fresh.fresh((1024, 1536), torch.float32).fill_(number)]
            if not all(bool((result == number).all()) for result in held):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, range(4)))
