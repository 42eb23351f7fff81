"""Options as values: what `optimize` can be asked for, checked when they are made."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bincompile.errors import ConfigError

PRECISIONS = ("w1a1", "w1a8", "w1a32")
PLANNED_PRECISIONS = ("auto",)
BASES = (1, 2, 3, 4)
KINDS = ("float", "binary")  # of attention, and of its values
SEMANTICS = (None, "banded", "window")  # of a streaming form
POSITIONS = (None, "recycle")
OUTPUTS = ("last", "all")
VIOLATIONS = ("fallback", "raise", "warn")


@dataclasses.dataclass(frozen=True)
class Binary:
    """What to make binary in a float model. Lossy, so it is asked for and guarded.

    Args:
        precision: `"w1a1"` (1-bit weights and activations), `"w1a8"` (8-bit activations with a
            scale for each row) or `"w1a32"` (float activations).
        layers: glob over module paths; only layers that match are rewritten.
        keep: globs over module paths that stay float.
        linear: rewrite matrix products with a stored weight.
        embedding: rewrite look-up tables.
        attention: "float", or "binary": queries and keys are 1 bit with a scale for each row.
        values: with binary attention, "float", or "binary": values are 1 bit too, and what each
            is multiplied by (its share of attention times its scale) is rounded to 8 bits, which
            is the fastest form.
        bases: how many 1-bit weights, each with a scale for each row, stand for one float weight:
            1 to 4. More are nearer to it, and cost as many times the bytes and products.

    Example:
        >>> Binary("w1a32", layers="encoder.*", keep=("*.output.dense",)).covers("encoder.0.q")
        True
    """

    precision: str = "w1a32"
    layers: str = "*"
    keep: tuple[str, ...] = ()
    linear: bool = True
    embedding: bool = True
    attention: str = "float"
    values: str = "float"
    bases: int = 1

    def __post_init__(self) -> None:
        if type(self.bases) is not int or self.bases not in BASES:
            raise ConfigError(f"Binary(bases={self.bases!r})", "an int from 1 to 4",
                              "Binary(bases=)")
        for name in ("attention", "values"):
            if getattr(self, name) not in KINDS:
                raise ConfigError(f"Binary({name}={getattr(self, name)!r})",
                                  " or ".join(map(repr, KINDS)), f"Binary({name}=)")
        if self.values == "binary" and self.attention != "binary":
            raise ConfigError("Binary(values='binary') with float attention",
                              "values='binary' with attention='binary'", "Binary(attention=)")
        if self.precision in PLANNED_PRECISIONS:
            raise ConfigError(
                f"binary={self.precision!r} is not available yet",
                " or ".join(map(repr, PRECISIONS)),
                "use binary='w1a32' or 'w1a8' (1-bit weights) or 'w1a1' (weights and activations)",
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"binary={self.precision!r}", " or ".join(map(repr, PRECISIONS)),
                "the binary= argument of optimize, or Binary(precision=)",
            )

    def covers(self, path: str) -> bool:
        """Whether the layer at this module path is to be rewritten."""
        from fnmatch import fnmatchcase

        return fnmatchcase(path, self.layers) and not any(fnmatchcase(path, k) for k in self.keep)

    @classmethod
    def of(cls, value: Binary | str | None) -> Binary | None:
        """`binary=` of `optimize`: None, a precision string, or a `Binary`."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        raise ConfigError(f"binary={value!r}", "None, a string or bc.Binary(...)",
                          "the binary= argument of optimize")


@dataclasses.dataclass(frozen=True)
class Guard:
    """The limits that a lossy program has to keep on calibration and hold-out data.

    Args:
        cos_mean: least mean cosine similarity between the outputs of model and program.
        cos_min: least cosine similarity of any single sample.
        metric: optional `metric(model_like) -> float`, higher is better.
        max_drop: most that `metric` may fall.

    Example:
        >>> Guard(cos_mean=0.99).cos_min
        0.9
    """

    cos_mean: float = 0.98
    cos_min: float = 0.90
    metric: Callable[[Any], float] | None = None
    max_drop: float = 0.01

    def __post_init__(self) -> None:
        for name in ("cos_mean", "cos_min"):
            if not -1.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"Guard({name}={getattr(self, name)!r})", "a number from -1 to 1",
                                  f"Guard({name}=)")


@dataclasses.dataclass(frozen=True)
class Continual:
    """A streaming form: the model takes one token a step and remembers what later steps need.

    Args:
        window: tokens that each attention sees, the newest among them; None: what the model's own
            mask allows, or else all since the stream began.
        semantics: what the steps equal. "banded": the model on the whole sequence, each attention
            within its window. "window": the model on the last `window` tokens. None: "banded" for
            causal models, "window" for others.
        time_dim: the axis of time, of every input that has as many tokens as the first; or the
            axis of each input that is a stream, by name: the others do not change with time.
        positions: "recycle": positions of stored tables begin anew after the last, a change of
            the model; None: a stream ends with its table.
        outputs: "last": the newest token's; "all": those of all tokens in the window.
        partial_window: with window semantics, answer from the first token on, within what was
            seen so far.

    Source: Continual Inference (arXiv:2201.06268, arXiv:2204.03418).

    Example:
        >>> Continual.of(16).window
        16
    """

    window: int | None = None
    semantics: str | None = None
    time_dim: int | Mapping[str, int] = 1
    positions: str | None = None
    outputs: str = "last"
    partial_window: bool = False

    def __post_init__(self) -> None:
        whole = type(self.window) is int and self.window > 0
        if self.window is not None and not whole:
            raise ConfigError(f"Continual(window={self.window!r})", "a number of tokens, or None",
                              "Continual(window=)")
        for name, allowed in (("semantics", SEMANTICS), ("positions", POSITIONS),
                              ("outputs", OUTPUTS), ("partial_window", (False, True))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"Continual({name}={getattr(self, name)!r})",
                                  " or ".join(map(repr, allowed)), f"Continual({name}=)")
        axes = self.time_dim.values() if isinstance(self.time_dim, Mapping) else (self.time_dim,)
        if not axes or any(type(axis) is not int for axis in axes):
            raise ConfigError(f"Continual(time_dim={self.time_dim!r})",
                              "an axis, or a dict from names of inputs to axes",
                              "Continual(time_dim=)")
        if self.semantics == "window" and self.window is None:
            raise ConfigError("Continual(semantics='window') without a window",
                              "a number of tokens", "Continual(window=)")

    @classmethod
    def of(cls, value: Continual | int | None) -> Continual | None:
        """`continual=` of `optimize`: None, a window length, or a `Continual`."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return cls(window=value)
        raise ConfigError(f"continual={value!r}", "None, a window length, or bc.Continual(...)",
                          "the continual= argument of optimize")


class InstructionSet(NamedTuple):
    """What kernels can be compiled for.

    Args:
        name: as `Target.isa` has it.
        processor: LLVM's name of a processor.
        needs: features of the host, as /proc/cpuinfo spells them.
        triple: LLVM's name of machine and system.
        adds: what LLVM may use beyond that processor.
    """

    name: str
    processor: str
    needs: tuple[str, ...]
    triple: str = "x86_64-linux-gnu"
    adds: tuple[str, ...] = ()


INSTRUCTION_SETS = (  # of one machine, best first
    InstructionSet(
        "avx512-vpopcntdq", "icelake-server",
        ("avx512f", "avx512bw", "avx512vl", "avx512_vpopcntdq", "avx512_vnni", "avx512vbmi",
         "avx512_vbmi2", "avx512_bitalg", "avx512ifma", "gfni", "vaes", "vpclmulqdq")),
    InstructionSet("avx2", "x86-64-v3", ("avx2", "bmi2", "fma", "popcnt")),
    InstructionSet("x86-64", "x86-64-v2", ("popcnt", "ssse3", "sse4_1", "sse4_2")),
    InstructionSet("neon-dotprod", "generic", ("asimd", "asimddp"), "aarch64-linux-gnu",
                   ("+neon", "+dotprod")),
    InstructionSet("neon", "generic", ("asimd",), "aarch64-linux-gnu", ("+neon",)),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    Args:
        kind: `"cpu"` or `"cuda"`.
        isa: an instruction set of `INSTRUCTION_SETS`; empty where none fits (reference kernels).
        features: features of the host, as the system names them.

    Example:
        >>> Target.host().kind
        'cpu'
    """

    kind: str = "cpu"
    isa: str = ""
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "cuda"):
            raise ConfigError(f"target kind {self.kind!r}", "'cpu' or 'cuda'",
                              "the target= argument of optimize")
        if self.isa and self.instructions is None:
            raise ConfigError(f"instruction set {self.isa!r}",
                              ", ".join(found.name for found in INSTRUCTION_SETS),
                              "the target= argument of optimize")

    @property
    def instructions(self) -> InstructionSet | None:
        """What `isa` names; None where it names nothing."""
        return next((found for found in INSTRUCTION_SETS if found.name == self.isa), None)

    @property
    def processor(self) -> str:
        """LLVM's name of the processor of `isa`."""
        return self.instructions.processor if self.instructions else ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.isa}" if self.isa else self.kind

    @classmethod
    def host(cls) -> Target:
        """This machine; `BINCOMPILE_ISA` chooses a lesser instruction set for tests."""
        features, usable = host_instruction_sets()
        wanted = os.environ.get("BINCOMPILE_ISA")
        if wanted is not None and wanted != "none" and wanted not in usable:
            raise ConfigError(f"BINCOMPILE_ISA={wanted!r}", f"one of {[*usable, 'none']}",
                              "the environment variable BINCOMPILE_ISA")
        isa = "" if wanted == "none" else wanted or (usable[0] if usable else "")
        return cls("cpu", isa, features)

    @classmethod
    def of(cls, value: Target | str | None) -> Target:
        """`target=` of `optimize`: None for this host, `"cpu"`, `"cpu:avx2"`, or a `Target`."""
        if value is None or value == "cpu":
            return cls.host()
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise ConfigError(f"target={value!r}",
                              "None, 'cpu', 'cpu:<instruction set>', 'cuda' or bc.Target(...)",
                              "the target= argument of optimize")
        kind, _, isa = value.partition(":")
        features, usable = host_instruction_sets()
        if isa and (kind != "cpu" or isa not in usable):
            raise ConfigError(f"target={value!r}",
                              f"on this machine {', '.join(f'cpu:{name}' for name in usable)}",
                              "the target= argument of optimize")
        return cls(kind, isa, features if kind == "cpu" else ())


def host_instruction_sets() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The host's features, and the instruction sets that it can run, best first."""
    features = _host_features()
    usable = tuple(found.name for found in INSTRUCTION_SETS if set(found.needs) <= features)
    return tuple(sorted(features)), usable


def _host_features() -> set[str]:
    label = {"x86_64": "flags", "amd64": "flags", "aarch64": "Features"}.get(
        platform.machine().lower())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if label else []
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines
                 if line.split(":")[0].strip() == label), set())


def cache_dir() -> Path:
    """Where compiled kernels are kept: `BINCOMPILE_CACHE_DIR`, else the user's cache folder."""
    chosen = os.environ.get("BINCOMPILE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bincompile"
