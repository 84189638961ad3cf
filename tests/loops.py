"""A training loop of one's own with a squeezer in it."""

import torch
import torch._dynamo.testing
from adapters import LLAMA
from test_switch import loss_of, trained

from lora_squeeze.annealing.live import live_adapter
from lora_squeeze.annealing.schedule import custom

SCHEDULE = custom([(0, 8), (3, 4), (5, 2)], 7)


def loop(model, optimizer, squeezer, steps, *, scheduler=None, base=LLAMA):
    """Train for some steps; the rank and the learning rates of every step, and what was switched."""
    seen = []
    for _ in range(steps):
        seen.append((live_adapter(model).rank, [group["lr"] for group in optimizer.param_groups]))
        loss_of(model, base).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        squeezer.step()
    return seen


def adamw(model, lr=1e-3):
    return torch.optim.AdamW(trained(model), lr=lr)


def rates(seen):
    return [rates[0] for _, rates in seen]
