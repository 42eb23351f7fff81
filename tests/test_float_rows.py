"""Float linears of few rows inside row programs: their bits, their memory, and where they are."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from bincompile.body import Body
from bincompile.config import Target
from bincompile.op import Sample
from bincompile.ops import OPERATORS
from bincompile.ops.fused_rows import fused_rows, packed_layer
from bincompile.passes.capture import capture
from bincompile.passes.graph import put_in_order
from bincompile.passes.pipeline import EXACT, LOWER, run
from bincompile.program import Program
from bincompile.runtime import kernels_of
from bincompile.runtime.bound import Bound
from bincompile.runtime.executor import bind
from bincompile.runtime.kernels import sample_call

LINEAR = "t0 = linear(x0, x1, x2)\nreturn t0"
LAYER = """t0 = layer_norm(x0, x3, x3, 1e-05)
t1 = linear(t0, x1, x2)
t2 = relu(t1)
return t1, t2"""


def kernel(body: str, inputs: list[torch.Tensor]) -> Bound:
    """The compiled program; all inputs but the first are stored."""
    call = sample_call(fused_rows, Sample((inputs, body), stored=tuple(range(1, len(inputs)))),
                       Target.host(), ())
    (found,) = (k for k in kernels_of("fused_rows") if k.name == "tvm-rows")
    if reason := found.supports(call):
        pytest.skip(reason)
    bound = found.bind(call)
    assert isinstance(bound, Bound)
    return bound


@functools.cache
def weights(features: int, outputs: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(features + outputs)
    return (torch.randn(outputs, features, generator=generator) / features**0.5,
            torch.randn(outputs, generator=generator), torch.rand(features, generator=generator))


@pytest.mark.parametrize(("features", "outputs"), [(1, 1), (16, 64), (37, 70), (130, 17)])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(features: int,
                                                             outputs: int) -> None:
    layer = weights(features, outputs)
    x = torch.randn(35, features, generator=torch.Generator().manual_seed(0))
    run_rows = kernel(LAYER, [x, *layer])
    whole = run_rows(x)
    for found, exact in zip(whole, fused_rows.reference(
            [x.double(), *(w.double() for w in layer)], LAYER), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    for first in range(35):
        for count in (1, 2, 3, 7):
            part = run_rows(x[first:first + count])
            assert all(torch.equal(p, w[first:first + count]) for p, w in zip(part, whole,
                                                                              strict=True))
    assert [r.shape for r in run_rows(x[:0])] == [(0, outputs)] * 2


def test_nothing_beside_a_row_is_read() -> None:
    features, outputs = 37, 21
    weight, bias, _ = weights(features, outputs)
    wide = torch.full((outputs + 2, features), float("nan"))
    wide[1:-1] = weight
    x = torch.full((5, features), float("nan"))
    x[1:4] = torch.randn(3, features)
    run_rows = kernel(LINEAR, [x, wide[1:-1], bias])
    found, = run_rows(x[1:4])
    assert torch.equal(found, kernel(LINEAR, [x, weight, bias])(x[1:4].clone())[0])
    assert found.isfinite().all()


def test_threads_do_not_change_a_bit() -> None:
    features, outputs = 260, 1024  # enough for threads to share the outputs
    layer, before = weights(features, outputs), torch.get_num_threads()
    x = torch.randn(5, features)
    run_rows, found = kernel(LAYER, [x, *layer]), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([run_rows(x[:rows]) for rows in (1, 5)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert all(map(torch.equal, one, two))


def test_weights_are_read_where_they_are() -> None:
    weight, bias, _ = (w.clone() for w in weights(40, 24))
    x = torch.randn(2, 40)
    run_rows = kernel(LINEAR, [x, weight, bias])
    weight.mul_(2)
    torch.testing.assert_close(run_rows(x)[0], nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("body", ["float", "binary"])
def test_no_call_keeps_memory(body: str) -> None:
    """Scratch is given back: a return in the middle of a kernel would skip that."""
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    x, generator = torch.randn(16, 130), torch.Generator().manual_seed(0)
    packed = "t0 = binary_linear(x0, x1, x2, x3, 130, 'binary', None, None)\nt1 = relu(t0)\n" \
             "t2 = mul(t1, x0)\nreturn t2"
    run_rows = kernel(LAYER, [x, *weights(130, 17)]) if body == "float" else \
        kernel(packed, [x, *packed_layer(130, 130, generator)])
    results = run_rows.fresh(x)
    for _ in range(200):
        run_rows.into(x, *results)
    before = resident()
    for _ in range(3000):
        run_rows.into(x, *results)
    assert resident() - before < 3000 * 1024


class Block(nn.Module):
    """A layer around something that is no row operation."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.out, self.last = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = self.norm(x)
        query, key = (layer(inside).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                      for layer in (self.query, self.key))
        mixed = (torch.sin(query) * torch.cos(key)).transpose(1, 2).flatten(2)
        return self.last(x + self.out(mixed))


def lowered(model: nn.Module, x: torch.Tensor, level: str | None = None) -> Program:
    with torch.no_grad():
        program = run(EXACT, capture(model.eval(), (x,)).program)
        return run(LOWER, program.next(program.graph_module, level) if level else program)


def operations(program: Program) -> Iterator[list[str]]:
    """The operations of every row program."""
    for node in program.graph.nodes:
        if node.target is fused_rows.overload:
            yield [s.op for s in Body.parse(node.args[1]).statements]


def test_a_step_has_its_linears_in_row_programs() -> None:
    model, x = Block(), torch.randn(3, 1, 24)
    program = lowered(model, x, "steps")
    found = list(operations(program))
    assert found[0] == ["layer_norm", "linear", "linear"]
    assert found[-1] == ["linear", "add", "linear"]
    assert not [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    executable = bind(program, Target.host())
    with torch.no_grad():
        for rows in (1, 3, 20):
            x = torch.randn(rows, 1, 24)
            torch.testing.assert_close(executable(x)[0], model(x), rtol=1e-5, atol=1e-6)


def test_a_whole_sequence_keeps_the_products_of_torch() -> None:
    program = lowered(Block(), torch.randn(3, 5, 24))
    assert "linear" not in [op for ops in operations(program) for op in ops]


def test_axes_of_size_one_move_for_nothing() -> None:
    class Turned(nn.Module):
        """Time in front while the layer is computed, as in nn.MultiheadAttention."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(24, 24), nn.LayerNorm(24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside = self.layer(self.norm(x).transpose(0, 1))
            return x + torch.relu(inside).transpose(0, 1)

    model, x = Turned().eval(), torch.randn(3, 1, 24)
    with torch.no_grad():
        program = run(EXACT, capture(model, (x,), dynamic_shapes=(
            {0: torch.export.Dim.AUTO},)).program)
        program = run(LOWER, program.next(program.graph_module, "steps"))
        assert list(operations(program)) == [["layer_norm", "linear", "relu", "add"]]
        torch.testing.assert_close(program(x), model(x))


def test_what_acts_on_every_element_acts_before_views_take_rows_apart() -> None:
    class Convolved(nn.Module):
        """A convolution of one token, whose axis of time is behind its channels."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(24, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.gelu(self.layer(x).unsqueeze(-1)).clamp(max=0.7)
            return self.last(y.transpose(1, 2))

    model, x = Convolved().eval(), torch.randn(3, 24)
    program = lowered(model, x, "steps")
    assert [op for ops in operations(program) for op in ops] == [
        "linear", "gelu", "clamp", "linear"]
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))


def test_a_variance_of_one_number_is_not_taken_of_a_row() -> None:
    class Spread(nn.Module):
        """A statistic over an axis of size 1, which is 0 whatever stands there."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x).unsqueeze(-1)
            return torch.relu(y.var(-1, keepdim=True, correction=0) + y).squeeze(-1)

    model, x = Spread().eval(), torch.randn(3, 24)
    program = lowered(model, x, "steps")
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))


def test_equal_angles_are_computed_once() -> None:
    class Angles(nn.Module):
        """Two layers that hold the same numbers each; a third that holds others."""

        def __init__(self) -> None:
            super().__init__()
            for place, first in enumerate((0.0, 0.0, -0.0)):
                self.register_buffer(f"rates_{place}", torch.tensor([first, 2.0, 3.0]))

        def forward(self, x: torch.Tensor) -> Any:
            one, two, three = (torch.copysign(x.double(), rates * x.double()) for rates in (
                self.rates_0, self.rates_1, self.rates_2))
            return torch.sin(one) + 1, torch.sin(two), torch.sin(two), torch.sin(three) + 1

    model, x = Angles().eval(), torch.rand(3, 3) + 1
    program = lowered(model, x, "steps")
    targets = [n.target for n in program.graph.nodes]
    # results have memory of their own, so that two of them are computed apart
    assert targets.count(torch.ops.aten.sin.default) == 4
    assert targets.count(torch.ops.aten.copysign.Tensor) == 2
    with torch.no_grad():
        assert all(map(torch.equal, program(x), model(x)))


def test_what_writes_a_state_stays_in_its_place() -> None:
    write, graph = OPERATORS["stream_window"].overload, fx.Graph()
    token, ring, rows, clock = map(graph.placeholder, ("token", "ring", "rows", "clock"))
    first = graph.call_function(write, (token, ring, rows, clock, 3))
    second = graph.call_function(write, (token, ring, rows, clock, 3))
    read = graph.call_function(torch.ops.aten.neg.default, (ring,))
    graph.output((first, second, read))
    with graph.inserting_before(graph.output_node()):
        late = graph.call_function(torch.ops.aten.neg.default, (token,))
    first.args = (late, *first.args[1:])
    put_in_order(graph)
    assert [n for n in graph.nodes if n.op == "call_function"] == [late, first, second, read]


def test_equal_numbers_that_kernels_lay_out_otherwise_stay_apart() -> None:
    class Zeros(nn.Module):
        """A linear and a norm whose biases are equal."""

        def __init__(self) -> None:
            super().__init__()
            for name, value in (("bias", 0.0), ("shift", 0.0), ("gain", 1.0)):
                self.register_buffer(name, torch.full((24,), value))
            self.register_buffer("weight", torch.randn(24, 24))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.linear(x, self.weight, self.bias)
            return nn.functional.layer_norm(y, (24,), self.gain, self.shift)

    program = lowered(Zeros(), torch.randn(3, 24), "steps")
    stored = [n.target for n in program.graph.nodes if n.op == "get_attr"]
    assert len(stored) == 4 and list(operations(program)) == [["linear", "layer_norm"]]
