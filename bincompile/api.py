"""optimize and inspect: the pipeline behind one call."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from bincompile.compiled import CompiledModel, DeferredModel
from bincompile.config import VIOLATIONS, Binary, Continual, Guard, Target
from bincompile.errors import ConfigError, InputError, InputTypeError
from bincompile.passes import choose
from bincompile.passes.binarise import sites
from bincompile.passes.capture import Captured, capture
from bincompile.passes.check import ResultError, prove_whole
from bincompile.passes.examples import check_model
from bincompile.passes.exporting import one_at_a_time
from bincompile.passes.guard import guarded
from bincompile.passes.layouts import lay_out
from bincompile.passes.pipeline import EXACT, LOWER, run
from bincompile.program import Program
from bincompile.record import Refusal
from bincompile.report import Report
from bincompile.runtime.executor import Executable, bind
from bincompile.stream_form import StreamForm

log = logging.getLogger(__name__)


def optimize(model: nn.Module | ExportedProgram, args: tuple[Any, ...] | None = None,
             kwargs: Mapping[str, Any] | None = None, *,
             binary: Binary | str | None = None,
             continual: Continual | int | None = None,
             dynamic_shapes: Any = "auto",
             target: Target | str | None = None,
             calibration: Iterable[Any] | None = None,
             holdout: Iterable[Any] | None = None,
             guard: Guard | None = Guard(),  # noqa: B008  (a frozen value)
             on_violation: str = "fallback",
             choices: Mapping[str, str] | None = None) -> CompiledModel:
    """Compile a model; exact unless `binary=` asks for less.

    Attention and embeddings are recognised, proven in float64 and rewritten; layers that are
    binary already are packed to bits; operators get kernels for this machine. The model is not
    changed, and its float weights are shared, not copied.

    Args:
        model: an nn.Module in eval mode, an fx.GraphModule or an ExportedProgram.
        args: positional inputs of one call. Without inputs the model is captured at its first
            call, and again for a new structure, dtype or rank, as torch.compile does.
        kwargs: named inputs of that call.
        binary: lossy, on request: "w1a1" (1-bit weights and activations), "w1a32" (1-bit weights)
            or a `Binary`. It is measured on `calibration` and `holdout` and layers go back to
            float until `guard` holds.
        continual: also make a form that takes one token a step, for `compiled.stream()`: the
            number of tokens that attention sees, or a `Continual`.
        dynamic_shapes: "auto" (the first two axes of each input may vary, as far as the model
            allows), None (all sizes fixed), or what torch.export takes.
        target: None for this machine, or a `Target`.
        calibration: batches of inputs, each a tensor, a tuple of args, or a dict of kwargs.
        holdout: the same, unseen by the search; without it the last fifth of calibration.
        guard: limits of the divergence; None accepts an unknown one.
        on_violation: "fallback" (layers go back to float), "raise" or "warn".
        choices: `compiled.choices` of an earlier compilation, to make the same ones again with
            nothing measured; or node name -> kernel name. Without it what is meant to be faster is
            timed against what it replaces, and is left out where it is over 10 % slower; with {}
            nothing is.

    Returns:
        The compiled model; where no inputs were given, a `DeferredModel`.

    Raises:
        CaptureError: the model has no graph; the message has the user's line.
        ConfigError: an option that does not exist, or a model in training mode.
        AccuracyUnknownError: `binary=` without data and without `guard=None`.
        ContinualError: `continual=` of a model that can't run one step at a time, and why.
        ProofError: the compiled program disagrees with the model (nothing is returned then).

    Example:
        >>> import torch
        >>> model = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        >>> compiled = optimize(model, (torch.randn(2, 5, 16),))
        >>> compiled.report.lossy, [m.operator for m in compiled.report.matches]
        (False, ['attention'])
    """
    options = Options.of(
        binary, continual, target, dynamic_shapes=dynamic_shapes, calibration=calibration,
        holdout=holdout, guard=guard, on_violation=on_violation, choices=choices)
    if args is None and kwargs is None and not isinstance(model, ExportedProgram):
        check_model(model)
        return DeferredModel(lambda a, k: options.compile(model, a, k))
    return options.compile(model, *_call(args, kwargs))


def inspect(model: nn.Module | ExportedProgram, args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = "auto",
            continual: Continual | int | None = None) -> Report:
    """A dry run: what would be recognised and proven, and what refused. Nothing is compiled.

    Args:
        model: as `optimize` takes it.
        args: positional inputs of one call.
        kwargs: named inputs of that call.
        dynamic_shapes: as `optimize` takes it.
        continual: whether it would stream: what its steps would equal, not proven, or why not,
            as a refusal.

    Example:
        >>> import torch
        >>> model = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
        >>> x = torch.randn(2, 5, 16)
        >>> inspect(model, (x, x, x)).matches[0].attrs["heads"]
        4
    """
    with one_at_a_time:
        program = run(EXACT, capture(model, *_call(args, kwargs), dynamic_shapes).program)
        asked = Continual.of(continual)
        if asked is None:
            return Report.of(run(LOWER, program))
        from bincompile.continual import verdict

        steps, refusals = verdict(program, asked)
        program = dataclasses.replace(program, refusals=(*program.refusals, *refusals))
        return Report.of(run(LOWER, program), steps=steps)


def _call(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = () if args is None else args, {} if kwargs is None else kwargs
    if not isinstance(args, tuple | list):
        raise InputTypeError(f"args of type {type(args).__name__}", "a tuple of inputs",
                             "args=(x,): a comma makes one input a tuple")
    if not isinstance(kwargs, Mapping):
        raise InputTypeError(f"kwargs of type {type(kwargs).__name__}", "a dict of named inputs",
                             "kwargs={'name': value}")
    return tuple(args), dict(kwargs)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one `optimize`, checked, and the pipeline under them."""

    binary: Binary | None
    target: Target
    dynamic_shapes: Any = "auto"
    calibration: Any = None
    holdout: Any = None
    guard: Guard | None = Guard()  # noqa: RUF009  (a frozen value)
    on_violation: str = "fallback"
    choices: Mapping[str, str] | None = None
    continual: Continual | None = None

    @classmethod
    def of(cls, binary: Any = None, continual: Any = None, target: Any = None,
           **options: Any) -> Options:
        """The options as a user gives them.

        Raises:
            ConfigError: one that does not exist or does not go with the others.
        """
        found = cls(Binary.of(binary), Target.of(target), continual=Continual.of(continual),
                    **options)
        found._check()
        return found

    def _check(self) -> None:
        if self.on_violation not in VIOLATIONS:
            raise ConfigError(f"on_violation={self.on_violation!r}",
                              " or ".join(map(repr, VIOLATIONS)), "the on_violation= argument")
        if self.guard is not None and not isinstance(self.guard, Guard):
            raise ConfigError(f"guard={self.guard!r}", "bc.Guard(...) or None", "guard=")
        if self.target.kind != "cpu":
            raise ConfigError(f"target={str(self.target)!r} is not available yet", "'cpu' or None",
                              "the target= argument")
        if self.binary is None and (self.calibration is not None or self.holdout is not None):
            raise ConfigError("calibration data without a lossy rewrite", "data with binary=",
                              "pass binary=, or leave calibration= and holdout= out")

    def capture(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
        """The program of one call."""
        return capture(model, args, kwargs, self.dynamic_shapes)

    def rewrite(self, program: Program, example: Sequence[Any] | None = None) -> Program:
        """The program after all rewrites, exact and lossy; layers are timed on `example`."""
        program = run(EXACT, program)
        found = [] if self.binary is None else sites(program, self.binary)
        kept = choose.replayed(found, self.choices or {})
        if self.binary is None:
            return program
        if self.choices is None and example is not None:
            kept = choose.measured_sites(program, self.binary, found, example, self.target)
        result = guarded(program, self.binary, self.guard, self.calibration, self.holdout,
                         self.on_violation, kept)
        return dataclasses.replace(
            result, refusals=(*result.refusals, *choose.refusals(found, kept)), choices=kept)

    def finish(self, captured: Captured, program: Program, weights: Sequence[torch.Tensor] = (),
               example: Sequence[Any] | None = None) -> CompiledModel:
        """The program lowered, bound and proven.

        `weights` are inputs behind the example's; kernels are timed on `example`, or else on the
        inputs that the program was captured with.
        """
        program = run(LOWER, program)
        _dump(program)
        example = captured.example if example is None else example
        program, executable = self._bound(program, example, weights)
        if captured.example is not None:
            whole = prove_whole(captured.model, program, executable, captured.example, weights)
            program = dataclasses.replace(program, notes=(*program.notes, whole.note))
            relaid = lay_out(program, whole.expected, whole.found)
            if relaid is not program:
                program, executable = relaid, bind(relaid, self.target, executable.kernels)
        return CompiledModel(program, executable, self.target)

    def _bound(self, program: Program, example: Sequence[Any] | None,
               weights: Sequence[torch.Tensor]) -> tuple[Program, Executable]:
        """The program with a kernel for each operator: as chosen, or else by measurement."""
        executable = bind(program, self.target, choose.kernel_names(self.choices or {}))
        found = choose.explained(self.choices or {})
        if self.choices is None and example is not None:
            found = choose.measured_kernels(program, executable, [*example, *weights])
            if found:
                executable = bind(program, self.target, choose.kernel_names(found))
        return choose.noted(program, found), executable

    def streaming(self, program: Program) -> StreamForm | None:
        """The program's form for streams, proven; None where none was asked for."""
        if self.continual is None:
            return None
        from bincompile.continual import stream_form

        return stream_form(program, self.continual, self.target)

    def compile(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompiledModel:
        """The whole pipeline on one call of the model."""
        captured = self.capture(model, args, kwargs)
        example = _as_called(captured, args, kwargs)
        program = self.rewrite(captured.program, example)
        form = self.streaming(program)
        try:
            compiled = self.finish(captured, program, example=example)
        except ResultError as error:
            if program.lossy or not program.matches:
                raise
            log.warning("no rewrite is kept: %s", error.found)
            compiled = self.finish(captured, _without_rewrites(program, error), example=example)
        return compiled if form is None else compiled.with_form(form)


def _as_called(captured: Captured, args: tuple[Any, ...],
               kwargs: dict[str, Any]) -> Sequence[Any] | None:
    """The flat inputs of the user's call; the capture's own where there is none, as an exported
    program has its inputs with it, or where only other sizes are allowed: a batch of 1 is grown.
    """
    if captured.example is None:
        return None
    try:
        return captured.program.signature.flatten(args, kwargs)
    except (InputError, InputTypeError):
        return captured.example


def _without_rewrites(program: Program, error: ResultError) -> Program:
    """The program as it was captured; what was matched is refused, with the error for a reason.

    Each rewrite was proven in float64, so that this is a model whose own results are lost to
    rounding, such as scores of -1e9 that are used again.
    """
    refused = (Refusal(m.operator, m.path, f"proven, but {error.found}", m.node, m.source)
               for m in program.matches)
    return dataclasses.replace(program.at("normal"), refusals=(*program.refusals, *refused))


def _dump(program: Program) -> None:
    """Write the text of every stage to the folder that BINCOMPILE_DUMP names."""
    folder = os.environ.get("BINCOMPILE_DUMP")
    if folder:
        os.makedirs(folder, exist_ok=True)
        for index, stage in enumerate(program.stages):
            path = os.path.join(folder, f"{index}_{stage.level}.txt")
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"{stage}\n")
