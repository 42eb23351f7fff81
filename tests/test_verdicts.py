"""Every model of the verdicts streams as it says, proven, or is refused with its reason."""

from __future__ import annotations

import re

import pytest
import torch
from verdicts import FEW, VERDICTS, Verdict

from bincompile.errors import ContinualError
from bincompile.passes.capture import capture
from bincompile.passes.pipeline import EXACT, run
from bincompile.passes.streaming.build import to_steps
from bincompile.passes.streaming.prove import EXACT as LIMIT
from bincompile.passes.streaming.prove import prove

CASES = [pytest.param(v, id=v.name, marks=[] if v.name in FEW else [pytest.mark.slow])
         for v in VERDICTS]


@pytest.mark.parametrize("verdict", CASES)
def test_verdict(verdict: Verdict) -> None:
    torch.manual_seed(0)
    program = run(EXACT, capture(verdict.build().eval(), verdict.inputs(), {}).program)
    if verdict.streams is None:
        with pytest.raises(ContinualError) as caught:
            to_steps(program, verdict.continual)
        text = str(caught.value)
        assert re.search(verdict.refused, text, re.IGNORECASE), text
        assert verdict.at in text
        return
    steps = to_steps(program, verdict.continual)
    assert steps.semantics == verdict.streams
    evidence, = prove(steps, program, verdict.continual)
    assert evidence.max_error <= LIMIT
    assert evidence.trials > 2 * sum(window or 0 for _, window in steps.windows)
