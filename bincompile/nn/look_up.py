"""Look-up in a packed table that joins autograd without gradients of integers."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from bincompile.errors import InputTypeError
from bincompile.ops import bases, row_gradient
from bincompile.ops.binary_embedding import binary_embedding

NUMBERS = 1 << 20  # floats of unpacked rows at a time in the gradient of the scales


class BinaryEmbeddingForward(torch.autograd.Function):
    """Rows of a packed table, by `BinaryEmbeddingForward.apply(...)` of the arguments below.

    Args:
        input: int32 or int64 of any shape.
        qweight: uint8 (V, k * ceil(D/8)), least significant bit first, k bases side by side.
        embed_scale: float (V, k), or (V,) for one base; a row of zeros is a padding row.
        ori_embedding_dim: D.
        is_train: let the result carry a gradient. That of the table is kept in
            `qweight.sparse_grad` (see `bincompile.ops.row_gradient`), summed over backward passes
            until `BinaryOptimizer.zero_grad` drops it.
        anchor: a float parameter, of no elements, through which the result joins autograd where
            `embed_scale` doesn't require a gradient. The layers give their own.

    Returns:
        (*input.shape, D) in the dtype of embed_scale; padding rows are exactly zero, and neither
        they nor their scale get a gradient.

    Raises:
        InputTypeError: indices that aren't integers; is_train with nothing that requires grad.
        InputError: an index out of range, or sizes that don't fit together.

    With g the gradient of the result, row r gets a_r * sum of g over its look-ups, which is the
    derivative by its signs; the scale gets <g, signs>.

    Source: bitorch_engine's BinaryEmbeddingForward; Bop (arXiv:1906.02107) for the gradient.

    Example:
        >>> table = torch.tensor([[5], [2]], dtype=torch.uint8)
        >>> scale = torch.tensor([[0.5], [2.0]], requires_grad=True)
        >>> rows = BinaryEmbeddingForward.apply(torch.tensor([1, 0, 1]), table, scale, 3, True)
        >>> rows.tolist()
        [[-2.0, 2.0, -2.0], [0.5, -0.5, 0.5], [-2.0, 2.0, -2.0]]
        >>> rows.sum().backward()
        >>> table.sparse_grad.to_dense().tolist()
        [[0.5, 0.5, 0.5], [4.0, 4.0, 4.0]]
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, qweight: torch.Tensor, embed_scale: torch.Tensor,
                ori_embedding_dim: int, is_train: bool,
                anchor: torch.Tensor | None = None) -> torch.Tensor:
        """The rows; what backward needs is kept only if `is_train`."""
        single = embed_scale.ndim == 2 and embed_scale.shape[1] == 1
        rows = binary_embedding.overload(input, qweight,
                                         embed_scale.squeeze(1) if single else embed_scale,
                                         ori_embedding_dim)
        if not is_train:
            ctx.mark_non_differentiable(rows)
        elif not (embed_scale.requires_grad or (anchor is not None and anchor.requires_grad)):
            raise InputTypeError(
                "is_train=True with nothing that requires a gradient",
                "an embed_scale that requires grad, or an anchor that does",
                "embed_scale.requires_grad_(), or use bincompile.nn.BinaryEmbedding")
        else:
            ctx.table, ctx.features = qweight, ori_embedding_dim
            read_again = qweight if embed_scale.requires_grad else None
            ctx.save_for_backward(input, embed_scale, read_again)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """None for all but the scale; the table's gradient goes to `qweight.sparse_grad`."""
        if not ctx.needs_input_grad[2] and not ctx.needs_input_grad[5:]:
            return (None,) * 6
        indices, scale, table = ctx.saved_tensors
        scales = scale.detach().view(scale.shape[0], -1)
        row_gradient.accumulate(ctx.table,
                                row_gradient.of_look_up(indices, output_gradient, scales))
        gradient = None
        if ctx.needs_input_grad[2]:
            gradient = _of_scales(indices, output_gradient, scales, table,
                                  ctx.features).view_as(scale)
        empty = output_gradient.new_zeros(0) if any(ctx.needs_input_grad[5:]) else None
        return None, None, gradient, None, None, empty


def _of_scales(indices: torch.Tensor, grad: torch.Tensor, scales: torch.Tensor,
               table: torch.Tensor, features: int) -> torch.Tensor:
    """<g, signs> of each base, summed over the look-ups of a row: (V, k); 0 for padding rows."""
    flat, count, out = indices.reshape(-1), scales.shape[1], torch.zeros_like(scales)
    grads, step = grad.reshape(-1, features), max(1, NUMBERS // (features * count))
    for start in range(0, flat.numel(), step):
        rows = flat[start:start + step]
        signs = bases.split(table[rows], count, features, grad.dtype)
        products = signs @ grads[start:start + step].unsqueeze(-1)
        out.index_add_(0, rows, products.squeeze(-1).to(out.dtype))
    return out.masked_fill_((scales == 0).all(-1, keepdim=True), 0.0)
