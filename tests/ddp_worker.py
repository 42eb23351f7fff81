"""One process of a distributed training run: `python ddp_worker.py RANK PROCESSES STORE`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bincompile.nn import BinaryEmbedding
from bincompile.optim import BinaryOptimizer

STEPS, BATCH, ROWS = 12, 8, 40


class Words(nn.Module):
    """Two look-ups of one table, and a head: (B,) and (B,) to (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = BinaryEmbedding(ROWS, 16, padding_idx=0)
        self.head = nn.Linear(16, 3)

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(one) + self.words(two))


def train(rank: int, processes: int, rule: str, wrap_first: bool, idle_step: int) -> list[Any]:
    """The table, the sum of the head, the rows with state, and the buffers that DDP broadcasts.

    Each process starts from its own seed and sees its share of each batch, in two passes. In the
    idle step only process 0 has a gradient, of its table.
    """
    torch.manual_seed(5 + rank)
    inner = Words().double()
    model: nn.Module = inner
    if processes > 1 and wrap_first:
        model = DistributedDataParallel(model)
    optimizer = BinaryOptimizer.for_model(model, rule, float_lr=0.01)
    if processes > 1 and not wrap_first:
        model = DistributedDataParallel(model)
    data = torch.Generator().manual_seed(9)
    share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    for step in range(STEPS):
        one, two = (t[share] for t in torch.randint(ROWS, (2, BATCH), generator=data))
        labels = torch.randint(3, (BATCH,), generator=data)[share]
        optimizer.zero_grad()
        for place in range(2):
            part = slice(place, None, 2)
            nn.functional.cross_entropy(model(one[part], two[part]), labels[part]).backward()
        if step == idle_step:
            for parameter in model.parameters():
                parameter.grad = None
            if rank:
                optimizer.zero_grad()
        optimizer.step()
    sent = {id(buffer) for buffer in getattr(model, "modules_buffers", ())}
    state = optimizer.state[inner.words.qweight]
    return [inner.words.qweight.tolist(), inner.head.weight.sum().item(), state["rows"].tolist(),
            [name for name, buffer in inner.named_buffers() if id(buffer) in sent]]


if __name__ == "__main__":
    own, count, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=own,
                                   world_size=count)
    print(json.dumps([train(own, count, "bop", False, -1),
                      train(own, count, "sign_momentum", True, 7)]), flush=True)
    distributed.barrier()  # neither process may leave while the other still talks to it
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an interpreter that is being taken down
