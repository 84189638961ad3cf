"""A squeeze as its settings say: analyze and, with an output_path, compress."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from lora_squeeze.adapter import Adapter
from lora_squeeze.analysis import analyze
from lora_squeeze.decomposition import decompose
from lora_squeeze.formats import check_output_of
from lora_squeeze.moments import read_moments
from lora_squeeze.records import Analysis, Compression
from lora_squeeze.settings import Settings
from lora_squeeze.verbs import choose_ranks, squeeze

__all__ = ["Progress", "squeeze_as_set"]

# progress("Analyzing", 24) is a context that yields what is to be called with each layer's name.
Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]


@contextmanager
def _silent(_what: str, _total: int) -> Generator[Callable[[str], None], None, None]:
    yield lambda _name: None


def squeeze_as_set(
    adapter: Adapter,
    settings: Settings,
    *,
    progress: Progress = _silent,
    on_analysis: Callable[[Analysis], None] | None = None,
) -> tuple[Analysis, Compression | None]:
    """Analyze an adapter and, if there is an output_path, compress it; `adapter_path` is not heeded.

    on_analysis
        called before compressing begins.

    Raises AdapterError, RankError or OutputError.
    """
    chosen = settings.squeeze
    by: Literal["mean", "worst"] = "worst" if chosen.by == "worst" else "mean"
    if chosen.output_path:
        check_output_of(adapter, Path(chosen.output_path), overwrite=chosen.overwrite)
    moments = read_moments(Path(chosen.calibration)) if chosen.calibration else None
    with progress("Analyzing", len(adapter.layers)) as advance:
        decomposition = decompose(
            adapter, method=chosen.method, device=chosen.device, moments=moments, on_layer=advance
        )
    analysis = analyze(
        decomposition.spectra,
        source=adapter.source,
        source_rank=settings.source_rank,
        target_ranks=chosen.target_ranks,
        min_variance_retention=chosen.min_variance_retention,
        by=by,
        notes=decomposition.adapter.notes,
    )
    if on_analysis is not None:
        on_analysis(analysis)
    if not chosen.output_path:
        return analysis, None
    dtype = chosen.dtype.upper() or None
    runtime, cap = chosen.runtime, chosen.max_lora_rank or None
    policy = chosen.policy or f"fixed={chosen.compress_to or analysis.recommended_rank}"
    ranks = choose_ranks(
        decomposition, policy, by=by, limits=chosen.limits, dtype=dtype, runtime=runtime, max_lora_rank=cap
    )
    with progress("Squeezing", len(adapter.layers)) as advance:
        compression = squeeze(
            decomposition,
            ranks,
            chosen.output_path,
            dtype=dtype,
            device=chosen.device,
            runtime=runtime,
            max_lora_rank=cap,
            base=chosen.base_path or None,
            overwrite=chosen.overwrite,
            on_layer=advance,
        )
    return analysis, compression
