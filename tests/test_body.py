"""Bodies: text and back, what is refused, and what the operations of the table do."""

from __future__ import annotations

import math

import pytest
import torch

from bincompile.body import LONGEST, Body, Name, Statement
from bincompile.errors import BincompileError, InputError, InputTypeError
from bincompile.ops.fused_rows import doubtful_rows, fused_rows, packed_layer, sign_inputs
from bincompile.ops.row_ops import KINDS, ROW_OPS, check_body, interpret

TEXTS = (
    "t0 = add(x0, x1)\nt1 = layer_norm(t0, x2, None, 1e-12)\nreturn t0, t1",
    "t0 = clamp(x0, -1e999, 1e999)\nreturn t0",
    "t0 = gelu(x0, 'none')\nt1 = pow(t0, -3)\nt2 = where(x1, t1, -0.5)\nreturn t2",
    "t0 = binary_linear(x0, x1, x2, None, 64, 'binary', None, None)\nreturn t0",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_body_reads_back_as_it_is_written(text: str) -> None:
    body = Body.parse(text)
    check_body(body)
    assert str(body) == text and Body.parse(str(body)) == body


def test_a_body_knows_its_inputs_statements_and_results() -> None:
    body = Body.parse(TEXTS[0])
    assert body.inputs == 3 and body.results == (Name("t0"), Name("t1"))
    assert body.statements[1] == Statement("layer_norm", (Name("t0"), Name("x2"), None, 1e-12))
    assert body.statements[1].reads == (Name("t0"), Name("x2"))
    assert Body.parse("  t0 = relu( x0 )\n\n  return t0\n") == Body.parse("t0=relu(x0)\nreturn t0")


def test_infinity_is_a_literal_and_nan_is_none() -> None:
    assert Body.parse(TEXTS[1]).statements[0].args[1:] == (-math.inf, math.inf)
    with pytest.raises(InputError, match="no literal"):
        str(Body((Statement("mul", (Name("x0"), math.nan)),), (Name("t0"),)))


@pytest.mark.parametrize("text", [
    "", "return", "return x0", "t0 = relu(x0)", "t0 = relu(x0)\nreturn", "t0 = relu(x0)\nreturn t1",
    "t1 = relu(x0)\nreturn t1", "t0 = t1 = relu(x0)\nreturn t0", "t0 += relu(x0)\nreturn t0",
    "t0 = relu(x00)\nreturn t0", "t0 = relu(y)\nreturn t0", "t0 = relu(x=x0)\nreturn t0",
    "t0 = relu(x0 + 1)\nreturn t0", "t0 = relu(relu(x0))\nreturn t0", "t0 = relu(*x0)\nreturn t0",
    "t0 = relu([x0])\nreturn t0", "t0 = relu(-x0)\nreturn t0", "t0 = relu(-True)\nreturn t0",
    "t0 = relu(b'x')\nreturn t0", "t0 = relu(1j)\nreturn t0", "t0 = a.relu(x0)\nreturn t0",
    "t0 = relu(x0); import os\nreturn t0", "return t0\ndef f(): pass", "t0 = relu(x0)\nraise t0",
    "t0 = relu(x0)\nreturn (t0 for t0 in x0)", "t0 = relu(f'{x0}')\nreturn t0", "(" * 5000,
    "t0 = relu(x0)\n" * (LONGEST // 10)])
def test_what_is_no_body_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        Body.parse(text)
    assert caught.value.found and caught.value.allowed and caught.value.change


def test_a_text_is_asked_for() -> None:
    with pytest.raises(InputTypeError, match="a body of type int"):
        Body.parse(3)  # type: ignore[arg-type]


def argument(kind: str, place: int) -> object:
    return {"value": Name(f"x{place}"), "tensor": Name(f"x{place}"), "optional": None,
            "number": 2.0, "limit": 0.3, "count": 3, "text": "none"}[kind]


@pytest.mark.parametrize("name", ROW_OPS)
def test_every_operation_refuses_arguments_of_another_kind(name: str) -> None:
    op = ROW_OPS[name]
    good = tuple(argument(kind, place) for place, kind in enumerate(op.kinds))
    check_body(Body((Statement(name, good),), (Name("t0"),)))
    with pytest.raises(InputError, match="arguments in"):
        check_body(Body((Statement(name, (*good, 1)),), (Name("t0"),)))
    for place, kind in enumerate(op.kinds):
        wrong = next(arg for arg in ("text", 1.5, None, Name("x0")) if not KINDS[kind][1](arg))
        bad = (*good[:place], wrong, *good[place + 1:])
        with pytest.raises(InputError, match="the argument"):
            check_body(Body((Statement(name, bad),), (Name("t0"),)))


SHAPES = {"where": (torch.bool, None, None), "logical_and": (torch.bool, torch.bool),
          "logical_or": (torch.bool, torch.bool), "logical_not": (torch.bool,)}


@pytest.mark.parametrize("name", [n for n, op in ROW_OPS.items() if "count" not in op.kinds
                                  and n != "embedding"])
def test_no_row_depends_on_another(name: str) -> None:
    op, generator = ROW_OPS[name], torch.Generator().manual_seed(5)
    args = []
    for place, kind in enumerate(op.kinds):
        made = argument(kind, place)
        if isinstance(made, Name):
            made = torch.rand(4, 6, generator=generator) + 0.1
            flag = SHAPES.get(name, ())[place:place + 1] == (torch.bool,)
            made = made > 0.5 if flag else made
        args.append(made)
    whole = op.reference(*args)
    for row in range(4):
        alone = op.reference(*(a[row:row + 1] if isinstance(a, torch.Tensor) and not (
            place and op.form == "linear") else a for place, a in enumerate(args)))
        torch.testing.assert_close(whole[row:row + 1], alone, rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_go_together_name_the_statement() -> None:
    with pytest.raises(InputError, match=r"t1 = mul\(t0, x1\) of torch.float32 \(2, 3\)"):
        interpret(Body.parse("t0 = relu(x0)\nt1 = mul(t0, x1)\nreturn t1"),
                  [torch.ones(2, 3), torch.ones(4)])


def test_errors_of_our_operators_keep_their_words() -> None:
    x, layer = torch.ones(2, 9), packed_layer(4, 8, torch.Generator().manual_seed(0))
    body = "t0 = binary_linear(x0, x1, x2, x3, 8, 'binary', None, None)\nreturn t0"
    with pytest.raises(BincompileError, match=r"input of shape \(2, 9\)"):
        fused_rows.overload([x, *layer], body)


def test_rows_are_doubtful_where_a_sign_is_taken_of_nearly_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, generator=generator)
    x[0, 1, 4], x[1, 2, 0], x[1, 0, 3] = 1e-9, -0.0, 1e-4
    layer = packed_layer(8, 8, generator)
    body = ("t0 = binary_linear(x0, x1, x2, x3, 8, 'binary', None, None)\nt1 = add(t0, x0)\n"
            "return t1")
    bound = fused_rows.bind(([x, *layer], body), {})
    assert torch.equal(sign_inputs(bound)[0], x)
    assert doubtful_rows(bound).tolist() == [False, True, False, False, False, True]
    plain = fused_rows.bind(([x, x], "t0 = add(x0, x1)\nreturn t0"), {})
    assert doubtful_rows(plain) is None and sign_inputs(plain) == []
