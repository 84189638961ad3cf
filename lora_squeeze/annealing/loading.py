"""A model that takes on the ranks of what is loaded into it.

A checkpoint of an annealed run has lower ranks than the model that the script builds. Once a model
follows, `load_state_dict` (and with it PEFT's load_adapter and the Trainer's resume and best-model
loading) first gives every module the rank of the factors that are coming.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_squeeze.annealing.live import place, record_ranks, site_of, sites, unwrapped
from lora_squeeze.annealing.replicas import rebuild_reducers
from lora_squeeze.annealing.sharding import is_sharded

__all__ = ["follow_loaded_ranks"]


def follow_loaded_ranks(model: nn.Module, adapter_name: str = "default") -> None:
    """Let the adapter of a model take on any rank that is loaded into it; doing so twice changes nothing.

    Optimizers are not told: load their state afterwards, as every training script does.
    """
    bare: Any = unwrapped(model)
    following: set[str] = bare.__dict__.setdefault("_follows_loaded_ranks", set())
    if adapter_name in following:
        return
    following.add(adapter_name)
    # Partial functions that are told their module, so that the model can still be copied and pickled.
    for site in sites(bare, adapter_name).values():
        resize = partial(_resize, adapter_name, site.key)
        if hasattr(site.module, "register_load_state_dict_pre_hook"):
            site.module.register_load_state_dict_pre_hook(resize)
        else:  # torch 2.4
            site.module._register_load_state_dict_pre_hook(resize, with_module=True)
    bare.register_load_state_dict_post_hook(partial(_record, adapter_name))


def _resize(adapter: str, name: str, module: Any, state: Mapping[str, torch.Tensor], prefix: str, *_rest: Any) -> None:
    """Give one module the rank of the factors that are about to be loaded."""
    site = site_of(name, module, adapter)
    if site.kind == "embedding":
        down, up = (state.get(f"{prefix}lora_embedding_{factor}.{adapter}") for factor in "AB")
    else:
        down, up = (state.get(f"{prefix}lora_{factor}.{adapter}.weight") for factor in "AB")
    if down is None or up is None or down.shape == site.down.shape or is_sharded(site.down):
        return
    if down.dim() != site.down.dim() or down.shape[1:] != site.down.shape[1:] or up.shape[0] != site.up.shape[0]:
        return  # of another model: load_state_dict says so
    place(site, site.down.new_zeros(down.shape), site.up.new_zeros(up.shape), scale=site.scale)
    module._rank_was_loaded = True


def _record(adapter: str, model: nn.Module, _keys: Any) -> None:
    """Once everything is loaded: the configuration, and the processes that share the parameters."""
    loaded = [site.module for site in sites(model, adapter).values() if hasattr(site.module, "_rank_was_loaded")]
    for module in loaded:
        del module._rank_was_loaded
    if loaded:
        record_ranks(model, adapter)
        rebuild_reducers(model)
