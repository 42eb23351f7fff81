"""What is installed, what an import costs, and what it must not import."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bincompile

ROOT = Path(__file__).parent.parent
IMPORT_SECONDS = 0.3

NAMES_OF_USERS = """
import sys, time
import torch
start = time.perf_counter()
import bincompile
imported = time.perf_counter() - start
names = [getattr(bincompile, name) for name in dir(bincompile)]
print(imported, "tvm" in sys.modules, "transformers" in sys.modules, len(names))
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          check=False)


def test_import_costs_at_most_300_ms_over_torch_and_never_imports_tvm() -> None:
    found = [run(NAMES_OF_USERS, ROOT) for _ in range(3)]
    assert all(f.returncode == 0 for f in found), found[0].stderr
    rows = [f.stdout.split() for f in found]
    assert min(float(seconds) for seconds, *_ in rows) <= IMPORT_SECONDS
    assert all(rest == ["False", "False", str(len(bincompile.__all__))] for _, *rest in rows)


@pytest.mark.parametrize("folder", ["passes", "runtime", "models"])
def test_the_folders_beside_the_package_are_no_packages_of_their_own(folder: str) -> None:
    found = run(f"import {folder}", ROOT)
    assert found.returncode == 1
    assert f"ImportError: import bincompile.{folder}, not {folder}" in found.stderr


def test_the_package_does_not_contain_itself() -> None:
    with pytest.raises(ImportError, match="import bincompile, not"):
        __import__("bincompile.bincompile")


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = bincompile.optimise
    assert dir(bincompile) == sorted(bincompile.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir",
                    str(folder), str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    assert built.name.startswith(f"bincompile-{bincompile.__version__}-py3-none-")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    tracked = subprocess.run(["git", "ls-files", "bincompile", "passes", "runtime", "models",
                              "csrc"], cwd=ROOT, check=True, capture_output=True, text=True)
    expected = {f if f.startswith("bincompile/") else f"bincompile/{f}"
                for f in tracked.stdout.split()}
    assert expected <= names, sorted(expected - names)
    assert {name.split("/")[0] for name in names} == {
        "bincompile", f"bincompile-{bincompile.__version__}.dist-info"}


def test_the_wheel_holds_the_native_library_the_licence_and_the_command(
        wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert any(n.startswith("bincompile/lib/") for n in names), "no native library"
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    assert "bincompile/py.typed" in names
    (entry_points,) = (n for n in names if n.endswith("/entry_points.txt"))
    assert "bincompile = bincompile.cli:main" in wheel.read(entry_points).decode()


def test_the_wheel_asks_for_ranges_so_that_other_packages_can_live_beside_us(
        wheel: zipfile.ZipFile) -> None:
    (metadata,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
    fields = importlib.metadata.PathDistribution(zipfile.Path(wheel, metadata).parent)
    required = [r for r in fields.requires or () if "extra ==" not in r]
    assert {re.split("[<>]", r)[0] for r in required} == {
        "torch", "numpy", "safetensors", "apache-tvm", "apache-tvm-ffi", "filelock"}
    assert all(">=" in r and "==" not in r for r in required)
