"""An adapter evaluated as the run that trained it was: what drops nothing scores what the run itself scored."""

import pytest
from quick_runs import models, quick  # noqa: F401

from lora_squeeze import compress_adapter
from lora_squeeze.training.run import evaluate_adapter, train

SIZES = {"batch_size": 4, "lr": 2e-2, "max_steps": 8}
DATA = {"eval_fraction": 0.3, "max_eval_examples": 8}


def scores(metrics):
    """All that says how well it did, and nothing on how fast."""
    return {
        key: value
        for key, value in metrics.items()
        if key.startswith("eval_") and not key.endswith(("runtime", "_per_second", "_num_tokens"))
    }


def same_scores(settings, folder, scratch):
    record = train(settings, folder)
    compress_adapter(folder / "final", scratch / "full", record.rank)
    found = scores(evaluate_adapter(settings, scratch / "full", scratch=scratch))
    own = scores(record.metrics)
    assert found.keys() >= own.keys()
    assert {key: found[key] for key in own} == pytest.approx(own, rel=1e-3, abs=1e-4)
    return own


@pytest.mark.parametrize("more", [{}, {"lora": {"dora": True}}], ids=["lora", "dora"])
def test_preferences_are_measured_against_what_the_run_began_with(more, quick, tmp_path):
    settings = quick("builtin:preferences:40", training={**SIZES, "method": "dpo"}, data=DATA, **more)
    (tmp_path / "scratch").mkdir()
    own = same_scores(settings, tmp_path / "run", tmp_path / "scratch")
    assert abs(own["eval_rewards/margins"]) > 1e-3  # against itself, all rewards are zero


@pytest.mark.parametrize("squeezed", [0, 2])
def test_preferences_learned_on_top_of_an_adapter_are_measured_against_that(squeezed, quick, tmp_path):
    train(quick("builtin:sums:40", training=SIZES), tmp_path / "before")
    settings = quick(
        "builtin:preferences:40",
        model={"lora_rank": 0, "adapter": str(tmp_path / "before" / "final"), "squeeze_to": squeezed},
        training={**SIZES, "method": "dpo"},
        data=DATA,
    )
    (tmp_path / "scratch").mkdir()
    own = same_scores(settings, tmp_path / "run", tmp_path / "scratch")
    assert abs(own["eval_rewards/margins"]) > 1e-3


@pytest.mark.parametrize(
    ("method", "source", "base"),
    [("sft", "builtin:sums:40", "llama"), ("classify", "builtin:sentiment:40", "bert")],
)
def test_other_methods(method, source, base, quick, tmp_path):
    (tmp_path / "scratch").mkdir()
    settings = quick(source, base=base, training={**SIZES, "method": method}, data=DATA)
    same_scores(settings, tmp_path / "run", tmp_path / "scratch")
