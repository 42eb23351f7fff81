"""Independent formulas of binary bases and of int8 rows, row by row."""

from __future__ import annotations

import itertools

import torch


def int8_rows(x):
    """Whole numbers and scales of rows, each in float32 as its definition says."""
    numbers, scales = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(*x.shape[:-1], 1)
    for index in itertools.product(*map(range, x.shape[:-1])):
        row = x[index].float()
        largest = row.abs().max()
        if not torch.isfinite(row).all():
            scales[index] = torch.nan
        elif largest >= 2.0**-100:
            factor = torch.tensor(127.0) / largest
            numbers[index] = torch.tensor([round((value * factor).item()) for value in row])
            scales[index] = largest / 127
    return numbers, scales


def base_signs(packed, count, features):
    """The signs of every base, (rows, count, features), bit by bit."""
    width = -(-features // 8)
    rows = [[[1.0 if int(row[base * width + place // 8]) >> place % 8 & 1 else -1.0
              for place in range(features)] for base in range(count)] for row in packed]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(packed), count, features)


def binary_bases_linear(x, weight, weight_scale, bias, in_features, activation, shift):
    """The rows times the dense weight that the bases stand for."""
    signs = base_signs(weight, weight_scale.shape[1], in_features)
    dense = torch.einsum("nbk,nb->nk", signs, weight_scale)
    x, row = x if shift is None else (x.float() + shift.float()).double(), 1.0
    if activation == "int8":
        x, row = int8_rows(x)
    if activation == "binary":
        x, row = torch.where(x >= 0, 1.0, -1.0).double(), x.abs().mean(-1, keepdim=True)
    out = torch.einsum("...k,nk->...n", x, dense) * row
    return out if bias is None else out + bias


def fit_bases(x, count):
    """Rows fitted one by one: least squares for the scales, then the nearest level."""
    x, packed, scales = x.float(), [], []
    codes = torch.tensor([[1.0 if code >> base & 1 else -1.0 for base in range(count)]
                          for code in range(2**count)])
    for row in x:
        rest, signs, scale = row, [], []
        for _ in range(count):
            scale.append(rest.abs().mean())
            signs.append(torch.where(rest >= 0, 1.0, -1.0))
            rest = rest - scale[-1] * signs[-1]
        matrix, found = torch.stack(signs), torch.stack(scale)
        for _ in range(6 if count > 1 else 0):
            square = (matrix @ matrix.T).double() + 1e-9 * torch.eye(count)
            found = torch.linalg.solve(square, (matrix @ row).double()).float()
            distance = (row[:, None] - (codes @ found)[None]).abs()
            matrix = codes[distance.argmin(1)].T
        flags = torch.zeros(count, -(-x.shape[1] // 8) * 8, dtype=torch.uint8)
        flags[:, :x.shape[1]] = matrix > 0
        packed.append(sum(flags[:, bit::8] << bit for bit in range(8)).flatten())
        scales.append(found)
    if not packed:
        return (torch.zeros(0, count * -(-x.shape[1] // 8), dtype=torch.uint8),
                torch.zeros(0, count))
    return torch.stack(packed), torch.stack(scales)
