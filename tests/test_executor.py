"""The executor: planned memory, threads, results of their own, and calls that fail."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import nn

import bincompile as bc
from bincompile.errors import InputError
from bincompile.runtime.bound import Bound
from bincompile.runtime.buffers import MOST_ARENAS, MOST_LAYOUTS, Layout
from bincompile.runtime.executor import Executable
from bincompile.runtime.straight_line import straight_line


class Stack(nn.Module):
    """Binary layers with views, a residual and torch operators between them; three results."""

    def __init__(self, features: int = 24, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(bc.nn.BinaryLinear(features, features) for _ in range(depth))
        self.last = bc.nn.BinaryLinear(features, 2 * features)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x.transpose(0, 1)).transpose(0, 1)
        wide = self.last(x)
        left, right = wide.chunk(2, -1)
        return left, right * 2, self.last(left).flatten(0, 1)


def planned(compiled, spoil: bool = True) -> Executable:
    """The same program with each kernel a `Bound` around the reference, in planned memory."""
    def bound(call):
        reference = call.partial(call.operator.reference)

        def results(*values):
            found = reference(*values)
            return tuple(found) if isinstance(found, tuple | list) else (found,)

        def into(*values):
            count = len(call.run_time(call.arguments))
            for out, value in zip(values[count:], results(*values[:count]), strict=True):
                assert out.is_contiguous() and out.data_ptr() % 64 == 0
                if spoil:
                    out.fill_(float("nan"))
                out.copy_(value)

        def shape(*values):
            return tuple((tuple(t.shape), t.dtype) for t in results(*values))

        several = "Tensor[]" in str(call.operator.overload._schema).rpartition("->")[2]
        return Bound(shape, into, several=several)

    executable = compiled.executable
    kernels = {name: bound(call) for name, call in executable.calls.items()}
    function, memory = straight_line(compiled.program.graph_module, executable.calls, kernels)
    return dataclasses.replace(executable, bound=kernels, function=function, memory=memory)


@pytest.fixture(scope="module")
def stack():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 24)
    compiled = bc.optimize(Stack().eval(), (x,))
    return compiled, planned(compiled)


def expect(compiled, x):
    """The results by the graph itself."""
    with torch.no_grad():
        return compiled.program.graph_module(x)


def same(found, expected) -> bool:
    """Whether two tuples of tensors are equal bit for bit."""
    return all(map(torch.equal, found, expected))


def test_results_are_those_of_the_graph_at_every_size(stack):
    compiled, executable = stack
    for sizes in ((3, 5), (1, 1), (3, 5), (2, 9), (7, 2), (2, 9), (1, 1)):
        x = torch.randn(*sizes, 24)
        assert same(executable(x), expect(compiled, x)), sizes


def test_memory_is_reused_within_a_call_and_between_calls(stack):
    _, executable = stack
    x = torch.randn(3, 5, 24)
    executable(x), executable(x)
    (layout,) = [v for k, v in executable.memory.layouts.items() if k == (3, 5)]
    assert 0 < len(layout.places) and 0 < len(layout.given)
    assert layout.nbytes < len(layout.places) * 2048
    before = executable.memory.nbytes
    for _ in range(5):
        executable(x)
    assert executable.memory.nbytes == before >= layout.nbytes


def test_results_never_share_memory_with_what_the_next_call_writes(stack):
    compiled, executable = stack
    x = torch.randn(3, 5, 24)
    executable(x)
    first, expected = executable(x), expect(compiled, x)
    assert same(first, expected)
    executable(torch.randn(3, 5, 24)), executable(torch.full((3, 5, 24), float("nan")))
    assert same(first, expected)
    first[1].fill_(7.0)
    assert same(executable(x), expected)


def test_a_call_that_fails_gives_its_memory_back(stack):
    _, executable = stack
    x = torch.randn(3, 5, 24)
    executable(x), executable(x)
    before = executable.memory.nbytes
    scope = executable.function.__globals__
    name = next(k for k in scope if k.startswith("i_"))
    kernel, scope[name] = scope[name], lambda *values: 1 / 0
    try:
        with pytest.raises(ZeroDivisionError):
            executable(x)
    finally:
        scope[name] = kernel
    assert executable.memory.nbytes == before
    assert torch.is_grad_enabled()


def test_threads_of_different_sizes_get_their_own_results(stack):
    compiled, executable = stack
    inputs = [torch.randn(1 + i % 3, 2 + i % 5, 24) for i in range(8)]
    expected = [expect(compiled, x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for turn in range(25):
            at = (index + turn) % len(inputs)
            if not same(executable(inputs[at]), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_layouts_and_arenas_are_bounded(stack):
    compiled, executable = stack
    for size in range(1, MOST_LAYOUTS + 6):
        x = torch.randn(1, size, 24)
        assert same(executable(x), expect(compiled, x))
        assert same(executable(x), expect(compiled, x))
    assert len(executable.memory.layouts) == MOST_LAYOUTS
    arenas = [executable.memory.take() for _ in range(MOST_ARENAS + 5)]
    for arena in arenas:
        executable.memory.give(arena)
    taken = [executable.memory.take() for _ in range(MOST_ARENAS + 1)]
    assert sum(arena in arenas for arena in taken) == MOST_ARENAS
    executable.memory.release()
    assert executable.memory.nbytes == 0


def test_inference_mode_and_gradients_leave_planned_memory_usable(stack):
    compiled, executable = stack
    executable.memory.release()
    x = torch.randn(2, 2, 24)
    with torch.inference_mode():
        executable(x), executable(x)
    found = executable(x.clone().requires_grad_())
    assert same(found, expect(compiled, x)) and not found[0].requires_grad


@pytest.mark.parametrize("lifetimes", [
    [(0, 3), (1, 2), (2, 3), (4, 5)], [(0, 0)], [(0, 9), (1, 1), (2, 2), (3, 3), (4, 9)]])
def test_what_lives_at_the_same_time_never_overlaps(lifetimes):
    generator = torch.Generator().manual_seed(len(lifetimes))
    for _ in range(20):
        sizes = [((int(torch.randint(0, 90, (1,), generator=generator)), 3), torch.float32)
                 for _ in lifetimes]
        layout = Layout.of(sizes, lifetimes)
        spans = [(o, o + 4 * s[0] * s[1]) for o, s, *_ in layout.places]
        for i, (a, b) in enumerate(spans):
            assert a % 64 == 0 and b <= layout.nbytes
            for j, (c, d) in enumerate(spans[:i]):
                apart = lifetimes[i][1] < lifetimes[j][0] or lifetimes[j][1] < lifetimes[i][0]
                assert apart or b <= c or d <= a, (spans, lifetimes)


def test_explain_gives_the_time_of_every_node(stack):
    compiled, _ = stack
    x = torch.randn(3, 5, 24)
    profile = compiled.explain((x,), repeats=3)
    ours = {timed.node: timed.kernel for timed in profile.nodes if timed.kernel != "torch"}
    assert ours == dict(compiled.executable.kernels)
    assert all(timed.microseconds > 0 for timed in profile.nodes) and profile.microseconds > 0
    assert sum(profile.by_operator.values()) == pytest.approx(
        sum(timed.microseconds for timed in profile.nodes))
    assert "aten.chunk" in str(profile) or "aten.split" in str(profile)
    assert profile.to_dict()["threads"] == torch.get_num_threads()
    assert compiled.explain() == compiled.executable.explain()
    with pytest.raises(InputError):
        compiled.explain((torch.randn(3, 25),))


def test_views_of_planned_memory_are_made_once(stack):
    compiled, executable = stack
    x = torch.randn(3, 4, 24)
    made = []
    prepare = executable.function.__globals__["prepare"]
    executable.function.__globals__["prepare"] = lambda *v: made.append(1) or prepare(*v)
    try:
        executable.memory.release()
        for _ in range(4):
            assert same(executable(x), expect(compiled, x))
    finally:
        executable.function.__globals__["prepare"] = prepare
    assert made == [1]
    assert any(isinstance(v, torch.Tensor) and v._is_view() for v in prepare(
        x, *(torch.empty(size, dtype=dtype) for _, size, _, dtype
             in executable.memory.layouts[(3, 4)].places)))


def test_a_view_that_turns_out_to_be_a_copy_is_never_kept(stack):
    compiled, executable = stack
    x = torch.randn(5, 3, 24)
    scope = executable.function.__globals__
    prepare = scope["prepare"]
    executable(x)
    scope["prepare"] = lambda *values: tuple(
        v.clone() if isinstance(v, torch.Tensor) else v for v in prepare(*values))
    try:
        for _ in range(3):
            assert same(executable(x), expect(compiled, x))
        assert (5, 3) in executable.memory.stubborn
    finally:
        scope["prepare"] = prepare
