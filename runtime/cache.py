"""Files that are made once and kept: checked when read, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from bincompile.config import cache_dir

MARK = b"bincompile-sha256:"  # stands after the content, before its digest
_FOOTER = len(MARK) + hashlib.sha256().digest_size


def digest(*parts: str) -> str:
    """A name made of what a file depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The file of this name in the cache; `make(path)` writes it if it is not there or damaged.

    Processes that ask for the same file at the same time make it once.

    Raises:
        OSError: the cache folder can't be written.
    """
    path = cache_dir() / name
    if is_intact(path):
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not is_intact(path):
            _replace(path, make)
    return path


def is_intact(path: Path) -> bool:
    """Whether the file can be read and is what was written."""
    return intact(path) is not None


def intact(path: Path) -> bytes | None:
    """What was written to the file; None if it can't be read or is something else."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body, footer = content[:-_FOOTER], content[-_FOOTER:]
    return body if footer == MARK + hashlib.sha256(body).digest() else None


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    """Write the file beside its place, then move it there; the caller holds the lock."""
    for stale in path.parent.glob(f".{path.stem}-*"):  # of a process that was killed here
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        fresh = Path(folder) / path.name
        make(fresh)
        body = fresh.read_bytes()
        fresh.write_bytes(body + MARK + hashlib.sha256(body).digest())
        os.replace(fresh, path)
