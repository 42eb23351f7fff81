"""One step as a function of tensors to tensors, without anything that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from bincompile.errors import InputError
from bincompile.program import attribute
from bincompile.stream_form import StreamForm
from bincompile.stream_rows import room


class StepFunction(nn.Module):
    """`step(params, state, *tokens) -> (y, valid, state)`: pure, of all rows, by the references.

    It changes none of its arguments and keeps nothing, so that torch.export takes it and a caller
    may batch, scan or replay it. Rows that are not valid hold NaN. A state that grows is as long
    as `state(slots=)` made it: a row can take so many steps, and its next answer is not valid, or
    an error where the operators are run as they are.

    Args:
        form: the streaming form.

    Example:
        >>> import torch, bincompile as bc
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
        >>> x = torch.randn(2, 6, 4)
        >>> compiled = bc.optimize(model, (x,), continual=8)
        >>> step = compiled.step_function
        >>> y, valid, state = step(step.params, step.state(2), x[:, 0])
        >>> torch.allclose(y, model(x)[:, 0], atol=1e-6), valid.tolist(), state["clock"].tolist()
        (True, [True, True], [1, 1])
        >>> program = torch.export.export(step, (step.params, state, x[:, 1]), strict=False)
        >>> torch.equal(program.module()(step.params, state, x[:, 1])[0],
        ...             step(step.params, state, x[:, 1])[0])
        True
    """

    def __init__(self, form: StreamForm) -> None:
        super().__init__()
        self._form = form

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """The stored tensors that a step reads, by name."""
        return self._form.steps.program.tensors()

    def state(self, batch_size: int = 1, slots: int | None = None,
              **statics: Any) -> dict[str, torch.Tensor]:
        """What rows hold before their first step: "clock" (rows,) and the states by name.

        Args:
            batch_size: how many rows.
            slots: steps that there has to be room for, where states grow.
            statics: as `CompiledModel.stream` takes them.
        """
        rows = self._form.rows(batch_size, statics)
        if slots is not None:
            rows.grow(slots - 1)
        names = [state.name for state in self._form.steps.states]
        return {"clock": rows.clock, **dict(zip(names, rows.states, strict=True))}

    def forward(self, params: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor],
                *tokens: torch.Tensor) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
        """One step of all rows.

        Args:
            params: the stored tensors, by name.
            state: "clock" and the states, by name.
            tokens: as `Stream.step` takes them.

        Returns:
            What the model returns without the axis of time, a bool for each row, and the state
            after the step.
        """
        steps, answers = self._form.steps, self._form.answers
        if len(tokens) != len(steps.inputs):
            raise InputError(f"{len(tokens)} tokens", f"{len(steps.inputs)}", "the call")
        clock = state["clock"]
        states = [state[known.name].clone() for known in steps.states]
        with_time = [token.unsqueeze(known.time_axis)
                     for token, known in zip(tokens, steps.inputs, strict=True)]
        rows = torch.arange(clock.shape[0], device=clock.device)
        outputs = _Reader(steps.program.graph_module, params).run(*with_time, rows, clock, *states)
        valid = steps.valid_at(clock)
        for limit in (steps.limit, room(steps.states, states)):
            valid = valid if limit is None else valid & (clock < limit)
        parts = answers.blanked(answers.parts(outputs), valid)
        named = dict(zip((known.name for known in steps.states), states, strict=True))
        return answers.result(parts), valid, {"clock": clock + 1, **named}


class _Reader(fx.Interpreter):
    """Runs a graph with other stored tensors than its own."""

    def __init__(self, module: fx.GraphModule, params: Mapping[str, torch.Tensor]) -> None:
        super().__init__(module)
        self._params = params

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = self._params.get(target)
        return attribute(self.module, target) if found is None else found
