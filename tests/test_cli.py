"""Every verb of the command line: its text, its one JSON document, its exit code, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bincompile as bc
from bincompile import bench, cli, demo, models

FACTORY = """
import torch

print("the file may print")

def encoder():
    print("so may the factory")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    return layer, (torch.randn(3, 10, 32),), {}

def training():
    return torch.nn.Linear(2, 2).train(), (torch.ones(1, 2),), {}

class Branches(torch.nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def branches():
    return Branches().eval(), (torch.ones(2, 3),), {}

def data():
    torch.manual_seed(1)
    return [(torch.randn(4, 10, 32),)]

def two():
    return torch.nn.Linear(2, 2), ()

def broken():
    raise ZeroDivisionError("on purpose")

not_a_function = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    found = capsys.readouterr()
    return code, found.out, found.err


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == cli.DONE, err
    return json.loads(out)


def test_inspect_prints_the_report(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    code, out, err = run(capsys, "inspect", f"{file}:encoder")
    assert code == cli.DONE
    assert out.startswith("found and proven: 1 attention")
    assert "heads=4" in out
    assert "so may the factory" in err


def test_inspect_json_holds_nothing_but_the_document(
        capsys: pytest.CaptureFixture[str], file: Path) -> None:
    found = document(capsys, "inspect", f"{file}:encoder")
    (match,) = (m for m in found["matches"] if m["operator"] == "attention")
    assert match["validated"] and match["max_error"] <= match["evidence"]["limit"]
    assert found["lossy"] is False


def test_optimize_saves_what_load_reads(
        capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "out.bcz"
    found = document(capsys, "optimize", f"{file}:encoder", "-o", str(saved))
    assert found["bytes"] == saved.stat().st_size > 0
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(5, 7, 32)
    torch.testing.assert_close(bc.load(saved)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_optimize_makes_layers_binary_when_asked_and_measured(
        capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    asked = ("optimize", f"{file}:encoder", "-o", str(tmp_path / "out.bcz"), "--binary", "w1a32",
             "--layers", "linear*")
    found = document(capsys, *asked, "--no-guard")
    lossy = [r for r in found["rewrites"] if r["kind"] == "lossy"]
    assert found["lossy"] and {r["path"] for r in lossy} == {"linear1", "linear2"}
    assert all(r["bytes_after"] < r["bytes_before"] for r in lossy)
    measured = document(capsys, *asked, "--calibration", f"{file}:data", "--holdout",
                        f"{file}:data")
    assert len(measured["rewrites"]) >= 1


def test_a_lossy_rewrite_without_data_fails(
        capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    code, out, err = run(capsys, "optimize", f"{file}:encoder", "-o", str(tmp_path / "x.bcz"),
                         "--binary", "w1a32")
    assert (code, out) == (cli.FAILED, "")
    assert "calibration" in err and not (tmp_path / "x.bcz").exists()


def test_env_lists_versions_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "env")
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert all(states["reference"] == "available" for states in found["kernels"].values())
    _, out, _ = run(capsys, "env")
    assert all(name in out for name in ("apache-tvm-ffi", "binary_linear", "cache"))


def test_env_says_why_a_kernel_is_not_there(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BINCOMPILE_ISA", "none")
    found = document(capsys, "env")
    assert found["target"] == "cpu"
    compiled = {k: v for k, v in found["kernels"]["binary_linear"].items() if k.startswith("tvm")}
    assert compiled and all(v.startswith("no: ") for v in compiled.values())


def test_demo_compiles_digits_and_checks_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "demo", "--threads", "1")
    assert found["threads"] == 1
    assert found["identical_predictions"] == found["images"] == 500
    assert found["artifact"]["same_bits"] and found["artifact"]["bytes"] > 0
    candidates = found["candidates"]
    assert candidates["compiled"]["accuracy"] == candidates["binary model"]["accuracy"] >= 0.88
    assert candidates["compiled"]["bytes"] < candidates["float model"]["bytes"]
    assert {m["operator"] for m in found["report"]["matches"]} >= {"attention", "embedding"}
    stream = found["stream"]
    assert stream["same_decisions"] == stream["frames"] == 300 and stream["error"] <= 1e-5
    whole, step = (stream["candidates"][name]["operations"] for name in (demo.WINDOW, demo.STREAM))
    assert step * 100 < whole and stream["semantics"] == "banded(64)"


def test_bench_times_a_model_and_a_saved_one(
        capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "out.bcz"
    document(capsys, "optimize", f"{file}:encoder", "-o", str(saved))
    found = document(capsys, "bench", f"{file}:encoder", "--threads", "1", "2")
    assert [(r["threads"], r["candidate"]) for r in found["rows"]] == [
        (1, "eager"), (1, "compiled"), (2, "eager"), (2, "compiled")]
    assert found["inputs"] == ["float32[3, 10, 32]"] and torch.get_num_threads() == 1
    loaded = document(capsys, "bench", str(saved), "--threads", "1")
    assert [r["candidate"] for r in loaded["rows"]] == ["loaded"]
    assert all(r["ms"] > 0 for r in (*found["rows"], *loaded["rows"]))
    assert "eager" in run(capsys, "bench", f"{file}:encoder", "--threads", "1")[1]


def test_bench_measures_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "bench", "validate", "--threads", "1")
    assert found["suite"] == "validate" and {r["threads"] for r in found["rows"]} == {1}
    assert all(row["ms"]["proof"] > 0 for row in found["rows"])
    assert "proof ms" in bench.table(found)


WRONG = {
    "no verb": ((), "VERB"),
    "unknown verb": (("optimise", "digits"), "optimise"),
    "unknown option": (("env", "--loud"), "--loud"),
    "unknown model": (("inspect", "resnet"), ", ".join(models.NAMES)),
    "no such file": (("inspect", "nowhere.py:make"), "nowhere.py"),
    "no such function": (("inspect", "{file}:absent"), "absent"),
    "no function": (("inspect", "{file}:not_a_function"), "not_a_function"),
    "wrong result": (("inspect", "{file}:two"), "(model, args, kwargs)"),
    "factory fails": (("inspect", "{file}:broken"), "ZeroDivisionError: on purpose"),
    "training mode": (("inspect", "{file}:training"), "eval()"),
    "unknown precision": (("optimize", "{file}:encoder", "-o", "x", "--binary", "w2a2"), "w1a32"),
    "idle option": (("optimize", "digits", "-o", "x", "--keep", "head"), "--keep without --binary"),
    "no output": (("optimize", "{file}:encoder"), "--output"),
    "no saved file": (("bench", "nowhere.bcz"), "nowhere.bcz"),
    "no threads": (("demo", "--threads", "0"), "from 1 up"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_three_lines_and_exit_code_2(
        capsys: pytest.CaptureFixture[str], file: Path, case: str) -> None:
    arguments, word = WRONG[case]
    code, out, err = run(capsys, *(a.format(file=file) for a in arguments), "--json")
    assert (code, out) == (cli.MISUSED, "")
    lines = [line for line in err.splitlines() if "may" not in line]
    assert [line.split(":")[0].strip() for line in lines] == ["bincompile", "allowed", "change"]
    assert word in err and "Traceback" not in err


def test_a_model_that_does_not_compile_is_exit_code_1(file: Path) -> None:
    found = subprocess.run([sys.executable, "-m", "bincompile", "inspect", f"{file}:branches"],
                           capture_output=True, text=True, check=False,
                           cwd=Path(__file__).parent.parent)
    assert (found.returncode, found.stdout) == (cli.FAILED, "")
    lines = [line for line in found.stderr.splitlines() if "may" not in line]
    assert [line.split(":")[0].strip() for line in lines] == [
        "bincompile", "because", "allowed", "change"]
    assert "return x * 2 if x.sum() > 0 else x" in lines[0]


def test_python_m_bincompile_is_the_command() -> None:
    found = subprocess.run([sys.executable, "-m", "bincompile", "env", "--json"],
                           capture_output=True, text=True, check=False,
                           cwd=Path(__file__).parent.parent)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["versions"]["bincompile"] == bc.__version__


def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    with subprocess.Popen([sys.executable, "-m", "bincompile", "env"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == cli.DONE


@pytest.mark.slow
def test_inspect_minilm_finds_six_attentions_and_three_look_ups(
        capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "inspect", "minilm")
    operators = [m["operator"] for m in found["matches"] if m["validated"]]
    assert operators.count("attention") == 6 and operators.count("embedding") == 3
