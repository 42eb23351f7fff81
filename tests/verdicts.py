"""The verdicts: which models stream, what the steps then equal, and why others are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from stream_blocks import (
    Attention,
    Block,
    Buckets,
    CausalConv,
    Chomp,
    Classed,
    Conformer,
    Decoder,
    E,
    Encoder,
    Fn,
    Learned,
    Recurrent,
    Selective,
    Sliding,
    Swin,
    TokenShift,
    WaveNet,
    rotary,
    rotary_complex,
    slopes,
)
from torch import nn
from torch.nn import functional as F

from bincompile.config import Continual

W = 6
Inputs = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One model and what is said of it.

    Args:
        name: of the case.
        build: makes the model.
        inputs: makes one call's inputs.
        continual: what is asked for.
        streams: what its steps equal, as `StepProgram.semantics` says it; None: it is refused.
        refused: words of the reason, in order of appearance, or of what to change.
        at: part of the source line, or of the module path, that the refusal names.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    continual: Continual
    streams: str | None = None
    refused: str = ""
    at: str = ""

    def __str__(self) -> str:
        return self.name


def tokens(length: int = 9, width: int = E) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, length, width),)


def ids(length: int = 9, words: int = 50) -> Callable[[], Inputs]:
    return lambda: (torch.randint(0, words, (2, length)),)


def channels(length: int = 16) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, E, length),)


def of(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


BANDED, OPEN, LAST = Continual(window=W), Continual(), Continual(window=W, time_dim=2)
ALONG_2 = Continual(time_dim=2)
WINDOW = Continual(window=W, semantics="window")
CUT, WHOLE, OWN = f"banded({W}), truncates", "banded(unbounded)", "banded(7)"

STREAMS = (
    Verdict("causal encoder", lambda: Encoder(), tokens(), BANDED, CUT),
    Verdict("causal encoder pre-norm", lambda: Encoder(2, norm_first=True), tokens(), BANDED, CUT),
    Verdict("causal encoder unbounded", lambda: Encoder(2), tokens(), OPEN, WHOLE),
    Verdict("band by hand", lambda: Block(Sliding()), tokens(), OPEN, "banded(5)"),
    Verdict("band by hand, two widths", lambda: of(Block(Sliding(3)), Block(Sliding(7))),
            tokens(), OPEN, OWN),
    Verdict("alibi", lambda: Block(Attention(slopes)), tokens(), BANDED, CUT),
    Verdict("relative buckets", lambda: Block(Attention(Buckets())), tokens(), OPEN, WHOLE),
    Verdict("rotary", lambda: of(Block(Attention(turn=rotary)), Block(Attention(turn=rotary))),
            tokens(), BANDED, CUT),
    Verdict("rotary by complex numbers", lambda: Block(Attention(turn=rotary_complex)), tokens(),
            BANDED, CUT),
    Verdict("groups of queries", lambda: Block(Attention(groups=2, sdpa=True)), tokens(), BANDED,
            CUT),
    Verdict("learned positions", Learned, ids(), BANDED, CUT),
    Verdict("learned positions, recycled", Learned, ids(),
            Continual(window=W, positions="recycle"), CUT),
    Verdict("bidirectional, one layer", lambda: Encoder(1, False), tokens(), BANDED,
            f"window({W})"),
    Verdict("bidirectional, two layers", lambda: Encoder(2, False), tokens(), BANDED,
            f"window({W})"),
    Verdict("bidirectional, two layers pre-norm", lambda: Encoder(2, False, norm_first=True),
            tokens(), BANDED, f"window({W})"),
    Verdict("causal, one layer, re-run", lambda: Encoder(1), tokens(), WINDOW, f"window({W})"),
    Verdict("memory that does not change", Decoder,
            lambda: (torch.randn(2, 9, E), torch.randn(2, 5, E)),
            Continual(window=W, time_dim={"x": 1}), CUT),
    Verdict("class token", Classed, tokens(W), BANDED, f"window({W})"),
    Verdict("causal convolution and encoder", lambda: of(CausalConv(), Encoder()), tokens(),
            BANDED, CUT),
    Verdict("symmetric convolution", lambda: nn.Conv1d(E, E, 5, padding=2), channels(), ALONG_2,
            WHOLE),
    Verdict("strided convolutions and encoder", lambda: Fn(
        lambda m, x: m.encoder(m.second(F.gelu(m.first(x))).transpose(1, 2)),
        first=nn.Conv1d(E, E, 3, stride=2), second=nn.Conv1d(E, E, 4, stride=2),
        encoder=Encoder()), channels(32), LAST, CUT),
    Verdict("wavenet", WaveNet, channels(), ALONG_2, WHOLE),
    Verdict("temporal convolution network", lambda: of(Chomp(), Chomp(dilation=4)), channels(),
            ALONG_2, WHOLE),
    Verdict("conformer", Conformer, tokens(), BANDED, CUT),
    Verdict("GRU and attention", lambda: Fn(lambda m, x: m.encoder(m.rnn(x)[0]),
                                            rnn=nn.GRU(E, E, batch_first=True),
                                            encoder=Encoder()), tokens(), BANDED, CUT),
    Verdict("LSTM of two layers", lambda: Recurrent(nn.LSTM, num_layers=2), tokens(), OPEN, WHOLE),
    Verdict("token shift", lambda: of(Block(TokenShift()), Block(TokenShift())), tokens(), OPEN,
            WHOLE),
    Verdict("selective scan", lambda: Block(Selective()), tokens(), OPEN, WHOLE),
    Verdict("batch norm", lambda: of(nn.BatchNorm1d(E), nn.Conv1d(E, E, 1)), channels(), ALONG_2,
            WHOLE),
    Verdict("mean of all tokens", lambda: Fn(lambda m, x: m.head(m.encoder(x).mean(1)),
                                             encoder=Encoder(), head=nn.Linear(E, 3)),
            tokens(), OPEN, WHOLE),
    Verdict("the last token", lambda: Fn(lambda m, x: m.head(m.encoder(x)[:, -1]),
                                         encoder=Encoder(), head=nn.Linear(E, 3)),
            tokens(), BANDED, CUT),
    Verdict("the newest over the maximum so far", lambda: Fn(
        lambda m, x: x / x.abs().amax(1, keepdim=True)), tokens(), OPEN, WHOLE),
)

REFUSED = (
    Verdict("bidirectional, three layers", lambda: Encoder(3, False), tokens(), BANDED,
            refused="", at="layers.layers"),
    Verdict("bidirectional, banded", lambda: Encoder(1, False), tokens(),
            Continual(window=W, semantics="banded"), refused="window", at="layers.layers.0"),
    Verdict("causal, two layers, re-run", lambda: Encoder(3), tokens(), WINDOW,
            refused="window", at="layers"),
    Verdict("bidirectional LSTM", lambda: Recurrent(nn.LSTM, bidirectional=True), tokens(), OPEN,
            refused="bidirectional", at="rnn"),
    Verdict("group norm over time", lambda: nn.GroupNorm(4, E), channels(), ALONG_2,
            refused="time"),
    Verdict("instance norm over time", lambda: nn.InstanceNorm1d(E), channels(), ALONG_2,
            refused="time"),
    Verdict("Fourier transform of time", lambda: Fn(lambda m, x: torch.fft.rfft(x, dim=1).abs()),
            tokens(), OPEN, refused="time", at="rfft"),
    Verdict("flip", lambda: Fn(lambda m, x: x + x.flip(1)), tokens(), OPEN, refused="time",
            at="flip"),
    Verdict("softmax of time", lambda: Fn(lambda m, x: x.softmax(1)), tokens(), OPEN,
            refused="time", at="softmax"),
    Verdict("windows that do not overlap", Swin, tokens(8), BANDED, refused="", at=""),
    Verdict("roll", lambda: Fn(lambda m, x: x - x.roll(1, 1)), tokens(), OPEN, refused="time",
            at="roll"),
    Verdict("reflected padding", lambda: nn.Conv1d(E, E, 3, padding=1, padding_mode="reflect"),
            channels(), ALONG_2, refused="time"),
    Verdict("sorted tokens", lambda: Fn(lambda m, x: x.sort(1).values), tokens(), OPEN,
            refused="time", at="sort"),
    Verdict("tokens mixed by a matrix", lambda: Fn(
        lambda m, x: m.mix(x.transpose(1, 2)).transpose(1, 2), mix=nn.Linear(9, 9)), tokens(9),
        OPEN, refused="time", at="mix"),
)

VERDICTS = (*STREAMS, *REFUSED)
# Those of the default run: one of each class, and of each kind of refusal.
FEW = ("causal encoder", "bidirectional, two layers", "symmetric convolution",
       "LSTM of two layers", "batch norm", "the newest over the maximum so far",
       "bidirectional, banded", "bidirectional LSTM", "group norm over time",
       "Fourier transform of time", "softmax of time", "flip")
