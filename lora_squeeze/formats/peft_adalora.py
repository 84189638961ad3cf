"""AdaLoRA, read as the plain LoRA that it amounts to.

PEFT computes ΔW = B (A ∘ E) · lora_alpha / (ranknum + 1e-5), where `ranknum` stays init_r even after
directions have been pruned, and lora_alpha ≤ 0 stands for the module's own rank (arXiv 2303.10512).
E goes into A, the rest becomes the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_squeeze.adapter import LayerSpec
from lora_squeeze.errors import AdapterError
from lora_squeeze.formats.peft_config import number
from lora_squeeze.formats.peft_keys import Keys, Pair
from lora_squeeze.formats.peft_layout import Place
from lora_squeeze.formats.tensors import DTYPES

__all__ = ["adalora_places", "as_lora_config", "pruned_away"]

_FIELDS = (
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "rank_pattern",
)  # fmt: skip


def as_lora_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a LoRA adapter in AdaLoRA's place; ranks and alpha are set when it is written."""
    kept = {field: value for field, value in config.items() if field not in _FIELDS}
    return {**kept, "peft_type": "LORA", "use_rslora": False}


def pruned_away(keys: Keys) -> tuple[str, ...]:
    """Modules of which AdaLoRA kept no direction."""
    return tuple(name for name, pair in keys.pairs.items() if pair.down.shape[:1] == (0,))


def adalora_places(keys: Keys, config: Mapping[str, Any], config_path: Path, path: Path) -> dict[str, Place]:
    """Every layer of an AdaLoRA file. Raises AdapterError for shapes that do not fit together."""
    first_rank = number(config, "init_r", config_path, whole=True)
    alpha = number(config, "lora_alpha", config_path)
    gone = pruned_away(keys)
    return {
        name: Place(pair, 0, 1, _spec(pair, first_rank, alpha, path))
        for name, pair in keys.pairs.items()
        if name not in gone
    }


def _spec(pair: Pair, first_rank: float, alpha: float, path: Path) -> LayerSpec:
    assert pair.values is not None, "sort_keys finds all three"
    down, up, values = pair.down.shape, pair.up.shape, pair.values.shape
    for spec in (pair.down, pair.up, pair.values):
        if spec.dtype not in DTYPES:
            raise AdapterError(f"{path}: '{spec.key}' has dtype {spec.dtype}; factors of {', '.join(DTYPES)} are known")
    if (
        len(down) != 2
        or len(up) != 2
        or 0 in (*down, *up)
        or up[1] != down[0]
        or values not in ((down[0], 1), down[:1])
    ):
        raise AdapterError(
            f"{path}: layer '{pair.module}': lora_A {list(down)}, lora_B {list(up)} and lora_E {list(values)} do not "
            "fit together; the rank must be the first dimension of A and E and the second of B"
        )
    wide = "F64" if "F64" in (pair.down.dtype, pair.values.dtype) else "F32"
    return LayerSpec(
        name=pair.module,
        out_features=up[0],
        in_features=down[1],
        rank=down[0],
        scale=(alpha if alpha > 0 else down[0]) / (first_rank + 1e-5),
        down_dtype=wide,
        up_dtype=pair.up.dtype,
    )
