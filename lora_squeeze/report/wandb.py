"""The W&B run `squeeze-analysis`, as the `squeeze` document describes it."""

from __future__ import annotations

from lora_squeeze.extras import require
from lora_squeeze.records import Analysis

__all__ = ["COLUMNS", "log_squeeze"]

COLUMNS = ("rank", "mean_variance", "min_variance", "max_variance", "recommended")


def log_squeeze(analysis: Analysis, *, project: str, entity: str = "", group: str = "", directory: str = "") -> str:
    """Write table, curves and summary of an analysis, and return the run's address, or its folder when offline.

    Raises MissingExtra, and whatever W&B raises.
    """
    wandb = require("wandb", "wandb")
    facts = {
        "source_rank": analysis.source_rank,
        "recommended_rank": analysis.recommended_rank,
        "min_variance_retention": analysis.min_variance_retention,
        "num_layers": len(analysis.spectra),
    }
    run = wandb.init(
        project=project,
        entity=entity or None,
        group=group or None,
        dir=directory or None,
        name="squeeze-analysis",
        job_type="squeeze",
        tags=["squeeze", f"rank-{analysis.recommended_rank}"],
        config=facts,
        reinit="create_new",  # whatever run of this process is open stays so
    )
    try:
        table = wandb.Table(columns=list(COLUMNS))
        for rank in analysis.target_ranks:
            curves = (analysis.mean_variance, analysis.min_variance, analysis.max_variance)
            table.add_data(rank, *(curve[rank] for curve in curves), rank == analysis.recommended_rank)
            names = ("squeeze/mean_variance", "squeeze/min_variance", "squeeze/max_variance")
            values = (curve[rank] for curve in curves)
            run.log({"squeeze/rank": rank, **dict(zip(names, values, strict=True))})
        run.log({"squeeze/variance_table": table})
        for name, value in facts.items():
            run.summary[f"squeeze/{name}"] = value
        return str(run.url or run.dir)
    finally:
        run.finish()
