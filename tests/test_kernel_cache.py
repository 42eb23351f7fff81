"""Where compiled kernels come from: the cache, the compiler, and what happens without them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bincompile.config import INSTRUCTION_SETS, Target, cache_dir
from bincompile.errors import KernelError
from bincompile.ops import OPERATORS
from bincompile.runtime import Call, Dynamic, choose, native, tvm
from bincompile.runtime.cache import MARK, cached, is_intact

HOST = Target.host()

PROBE = """
import sys, warnings
if {blocked}: sys.modules["tvm"] = None
import torch
from bincompile.config import Target
from bincompile.ops import OPERATORS, bits
from bincompile.runtime import Call, Dynamic, choose
torch.manual_seed(5)
torch.set_num_threads(2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for features in (48, 64):
        operator = OPERATORS["binary_linear"]
        x = torch.randn(70, features)
        given = operator.bind((Dynamic(x), bits.pack(torch.randn(80, features)), torch.rand(80),
                               torch.randn(80), features), {{}})
        call = Call(operator, given, Target.host())
        kernel = choose(call)
        same = torch.equal(kernel.bind(call)(x), operator.overload(**{{**given, "x": x}}))
        print(kernel.name, same)
print("tvm imported:", sys.modules.get("tvm") is not None)
print("warnings:", [str(w.message) for w in caught if w.category is RuntimeWarning])
"""


THREADS = """
from pathlib import Path
import torch
from bincompile.config import Target
from bincompile.ops import OPERATORS, bits
from bincompile.runtime import Call, Dynamic, choose
torch.set_num_threads(2)
x = torch.randn(600, 512)
operator = OPERATORS["binary_linear"]
packed = bits.pack(torch.randn(512, 512))
call = Call(operator, operator.bind((Dynamic(x), packed, torch.ones(512), None, 512), {}),
            Target.host())
bound = choose(call).bind(call)
x @ x.T @ x
before = len(list(Path("/proc/self/task").iterdir()))
bound(x)
print("more threads:", len(list(Path("/proc/self/task").iterdir())) - before)
print("pools:", len({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()
                     if "libgomp" in line}))
"""


def test_kernels_run_on_the_threads_of_torch(tmp_path: Path) -> None:
    for state in ("cold", "warm"):
        said = python(THREADS, BINCOMPILE_CACHE_DIR=str(tmp_path))
        assert said.splitlines() == ["more threads: 0", "pools: 1"], state


def probe(blocked: bool = False, **environment: str) -> str:
    """Two layers in a process of its own: kernels, equality, whether TVM came, warnings."""
    return python(PROBE.format(blocked=blocked), **environment)


def python(script: str, **environment: str) -> str:
    """What a script prints in a process of its own, in the checkout."""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment, text=True,
                          capture_output=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the two layers of `probe`."""
    folder = tmp_path_factory.mktemp("warm")
    said = probe(BINCOMPILE_CACHE_DIR=str(folder))
    assert said.count("tvm-w1a1 True") == 2 and "tvm imported: True" in said
    assert "warnings: []" in said
    return folder


def test_a_warm_process_never_imports_tvm(warm: Path) -> None:
    said = probe(BINCOMPILE_CACHE_DIR=str(warm))
    assert said.count("tvm-w1a1 True") == 2
    assert "tvm imported: False" in said and "warnings: []" in said
    assert probe(blocked=True, BINCOMPILE_CACHE_DIR=str(warm)).count("tvm-w1a1 True") == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_made_again(warm: Path, damage: str) -> None:
    file = next(warm.glob("w1a1_linear-*.so"))
    whole = file.read_bytes()
    flipped = bytes([whole[5000] ^ 1])
    file.write_bytes({"cut": whole[:-7], "empty": b"",
                      "flip": whole[:5000] + flipped + whole[5001:]}[damage])
    said = probe(BINCOMPILE_CACHE_DIR=str(warm))
    assert said.count("tvm-w1a1 True") == 2 and "tvm imported: True" in said
    assert "tvm imported: False" in probe(BINCOMPILE_CACHE_DIR=str(warm))


def test_without_a_c_compiler_kernels_are_compiled_in_the_process(tmp_path: Path) -> None:
    said = probe(BINCOMPILE_CACHE_DIR=str(tmp_path), CC="/no/such/compiler")
    assert said.count("tvm-w1a1 True") == 2
    assert said.count("no C compiler") == 1 and said.count("compiled anew") == 1
    assert not list(tmp_path.glob("w1a1*.so"))


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = probe(BINCOMPILE_CACHE_DIR=str(tmp_path / "file"))
    assert said.count("tvm-w1a1 True") == 2 and said.count("cache can't be written") == 1


def test_without_tvm_and_with_a_cold_cache_torch_runs(tmp_path: Path) -> None:
    said = probe(blocked=True, BINCOMPILE_CACHE_DIR=str(tmp_path))
    assert said.count("torch-byte-table True") == 2 and said.count("can't be imported") == 1


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda _: probe(BINCOMPILE_CACHE_DIR=str(tmp_path)), range(3)))
    assert all(s.count("tvm-w1a1 True") == 2 for s in said)
    assert len(list(tmp_path.glob("w1a1*.so"))) == 2
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_what_a_killed_process_left_is_removed(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BINCOMPILE_CACHE_DIR", str(tmp_path))
    (tmp_path / ".name-left").mkdir()
    (tmp_path / ".name-left" / "name.so").write_text("half")
    path = cached("name.so", lambda fresh: fresh.write_bytes(b"whole"))
    assert path.read_bytes().startswith(b"whole" + MARK) and is_intact(path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == []
    with pytest.raises(ZeroDivisionError):
        cached("other.so", lambda fresh: fresh.write_bytes(b"%d" % (1 // 0)))
    assert not (tmp_path / "other.so").exists() and not list(tmp_path.glob(".other*"))


def test_a_compiler_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no openmp here >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("BINCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    given = (Dynamic(torch.empty(1, 72)), torch.zeros(80, 9, dtype=torch.uint8), torch.ones(80),
             None, 72)
    operator = OPERATORS["binary_linear"]
    call = Call(operator, operator.bind(given, {}), HOST)
    with pytest.raises(KernelError, match="no openmp here"):
        choose(call).bind(call)
    assert not list(cache_dir().glob("*.so"))


def test_the_key_changes_with_what_the_kernel_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [Target("cpu", isa.name) for isa in INSTRUCTION_SETS]
    names = {tvm.Recipe(schedule, {"features": f, "outputs": 8}).file_name(target)
             for schedule in ("w1a1_linear", "w1a32_linear") for f in (8, 16) for target in targets}
    assert len(names) == 4 * len(targets)
    recipe = tvm.Recipe("w1a1_linear", {"features": 8, "outputs": 8})
    seen = {recipe.file_name(HOST)}
    for module, name, value in ((native, "FLAGS", ("-O0",)), (tvm, "_version", str.upper)):
        monkeypatch.setattr(module, name, value)
        tvm._tools.cache_clear()
        seen.add(recipe.file_name(HOST))
    monkeypatch.undo()
    tvm._tools.cache_clear()
    assert len(seen) == 3
