"""Operators that act on every position of time alike, and keep the layout of what they read."""

from __future__ import annotations

from typing import Any

from torch import fx

from bincompile.passes.graph import aten
from bincompile.passes.streaming.builder import StepBuilder
from bincompile.passes.streaming.facts import Facts
from bincompile.passes.streaming.kinds import Kind
from bincompile.passes.streaming.rule import Rule

UNARY = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bitwise_not", "ceil", "cos", "cosh",
    "deg2rad", "digamma", "elu", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor", "frac",
    "gelu", "hardshrink", "hardsigmoid", "hardswish", "isfinite", "isinf", "isnan", "leaky_relu",
    "lgamma", "log", "log10", "log1p", "log2", "log_sigmoid", "logical_not", "logit", "mish",
    "nan_to_num", "neg", "positive", "rad2deg", "reciprocal", "relu", "relu6", "round", "rsqrt",
    "selu", "sgn", "sigmoid", "sign", "signbit", "silu", "sin", "sinc", "sinh", "softplus",
    "softshrink", "sqrt", "square", "tan", "tanh", "threshold", "trunc", "hardtanh", "celu",
    "clone", "contiguous", "alias", "detach", "zeros_like", "ones_like", "full_like", "_to_copy",
    "lift_fresh_copy", "native_dropout", "polygamma", "special_log_ndtr", "special_ndtr", "real",
    "imag", "angle", "conj", "view_as_real_copy", "resolve_conj", "resolve_neg", "clamp",
    "clamp_min", "clamp_max", "frexp", "log_sigmoid_forward",
)
MANY = (
    "add", "sub", "mul", "div", "maximum", "minimum", "fmax", "fmin", "atan2", "hypot", "pow",
    "fmod", "remainder", "floor_divide", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
    "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor",
    "bitwise_left_shift", "bitwise_right_shift", "where", "masked_fill", "lerp", "addcmul",
    "addcdiv", "rsub", "xlogy", "copysign", "heaviside", "prelu", "clamp", "clamp_min",
    "clamp_max", "true_divide", "nextafter", "ldexp", "logaddexp", "logaddexp2", "copy",
    "float_power", "isclose", "complex", "polar", "dropout", "feature_dropout", "to", "type_as",
    "glu_none",
)


def overloads(names: tuple[str, ...]) -> tuple[Any, ...]:
    """The overloads of these names that make new values from tensors and numbers alone."""
    packets = (getattr(aten, name) for name in names if hasattr(aten, name))
    return tuple(getattr(packet, kind) for packet in packets for kind in packet.overloads()
                 if _is_functional(getattr(packet, kind)))


def _is_functional(target: Any) -> bool:
    """Whether an operator makes new values from tensors and numbers alone."""
    schema = target._schema
    return not schema.is_mutable and "out" not in target._overloadname.split("_")


def kind(node: fx.Node, facts: Facts) -> Kind:
    """What the arguments that are broadcast to each other are together."""
    return facts.joined([*node.args, *node.kwargs.values()])


def emit(node: fx.Node, build: StepBuilder) -> fx.Node:
    """The same operator on the step nodes of its arguments."""
    like, extent = build.kind(node), build.extent(node)

    def read(arg: fx.Node) -> Any:
        return build.read(arg, like, extent)

    return build.call(node.target, *fx.node.map_arg(node.args, read),
                      **fx.node.map_arg(dict(node.kwargs), read))


pointwise = Rule(overloads((*UNARY, *MANY)), kind, emit)
