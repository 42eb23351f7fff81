"""What compiled linear layers with bases share: packed bases, and the function that calls them.

Their weights are bases beside each other: uint8 (outputs, bases * ceil(features / 8)), bit 1 where
positive; padding bits and outputs become 0 and stand for nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from bincompile.ops import bits
from bincompile.runtime.bound import Bound, Size
from bincompile.runtime.kernels import Call
from bincompile.runtime.schedules import w1a8_dot, w1a8_linear
from bincompile.runtime.schedules.common import LANE, PANEL, VECTORS, WORD, ceil_div

CHUNK = 1 << 22  # bits that are unpacked at a time


def pack_fives(weight: torch.Tensor, count: int, features: int) -> torch.Tensor:
    """15 bits of one output in a word: uint16 (bases, panels, words, vectors, 32).

    Example:
        >>> packed = pack_fives(torch.tensor([[5]], dtype=torch.uint8), 1, 3)
        >>> packed.shape, packed.view(torch.int16)[0, 0, 0, 0, 0].item()
        (torch.Size([1, 1, 1, 1, 32]), 5)
    """
    panels, vectors = w1a8_linear.vectors_of(weight.shape[0])
    words = ceil_div(features, w1a8_linear.WORD)
    padded = panels * vectors * w1a8_linear.WIDTH
    codes = _words(weight, count, features, padded, (words, w1a8_linear.WORD), torch.int16)
    lanes = codes.view(count, panels, vectors, 2, LANE, words).permute(0, 1, 5, 2, 4, 3)
    return lanes.reshape(count, panels, words, vectors, -1).contiguous().view(torch.uint16)


def pack_bytes(weight: torch.Tensor, count: int, features: int) -> torch.Tensor:
    """32 bits of one output in a word, bit 8 j + t of number 4 t + j: uint32 (.., words, 16).

    Example:
        >>> packed = pack_bytes(torch.tensor([[5]], dtype=torch.uint8), 1, 3)
        >>> hex(packed.view(torch.int32)[0, 0, 0, 0].item())
        '0x10001'
    """
    panels, words = ceil_div(weight.shape[0], LANE), ceil_div(features, WORD)
    order = torch.arange(WORD).view(w1a8_dot.STEPS, w1a8_dot.BYTES).T.flatten()
    codes = _words(weight, count, features, panels * LANE, (words, WORD), torch.int32, order)
    return codes.view(count, panels, LANE, words).transpose(2, 3).contiguous().view(torch.uint32)


def pack_words(weight: torch.Tensor, count: int, features: int, inputs: int) -> torch.Tensor:
    """Some bits of one output in a word, 1 where negative: uint32 (bases, panels, words, 4, 16).

    Args:
        inputs: how many bits a word holds.

    Example:
        >>> packed = pack_words(torch.tensor([[5]], dtype=torch.uint8), 1, 3, 30)
        >>> packed.shape, packed.view(torch.int32)[0, 0, 0, 0, 0].item() & 7
        (torch.Size([1, 1, 1, 4, 16]), 2)
    """
    panels, words = ceil_div(weight.shape[0], PANEL), ceil_div(features, inputs)
    codes = ~_words(weight, count, features, panels * PANEL, (words, inputs), torch.int32)
    lanes = codes.view(count, panels, VECTORS, LANE, words).permute(0, 1, 4, 2, 3)
    return lanes.contiguous().view(torch.uint32)


def _words(weight: torch.Tensor, count: int, features: int, outputs: int, shape: tuple[int, int],
           dtype: torch.dtype, order: torch.Tensor | None = None) -> torch.Tensor:
    """The bits of every output in words (count, outputs, words), some outputs at a time."""
    places = torch.arange(shape[1], dtype=torch.int64)
    found = torch.zeros(count, outputs, shape[0], dtype=dtype)
    bases = weight.view(weight.shape[0], count, -1)
    step = max(1, CHUNK // (count * shape[0] * shape[1]))
    for start in range(0, weight.shape[0], step):
        end = min(start + step, weight.shape[0])
        signs = bits.unpack(bases[start:end], features, torch.float32) > 0
        flags = torch.nn.functional.pad(signs, (0, shape[0] * shape[1] - features))
        flags = flags.unflatten(-1, shape)
        flags = flags if order is None else flags[..., order]
        codes = (flags.to(torch.int64) << places).sum(-1)
        wide = codes - ((codes >> 31) << 32) if dtype is torch.int32 else codes
        found[:, start:end] = wide.to(dtype).transpose(0, 1)
    return found


def scales_of(call: Call) -> torch.Tensor:
    """The scales of a layer's weights, (outputs, bases)."""
    scale: torch.Tensor = call.value("weight_scale").detach()
    outputs = call.value("weight").shape[0]
    return scale if scale.ndim == 2 else scale.expand(outputs).unsqueeze(-1)


def bound(module: Any, stored: list[torch.Tensor], features: int, outputs: int, block: int,
          worth_threads: int) -> Bound:
    """The kernel as a function from x (..., features) to (..., outputs).

    Args:
        module: the compiled functions, by how they use threads.
        stored: their arguments between x and the result.
        block: rows of one block of the schedule.
        worth_threads: products below which a second thread costs more than it brings.
    """
    from tvm_ffi import from_dlpack

    kept = [from_dlpack(tensor) for tensor in stored]
    serial, by_rows, by_panels = (module[mode] for mode in ("serial", "rows", "panels"))
    few = worth_threads // (features * outputs)

    def shape(x: torch.Tensor) -> tuple[Size, ...]:
        return (((*x.shape[:-1], outputs), x.dtype),)

    def into(x: torch.Tensor, out: torch.Tensor) -> None:
        flat = x if x.dtype is torch.float32 else x.float()
        if flat.ndim != 2:
            flat = flat.reshape(-1, features)
        if not flat.is_contiguous():
            flat = flat.contiguous()
        rows, threads = flat.shape[0], torch.get_num_threads()
        narrow = out.dtype is not torch.float32
        if narrow:
            result = torch.empty(rows, outputs)
        else:
            result = out if out.ndim == 2 else out.view(rows, outputs)
        if threads == 1 or rows <= few:
            serial(flat, *kept, result)
        elif rows >= 2 * threads * block:
            by_rows(flat, *kept, result)
        else:
            by_panels(flat, *kept, result)
        if narrow:
            out.copy_(result.view(out.shape))

    return Bound(shape, into)
