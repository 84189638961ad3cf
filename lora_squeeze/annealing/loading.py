"""A model that takes on the ranks of what is loaded into it.

A checkpoint of an annealed run has lower ranks than the model that the script builds. Once a model
follows, `load_state_dict` (and with it PEFT's load_adapter and the Trainer's resume and best-model
loading) first gives every module the rank of the factors that are coming.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_squeeze.annealing.live import Site, place, record_ranks, sites, unwrapped
from lora_squeeze.annealing.replicas import rebuild_reducers

__all__ = ["follow_loaded_ranks"]


def follow_loaded_ranks(model: nn.Module, adapter_name: str = "default") -> None:
    """Let the adapter of a model take on any rank that is loaded into it; doing so twice changes nothing.

    Optimizers are not told: load their state afterwards, as every training script does.
    """
    bare = unwrapped(model)
    following: set[str] = bare.__dict__.setdefault("_follows_loaded_ranks", set())
    if adapter_name in following:
        return
    following.add(adapter_name)
    changed: list[str] = []
    for site in sites(bare, adapter_name).values():
        site.module.register_load_state_dict_pre_hook(_hook(site, changed))

    def finish(_module: nn.Module, _keys: Any) -> None:
        if changed:
            changed.clear()
            record_ranks(bare, adapter_name)
            rebuild_reducers(bare)

    bare.register_load_state_dict_post_hook(finish)


def _hook(site: Site, changed: list[str]) -> Any:
    adapter = site.adapter
    down_key, up_key = (
        (f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}")
        if site.kind == "embedding"
        else (f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight")
    )

    def resize(_module: nn.Module, state: Mapping[str, torch.Tensor], prefix: str, *_rest: Any) -> None:
        down, up = state.get(prefix + down_key), state.get(prefix + up_key)
        if down is None or up is None or down.shape == site.down.shape:
            return
        if down.dim() != site.down.dim() or down.shape[1:] != site.down.shape[1:] or up.shape[0] != site.up.shape[0]:
            return  # of another model: load_state_dict says so
        place(site, site.down.new_zeros(down.shape), site.up.new_zeros(up.shape), scale=site.scale)
        changed.append(site.name)

    return resize
