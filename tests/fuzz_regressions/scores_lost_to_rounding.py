"""Scores of -1e9 are used again: the model's own float32 keeps no digit of them."""

import torch
from torch import nn

SIZES = ((2, 5), (3, 5), (2, 1))
DYNAMIC = False
DTYPE = torch.float32
UNGUARDED, ROUGH = False, True


class Model(nn.Module):
    def forward(self, x, bias, kept):
        grid = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & kept[:, None, :]
        scores = x @ x.mT + bias + torch.where(grid, 0.0, -1e9).to(x.dtype)
        return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ x


def inputs(b, n):
    torch.manual_seed(b * 100 + n)
    kept = (torch.arange(n) + torch.arange(b)[:, None]) % 3 != 1
    return torch.randn(b, n, 4), torch.randn(n, n), kept
