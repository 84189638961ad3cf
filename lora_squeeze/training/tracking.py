"""The W&B run that a training reports to, opened here, so that transformers' callback opens none of its own.

The callback would take its tags from an environment variable, which is split at commas, and would
begin another run whenever a training goes on from a checkpoint.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager

from lora_squeeze.errors import TrainingError
from lora_squeeze.extras import require
from lora_squeeze.formats.folder import new_file
from lora_squeeze.training.folder import RunFolder
from lora_squeeze.training.settings import RunSettings

__all__ = ["tracked"]


@contextmanager
def tracked(settings: RunSettings, run: RunFolder) -> Generator[None, None, None]:
    """Report to W&B what is logged inside, if `[logging]` says so; the W&B run is failed if the block fails.

    A run that goes on reports to the W&B run that it began with. Raises MissingExtra, TrainingError.
    """
    logs = settings.logging
    if not logs.wandb_project:
        yield
        return
    wandb = require("wandb", "wandb")
    try:
        opened = wandb.init(
            project=logs.wandb_project,
            entity=logs.wandb_entity or None,
            group=logs.wandb_group or None,
            tags=logs.wandb_tags or None,
            name=logs.wandb_run_name or run.path.name,
            id=os.environ.get("WANDB_RUN_ID") or _id_of(run),
            resume="allow",
        )
    except Exception as error:  # no login, no network, a name that it does not take
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrainingError(
            f"[logging] wandb_project = '{logs.wandb_project}': W&B cannot be reported to: {reason}; `wandb login`, "
            "WANDB_MODE=offline to send it later, or leave wandb_project out"
        ) from error
    with opened:
        yield


def _id_of(run: RunFolder) -> str:
    """What W&B knows the run in this folder by: drawn once, as a path may be another run's on another machine."""
    if run.wandb.exists() and (kept := run.wandb.read_text(encoding="utf-8").strip()):
        return kept
    drawn = secrets.token_hex(8)
    with new_file(run.wandb, overwrite=True) as file:
        file.write_text(drawn + "\n", encoding="utf-8")
    return drawn
