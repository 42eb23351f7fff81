"""Artifacts: a compiled model in one file, and back.

The file is a zip of two members, neither compressed: `program.json` (format, version, graph over
the closed list of `bincompile.opset`, calling convention, records, chosen kernels, and the SHA-256
of the other member) and `tensors.safetensors`. Nothing in it can name a Python object, so loading
never runs code from it. A model that streams has its step program under "stream", and is of
version 2; its tensors are in the same member, each once. Equal programs give equal files; a file is
written whole or not at all.

Law of the format: a reader refuses a version that it does not know; members and fields are never
given another meaning; a new meaning is a new version.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from bincompile.codec import decode, encode
from bincompile.compiled import CompiledModel
from bincompile.config import Target
from bincompile.errors import ArtifactError
from bincompile.ops import operator_of
from bincompile.program import Program
from bincompile.runtime.executor import bind
from bincompile.runtime.kernels import kernels_of
from bincompile.steps import StepProgram
from bincompile.stream_codec import decode_steps, encode_form, tensors_of, writes
from bincompile.stream_form import StreamForm

FORMAT, VERSION, STREAMING = "bincompile", 1, 2  # a model that streams is of a later version
MEMBERS = ("program.json", "tensors.safetensors")
LARGEST_DOCUMENT = 64 * 2**20
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError,
              RuntimeError, UnicodeError)


def save(program: Program, kernels: Mapping[str, str], path: str | os.PathLike[str],
         form: StreamForm | None = None) -> None:
    """Write a lowered program to `path`, replacing a file that is there only when it is whole.

    Args:
        program: the program.
        kernels: the kernel of each node.
        path: the file.
        form: its form for streams, if it has one.

    Raises:
        ArtifactError: the program calls something outside of the closed list, or the path can't
            be written.
    """
    parts = {"": program.tensors(), **({} if form is None else tensors_of(form))}
    stored, tensors = _distinct({_name(part, name): tensor for part, found in parts.items()
                                 for name, tensor in found.items()})
    names = {part: {name: stored[_name(part, name)] for name in found}
             for part, found in parts.items()}
    payload = save_tensors(tensors)
    document = {"format": FORMAT, "version": VERSION if form is None else STREAMING,
                "sha256": hashlib.sha256(payload).hexdigest(), "kernels": dict(kernels),
                **encode(program, names[""]),
                **({} if form is None else {"stream": encode_form(form, names)})}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    _write(Path(path), {MEMBERS[0]: text, MEMBERS[1]: payload})


def load(path: str | os.PathLike[str], *, target: Target | str | None = None) -> CompiledModel:
    """The compiled model in a file that `CompiledModel.save` wrote.

    No code of the file is run and apache-tvm is not needed: kernels come from the cache of
    compiled ones, or, where they are not there and can't be compiled, from the references.
    Results of a class of their own (as transformers returns) come back as a dict with the same
    names, also readable as attributes.

    Args:
        path: the file.
        target: the machine to run on; None for this one.

    Raises:
        ArtifactError: not such a file, damaged, or of a version that is not known.

    Example:
        >>> import tempfile, torch, bincompile as bc
        >>> x = torch.randn(2, 5, 16)
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        >>> compiled = bc.optimize(layer, (x,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     compiled.save(f"{folder}/layer.bcz")
        ...     again = bc.load(f"{folder}/layer.bcz")
        >>> torch.equal(again(x), compiled(x))
        True
    """
    members = _read(Path(path))
    try:
        document = json.loads(members[MEMBERS[0]])
        _check_head(document, members[MEMBERS[1]], path)
        program, steps, chosen = _decoded(document, load_tensors(members[MEMBERS[1]]))
    except (*_MALFORMED, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: {type(error).__name__}: {str(error)[:200]}",
                            "a file written by CompiledModel.save", "save the model again"
                            ) from error
    machine = Target.of(target)
    compiled = CompiledModel(program, bind(program, machine, chosen[0]), machine)
    return compiled if steps is None else compiled.with_form(StreamForm.bound(
        steps, program.signature, machine, chosen[1], chosen[2]))


def _decoded(document: Any, tensors: dict[str, torch.Tensor]) -> tuple[
        Program, StepProgram | None, tuple[dict[str, str], str, dict[str, str]]]:
    """The program, its steps, and the kernels of one, the fingerprint and kernels of the other."""
    program = decode(document, tensors)
    if writes(program):
        raise ArtifactError("a model that writes to its inputs", "one that does not",
                            "save the model again")
    kernels = _known(document["kernels"], program)
    if document["version"] == VERSION:
        return program, None, (kernels, "", {})
    found = document["stream"]
    steps = decode_steps(found, tensors, program.signature)
    return program, steps, (kernels, str(found["fingerprint"]),
                            _known(found["kernels"], steps.program))


def _known(kernels: Mapping[str, str], program: Program) -> dict[str, str]:
    """The saved choices of kernels that this version has; the others are chosen anew."""
    operators = {n.name: operator_of(n.target) for n in program.graph.nodes}
    return {node: kernel for node, kernel in kernels.items() if (found := operators.get(node))
            and kernel in {k.name for k in kernels_of(found.name)}}


def _name(part: str, name: str) -> str:
    """The name of a tensor among those of all programs; the same tensor is in the file once."""
    return f"{part}:{name}" if part else name


def _distinct(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Each tensor once, however many names it has: name in the graph -> name in the file."""
    names: dict[tuple[Any, ...], str] = {}
    stored, kept = {}, {}
    for name, tensor in sorted(tensors.items()):
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(),
               name if tensor.numel() == 0 else "")
        stored[name] = names.setdefault(key, name)
        if stored[name] == name:
            kept[name] = tensor.detach().cpu().contiguous().clone()
    return stored, kept


def _write(path: Path, members: dict[str, bytes]) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ArtifactError(f"{path} can't be written: {error}", "a folder that can be written to",
                            "the path given to save") from error
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, content in members.items():
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise ArtifactError(f"{path} can't be written: {error}", "space and permission to write it",
                            "the path given to save") from error


def _read(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if [e.filename for e in entries] != list(MEMBERS) or any(
                    e.compress_type != zipfile.ZIP_STORED for e in entries) \
                    or entries[0].file_size > LARGEST_DOCUMENT:
                raise ArtifactError(f"{path} with members {[e.filename for e in entries][:5]}",
                                    f"{MEMBERS}, not compressed", "a file written by save")
            return {e.filename: archive.read(e) for e in entries}
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ArtifactError(f"{path} can't be read: {error}",
                            "a file written by CompiledModel.save", "the path") from error


def _check_head(document: Any, payload: bytes, path: Any) -> None:
    if document.get("format") != FORMAT or document.get("version") not in (VERSION, STREAMING):
        raise ArtifactError(f"{path} of format {document.get('format')!r}, version "
                            f"{document.get('version')!r}",
                            f"{FORMAT!r}, version {VERSION} or {STREAMING}",
                            "use the version of bincompile that wrote it")
    if hashlib.sha256(payload).hexdigest() != document["sha256"]:
        raise ArtifactError(f"{path}: the tensors are not those that were saved",
                            "an undamaged file", "copy or save it again")
