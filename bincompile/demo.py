"""The demonstration: a binary transformer for digits, compiled, checked, timed, saved, loaded.

Then a transformer that listens, one frame at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bincompile.api import optimize
from bincompile.artifact import load
from bincompile.compiled import CompiledModel
from bincompile.config import Continual
from bincompile.report import table
from bincompile.suites import operations
from bincompile.timing import medians

WINDOW, STREAM = "model on the window", "stream"
ERROR = 1e-5  # of a stream's outputs, relative to the largest of the model's


def run() -> dict[str, Any]:
    """Compile the bundled models `digits` and `audio_stream` and measure what came of them.

    Returns:
        threads, report, candidates (accuracy, bytes, ms_all, ms_one of the float twin, the binary
        model and the compiled one), images, identical_predictions, artifact (bytes, same_bits),
        stream (see `listen`).
    """
    return {**_read(), "stream": listen()}


@torch.inference_mode()
def listen() -> dict[str, Any]:
    """Stream the model `audio_stream` over a synthesised sound and compare it with itself, whole.

    Returns:
        semantics, frames, same_decisions, error (relative), accuracy, receptive_field,
        state_bytes, candidates (ms and operations of a frame: the window computed anew, and the
        stream).
    """
    from bincompile.models import audio_stream

    model = audio_stream.build()
    sound, labels = audio_stream.synthesise(3.0, seed=10**6)
    heard = audio_stream.frames(sound)[None]
    compiled = optimize(model, (heard,), continual=Continual())
    stream = compiled.stream(1)
    found = torch.stack([stream.step(frame) for frame in heard.unbind(1)], 1)
    wanted, field, steps = model(heard), stream.receptive_field, compiled.steps
    assert field is not None and steps is not None
    window, frame = heard[:, -field:].contiguous(), heard[:, -1].contiguous()
    times = medians({WINDOW: lambda: model(window), STREAM: lambda: stream.step(frame)})
    counts = {WINDOW: operations.of_call(lambda: model(window)),
              STREAM: operations.of_step(steps)}
    decisions = found.argmax(-1)
    return {"semantics": steps.semantics, "frames": heard.shape[1],
            "same_decisions": int((decisions == wanted.argmax(-1)).sum()),
            "error": ((found - wanted).abs().max() / wanted.abs().max()).item(),
            "accuracy": (decisions[0] == labels).double().mean().item(),
            "receptive_field": field, "state_bytes": stream.nbytes,
            "candidates": {name: {"ms": times[name], "operations": counts[name]}
                           for name in times}}


def _read() -> dict[str, Any]:
    """What became of `digits`."""
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
        "", *_stream_lines(result["stream"]),
    ])


def _stream_lines(stream: dict[str, Any]) -> list[str]:
    """What `listen` found."""
    rows = [(name, f"{c['ms']:.3f}", f"{1e3 / c['ms']:,.0f}", f"{c['operations']:,}")
            for name, c in stream["candidates"].items()]
    header = ("a frame of 10 ms", "ms", "a second", "operations")
    count, field = stream["frames"], stream["receptive_field"]
    return [
        f"audio_stream: a causal transformer that listens, one step for each frame; "
        f"{stream['semantics']}", "", table(header, rows), "",
        f"same decisions as the whole model: {stream['same_decisions']} of {count}, outputs "
        f"within {stream['error']:.1e}; {stream['accuracy']:.1%} of them right",
        f"remembers {stream['state_bytes']:,} bytes; a decision depends on {field} frames"]


def succeeded(result: dict[str, Any]) -> bool:
    """Whether the compiled models, loaded and streamed, predict what the originals do."""
    stream = result["stream"]
    return (result["identical_predictions"] == result["images"]
            and result["artifact"]["same_bits"]
            and stream["same_decisions"] == stream["frames"] and stream["error"] <= ERROR)


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
