"""A run as a job of its own: what a worker of a campaign does."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lora_squeeze.extras import require
from lora_squeeze.training.settings import read_run_settings

__all__ = ["quiet_libraries", "train_job"]

# What is worth a line of a log, by the names of transformers and TRL.
_LOGGED = ("loss", "reward", "squeeze/rank", "learning_rate", "eval_loss", "eval_accuracy", "eval_reward")


def train_job(config: str, folder: str) -> None:
    """Train as a TOML file says, with a line on standard output for each logging step."""
    from lora_squeeze.training.run import train

    with quiet_libraries():
        train(read_run_settings(Path(config)), folder, on_log=_print_step)


def _print_step(step: int, steps: int, metrics: Mapping[str, float]) -> None:
    said = "  ".join(f"{key} {metrics[key]:.4g}" for key in _LOGGED if key in metrics)
    if said:
        print(f"step {step}/{steps}  {said}", flush=True)


@contextmanager
def quiet_libraries() -> Generator[None, None, None]:
    """Without the bars, reports and warnings of transformers, TRL and datasets about what is done on purpose."""
    datasets, logging = require("datasets", "train"), require("transformers.utils.logging", "train")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
