"""A compiled model: called like the model that it came from, and open to inspection."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from bincompile.config import Target
from bincompile.errors import ConfigError, ContinualError, InputError, InputTypeError
from bincompile.profile import Profile, profile
from bincompile.program import Program
from bincompile.record import parsed
from bincompile.report import Report
from bincompile.runtime.executor import Executable, settle
from bincompile.runtime.holdings import holdings


class CompiledModel:
    """A lowered program with a kernel bound to every operator.

    It is called with the arguments of the model and returns its results; results carry no
    gradient. It reads the model's float weights where they are: to change a weight, change the
    model and compile it again. Threads may share it.

    Args:
        program: a lowered program; its earlier stages come with it.
        executable: its kernels, bound.
        target: the machine that it runs on.

    Example:
        >>> import torch, bincompile as bc
        >>> model = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
        >>> x = torch.randn(2, 5, 16)
        >>> compiled = bc.optimize(model, (x, x, x))
        >>> torch.allclose(compiled(x, x, x)[0], model(x, x, x)[0], atol=1e-5)
        True
    """

    def __init__(self, program: Program, executable: Executable, target: Target) -> None:
        self._program, self._executable = settle(program, executable)
        self._target = target

    @property
    def program(self) -> Program:
        """The lowered program; `program.at(level)` gives an earlier stage."""
        return self._program

    @property
    def executable(self) -> Executable:
        """The bound kernels."""
        return self._executable

    @property
    def target(self) -> Target:
        """The machine that the kernels are for."""
        return self._target

    @property
    def report(self) -> Report:
        """What was found, proven, rewritten and refused."""
        return Report.of(self._program, self._executable.kernels)

    @property
    def choices(self) -> dict[str, str]:
        """What was chosen, for `optimize(..., choices=)`: the kernel of each node, and layers that
        stayed float; behind it, where it was chosen for its time, the times."""
        chosen: dict[str, str] = dict(self._executable.kernels)
        for node, choice in self._program.choices.items():
            if node not in chosen or chosen[node] == parsed(choice)[0]:
                chosen[node] = choice
        return chosen

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, scales and tables that it holds, in whatever layout; each once."""
        return sum(size for kind, size in self.holdings.items() if kind != "planned")

    @property
    def holdings(self) -> dict[str, int]:
        """Bytes that it holds: "bits", "numbers", and "planned" for results inside the program.

        Example:
            >>> import torch, bincompile as bc
            >>> layer = torch.nn.Linear(512, 512).eval()
            >>> compiled = bc.optimize(layer, (torch.ones(3, 512),), binary="w1a1", guard=None)
            >>> compiled.holdings["bits"] * 32 == layer.weight.nbytes
            True
        """
        return holdings(self._program, self._executable)

    def explain(self, args: tuple[Any, ...] | None = None,
                kwargs: dict[str, Any] | None = None, *, repeats: int = 30,
                ) -> dict[str, list[tuple[str, str]]] | Profile:
        """Which kernel runs what, or where the time of a call goes.

        Args:
            args: positional inputs of a call to time; without args and kwargs nothing is run.
            kwargs: its named inputs.
            repeats: how often the call is made.

        Returns:
            Without inputs, for each node of ours every kernel and whether it was chosen or why not.
            With inputs a `Profile`: the median time of each node, ours and torch's, its kernel and
            its share; it prints as tables.
        """
        if args is None and kwargs is None:
            return self._executable.explain()
        flat = self._program.signature.flatten(tuple(args or ()), dict(kwargs or {}))
        return profile(self._program, self._executable, flat, repeats)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signature = self._program.signature
        return signature.unflatten(run(self._executable, signature.flatten(args, kwargs)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program to one file that `bincompile.load` reads; see `bincompile.artifact`."""
        from bincompile.artifact import save

        save(self._program, self._executable.kernels, path)

    def stream(self, batch_size: int = 1) -> Any:
        """One step at a time; only for a model compiled with `continual=`."""
        raise ContinualError("stream() of a model that was not compiled with continual=",
                             "a continual program", "continual= is not available yet; call the "
                             "compiled model on the whole window")

    def __repr__(self) -> str:
        return f"CompiledModel({self.report.summary()}; {self._target})"


def run(executable: Executable, flat: list[Any]) -> tuple[Any, ...]:
    """The flat results of a call; casts are the captured program's, not the caller's autocast."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return executable(*flat)
    return executable(*flat)


class DeferredModel(CompiledModel):
    """A model that is captured when it is called: once for each structure, dtype and rank.

    Its program and report are those of the last capture.

    Example:
        >>> import torch, bincompile as bc
        >>> compiled = bc.optimize(torch.nn.Embedding(7, 4).eval())
        >>> compiled(torch.tensor([[1, 2]])).shape, compiled(torch.tensor([[3] * 9] * 5)).shape
        (torch.Size([1, 2, 4]), torch.Size([5, 9, 4]))
        >>> len(compiled.variants)
        1
    """

    def __init__(self, make: Callable[[tuple[Any, ...], dict[str, Any]], CompiledModel]) -> None:
        self._make = make
        self.variants: list[CompiledModel] = []

    def __getattr__(self, name: str) -> Any:
        if name not in ("_program", "_executable", "_target"):
            raise AttributeError(name)
        if not self.variants:
            raise ConfigError("a model that was not captured yet",
                              "a model that was called at least once",
                              "call it once, or pass args= to optimize")
        return getattr(self.variants[0], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for variant in self.variants:
            try:
                flat = variant.program.signature.flatten(args, kwargs)
            except (InputError, InputTypeError):
                continue
            return variant.program.signature.unflatten(run(variant.executable, flat))
        self.variants.insert(0, self._make(args, kwargs))
        return self.variants[0](*args, **kwargs)

    def __repr__(self) -> str:
        return f"DeferredModel({len(self.variants)} captured)"
