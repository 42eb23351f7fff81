"""A copy was dropped as idle, though complex numbers need neighbours in memory."""

import torch
from torch import nn
from torch.nn import functional

SIZES = ((2, 7), (3, 11), (1, 4))
DYNAMIC = True
DTYPE = torch.float32
UNGUARDED = ROUGH = False


class Model(nn.Module):
    def forward(self, x):
        q = x.unflatten(-1, (4, 2)).permute(0, 3, 1, 2)
        places, rates = torch.arange(q.shape[-2]), 10.0 ** -torch.arange(2).to(q.dtype)
        angle = places.to(q.dtype)[:, None] * rates
        pairs = torch.view_as_complex(q.contiguous().unflatten(-1, (-1, 2)))
        q = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        return functional.scaled_dot_product_attention(q, q, q)


def inputs(b, n):
    torch.manual_seed(b * 100 + n)
    return (torch.randn(b, n, 8),)
