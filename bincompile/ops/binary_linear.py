"""Linear layers with 1-bit weights: packed for inference, and with float masters for training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bincompile.errors import InputError, InputTypeError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bits, int8

ACTIVATIONS = ("binary", "float", "int8")


def accumulate(x: torch.Tensor, signs: torch.Tensor, activation: str,
                scale: torch.Tensor | None, shift: torch.Tensor | None,
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The products before the weight scale, and the scale of the activations."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if shift is not None:
        wide = wide + shift.to(wide.dtype)
    if activation == "float":
        return wide @ signs.to(wide.dtype).mT, None
    if activation == "int8":
        return int8_products(wide, signs)
    row = bits.row_scale(wide) if scale is None else scale.to(wide.dtype)
    return bits.sign(wide) @ signs.to(wide.dtype).mT, row


def int8_products(wide: torch.Tensor, signs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole sums of quantised rows (..., K) and signs (N, K), and the scales of the rows."""
    numbers, row = int8.quantised(wide)
    dtype = torch.promote_types(wide.dtype, int8.exact(wide.shape[-1]))
    return (numbers.to(dtype) @ signs.to(dtype).mT).to(wide.dtype), row


def finish(accumulated: torch.Tensor, row: torch.Tensor | None, weight_scale: torch.Tensor,
            bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """((accumulated * row) * weight_scale) + bias, each rounded, in `dtype` at the end."""
    out = accumulated if row is None else accumulated * row
    out = out * weight_scale.to(out.dtype)
    return (out if bias is None else out + bias.to(out.dtype)).to(dtype)


def _reference(x, weight, weight_scale, bias, in_features, activation="binary",
               activation_scale=None, shift=None):
    signs = bits.unpack(weight, in_features, torch.float32)
    accumulated, row = accumulate(x, signs, activation, activation_scale, shift)
    return finish(accumulated, row, weight_scale, bias, x.dtype)


def _shape(x, weight, weight_scale, bias, in_features, activation="binary",
           activation_scale=None, shift=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def check_input(x: torch.Tensor, in_features: int, activation: str,
                shift: torch.Tensor | None) -> None:
    """Raise unless x is a float tensor (..., in_features) and `activation` is one that exists."""
    if not x.dtype.is_floating_point:
        raise InputTypeError(f"input of dtype {x.dtype}", "a float dtype", "the input's dtype")
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise InputError(f"input of shape {tuple(x.shape)}", f"(..., {in_features})",
                         "the input's last dimension")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation={activation!r}", " or ".join(map(repr, ACTIVATIONS)),
                         "the activation argument")
    if shift is not None and tuple(shift.shape) != (in_features,):
        raise InputError(f"shift of shape {tuple(shift.shape)}", f"({in_features},)", "the shift")


def _check(x, weight, weight_scale, bias, in_features, activation="binary",
           activation_scale=None, shift=None):
    check_input(x, in_features, activation, shift)
    if activation == "int8" and activation_scale is not None:
        raise InputError("a stored activation_scale with activation='int8'",
                         "scales of the rows themselves", "activation_scale=None")
    width = bits.packed_width(in_features)
    if weight.dtype != torch.uint8 or weight.ndim != 2 or weight.shape[1] != width:
        raise InputError(f"packed weight {weight.dtype} of shape {tuple(weight.shape)}",
                         f"uint8 (out_features, {width}) for {in_features} input features",
                         "pack the weight with bincompile.ops.bits.pack")
    check_outputs(weight.shape[0], weight_scale, bias)


def check_outputs(out_features, weight_scale, bias) -> None:
    """Raise unless the scale is (1,) or (out_features,) and the bias (out_features,)."""
    for name, tensor, sizes in (("weight_scale", weight_scale, ((1,), (out_features,))),
                                ("bias", bias, ((out_features,),))):
        if tensor is not None and tuple(tensor.shape) not in sizes:
            raise InputError(f"{name} of shape {tuple(tensor.shape)}",
                             " or ".join(map(str, sizes)), f"the {name}")


def shifted_input(bound: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensor whose signs a linear operator takes, if it takes any."""
    if bound.get("activation", "binary") != "binary":
        return []
    return [bound["x"] if bound["shift"] is None else bound["x"] + bound["shift"]]


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for rows, features, outputs in ((3, 1, 1), (1, 8, 5), (7, 31, 64), (33, 64, 65),
                                    (4, 130, 16), (0, 32, 8), (2, 257, 129)):
        weight = bits.pack(normal(outputs, features))
        for activation in ACTIVATIONS:
            yield Sample((normal(rows, features), weight, normal(outputs).abs(), normal(outputs),
                          features, activation))
    x = normal(2, 3, 32)
    x[0, 0], x[0, 1, :3] = 0.0, torch.tensor([0.0, -0.0, float("inf")])
    weight = bits.pack(normal(6, 32))
    yield Sample((x, weight, normal(1).abs(), None, 32, "binary"))
    yield Sample((x, weight, normal(1).abs(), None, 32, "binary", torch.tensor(0.5), normal(32)))
    yield Sample((x.nan_to_num(posinf=1.0), weight, normal(6), None, 32, "float", None, normal(32)))
    hostile = normal(6, 32)
    hostile[0], hostile[1], hostile[2] = 0.0, 1e-38, hostile[2] * 1e30
    hostile[3, 7], hostile[4, 9], hostile[5] = float("nan"), -float("inf"), 2.5
    yield Sample((hostile, weight, normal(6).abs(), normal(6), 32, "int8"))
    yield Sample((normal(2, 3, 32), weight, normal(1), None, 32, "int8", None, normal(32)))
    yield Sample((normal(5, 32).half(), weight, normal(6), normal(6), 32, "int8"))
    yield Sample((normal(5, 32).half(), weight, normal(6), normal(6), 32, "binary"))
    yield Sample((normal(5, 32).bfloat16(), weight, normal(6), normal(6), 32, "float"))
    yield Sample((normal(32, 5).T, weight, normal(6), None, 32, "binary"))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    x, weight = torch.randn(2, 16, generator=generator), torch.zeros(4, 2, dtype=torch.uint8)
    scale = torch.ones(4)
    yield Sample((x[:, :15], weight, scale, None, 16, "binary"), error="(..., 16)")
    yield Sample((x.long(), weight, scale, None, 16, "binary"), error="float dtype")
    yield Sample((x, weight.float(), scale, None, 16, "binary"), error="uint8")
    yield Sample((x, weight, scale[:3], None, 16, "binary"), error="weight_scale")
    yield Sample((x, weight, scale, torch.ones(5), 16, "binary"), error="bias")
    yield Sample((x, weight, scale, None, 16, "ternary"), error="activation")
    yield Sample((x, weight, scale, None, 16, "int8", torch.ones(())), error="activation_scale")


binary_linear = Operator(
    name="binary_linear",
    schema="(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int in_features, "
           "str activation='binary', Tensor? activation_scale=None, Tensor? shift=None) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    signs_of=shifted_input,
    tolerance=Tolerance(rtol=1e-5, atol=1e-5),
    source="XNOR-Net, arXiv:1603.05279 (scale: mean |x| of each row); int8: bincompile.ops.int8",
)
