"""What a call costs beside the kernel, and what two calls at once do."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.errors import InputError, InputTypeError


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    model = bc.nn.BinaryLinear(768, 768).eval()
    return bc.optimize(model, (torch.randn(1, 768),))


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, norm_first=True).eval()
    return bc.optimize(model, (torch.randn(2, 9, 64),), binary="w1a1", guard=None)


def test_a_call_makes_no_reference_cycles_and_keeps_nothing(layer):
    import gc

    x = torch.randn(1, 768)
    layer(x), layer(x)
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(100):
            layer(x)
        assert len(gc.get_objects()) - before < 20
    finally:
        gc.enable()


def test_a_hundred_calls_give_the_same_bits_as_do_one_and_two_threads(block):
    x, threads = torch.randn(2, 9, 64), torch.get_num_threads()
    expected = block(x)
    assert all(torch.equal(block(x), expected) for _ in range(100))
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(block(x), expected)
    finally:
        torch.set_num_threads(threads)


def test_threads_with_different_sizes_at_once_get_what_each_would_get_alone(block):
    inputs = [torch.randn(1 + i % 3, 3 + i % 4, 64) for i in range(6)]
    expected = [block(x) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(30):
            at = (first + turn) % len(inputs)
            if not torch.equal(block(inputs[at]), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_kernels_let_other_python_threads_run():
    """While a kernel of many milliseconds runs, a thread of Python counts on."""
    torch.manual_seed(0)
    model = bc.nn.BinaryLinear(1024, 1024).eval()
    x = torch.randn(4096, 1024)
    compiled = bc.optimize(model, (x[:4],))
    assert "reference" not in compiled.executable.kernels.values()
    (bound,) = compiled.executable.bound.values()
    bound(x)
    ticks, done = list[float](), threading.Event()

    def count() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        while not ticks:
            time.sleep(0.001)
        overlapped = 0
        for _ in range(50):
            start = time.perf_counter()
            compiled(x)
            end = time.perf_counter()
            overlapped += any(start < tick < end for tick in tuple(ticks[-10000:]))
            if overlapped:
                break
    finally:
        done.set()
        counter.join()
    assert overlapped


@pytest.mark.parametrize(("call", "error", "word"), [
    (lambda c: c(torch.randn(1, 767)), InputError, "fixed by the capture"),
    (lambda c: c(torch.randn(768)), InputError, "rank"),
    (lambda c: c(torch.randn(1, 768).double()), InputTypeError, "float64"),
    (lambda c: c([1.0]), InputTypeError, "list"),
    (lambda c: c(), InputTypeError, "as captured"),
    (lambda c: c(torch.randn(1, 768), torch.randn(1)), InputTypeError, "as captured"),
    (lambda c: c(torch.randn(1, 768), scale=2), InputTypeError, "as captured"),
])
def test_hostile_calls_say_what_is_wrong(layer, call, error, word):
    with pytest.raises(error, match=word):
        call(layer)
    x, (name,) = torch.randn(2, 768), layer.program.signature.names
    assert torch.equal(layer(x), layer(**{name: x}))


@pytest.mark.parametrize("make", [
    lambda: torch.randn(768, 3).T, lambda: torch.randn(3, 1536)[:, ::2],
    lambda: torch.randn(3 * 768 + 1)[1:].view(3, 768),
    lambda: torch.randn(1, 768).expand(5, 768), lambda: torch.randn(3, 768).requires_grad_()])
def test_memory_in_any_order_gives_the_same_bits(layer, make):
    x = make()
    found = layer(x)
    assert torch.equal(found, layer(x.detach().clone().contiguous()))
    assert not found.requires_grad and found.is_contiguous()


def test_default_dtype_and_device_of_the_caller_change_nothing(layer, block):
    x, y = torch.randn(3, 768), torch.randn(2, 9, 64)
    expected = layer(x), block(y)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(layer(x), expected[0]) and torch.equal(block(y), expected[1])
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        found = layer(x), block(y)
    assert all(map(torch.equal, found, expected))
