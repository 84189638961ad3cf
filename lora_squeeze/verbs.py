"""The whole way in one call: open, decompose, choose ranks, compress, save, report what was lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from lora_squeeze.adapter import Adapter
from lora_squeeze.analysis import analyze
from lora_squeeze.compression import compress
from lora_squeeze.decomposition import Decomposition, decompose
from lora_squeeze.formats import open_adapter, save_adapter
from lora_squeeze.formats.folder import check_output
from lora_squeeze.policies import By, fixed
from lora_squeeze.records import Analysis, Compression, LayerError, Ranks, Spectrum

__all__ = ["analyze_adapter", "compress_adapter", "squeeze", "write_squeezed"]

Choose = Callable[[Sequence[Spectrum]], Ranks]


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
    return squeeze(
        open_adapter(adapter_path),
        output_path,
        partial(fixed, rank=target_rank),
        device=device,
        dtype=dtype,
        method=method,
        overwrite=overwrite,
    )


def squeeze(
    adapter: Adapter,
    output: str | os.PathLike[str],
    choose: Choose,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    method: str = "gram",
    overwrite: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> Compression:
    """Decompose an adapter, let `choose` turn its spectra into ranks, and write the result.

    on_layer
        called twice for every layer: when it has been decomposed and when it has been squeezed.
    """
    check_output(Path(output), source=adapter.weights.parent if adapter.weights else None, overwrite=overwrite)
    decomposition = decompose(adapter, method=method, device=device, on_layer=on_layer)
    ranks = choose(decomposition.spectra)
    return write_squeezed(
        decomposition, ranks, output, dtype=dtype, device=device, overwrite=overwrite, on_layer=on_layer
    )


def write_squeezed(
    decomposition: Decomposition,
    ranks: Ranks,
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> Compression:
    """Apply a plan to a decomposed adapter, save it and report each layer's relative error.

    The errors are those of the very numbers that were written: they are taken after rounding,
    and `save_adapter` checks that the disk holds the bytes they were taken from.
    """
    errors: dict[str, LayerError] = {}

    def observe(error: LayerError) -> None:
        errors[error.name] = error
        if on_layer is not None:
            on_layer(error.name)

    source = decomposition.adapter
    squeezed = compress(decomposition, ranks, dtype=dtype, device=device, on_layer=observe)
    written = save_adapter(squeezed, output, overwrite=overwrite)
    return Compression(
        source=source.source,
        output=str(output),
        policy=ranks.policy,
        layers=tuple(errors[name] for name in source.layers),
        bytes_before=source.weights.stat().st_size if source.weights else 0,
        bytes_after=written.nbytes,
        parameters_before=source.parameters,
        parameters_after=squeezed.parameters,
        notes=source.notes,
    )
