"""The closed list of what a saved graph may call: pure functions of tensors and sizes.

None of them reads a file or keeps state, and none changes its arguments but operators of streams,
which write to the states that they are given: a loaded program may do that only there. A file that
names anything else is refused, and so is saving a program that calls anything else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from bincompile.ops import OPERATORS

_POINTWISE = """
__and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Tensor abs.default acos.default
add.Scalar add.Tensor addcdiv.default addcmul.default asin.default atan.default atan2.default
bitwise_and.Tensor bitwise_not.default bitwise_or.Tensor ceil.default celu.default clamp.Tensor
clamp.default clamp_max.default clamp_min.default cos.default cosh.default div.Scalar div.Tensor
div.Tensor_mode elu.default eq.Scalar eq.Tensor erf.default exp.default exp2.default expm1.default
floor.default floor_divide.default fmod.Scalar fmod.Tensor ge.Scalar ge.Tensor gelu.default
glu.default gt.Scalar gt.Tensor hardshrink.default hardsigmoid.default hardswish.default
hardtanh.default isfinite.default isinf.default isnan.default le.Scalar le.Tensor leaky_relu.default
lerp.Scalar lerp.Tensor log.default log10.default log1p.default log2.default log_sigmoid.default
logical_and.default logical_not.default logical_or.default logical_xor.default lt.Scalar lt.Tensor
masked_fill.Scalar masked_fill.Tensor maximum.default minimum.default mish.default mul.Scalar
mul.Tensor nan_to_num.default ne.Scalar ne.Tensor neg.default pow.Scalar pow.Tensor_Scalar
pow.Tensor_Tensor prelu.default reciprocal.default relu.default relu6.default remainder.Scalar
remainder.Tensor round.default rsqrt.default rsub.Scalar selu.default sigmoid.default sign.default
silu.default sin.default sinh.default softplus.default softshrink.default sqrt.default
square.default sub.Scalar sub.Tensor tan.default tanh.default threshold.default trunc.default
where.ScalarOther where.ScalarSelf where.self
"""
_SHAPES = """
_to_copy.default broadcast_to.default cat.default chunk.default clone.default
constant_pad_nd.default diagonal.default diff.default expand.default expand_as.default
flatten.using_ints flip.default gather.default index.Tensor index_select.default mT.default
movedim.int narrow.default numpy_T.default pad.default permute.default repeat.default
repeat_interleave.self_int reshape.default roll.default select.int slice.Tensor split.Tensor
split_with_sizes.default squeeze.default squeeze.dim squeeze.dims stack.default swapaxes.default
sym_numel.default sym_size.int t.default to.dtype transpose.int tril.default triu.default
type_as.default unbind.int unflatten.int unfold.default unsqueeze.default
"""
_CREATION = """
arange.default arange.start arange.start_step empty.memory_format full.default full_like.default
linspace.default new_full.default new_ones.default new_zeros.default ones.default ones_like.default
scalar_tensor.default zeros.default zeros_like.default
"""
_REDUCTIONS = """
_safe_softmax.default _softmax.default all.default all.dim amax.default amin.default aminmax.default
any.default any.dim argmax.default argmin.default count_nonzero.dim_IntList cummax.default
cummin.default cumprod.default cumsum.default linalg_vector_norm.default log_softmax.int
logcumsumexp.default logsumexp.default max.default max.dim mean.default mean.dim min.default min.dim
norm.ScalarOpt_dim prod.default prod.dim_int softmax.int sort.default std.correction sum.default
sum.dim_IntList topk.default var.correction var_mean.correction
"""
_LAYERS = """
_embedding_bag.default _embedding_bag_forward_only.default
_native_batch_norm_legit_no_training.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
addmm.default avg_pool1d.default avg_pool2d.default avg_pool3d.default baddbmm.default
batch_norm.default bmm.default conv1d.default conv1d.padding conv2d.default conv2d.padding
conv3d.default conv3d.padding cosine_similarity.default dot.default einsum.default embedding.default
embedding_bag.default embedding_bag.padding_idx group_norm.default gru.input instance_norm.default
layer_norm.default linear.default lstm.input matmul.default max_pool1d.default max_pool2d.default
max_pool3d.default mm.default mv.default native_group_norm.default native_layer_norm.default
one_hot.default outer.default pixel_shuffle.default rms_norm.default rnn_relu.input rnn_tanh.input
scaled_dot_product_attention.default upsample_bilinear2d.vec upsample_nearest2d.vec
"""
_PYTHON = {
    f"{module.__name__.strip('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, "add sub mul floordiv truediv mod neg pow getitem eq ne lt le gt ge and_ or_"),
        (math, "ceil floor trunc"),
        (torch, "sym_max sym_min sym_not sym_float sym_int sym_ite"))
    for name in names.split()
}


def _functions() -> dict[str, Callable[..., Any]]:
    found = dict(_PYTHON)
    for name in f"{_POINTWISE} {_SHAPES} {_CREATION} {_REDUCTIONS} {_LAYERS}".split():
        packet, overload = name.split(".")
        operators = getattr(torch.ops.aten, packet, None)
        if operators is not None and overload in operators.overloads():
            found[f"aten.{name}"] = getattr(operators, overload)
    found.update((f"bincompile.{name}", op.overload) for name, op in OPERATORS.items())
    return found


FUNCTIONS: dict[str, Callable[..., Any]] = _functions()
NAMES: dict[Any, str] = {function: name for name, function in FUNCTIONS.items()}
