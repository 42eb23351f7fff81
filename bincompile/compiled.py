"""A compiled model: called like the model that it came from, and open to inspection."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bincompile.config import Target
from bincompile.errors import ConfigError, ContinualError, InputError, InputTypeError
from bincompile.profile import Profile, profile
from bincompile.program import Program
from bincompile.record import parsed
from bincompile.report import Report
from bincompile.runtime.executor import Executable, settle
from bincompile.runtime.holdings import holdings
from bincompile.steps import StepProgram

if TYPE_CHECKING:
    from bincompile.step_function import StepFunction
    from bincompile.stream import Stream
    from bincompile.stream_form import StreamForm


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
        self._form: StreamForm | None = None

    def with_form(self, form: StreamForm) -> CompiledModel:
        """The same with a form for streams; what was given must not be used again."""
        made = copy.copy(self)
        made._form = form.settled()
        return made

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
        return Report.of(self._program, self._executable.kernels, self.steps)

    @property
    def steps(self) -> StepProgram | None:
        """The program of one step; None without `continual=`."""
        return None if self._form is None else self._form.steps

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
        pairs = [(self._program, self._executable)]
        return holdings(*pairs, *(() if self._form is None else self._form.programs))

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

        save(self._program, self._executable.kernels, path, self._form)

    def stream(self, batch_size: int = 1, **statics: Any) -> Stream:
        """Rows of tokens that are taken one step at a time; see `Stream`.

        Args:
            batch_size: how many rows.
            statics: by name, the model's inputs that do not change with time, for those rows.

        Raises:
            ContinualError: the model was compiled without `continual=`.
            InputError: a number of rows, or an input of a wrong size, or one that is missing.
            InputTypeError: an input of a wrong type, or of a name that is not known.

        Example:
            >>> import torch, bincompile as bc
            >>> model = torch.nn.GRU(4, 8, batch_first=True).eval()
            >>> x = torch.randn(3, 5, 4)
            >>> stream = bc.optimize(model, (x,), continual=bc.Continual()).stream(3)
            >>> y = [stream.step(x[:, t])[0] for t in range(5)]
            >>> torch.allclose(torch.stack(y, 1), model(x)[0], atol=1e-5)
            True
        """
        from bincompile.stream import Stream

        form = self._streaming("stream()")
        return Stream(form, form.rows(batch_size, statics))

    @property
    def step_function(self) -> StepFunction:
        """One step as a pure function of tensors, which torch.export takes; see `StepFunction`."""
        from bincompile.step_function import StepFunction

        return StepFunction(self._streaming("step_function"))

    def _streaming(self, what: str) -> StreamForm:
        if self._form is None:
            raise ContinualError(f"{what} of a model that was not compiled with continual=",
                                 "a model compiled with continual=",
                                 "optimize(model, args, continual=64), or bc.Continual(...)")
        return self._form

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
        if name not in ("_program", "_executable", "_target", "_form"):
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
