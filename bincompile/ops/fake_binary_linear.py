"""The trainable form of `binary_linear`: float master weights, straight-through gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bits, int8
from bincompile.ops.binary_linear import (
    accumulate,
    check_input,
    check_outputs,
    finish,
    shifted_input,
)

CLIP = 2.0  # the gradient of a sign passes where |x| <= CLIP * scale


def _reference(x, weight, weight_scale, bias, activation="binary", activation_scale=None,
               shift=None):
    accumulated, row = accumulate(x, bits.sign(weight), activation, activation_scale, shift)
    return finish(accumulated, row, weight_scale, bias, x.dtype)


def _shape(x, weight, weight_scale, bias, activation="binary", activation_scale=None, shift=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(x, weight, weight_scale, bias, activation="binary", activation_scale=None, shift=None):
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise InputError(f"weight {weight.dtype} of shape {tuple(weight.shape)}",
                         "a float dtype and (out_features, in_features)", "the weight")
    check_input(x, weight.shape[1], activation, shift)
    check_outputs(weight.shape[0], weight_scale, bias)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, weight_scale, bias, activation, activation_scale, shift = inputs
    ctx.save_for_backward(x, weight, weight_scale, activation_scale, shift)
    ctx.activation, ctx.bias_dtype = activation, None if bias is None else bias.dtype


def _backward(ctx, grad):
    """With z = x + shift, s its scale, a the weight scale and b the sums of sign products:

    dx = (g a) @ sign(W), where |z| <= 2 s (everywhere for float activations); dW = (g a)^T @ u,
    with u = s sign(z), or z, or for int8 what z is rounded to; da = sum g s b; ds = sum g a b;
    dshift = sum dx; dbias = sum g.
    """
    x, weight, weight_scale, activation_scale, shift = ctx.saved_tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) if shift is None else x.to(wide) + shift.to(wide)
    signs, g = bits.sign(weight).to(wide), grad.to(wide)
    scaled = g * weight_scale.to(wide)
    dx, used, row = scaled @ signs, z, None
    if ctx.activation == "binary":
        row = bits.row_scale(z) if activation_scale is None else activation_scale.to(wide)
        dx, used = dx * (z.abs() <= CLIP * row), row * bits.sign(z)
    elif ctx.activation == "int8":
        numbers, scale = int8.quantised(z)
        used = numbers * scale
    flat_g, flat_scaled, flat_used = (t.reshape(-1, t.shape[-1]) for t in (g, scaled, used))
    accumulated = flat_used @ signs.mT
    dscale = (flat_g * accumulated).sum(0)
    dactivation = None
    if activation_scale is not None and row is not None:
        dactivation = (scaled * (bits.sign(z) @ signs.mT)).sum().to(activation_scale.dtype)
        dactivation = dactivation.reshape(activation_scale.shape)
    if weight_scale.shape[0] == 1:
        dscale = dscale.sum(0, keepdim=True)
    return (dx.to(x.dtype), (flat_scaled.mT @ flat_used).to(weight.dtype),
            dscale.to(weight_scale.dtype),
            None if ctx.bias_dtype is None else flat_g.sum(0).to(ctx.bias_dtype), None,
            dactivation,
            None if shift is None else dx.reshape(-1, dx.shape[-1]).sum(0).to(shift.dtype))


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    for rows, features, outputs in ((3, 1, 1), (5, 33, 17), (2, 64, 65), (0, 8, 3)):
        for activation in ("binary", "float"):
            yield Sample((normal(rows, features), normal(outputs, features), normal(outputs),
                          normal(outputs), activation))
    yield Sample((normal(2, 3, 12), normal(4, 12), normal(1), None, "binary", torch.tensor(0.7),
                  normal(12)))
    yield Sample((normal(2, 3, 12, grad=True), normal(4, 12, grad=True), normal(4, grad=True),
                  normal(4, grad=True), "binary", None, normal(12, grad=True)))
    yield Sample((normal(3, 12, grad=True), normal(4, 12, grad=True), normal(4), None, "float"))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    x, weight = torch.randn(2, 16, generator=generator), torch.ones(4, 16)
    yield Sample((x[:, :9], weight, torch.ones(4), None), error="(..., 16)")
    yield Sample((x, weight.long(), torch.ones(4), None), error="weight")
    yield Sample((x, weight, torch.ones(3), None), error="weight_scale")


fake_binary_linear = Operator(
    name="fake_binary_linear",
    schema="(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str activation='binary', "
           "Tensor? activation_scale=None, Tensor? shift=None) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    signs_of=shifted_input,
    tolerance=Tolerance(),
    backward=(_setup_context, _backward),
    source="straight-through estimator, arXiv:1308.3432; scales of XNOR-Net, arXiv:1603.05279",
)
