"""Several processes: one decision for all of them, and gradients that are synchronised after it.

DistributedDataParallel's reducer keeps, for every parameter, the node of the autograd graph that its
gradient arrives at, and that node knows the shape. So after a switch the old reducer must be gone before
new nodes are made; `rebuild_reducers` does what unpickling a DistributedDataParallel does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_squeeze.annealing.live import Site, unwrapped
from lora_squeeze.annealing.sharding import is_sharded
from lora_squeeze.errors import LoraSqueezeError, UnsupportedAdapter

__all__ = ["agreed", "check_processes", "on_device", "rebuild_reducers"]

Result = TypeVar("Result")


def agreed(decide: Callable[[], Result]) -> Result:
    """What process 0 decides, in every process; if it fails there, every process raises its error."""
    if not _several():
        return decide()
    answer: Any = [None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except Exception as error:
            answer[0] = error if isinstance(error, LoraSqueezeError) else RuntimeError(f"in process 0: {error!r}")
            dist.broadcast_object_list(answer, src=0)
            raise
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def check_processes(model: nn.Module, sites: dict[str, Site]) -> None:
    """Raise UnsupportedAdapter, with the reason, where ranks cannot change under the model's distribution."""
    for site in sites.values():
        for parameter in (site.down, site.up):
            if hasattr(parameter, "ds_id"):
                raise UnsupportedAdapter(
                    f"module '{site.name}': DeepSpeed ZeRO-3 holds its factors in pieces of fixed sizes, so their "
                    "rank cannot change; train with DistributedDataParallel, or squeeze the adapter after the training"
                )
            if type(parameter).__name__ == "FlatParameter" or (is_sharded(parameter) and None in site.owners):
                raise UnsupportedAdapter(
                    f"module '{site.name}': tensor parallelism has divided its factors, and such pieces cannot change "
                    "their rank; train with DistributedDataParallel or FSDP 2, or squeeze the saved adapter"
                )
    for module in unwrapped(model).modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedAdapter(
                "FullyShardedDataParallel (FSDP 1) keeps the factors in flat parameters of fixed size; use FSDP 2 "
                "(fsdp_version: 2), or DistributedDataParallel"
            )
    for wrapper in _reducing(model):
        if wrapper.mixed_precision is not None:
            raise UnsupportedAdapter(
                "DistributedDataParallel(mixed_precision=…) keeps copies of the parameters in their first sizes; use "
                "torch.autocast instead"
            )


def rebuild_reducers(model: nn.Module) -> None:
    """Let every DistributedDataParallel around a model see its parameters in their new sizes."""
    for wrapper in _reducing(model):
        static = wrapper.static_graph
        # The nodes that the old reducer holds must be gone before the new one asks for them.
        del wrapper.reducer
        wrapper.logger = None
        parameters, sparse = wrapper._build_params_for_reducer()
        names = wrapper._build_debug_param_to_name_mapping(parameters)
        wrapper._ddp_init_helper(parameters, sparse, names, static)
        wrapper._has_rebuilt_buckets = False
        if static:
            wrapper._set_static_graph()
        for hook, state in wrapper._comm_hooks:
            register: Any = vars(dist)["_register_comm_hook"]
            register(wrapper.reducer, state, hook)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reducing(model: nn.Module) -> list[Any]:
    """The DistributedDataParallel modules around a model.

    The Trainer hands its callbacks the bare model, so they are looked for among everything that is alive.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    bare = unwrapped(model)
    found: list[Any] = [
        one
        for one in gc.get_objects()
        if type(one) is DistributedDataParallel and hasattr(one, "reducer") and unwrapped(one) is bare
    ]
    return found


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On this device, in float64 where it has that."""
    return tensor.to(device, dtype=torch.float32 if device.type == "mps" else tensor.dtype)
