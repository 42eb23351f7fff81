"""Rules of the tree: who may import whom, how long a file may be, what has to be documented."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import bincompile

ROOT = Path(__file__).parent.parent
FOLDERS = ("bincompile", "passes", "runtime", "models")
NOUNS, RUNTIME, PASSES, FACE = range(4)  # a layer imports itself and what stands to its left
NOUN_MODULES = ("body", "conditions", "errors", "config", "op", "quick", "record", "signature",
                "stages", "steps", "structure", "program", "ops", "views")
TVM_MODULES = ("bincompile.runtime.tvm", "bincompile.runtime.schedules")
FILE_LINES, FUNCTION_LINES = 400, 40


@functools.cache
def sources() -> tuple[Path, ...]:
    """Every Python file that is installed."""
    return tuple(sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py")))


def module_of(file: Path) -> str:
    """The name that a file is imported under."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    names = parts[1:] if parts[0] == "bincompile" else parts
    return ".".join(["bincompile", *(n for n in names if n != "__init__")])


MODULES = [m for m in map(module_of, sources()) if not m.endswith("__main__")]


def layer(module: str) -> int:
    """The layer of a module of ours; the package itself imports nothing."""
    if module == "bincompile":
        return NOUNS
    if module == "bincompile.nn" or module.startswith("bincompile.nn."):
        return FACE
    part = module.split(".")[1]
    if part in NOUN_MODULES:
        return NOUNS
    return {"runtime": RUNTIME, "passes": PASSES}.get(part, FACE)


@functools.cache
def tree(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text())


@functools.cache
def public_names() -> dict[str, str]:
    """The public names and their modules, as `bincompile/__init__.py` tells type checkers."""
    body = tree(ROOT / "bincompile" / "__init__.py").body
    block = next(n for n in body
                 if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {alias.name: node.module or "" for node in block.body
            if isinstance(node, ast.ImportFrom) for alias in node.names}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    has_text = ast.get_docstring(function) is not None
    return lines - ((first.end_lineno or 0) - first.lineno + 1 if has_text else 0)


def imports(root: ast.AST) -> Iterator[str]:
    """Every module that the code under `root` imports, type-checking blocks left out."""
    for node in ast.iter_child_nodes(root):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (_origin(node.module or "", alias.name) for alias in node.names)
        yield from imports(node)


def _origin(module: str, name: str) -> str:
    """The module that `from module import name` reads: `module.name` where that is a module."""
    if module == "bincompile" and name in public_names():
        module = public_names()[name]
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def at_import(file: Path) -> Iterator[str]:
    """The modules that are imported when the file is, not when a function of it is called."""
    for node in tree(file).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from imports(ast.Module([node], []))


@pytest.mark.parametrize("file", sources(), ids=module_of)
def test_a_layer_imports_only_leftwards(file: Path) -> None:
    own = module_of(file)
    wrong = [m for m in imports(tree(file))
             if m.split(".")[0] == "bincompile" and layer(m) > layer(own)]
    assert not wrong, f"{own} imports {wrong}"


@pytest.mark.parametrize("file", sources(), ids=module_of)
def test_tvm_is_imported_only_by_its_own_modules_and_late(file: Path) -> None:
    own = module_of(file)
    found = {m.split(".")[0] for m in imports(tree(file))}
    assert "tvm" not in found or own.startswith(TVM_MODULES), own
    assert "tvm" not in {m.split(".")[0] for m in at_import(file)}, own


@pytest.mark.parametrize("file", sources(), ids=module_of)
def test_files_and_functions_stay_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= FILE_LINES
    lengths = {n.name: code_lines(n) for n in ast.walk(tree(file))
               if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    long = {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES}
    assert not long, f"{module_of(file)}: functions over {FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("file", sources(), ids=module_of)
def test_public_names_are_documented(file: Path) -> None:
    assert ast.get_docstring(tree(file)), f"{module_of(file)} says nothing of itself"
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in tree(file).body if isinstance(n, named) and not n.name.startswith("_")]
    public += [n for c in public if isinstance(c, ast.ClassDef) for n in c.body
               if isinstance(n, named) and not n.name.startswith("_") and n.name != "forward"]
    silent = [n.name for n in public if not ast.get_docstring(n)]
    assert not silent, f"{module_of(file)}: no docstring on {silent}"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str) -> None:
    found = importlib.import_module(module)
    result = doctest.testmod(found, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(bincompile.__all__) - {"__version__", "nn", "optim"}))
def test_what_a_user_calls_has_an_example(name: str) -> None:
    value = getattr(bincompile, name)
    assert inspect.getdoc(value)
    if not (isinstance(value, type) and issubclass(value, Exception)):
        assert ">>>" in (value.__doc__ or ""), f"bincompile.{name} shows no example"


def test_the_names_for_checkers_are_the_names_at_run_time() -> None:
    assert set(public_names()) | {"__version__"} == set(bincompile.__all__)
    for name, module in public_names().items():
        if name not in ("nn", "optim"):
            assert getattr(bincompile, name) is getattr(importlib.import_module(module), name)


def test_the_layers_see_every_file() -> None:
    assert {"bincompile.program", "bincompile.passes.capture", "bincompile.runtime.kernels",
            "bincompile.models"} <= set(MODULES)
    tops = {e.name for e in os.scandir(ROOT) if e.is_dir() and not e.name.startswith(".")}
    assert {*FOLDERS, "csrc", "tests"} <= tops
