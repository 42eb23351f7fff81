"""The trainable form of bitorch-engine's binary linear layer: stored scales for the whole layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bincompile.errors import InputError
from bincompile.op import Operator, Sample, Tolerance
from bincompile.ops import bits
from bincompile.ops.binary_linear import accumulate, check_input, shifted_input


def _reference(x, weight, scale_a, scale_w, shift):
    """(scale_a * scale_w) * (sign(x + shift) @ sign(weight)^T); the product of scales is rounded
    once, then its product with the integer sum, then the result to the dtype of x."""
    accumulated, _ = accumulate(x, bits.sign(weight), "binary", scale_a, shift)
    scale = scale_a.to(accumulated.dtype) * scale_w.to(accumulated.dtype)
    return (accumulated * scale).to(x.dtype)


def _shape(x, weight, scale_a, scale_w, shift):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(x, weight, scale_a, scale_w, shift):
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise InputError(f"weight {weight.dtype} of shape {tuple(weight.shape)}",
                         "a float dtype and (out_features, in_features)", "the weight")
    check_input(x, weight.shape[1], "binary", shift)
    for name, scale in (("scale_a", scale_a), ("scale_w", scale_w)):
        if scale.ndim:
            raise InputError(f"{name} of shape {tuple(scale.shape)}", "()", f"the {name}")


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    """With z = x + shift, t = (g scale_w) @ sign(W) and K the number of elements of x:

    dx = t where |z| <= |scale_a|; dshift = sum dx; dW = g^T @ (scale_a sign(z));
    dscale_a = sum(t sign(z)) / sqrt(K), with no part of it clipped. scale_w has none.
    """
    x, weight, scale_a, scale_w, shift = ctx.saved_tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    z, g = x.to(wide) + shift.to(wide), grad.to(wide)
    signs, scale = bits.sign(z), scale_a.to(wide)
    through = (g * scale_w.to(wide)) @ bits.sign(weight).to(wide)
    dx = through * (z.abs() <= scale.abs())
    dscale = (through * signs).sum() / torch.sym_max(x.numel(), 1) ** 0.5
    dweight = g.reshape(-1, g.shape[-1]).mT @ (scale * signs).reshape(-1, x.shape[-1])
    dshift = dx.reshape(-1, dx.shape[-1]).sum(0)
    return (dx.to(x.dtype), dweight.to(weight.dtype), dscale.to(scale_a.dtype), None,
            dshift.to(shift.dtype))


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def normal(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    for lead, features, outputs in (((3,), 1, 1), ((2, 3), 33, 17), ((0,), 8, 3), ((), 9, 4)):
        yield Sample((normal(*lead, features), normal(outputs, features), torch.tensor(0.7),
                      torch.tensor(0.3), normal(features)))
    yield Sample((normal(4, 12, grad=True), normal(5, 12, grad=True),
                  torch.tensor(1.1, requires_grad=True), torch.tensor(0.2), normal(12, grad=True)))
    yield Sample((normal(4, 12).bfloat16(), normal(5, 12).bfloat16(), torch.tensor(1.1).bfloat16(),
                  torch.tensor(0.2), normal(12).bfloat16()))


def _bad_samples(generator: torch.Generator) -> Iterator[Sample]:
    x, weight = torch.randn(2, 16, generator=generator), torch.ones(4, 16)
    one, shift = torch.ones(()), torch.zeros(16)
    yield Sample((x[:, :9], weight, one, one, shift), error="(..., 16)")
    yield Sample((x, weight.char(), one, one, shift), error="weight")
    yield Sample((x, weight, one.reshape(1), one, shift), error="scale_a")
    yield Sample((x, weight, one, torch.ones(4), shift), error="scale_w")
    yield Sample((x, weight, one, one, shift[:3]), error="shift")


fake_bitorch_linear = Operator(
    name="fake_bitorch_linear",
    schema="(Tensor x, Tensor weight, Tensor scale_a, Tensor scale_w, Tensor shift) -> Tensor",
    reference=_reference,
    shape=_shape,
    check=_check,
    samples=_samples,
    bad_samples=_bad_samples,
    signs_of=shifted_input,
    tolerance=Tolerance(),
    backward=(_setup_context, _backward),
    source="bitorch_engine.layers.qlinear.binary.cutlass (0.2.6): its formulas, not its code",
)
