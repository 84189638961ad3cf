"""The squeeze within a campaign: which rank the first finished run needed, and adapters of that rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_squeeze.campaign.manifest import Manifest, RunEntry, SqueezeEntry, run_folder
from lora_squeeze.campaign.spec import Campaign
from lora_squeeze.formats import open_adapter
from lora_squeeze.records import Analysis
from lora_squeeze.settings import Settings, SqueezeSettings
from lora_squeeze.squeezing import squeeze_as_set

__all__ = ["analyzed", "rows_of", "squeeze_output", "squeezed_too"]


def analyzed(campaign: Campaign, manifest: Manifest, entry: RunEntry, folder: Path) -> tuple[Analysis, SqueezeEntry]:
    """Analyze a finished run's adapter and, with an output_path, compress it.

    Raises AdapterError, RankError or OutputError.
    """
    chosen = _chosen(campaign)
    output = squeeze_output(campaign, entry)
    final = run_folder(folder, entry).final
    settings = Settings(replace(chosen, adapter_path=str(final), output_path=output, overwrite=True))
    analysis, compression = squeeze_as_set(open_adapter(final), settings)
    return analysis, SqueezeEntry(
        status="finished",
        run=entry.name,
        source_rank=analysis.source_rank,
        recommended_rank=analysis.recommended_rank,
        min_variance_retention=analysis.min_variance_retention,
        num_layers=len(analysis.spectra),
        table=rows_of(analysis),
        outputs={entry.name: output} if compression is not None else {},
    )


def squeezed_too(campaign: Campaign, manifest: Manifest, entry: RunEntry, folder: Path) -> str:
    """Compress a later run's adapter as the first one was, and return where it lies."""
    chosen = _chosen(campaign)
    output = squeeze_output(campaign, entry)
    final = run_folder(folder, entry).final
    to = 0 if chosen.policy else chosen.compress_to or manifest.squeeze.recommended_rank
    settings = Settings(
        replace(chosen, adapter_path=str(final), output_path=output, compress_to=to, source_rank=0, overwrite=True)
    )
    squeeze_as_set(open_adapter(final), settings)
    return output


def squeeze_output(campaign: Campaign, entry: RunEntry) -> str:
    """Where a run's squeezed adapter goes: `output_path`, or a folder of its own in it; "" for nowhere."""
    output = _chosen(campaign).output_path
    if not output or not campaign.settings.squeeze_every_run:
        return output
    return str(Path(output) / Path(entry.folder).name)


def rows_of(analysis: Analysis) -> list[dict[str, float | int | bool]]:
    """The variance table with the columns that the `squeeze` document names."""
    return [
        {
            "rank": rank,
            "mean_variance": analysis.mean_variance[rank],
            "min_variance": analysis.min_variance[rank],
            "max_variance": analysis.max_variance[rank],
            "recommended": rank == analysis.recommended_rank,
        }
        for rank in analysis.target_ranks
    ]


def _chosen(campaign: Campaign) -> SqueezeSettings:
    return campaign.common.squeeze or SqueezeSettings()
