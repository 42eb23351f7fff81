"""The README runs: every Python block in order, every console block, and what it says they print.

A `text` block after a Python block is what that block prints; in a `console` block, lines after
`$ command` are what the command prints. `...` stands for what differs between machines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bincompile import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SET_UP = re.compile(r"<!-- set-up command (\d) -->\s*\Z")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of the README."""

    language: str
    text: str
    line: int
    set_up: str = ""


def blocks() -> list[Block]:
    text = README.read_text()
    found = []
    for fence in FENCE.finditer(text):
        mark = SET_UP.search(text[:fence.start()])
        found.append(Block(fence[1], fence[2], text[:fence.start()].count("\n") + 1,
                           mark[1] if mark else ""))
    return found


def console_commands() -> Iterator[tuple[str, str]]:
    for block in blocks():
        if block.language in ("console", "bash") and not block.set_up:
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                command, _, shown = part.partition("\n")
                yield command, shown


def same(shown: str, printed: str) -> bool:
    return doctest.OutputChecker().check_output(shown, printed, FLAGS)


def test_python_blocks_run_and_print_what_the_readme_shows(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    monkeypatch.setitem(sys.modules, "readme", type(sys)("readme"))
    printed = ""
    ran = 0
    for block in blocks():
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(README), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            printed, ran = out.getvalue(), ran + 1
        elif block.language == "text":
            assert same(block.text, printed), f"README line {block.line}: printed\n{printed}"
    assert ran >= 3


@pytest.mark.parametrize(("command", "shown"), [*console_commands()], ids=lambda text: text[:40])
def test_console_blocks_run(command: str, shown: str, tmp_path: Path, capsys: Any,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(command)
    code = cli.main(arguments)
    printed = capsys.readouterr()
    assert (name, code) == ("bincompile", cli.DONE), printed.err
    assert same(shown, printed.out), printed.out


def test_every_block_is_run_or_is_a_set_up_command() -> None:
    languages = {b.language for b in blocks()}
    assert languages <= {"python", "text", "console", "bash"}, languages
    assert [b.set_up for b in blocks() if b.set_up] == ["1", "2"]


def test_no_line_of_the_readme_names_a_file_that_is_not_there() -> None:
    named = re.findall(r"`((?:bincompile|passes|runtime|models|tests|csrc)/[\w./]*)`",
                       README.read_text())
    assert named and not [name for name in named if not (ROOT / name).exists()]
