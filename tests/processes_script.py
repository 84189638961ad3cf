"""Two processes that train together, for tests: processes_script.py FOLDER; what each saw is written there as JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainer_script import model, trainer
from transformers import TrainerCallback

from lora_squeeze.annealing.live import live_adapter
from lora_squeeze.annealing.replicas import agreed
from lora_squeeze.annealing.schedule import custom
from lora_squeeze.annealing.squeezer import Squeezer
from lora_squeeze.errors import RankError, UnsupportedAdapter

SCHEDULE = custom([(0, 8), (2, 4), (4, 2)], 6)


def trained(one):
    return [parameter for parameter in one.parameters() if parameter.requires_grad]


def apart(tensors):
    """The largest difference between the processes."""
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    everywhere = [torch.zeros_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, flat)
    return float((everywhere[0] - everywhere[1]).abs().max())


def batch(step, part):
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randint(0, 61, (3, 7), generator=generator)


def loss_of(one, tokens):
    return one(input_ids=tokens, labels=tokens).loss


def loop(rank, **options):
    """A loop of one's own, with and without accumulation, against the same training in one process."""
    accumulate = options.pop("accumulate", 1)
    hook = options.pop("hook", False)
    alone, together = model().eval(), model().eval()  # without dropout
    optimizers = [torch.optim.AdamW(trained(one), lr=1e-2) for one in (alone, together)]
    wrapped = DistributedDataParallel(together, **options)
    if hook:
        calls = []
        wrapped.register_comm_hook(calls, counted)
    squeezers = [
        Squeezer(one, optimizer, SCHEDULE) for one, optimizer in zip((alone, wrapped), optimizers, strict=True)
    ]
    differing, local = [], []
    for step in range(SCHEDULE.steps):
        for part in range(accumulate):
            tokens = batch(step, 10 * part + rank)
            if part < accumulate - 1:
                with wrapped.no_sync():
                    loss_of(wrapped, tokens).backward()
            else:
                loss_of(wrapped, tokens).backward()
            both = torch.cat([batch(step, 10 * part + one) for one in (0, 1)])
            loss_of(alone, both).backward()
        differing.append(apart([one.grad for one in trained(together)]))
        local.append(apart([tokens.double()]))
        for optimizer, squeezer in zip(optimizers, squeezers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            squeezer.step()
    return {
        "gradients apart": max(differing),
        "data apart": min(local),
        "weights apart": apart(trained(together)),
        "from one process": max(
            float((one - two).abs().max().detach()) for one, two in zip(trained(alone), trained(together), strict=True)
        ),
        "rank": live_adapter(together).rank,
        "hook calls": len(calls) if hook else 0,
    }


def sharded(rank):
    """FSDP 2: factors, gradients and optimizer state lie in pieces; against the same training in one process."""
    alone, together = model().eval(), model().eval()
    layers = together.base_model.model.model.layers
    for layer in layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(together, mesh=init_device_mesh("cpu", (2,)))
    optimizers = [torch.optim.AdamW(trained(one), lr=1e-2) for one in (alone, together)]
    squeezers = [
        Squeezer(one, optimizer, SCHEDULE) for one, optimizer in zip((alone, together), optimizers, strict=True)
    ]
    kept = trained(together)
    for step in range(SCHEDULE.steps):
        loss_of(together, batch(step, rank)).backward()
        loss_of(alone, torch.cat([batch(step, one) for one in (0, 1)])).backward()
        for optimizer, squeezer in zip(optimizers, squeezers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            squeezer.step()
    whole = [one.full_tensor() for one in trained(together)]
    return {
        "from one process": max(
            float((a - b).detach().abs().max()) for a, b in zip(trained(alone), whole, strict=True)
        ),
        "weights apart": apart(whole),
        "same parameters": all(a is b for a, b in zip(kept, trained(together), strict=True)),
        "sharded": all(optimizers[1].state[one]["exp_avg"].placements == one.placements for one in trained(together)),
        "rank": max(spec.rank for spec in live_adapter(together).layers.values()),
        "local rows": [one.to_local().shape[0] for one in trained(together)][:2],
    }


def counted(calls, bucket):
    calls.append(1)
    future = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


class Gradients(TrainerCallback):
    def __init__(self):
        self.differing, self.ranks = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.differing.append(apart([one.grad for one in trained(model)]))
        self.ranks.append(live_adapter(model).rank)


def in_the_trainer(folder):
    recorder = Gradients()
    one = trainer(folder / "trainer", recorder, ddp_find_unused_parameters=False)
    one.train()
    return {
        "gradients apart": max(recorder.differing),
        "ranks": recorder.ranks,
        "weights apart": apart(trained(one.model)),
        "wrapped": type(one.model_wrapped).__name__,
    }


def disagreement(rank):
    """Process 0 alone sees what is wrong, and every process says it."""

    def decide():
        assert rank == 0
        raise RankError("no rank will do")

    try:
        agreed(decide)
    except RankError as error:
        return str(error)
    return "nothing"


def mixed():
    try:
        wrapped = DistributedDataParallel(model())
        wrapped.mixed_precision = object()
        Squeezer(wrapped, torch.optim.AdamW(trained(wrapped)), SCHEDULE)
    except UnsupportedAdapter as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {"trainer": in_the_trainer(folder)}  # the Trainer begins the process group
    rank = dist.get_rank()
    found["plain"] = loop(rank)
    found["static"] = loop(rank, static_graph=True, gradient_as_bucket_view=True)
    found["unused"] = loop(rank, find_unused_parameters=True, accumulate=2)
    found["hook"] = loop(rank, hook=True)
    found["disagreement"] = disagreement(rank)
    found["mixed"] = mixed()
    found["sharded"] = sharded(rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
