"""The whole way in one call: open, decompose, choose ranks, compress, save, report what was lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from lora_squeeze.adapter import Adapter
from lora_squeeze.analysis import analyze
from lora_squeeze.compression import compress
from lora_squeeze.decomposition import Decomposition, decompose
from lora_squeeze.formats import open_adapter, save_adapter
from lora_squeeze.policies import By, fixed
from lora_squeeze.records import Analysis, Compression, Ranks, SqueezedLayer

__all__ = ["analyze_adapter", "compress_adapter", "squeeze"]


def analyze_adapter(
    adapter_path: str | os.PathLike[str],
    source_rank: int = 0,
    target_ranks: Iterable[int] | None = None,
    min_variance_retention: float = 0.95,
    device: str = "cpu",
    *,
    by: By = "mean",
    method: str = "gram",
    on_layer: Callable[[str], None] | None = None,
) -> Analysis:
    """Measure what each candidate rank of a saved adapter retains, and recommend one.

    source_rank
        the rank you believe it has; 0 takes it from the tensors.
    target_ranks
        candidates; default: powers of two up to the source rank, and the source rank.
    min_variance_retention
        fraction of Σσ² that the mean over layers (`by="worst"`: every layer) must retain.

    Raises AdapterError for a damaged adapter, RankError for impossible ranks or thresholds.
    """
    adapter = open_adapter(adapter_path)
    return analyze(
        decompose(adapter, method=method, device=device, on_layer=on_layer).spectra,
        source=adapter.source,
        source_rank=source_rank,
        target_ranks=target_ranks or (),
        min_variance_retention=min_variance_retention,
        by=by,
        notes=adapter.notes,
    )


def compress_adapter(
    adapter_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    target_rank: int,
    device: str = "cpu",
    *,
    dtype: str | None = None,
    method: str = "gram",
    overwrite: bool = False,
) -> Compression:
    """Write an adapter whose layers have at most `target_rank`, and report what that cost.

    The result is a PEFT folder; r and lora_alpha are adjusted so that the effective scale stays.
    Raises AdapterError, RankError or OutputError; nothing is left behind then.
    """
    adapter = open_adapter(adapter_path)
    return squeeze(
        adapter,
        fixed(adapter.layers.values(), target_rank),
        output_path,
        dtype=dtype,
        device=device,
        method=method,
        overwrite=overwrite,
    )


def squeeze(
    source: Adapter | Decomposition,
    ranks: Ranks,
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str = "cpu",
    method: str = "gram",
    overwrite: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> Compression:
    """Apply a plan of ranks to an adapter, save the result and report each layer's relative error.

    source
        an adapter (decomposed on the way, in one pass over the file) or its decomposition.
    on_layer
        called with each layer's name when it has been squeezed.

    The errors are those of the very numbers that were written: they are taken after rounding,
    and `save_adapter` checks that the disk holds the bytes they were taken from.
    Raises AdapterError, RankError or OutputError; nothing is left behind then.
    """
    layers: dict[str, SqueezedLayer] = {}

    def observe(layer: SqueezedLayer) -> None:
        layers[layer.spectrum.name] = layer
        if on_layer is not None:
            on_layer(layer.spectrum.name)

    adapter = source.adapter if isinstance(source, Decomposition) else source
    squeezed = compress(source, ranks, dtype=dtype, device=device, method=method, on_layer=observe)
    written = save_adapter(squeezed, output, overwrite=overwrite)
    return Compression(
        source=adapter.source,
        output=str(output),
        policy=ranks.policy,
        layers=tuple(layers[name] for name in adapter.layers),
        bytes_before=adapter.weights.stat().st_size if adapter.weights else 0,
        bytes_after=written.nbytes,
        parameters_before=adapter.parameters,
        parameters_after=squeezed.parameters,
        notes=adapter.notes,
    )
