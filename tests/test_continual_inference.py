"""What continual-inference's public tests claim of its transformers, of ours made from torch's.

Each claim is of an ordinary model under `optimize(continual=)`, and goes on past the first window:
there its encoder of two layers is wrong (the memory of its residual wraps one entry early), ours
is not. What differs on purpose:
- sequences keep the layout of the model, (N, T, E), where theirs are (N, E, T);
- `forward_step(update_state=False)` is a step of a fork;
- their ONNX export fails with this torch in all its own tests; ours is torch.export of the step as
  a function, see test_stream.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import peer
from torch import nn

import bincompile as bc
from bincompile.nn import SingleOutputMultiheadAttention
from bincompile.suites import operations

T, E, H, N = 10, 4, 2, 2  # tokens of the window, features, heads, batch
AHEAD = 23  # steps after the first window: past every ring's end, twice


def encoder(layers: int, norm: bool) -> nn.TransformerEncoder:
    torch.manual_seed(layers)
    layer = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(E) if norm else None,
                                 enable_nested_tensor=False).eval()


@pytest.fixture(scope="module", params=[1, 2], ids=["one layer", "two layers"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.TransformerEncoder, bc.CompiledModel]:
    """An encoder of one layer with a norm behind it, or of two without, and its stream's model."""
    model = encoder(request.param, norm=request.param == 1)
    return model, bc.optimize(model, (torch.randn(N, T, E),), continual=T)


@torch.no_grad()
def on_windows(model: nn.Module, x: torch.Tensor, window: int = T) -> torch.Tensor:
    """(N, steps, E): the newest output of the model on every window of x (N, T, E)."""
    ends = range(window, x.shape[1] + 1)
    return torch.stack([model(x[:, end - window:end])[:, -1] for end in ends], 1)


def close(found: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


# the encoder


def test_forward_is_the_model_on_the_window(
        pair: tuple[nn.TransformerEncoder, bc.CompiledModel]) -> None:
    model, compiled = pair
    x = torch.randn(N, T, E)
    close(compiled(x), model(x).detach())


def test_a_step_is_the_newest_output_of_the_window(
        pair: tuple[nn.TransformerEncoder, bc.CompiledModel]) -> None:
    model, compiled = pair
    x, stream = torch.randn(N, T + AHEAD, E), compiled.stream(N)
    assert stream.forward_steps(x[:, :T - 1]) is None
    wanted = on_windows(model, x)
    for i in range(AHEAD + 1):
        close(stream.forward_step(x[:, T - 1 + i]), wanted[:, i])


def test_several_steps_are_one_after_the_other(
        pair: tuple[nn.TransformerEncoder, bc.CompiledModel]) -> None:
    model, compiled = pair
    x = torch.randn(N, T + AHEAD, E)
    first, second = compiled.stream(N), compiled.stream(N)
    together = first.forward_steps(x)
    close(together, on_windows(model, x))
    parts = [second.forward_steps(part) for part in x.split([T - 1, 1, 7, AHEAD - 7], 1)]
    assert parts[0] is None
    assert torch.equal(torch.cat(parts[1:], 1), together)


def test_a_step_that_is_not_kept_is_a_step_of_a_fork(
        pair: tuple[nn.TransformerEncoder, bc.CompiledModel]) -> None:
    _, compiled = pair
    x, stream = torch.randn(N, T, E), compiled.stream(N)
    stream.forward_steps(x[:, :-1])
    tried = stream.fork().forward_step(x[:, -1])
    assert torch.equal(stream.forward_steps(x[:, -1:])[:, 0], tried)


def test_a_clean_state_begins_anew(
        pair: tuple[nn.TransformerEncoder, bc.CompiledModel]) -> None:
    model, compiled = pair
    stream = compiled.stream(N)
    stream.forward_steps(torch.randn(N, T + 5, E))
    stream.clean_state()
    x = torch.randn(N, T, E)
    assert stream.forward_steps(x[:, :-1]) is None
    close(stream.forward_step(x[:, -1]), on_windows(model, x)[:, 0])


def test_one_layer_takes_a_share_of_the_operations_and_two_no_more_than_all(
        pair: tuple[nn.TransformerEncoder, bc.CompiledModel]) -> None:
    """Theirs: a step of one layer takes a T-th of the window, of two no more than the window."""
    model, compiled = pair
    assert compiled.steps is not None
    share = 1 / T if len(model.layers) == 1 else 1.0
    window = operations.of_call(lambda: model(torch.randn(1, T, E)))
    assert 0 < operations.of_step(compiled.steps) <= share * window


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of continual-inference, at its state_dict
def test_continual_inference_gives_the_same_for_as_long_as_it_is_right(
        pair: tuple[nn.TransformerEncoder, bc.CompiledModel]) -> None:
    """Of two layers the first T - 1 answers; then its residuals are of other tokens."""
    model, compiled = pair
    theirs = peer("continual").TransformerEncoder.build_from(model, sequence_len=T).eval()
    x, ours = torch.randn(N, T + AHEAD, E), compiled.stream(N)
    answers: list[torch.Tensor] = []
    with torch.no_grad():
        for token in x.unbind(1):
            y, other = ours.forward_step(token), theirs.forward_step(token)
            assert (y is None) == (not isinstance(other, torch.Tensor))
            answers += [] if y is None else [torch.stack([y, other.reshape(N, E)])]
    found, peers = torch.stack(answers, 2)
    one = len(model.layers) == 1
    right = AHEAD + 1 if one else T - 1
    close(found[:, :right], peers[:, :right])
    assert one or (found - peers)[:, right:].abs().amax() > 1e-2


# the encoder with positions before it and a linear behind it


class Whole(nn.Module):
    """Recycled positions, two layers, the newest token's output, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(2 * T - 1, E)
        self.encoder, self.head = encoder(2, norm=False), nn.Linear(E, E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.positions(torch.arange(x.shape[1]))
        return self.head(self.encoder(x)[:, -1])


@pytest.mark.slow  # the verdicts have a learned table too
def test_positions_are_recycled_before_an_encoder() -> None:
    """The window of every step, with the positions that its tokens were given."""
    torch.manual_seed(0)
    model = Whole().eval()
    stream = bc.optimize(model, (torch.randn(N, T, E),),
                         continual=bc.Continual(T, positions="recycle")).stream(N)
    x = torch.randn(N, T + AHEAD, E)
    assert stream.forward_steps(x[:, :T - 1]) is None
    table = model.positions.weight.detach()
    for end in range(T, T + AHEAD + 1):
        places = torch.arange(end - T, end) % len(table)
        with torch.no_grad():
            wanted = model.head(model.encoder(x[:, end - T:end] + table[places])[:, -1])
        close(stream.forward_step(x[:, end - 1]), wanted)


@pytest.mark.parametrize("learned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_recycled_positions(learned: bool) -> None:
    """A table, learned or of sines, over as many tokens as it has rows, and after a clean start."""
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            places = torch.arange(T)[:, None] / 1e4 ** (torch.arange(E) / E)
            self.table = nn.Embedding(T, E, _weight=None if learned else places.sin())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table(torch.arange(x.shape[1]))

    model = Positions().eval()
    x = torch.zeros(N, T, E)
    stream = bc.optimize(model, (x,), continual=bc.Continual(positions="recycle")).stream(N)
    wanted = model(x).detach()
    close(stream.forward_steps(x[:, :-1]), wanted[:, :-1])
    close(stream.forward_step(x[:, -1]), wanted[:, -1])
    close(stream.forward_steps(x), wanted)  # begins anew after the last
    stream.clean_state()
    close(stream.forward_steps(x), wanted)


# its attention layers


class Attention(nn.Module):
    """nn.MultiheadAttention without the weights; one query of the window, or all."""

    def __init__(self, index: int | None, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=batch_first)
        self.index, self.axis = index, int(batch_first)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                ) -> torch.Tensor:
        y = self.attention(query, key, value, need_weights=False)[0]
        return y if self.index is None else y.select(self.axis, self.index)


def three(batch_first: bool, count: int = T) -> list[torch.Tensor]:
    shape = (N, count, E) if batch_first else (count, N, E)
    return [torch.randn(shape) for _ in range(3)]


@pytest.mark.parametrize(("index", "batch_first"), [
    pytest.param(-1, True, marks=pytest.mark.slow), (2, False)])
def test_one_query_of_the_window_is_answered(index: int, batch_first: bool) -> None:
    """Query, key and value are three streams, the answered query any of the window's."""
    model, axis = Attention(index, batch_first).eval(), int(batch_first)
    stream = bc.optimize(model, tuple(three(batch_first)),
                         continual=bc.Continual(T, time_dim=axis)).stream(N)
    sequences = three(batch_first, T + AHEAD)
    first = [x.narrow(axis, 0, T - 1) for x in sequences]
    assert stream.forward_steps(*first) is None
    for end in range(T, T + AHEAD + 1):
        with torch.no_grad():
            wanted = model(*(x.narrow(axis, end - T, T) for x in sequences))
        close(stream.forward_step(*(x.select(axis, end - 1) for x in sequences)), wanted)


@pytest.mark.slow  # test_step_attention has the same
def test_all_queries_of_the_window_are_answered() -> None:
    """Their retroactive attention: every output of the window, at every step."""
    model = Attention(None, batch_first=True).eval()
    stream = bc.optimize(model, tuple(three(True)),
                         continual=bc.Continual(T, outputs="all")).stream(N)
    sequences = three(True, T + AHEAD)
    assert stream.forward_steps(*(x[:, :T - 1] for x in sequences)) is None
    for end in range(T, T + AHEAD + 1):
        with torch.no_grad():
            wanted = model(*(x[:, end - T:end] for x in sequences))
        close(stream.forward_step(*(x[:, end - 1] for x in sequences)), wanted)


@pytest.mark.slow  # the encoder of two layers is the same class
def test_attention_over_attention() -> None:
    """Their stack of a retroactive layer and one of a single output, made from two of torch's."""
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.MultiheadAttention(E, H, batch_first=True)
                                       for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x, x, x, need_weights=False)[0]
            return self.second(x, x, x, need_weights=False)[0]

    model = Stack().eval()
    x = torch.randn(N, T + AHEAD, E)
    stream = bc.optimize(model, (x[:, :T],), continual=T).stream(N)
    close(stream.forward_steps(x), on_windows(model, x))


def test_operations_of_attention() -> None:
    """Theirs: a step takes less than a tenth of the window, which a layer of one output halves."""
    model = Attention(None, batch_first=True).eval()
    x = three(True, T)
    steps = bc.optimize(model, tuple(x), continual=T).steps
    assert steps is not None
    step, window = operations.of_step(steps), operations.of_call(lambda: model(*x)) / N
    assert 0 < step <= window / T
    layer = SingleOutputMultiheadAttention.build_from(model.attention, sequence_len=T)
    layer.call_mode = "forward_step"
    muls = layer.flops()
    assert abs(step - 2 * muls) <= 0.2 * step  # a bias and a scale count there, and not here
