"""The native parts under sanitizers and valgrind, and compiled kernels on an emulated machine."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_vector_math
import torch
from native import INCLUDES, Machine, Module, command
from stored import STORED

from bincompile.config import INSTRUCTION_SETS, Target, host_instruction_sets
from bincompile.op import Operator
from bincompile.ops import OPERATORS
from bincompile.runtime import kernels_of, library, native
from bincompile.runtime.kernels import Kernel, sample_call

HOST = host_instruction_sets()[1]
WHERE = {"aarch64": ("aarch64-linux-gnu-gcc",), "x86_64": ("gcc",)}
ARM = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "max")
ASAN = ("gcc", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TSAN = ("clang", "-fsanitize=thread", "-Wno-unused-command-line-argument")
THREADS = ("OMP_NUM_THREADS", "3")
SERVICES = (
    Machine("asan and ubsan", "", ASAN, environment=(THREADS,)),
    Machine("tsan", "", TSAN, environment=(
        THREADS, ("TSAN_OPTIONS", "ignore_noninstrumented_modules=1:halt_on_error=1"))),
    Machine("valgrind", "", runner=("valgrind", "-q", "--error-exitcode=9", "--leak-check=full",
                                    "--errors-for-leak-kinds=definite"), environment=(THREADS,)),
    Machine("aarch64", "", WHERE["aarch64"], ARM, environment=(THREADS,)),
)
KERNELS = (
    *(Machine(f"guarded {isa}", isa, ASAN) for isa in HOST if isa in ("avx2", HOST[0])),
    Machine("valgrind", "avx2", runner=("valgrind", "-q", "--error-exitcode=9"), sides=(1,)),
    *(Machine(isa.name, isa.name, WHERE["aarch64"], ARM) for isa in INSTRUCTION_SETS
      if isa.triple.startswith("aarch64")),
)


def skip_without(machine: Machine) -> None:
    if machine.isa in ("avx2", "avx512-vpopcntdq") and machine.isa not in HOST:
        pytest.skip(f"this processor has no {machine.isa}")
    if missing := machine.missing():
        pytest.skip(f"{missing} is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each machine's programs and libraries."""
    return {machine.name: tmp_path_factory.mktemp(machine.name.replace(" ", "-"))
            for machine in {*SERVICES, *KERNELS}}


@pytest.mark.slow
@pytest.mark.parametrize("machine", SERVICES, ids=lambda machine: machine.name)
def test_the_services_are_clean(machine: Machine, tmp_path: Path) -> None:
    skip_without(machine)
    rounds = "4" if machine.runner else "30"
    said = machine.run(machine.build(tmp_path), "services", "4", rounds)
    assert said == "services: as they should be\n"


@pytest.mark.slow
@pytest.mark.parametrize("machine", SERVICES, ids=lambda machine: machine.name)
def test_recorded_calls_are_clean(machine: Machine, tmp_path: Path) -> None:
    skip_without(machine)
    program = tmp_path / "replay"
    command([*machine.compiler, "-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror",
             str(native.shim_source().with_name("replay_selftest.c")), "-o", str(program)])
    assert machine.run(program) == "replay: as it should be\n"


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "right", "wrong"), [
    (SERVICES[0], "ALIGNMENT + size)", "size)"),
    (SERVICES[0], "free(own->blocks[place]);", ""),
    (SERVICES[1], "static __thread Kept", "static Kept"),
], ids=["short block", "leak", "race"])
def test_a_fault_in_the_shim_is_seen(machine: Machine, right: str, wrong: str, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without(machine)
    text = native.shim_source().read_text()
    assert text.count(right) == 1
    (tmp_path / "openmp_shim.c").write_text(text.replace(right, wrong))
    monkeypatch.setattr(native, "shim_source", lambda: tmp_path / "openmp_shim.c")
    program = machine.build(tmp_path)
    with pytest.raises(AssertionError, match=r"Sanitizer"):
        machine.run(program, "services", "4", "30")


@pytest.mark.slow
def test_a_read_behind_a_tensor_is_seen(tmp_path: Path) -> None:
    """The guard pages: a library that reads one number too many does not survive."""
    machine = Machine("guarded", HOST[0])
    skip_without(machine)
    source = tmp_path / "reader.c"
    source.write_text("""#include <tvm/ffi/c_api.h>
int __tvm_ffi_sum(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result) {
  DLTensor *x = given[0].v_ptr;
  result->type_index = kTVMFFIInt;
  for (int64_t i = 0; i < x->shape[0] + given[1].v_int64; ++i)
    result->v_int64 += ((int *)x->data)[i];
  return 0;
}
""")
    command(["gcc", "-shared", "-fPIC", *INCLUDES, str(source), "-o", str(tmp_path / "reader.so")])
    total = Module(machine, tmp_path, tmp_path / "reader.so")["sum"]
    numbers = torch.arange(1000, dtype=torch.int32)
    assert total(numbers, 0) == 499500
    with pytest.raises(AssertionError, match="guarded: -11"):
        total(numbers, 1)


def kernels_and_machines() -> list[Any]:
    return [pytest.param(operator, kernel, machine, id=f"{kernel.name}-{machine.name}")
            for operator in OPERATORS.values() for kernel in kernels_of(operator.name)
            if kernel.recipe is not None for machine in KERNELS]


def calls(operator: Operator, kernel: Kernel, target: Target) -> Iterator[Any]:
    for sample in operator.samples(torch.Generator().manual_seed(11)):
        call = sample_call(operator, sample, target, STORED)
        if kernel.supports(call) is None:
            yield sample, call


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "kernel", "machine"), kernels_and_machines())
def test_a_kernel_agrees_with_its_reference_there(
        operator: Operator, kernel: Kernel, machine: Machine, folders: dict[str, Path],
        monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without(machine)
    load = functools.partial(machine.load, folders[machine.name])
    for entry in pkgutil.iter_modules(library.__path__, f"{library.__name__}."):
        module = importlib.import_module(entry.name)
        if hasattr(module, "load"):
            monkeypatch.setattr(module, "load", load)
    found = list(calls(operator, kernel, machine.target))
    if not found:
        pytest.skip(f"{kernel.name} is not for {machine.isa}")
    limit = operator.tolerance
    for sample, call in found:
        given = operator.isolated(operator.bind(sample.args, sample.kwargs))
        expected = operator.overload(**given)
        values = operator.isolated({name: call.value(name) for name in operator.arguments})
        result = kernel.bind(call)(*call.run_time(values))
        exact = {"rtol": 0, "atol": 0} if limit.bits else {"rtol": limit.rtol, "atol": limit.atol}
        written = [(values[name], given[name]) for name in operator.mutated]
        for one, other in (*zip(flat(result), flat(expected), strict=True), *written):
            torch.testing.assert_close(one, other, equal_nan=True, **exact)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [m for m in KERNELS if "neon" in m.name],
                         ids=lambda machine: machine.name)
def test_vector_functions_give_the_bits_of_this_machine_there(
        machine: Machine, tmp_path: Path) -> None:
    skip_without(machine)
    if HOST[0] not in ("avx512-vpopcntdq", "avx2", "neon", "neon-dotprod"):
        pytest.skip("this processor rounds products before it adds them")
    machine.link(test_vector_math.compiled(machine.isa), tmp_path / "functions.so")
    module, x = Module(machine, tmp_path, tmp_path / "functions.so"), test_vector_math.grid()
    for name in test_vector_math.REFERENCES:
        found = torch.empty_like(x)
        module[name](x, found)
        expected = test_vector_math.run(name, x)
        assert torch.equal(found.isnan(), expected.isnan()), name
        sure = ~found.isnan()
        assert torch.equal(found[sure].view(torch.int32), expected[sure].view(torch.int32)), name


def flat(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def test_the_tools_are_told_apart() -> None:
    assert Machine("none", "", ("no-such-compiler",)).missing() == "no-such-compiler"
    assert Machine("none", "", ("cc",), ("no-such-runner",)).missing() == (
        "no-such-runner" if shutil.which("cc") else "cc")
