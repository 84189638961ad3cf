"""Factors that FSDP 2 (`fully_shard`) has divided among the processes.

A sharded parameter is a DTensor that an `FSDPParam` looks after. Its rank changes by letting the FSDPParam
lay out a new one, and putting that into the old parameter object, which optimizers go on pointing at.
What is read here is internal to torch; torch 2.13 is the version that it was tried with.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["gathered", "is_sharded", "owners", "refill", "reshard", "spread"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is divided among processes."""
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor; to be called by every process, if it is sharded."""
    whole: Any = tensor.detach()
    return whole.full_tensor() if is_sharded(tensor) else whole


def spread(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, divided as another one is; as it is, if that is not sharded."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def reshard(model: nn.Module) -> None:
    """Free what a forward pass has gathered, so that modules hold their shards again."""
    for module in _fsdp_modules(model):
        module.reshard()


def owners(model: nn.Module) -> dict[int, tuple[Any, Any]]:
    """id of each sharded parameter → the FSDPParam that looks after it, and its group."""
    found: dict[int, tuple[Any, Any]] = {}
    for module in _fsdp_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            for one in group.fsdp_params if group is not None else ():
                found[id(one.sharded_param)] = (one, group)
    return found


def refill(parameter: nn.Parameter, tensor: Tensor, owner: tuple[Any, Any]) -> None:
    """Give a sharded parameter another (whole) tensor of another shape."""
    one, group = owner
    one._init_sharded_param(nn.Parameter(tensor, parameter.requires_grad), one.device, None, group.mesh_info)
    fresh: Any = one.sharded_param
    sharded: Any = parameter
    sharded.grad = None
    sharded.data = fresh.data
    sharded._local_tensor, sharded._spec = fresh._local_tensor, fresh._spec
    one.sharded_param = sharded
    one._setattr_on_modules(sharded)
    # Buffers of the old shape.
    one.all_gather_outputs, one._unsharded_inner_tensors = [], []
    if hasattr(one, "_unsharded_param"):
        del one._unsharded_param
    if group.post_forward_mesh_info is not None:
        one._init_sharded_post_forward_param_metadata(tensor)
    one.init_dtype_attrs(group.mp_policy)


def _fsdp_modules(model: nn.Module) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return []
    import torch.distributed.fsdp as fsdp

    kind = getattr(fsdp, "FSDPModule", None)  # torch 2.6 and newer
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
