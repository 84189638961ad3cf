"""The whole way in one call: open, decompose, choose ranks, compress, save, report what was lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lora_squeeze.adapter import Adapter
from lora_squeeze.analysis import analyze
from lora_squeeze.comparison import outcome_of
from lora_squeeze.compression import compress_for, file_cost
from lora_squeeze.decomposition import Decomposition, decompose
from lora_squeeze.exploration import Exploration, explore
from lora_squeeze.formats import as_written, open_adapter, save_adapter, weights_size
from lora_squeeze.formats.dora import FITTED_NOTE, KEPT_NOTE, magnitudes_of
from lora_squeeze.limits import NO_LIMITS, Limits
from lora_squeeze.magnitudes import fit_magnitudes
from lora_squeeze.policies import By, Policy, fixed, params, parse_policy
from lora_squeeze.records import Analysis, Compression, DoraErrors, Outcome, Ranks, Spectrum, SqueezedLayer
from lora_squeeze.serving import caveats, limits_for, refuse_unloadable, rules_of
from lora_squeeze.summary import show
from lora_squeeze.verdicts import remembering_judge

__all__ = [
    "analyze_adapter",
    "choose_ranks",
    "compress_adapter",
    "explore_adapter",
    "full_rank",
    "outcome",
    "squeeze",
]


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
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Compression:
    """Write an adapter whose layers have at most `target_rank`, and report what that cost.

    The result has the source's format; what sets the scale (lora_alpha, alpha tensors) is adjusted
    so that the effective scale stays.
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
        base=base,
        overwrite=overwrite,
    )


def choose_ranks(
    decomposition: Decomposition,
    policy: str = "variance=0.95",
    *,
    by: By = "mean",
    limits: Limits = NO_LIMITS,
    dtype: str | None = None,
    runtime: str = "",
    max_lora_rank: int | None = None,
) -> Ranks:
    """Apply a policy, spelled NAME=VALUE, to a decomposed adapter.

    by
        for `variance`: whether the mean or the worst layer must reach it.
    dtype, runtime
        of the file that will be written: `size` needs to know.
    runtime, max_lora_rank
        tighten the limits to what that runtime loads; "" is whatever reads the adapter's format.

    Raises RankError for a policy that is unknown, impossible or contradicts the limits.
    """
    chosen = parse_policy(policy)
    limits = limits_for(runtime, limits, max_lora_rank=max_lora_rank)
    spectra = decomposition.spectra
    options: dict[str, Any] = {"by": by} if chosen.name == "variance" else {}
    if chosen.name == "size":
        options["cost"] = file_cost(decomposition.adapter, dtype=dtype, runtime=runtime)
    if rules_of(runtime).mixed_ranks:
        return chosen.choose(spectra, limits=limits, **options)
    return _equal_ranks(chosen, spectra, limits, options)


def _equal_ranks(chosen: Policy, spectra: Sequence[Spectrum], limits: Limits, options: Mapping[str, Any]) -> Ranks:
    """Where layers of a lower rank will be padded to the largest, they cost as much as if they had it."""
    largest = max(spectrum.rank for spectrum in spectra)
    padded = [replace(spectrum, rank=largest) for spectrum in spectra]
    choose = chosen.choose
    if chosen.name == "params":
        whole = sum(spectrum.rank * spectrum.component_size for spectrum in spectra)
        choose = partial(params, budget=chosen.value, whole=whole)
    ranks = choose(padded, limits=limits, **options)
    own = {spectrum.name: min(ranks.by_layer[spectrum.name], spectrum.rank) for spectrum in spectra}
    return Ranks(policy=chosen.spelling, by_layer=own)


def full_rank(adapter: Adapter) -> Ranks:
    """The plan that loses nothing: each layer its own rank, or the smaller of its dimensions."""
    own = {name: min(spec.rank, spec.out_features, spec.in_features) for name, spec in adapter.layers.items()}
    return Ranks(policy="full rank", by_layer=own)


def outcome(decomposition: Decomposition, ranks: Ranks, *, dtype: str | None = None, runtime: str = "") -> Outcome:
    """What a plan would keep and cost; nothing is computed for it but numbers."""
    cost = file_cost(decomposition.adapter, dtype=dtype, runtime=runtime)
    found = outcome_of(decomposition.spectra, ranks, cost=cost)
    if rules_of(runtime).mixed_ranks:
        return found
    return replace(found, parameters=compress_for(decomposition, ranks, runtime=runtime, dtype=dtype).parameters)


def explore_adapter(
    decomposition: Decomposition,
    policies: Sequence[str] = ("variance=0.95",),
    *,
    by: By = "mean",
    limits: Limits = NO_LIMITS,
    dtype: str | None = None,
    runtime: str = "",
    max_lora_rank: int | None = None,
    options: Iterable[str] = (),
    on_policy: Callable[[str], None] | None = None,
) -> Exploration:
    """Every policy over a grid of its values: ranks, sizes, energy kept and the runtimes that load them.

    policies
        spellings that have to be among the settings, and the first is to be looked at first;
        default: what `compress` takes.
    by, limits, dtype, runtime, max_lora_rank
        hold for all settings; see `choose_ranks`.
    options
        the same as the command line spells it, for commands that repeat a setting.

    Raises RankError for policies or limits that are impossible.
    """
    adapter = decomposition.adapter
    found_by: dict[str, Any] = {"limits": limits, "dtype": dtype, "runtime": runtime, "max_lora_rank": max_lora_rank}
    analysis = analyze(decomposition.spectra, source=adapter.source, by=by, notes=adapter.notes)
    settings = explore(
        analysis,
        choose=lambda spelling: choose_ranks(decomposition, spelling, by=by, **found_by),
        measure=partial(outcome, decomposition, dtype=dtype, runtime=runtime),
        judge=remembering_judge(adapter, dtype=dtype, runtime=runtime, max_lora_rank=max_lora_rank),
        largest_file=weights_size(adapter),
        also=policies,
        on_policy=on_policy,
    )
    return Exploration(
        analysis=analysis,
        settings=settings,
        first=policies[0],
        summary=show(adapter),
        source_sha256=adapter.sha256(),
        options=tuple(options),
    )


def squeeze(
    source: Adapter | Decomposition,
    ranks: Ranks,
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str = "cpu",
    method: str = "gram",
    runtime: str = "",
    max_lora_rank: int | None = None,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> Compression:
    """Apply a plan of ranks to an adapter, save the result and report each layer's relative error.

    source
        an adapter (decomposed on the way, in one pass over the file) or its decomposition.
    method, device
        of the decomposition on the way; one that is given has its own, and another is an error.
    runtime, max_lora_rank
        write what this runtime loads (see `lora_squeeze.serving`), or raise UnsupportedAdapter.
    base
        the base model's folder or safetensors file: DoRA's magnitudes are fitted to the squeezed
        directions (see `lora_squeeze.magnitudes`). Without it they are kept.
    on_layer
        called with each layer's name when it has been squeezed.

    The errors are those of the very numbers that were written: they are taken after rounding,
    and `save_adapter` checks that the disk holds the bytes they were taken from.
    Raises AdapterError, RankError, SettingsError or OutputError; nothing is left behind then.
    """
    layers: dict[str, SqueezedLayer] = {}

    def observe(layer: SqueezedLayer) -> None:
        layers[layer.spectrum.name] = layer
        if on_layer is not None and layer.spectrum.name not in fitted:
            on_layer(layer.spectrum.name)

    if not isinstance(source, Decomposition) and 0 in ranks.by_layer.values():
        source = decompose(source, method=method, device=device)  # what is left out is reported as well
    adapter = source.adapter if isinstance(source, Decomposition) else source
    fitted = magnitudes_of(adapter) if base is not None else {}
    squeezed = compress_for(source, ranks, runtime=runtime, dtype=dtype, device=device, method=method, on_layer=observe)
    refuse_unloadable(as_written(squeezed), runtime, max_lora_rank=max_lora_rank)
    dora: Callable[[], DoraErrors] | None = None
    if base is not None:
        squeezed, dora = fit_magnitudes(adapter, squeezed, base=base, on_layer=on_layer)
    written = save_adapter(squeezed, output, overwrite=overwrite)
    if isinstance(source, Decomposition):
        for spectrum in source.spectra:
            layers.setdefault(spectrum.name, SqueezedLayer(spectrum, 0, 1.0 if spectrum.energy > 0 else 0.0))
    return Compression(
        source=adapter.source,
        output=str(output),
        policy=ranks.policy,
        layers=tuple(layers[name] for name in adapter.layers),
        bytes_before=adapter.weights.stat().st_size if adapter.weights else weights_size(adapter),
        bytes_after=written.nbytes,
        parameters_before=adapter.parameters,
        parameters_after=squeezed.parameters,
        notes=(*(FITTED_NOTE if dora and note == KEPT_NOTE else note for note in adapter.notes), *caveats(squeezed)),
        dora=dora() if dora else None,
    )
