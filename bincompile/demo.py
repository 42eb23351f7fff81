"""The demonstration: a binary transformer for digits, compiled, checked, timed, saved, loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bincompile.api import optimize
from bincompile.artifact import load
from bincompile.compiled import CompiledModel
from bincompile.report import table
from bincompile.timing import medians


def run() -> dict[str, Any]:
    """Compile the bundled model `digits` and measure what came of it.

    Returns:
        threads, report, candidates (accuracy, bytes, ms_all, ms_one of the float twin, the binary
        model and the compiled one), images, identical_predictions, artifact (bytes, same_bits).
    """
    from bincompile.models import digits

    twin, model = digits.build_float(), digits.build()
    args, kwargs = digits.example_inputs()
    compiled = optimize(model, args, kwargs)
    candidates: dict[str, Any] = {
        "float model": twin, "binary model": model, "compiled": compiled}
    tokens = digits.test_split()[0]
    with torch.inference_mode():
        times = medians({name: _call(c, tokens) for name, c in candidates.items()})
        single = medians({name: _call(c, tokens[:1]) for name, c in candidates.items()})
        before, after = model(tokens).argmax(-1), compiled(tokens).argmax(-1)
    return {
        "model": "digits",
        "threads": torch.get_num_threads(),
        "report": compiled.report,
        "candidates": {
            name: {**digits.evaluate(c), "bytes": _bytes_of(c), "ms_all": times[name],
                   "ms_one": single[name]}
            for name, c in candidates.items()
        },
        "images": len(tokens),
        "identical_predictions": int((before == after).sum()),
        "artifact": _round_trip(compiled, tokens),
    }


def text(result: dict[str, Any]) -> str:
    """The result as a reader wants to see it."""
    count, same, saved = result["images"], result["identical_predictions"], result["artifact"]
    rows = [(name, f"{c['accuracy']:.4f}", c["bytes"], f"{c['ms_all']:.2f}", f"{c['ms_one']:.3f}")
            for name, c in result["candidates"].items()]
    header = ("", "accuracy", "bytes", f"ms, {count} images", "ms, 1 image")
    return "\n".join([
        f"digits: a binary transformer, compiled by bincompile, {result['threads']} thread(s)", "",
        str(result["report"]), "",
        table(header, rows), "",
        f"identical predictions: {same} of {count}",
        f"saved and loaded: {saved['bytes']:,} bytes, "
        f"{'the same bits' if saved['same_bits'] else 'DIFFERENT results'}",
    ])


def succeeded(result: dict[str, Any]) -> bool:
    """Whether the compiled model and the loaded one predict what the original does."""
    return (result["identical_predictions"] == result["images"]
            and result["artifact"]["same_bits"])


def _call(candidate: Callable[..., Any], tokens: torch.Tensor) -> Callable[[], Any]:
    return lambda: candidate(tokens)


def _bytes_of(candidate: CompiledModel | torch.nn.Module) -> int:
    """Bytes of the tensors that a model or a compiled program stores."""
    if isinstance(candidate, CompiledModel):
        return candidate.nbytes
    return sum(t.nbytes for t in candidate.state_dict().values())


def _round_trip(compiled: CompiledModel, tokens: torch.Tensor) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "digits.bcz"
        compiled.save(path)
        same = torch.equal(load(path)(tokens), compiled(tokens))
        return {"bytes": path.stat().st_size, "same_bits": same}
