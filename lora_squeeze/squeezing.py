"""A squeeze as its settings say: analyze and, with an output_path, compress."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

from lora_squeeze.adapter import Adapter
from lora_squeeze.analysis import analyze
from lora_squeeze.compression import compress_for
from lora_squeeze.decomposition import Decomposition, decompose
from lora_squeeze.errors import AdapterError, RankError, SettingsError
from lora_squeeze.formats import as_written, check_output_of, open_adapter
from lora_squeeze.formats.dora import magnitudes_of
from lora_squeeze.formats.folder import check_output
from lora_squeeze.limits import check_limits
from lora_squeeze.moments import read_moments
from lora_squeeze.provenance import Provenance, provenance_of
from lora_squeeze.records import Analysis, Compression, Ranks
from lora_squeeze.serving import limits_for
from lora_squeeze.settings import Settings, SqueezeSettings
from lora_squeeze.spectrum import check_device
from lora_squeeze.verbs import choose_ranks, squeeze

__all__ = ["Progress", "check_ahead", "squeeze_as_set"]

# progress("Analyzing", 24) is a context that yields what is to be called with each layer's name.
Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]


@contextmanager
def _silent(_what: str, _total: int) -> Generator[Callable[[str], None], None, None]:
    yield lambda _name: None


def check_ahead(chosen: SqueezeSettings, file: Path | str, *, source: Path | None = None, made: bool = False) -> None:
    """Refuse, before an adapter has been trained, what could not be squeezed once it is.

    source
        the folder where the adapter will be.
    made
        it is there already, so the output may be what was made of it (see `squeeze_as_set`).

    Raises SettingsError for settings, OutputError for the output.
    """
    try:
        check_limits(limits_for(chosen.runtime, chosen.limits, max_lora_rank=chosen.max_lora_rank or None))
        check_device(chosen.device)
    except (RankError, SettingsError) as error:
        raise SettingsError(f"{file}: [squeeze] {error}") from error
    for key in ("calibration", "base_path"):
        if (path := getattr(chosen, key)) and not Path(path).expanduser().exists():
            raise SettingsError(f"{file}: [squeeze] {key}: {path}: no such file or folder; correct it, or leave it out")
    if chosen.output_path:
        output = Path(chosen.output_path)
        known = made and source is not None and _is_made_of(open_adapter(source), output)
        check_output(output, source=source, overwrite=chosen.overwrite or known, in_file=True)


def squeeze_as_set(
    adapter: Adapter,
    settings: Settings,
    *,
    progress: Progress = _silent,
    on_analysis: Callable[[Analysis], None] | None = None,
    on_made: Callable[[], None] | None = None,
) -> tuple[Analysis, Compression | None]:
    """Analyze an adapter and, if there is an output_path, compress it; `adapter_path` is not heeded.

    on_analysis
        called before compressing begins.
    on_made
        called instead of compressing where the output is there already, made of this very adapter by these
        settings, and `overwrite` is not set; without it, such an output is refused like any other.

    Raises AdapterError, RankError or OutputError.
    """
    chosen = settings.squeeze
    by: Literal["mean", "worst"] = "worst" if chosen.by == "worst" else "mean"
    output = Path(chosen.output_path)
    known = bool(chosen.output_path) and on_made is not None and not chosen.overwrite and _is_made_of(adapter, output)
    if chosen.output_path:
        check_output_of(adapter, output, overwrite=chosen.overwrite or known, in_file=True)
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
    if known and on_made is not None:
        if _would_be_the_same(decomposition, ranks, chosen, output):
            on_made()
            return analysis, None
        check_output_of(adapter, output, overwrite=False, in_file=True)
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


def _is_made_of(adapter: Adapter, output: Path) -> bool:
    """Whether the adapter that lies there says that it was made of this one, in whatever way."""
    try:
        stated = provenance_of(open_adapter(output)) if output.exists() else None
        return stated is not None and stated.source_sha256 == adapter.sha256()
    except AdapterError:
        return False


def _would_be_the_same(decomposition: Decomposition, ranks: Ranks, chosen: SqueezeSettings, output: Path) -> bool:
    """Whether what lies there, made of this adapter, is what would be made of it by these settings."""
    adapter = decomposition.adapter
    planned = as_written(compress_for(decomposition, ranks, runtime=chosen.runtime, dtype=chosen.dtype or None))
    there = open_adapter(output)
    of_plan, of_there = provenance_of(planned), provenance_of(there)
    assert of_plan is not None, "it says of what it is made"
    of_plan = replace(of_plan, fitted=bool(chosen.base_path) and bool(magnitudes_of(adapter)))
    shapes = [
        {name: (spec.rank, spec.down_dtype, spec.up_dtype) for name, spec in one.layers.items()}
        for one in (planned, there)
    ]
    return of_there is not None and _settings_of(of_plan) == _settings_of(of_there) and shapes[0] == shapes[1]


def _settings_of(stated: Provenance) -> tuple[object, ...]:
    """What a provenance says but for hashes and errors, which are known once a file has been written."""
    fields = json.loads(stated.to_json())  # where one rank of all layers is one number
    return fields["policy"], fields["ranks"], stated.fitted
