"""Every policy over a grid: the numbers are those that `plan` and `compress` give for the same spelling."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from lora_squeeze import decompose, open_adapter
from lora_squeeze.analysis import analyze
from lora_squeeze.errors import LoraSqueezeError, RankError
from lora_squeeze.exploration import BUDGETS, RETENTIONS, Exploration, explore_analysis
from lora_squeeze.limits import Limits
from lora_squeeze.policies import POLICIES
from lora_squeeze.records import Spectrum
from lora_squeeze.serving import RUNTIMES, check
from lora_squeeze.verbs import choose_ranks, explore_adapter, outcome, squeeze
from lora_squeeze.verdicts import judge
from tests.adapters import BERT, make_adapter, pair, write_raw


@pytest.fixture(scope="module")
def decomposition(tmp_path_factory):
    folder = make_adapter(tmp_path_factory.mktemp("adapter"), r=12)
    return decompose(open_adapter(folder))


@pytest.fixture(scope="module")
def exploration(decomposition):
    return explore_adapter(decomposition)


def test_all_policies_are_there_from_little_to_everything(exploration):
    assert list(dict.fromkeys(setting.policy for setting in exploration.settings)) == list(POLICIES)
    for policy in POLICIES:
        settings = [setting for setting in exploration.settings if setting.policy == policy]
        kept = [setting.outcome.parameters for setting in settings]
        assert kept == sorted(kept)
        assert settings[0].outcome.parameters <= 1 / 12 * settings[0].outcome.source_parameters
        assert settings[-1].outcome.energy_kept == pytest.approx(1.0, abs=0.02)
        assert len({setting.ranks for setting in settings}) == len(settings)


def test_every_setting_can_be_repeated(decomposition, exploration):
    for setting in exploration.settings:
        ranks = choose_ranks(decomposition, setting.spelling)
        assert tuple(ranks.by_layer.values()) == setting.ranks
        assert outcome(decomposition, ranks) == setting.outcome
        assert setting.plan(exploration.analysis).by_layer == ranks.by_layer


def test_a_size_is_the_size_of_the_file(decomposition, exploration, tmp_path):
    setting = next(one for one in exploration.settings if one.policy == "size")
    written = squeeze(decomposition, choose_ranks(decomposition, setting.spelling), tmp_path / "out")
    assert written.bytes_after == setting.outcome.file_bytes
    assert written.parameters_after == setting.outcome.parameters


def test_verdicts_are_those_of_adapters_really_written(decomposition, exploration, tmp_path):
    for number, setting in enumerate(exploration.settings[::40]):
        plan = setting.plan(exploration.analysis)
        squeeze(decomposition, plan, tmp_path / f"{number}")
        written = open_adapter(tmp_path / f"{number}")
        for verdict in setting.verdicts:
            assert (verdict.loads == "as it is") == (not check(written, verdict.runtime))
            if verdict.loads == "fitted" and verdict.needs == (f"--for {verdict.runtime}",):
                squeeze(decomposition, plan, tmp_path / f"{number}-{verdict.runtime}", runtime=verdict.runtime)
                fitted = open_adapter(tmp_path / f"{number}-{verdict.runtime}")
                assert {spec.rank for spec in fitted.layers.values()} == {verdict.padded_to}
    assert {verdict.loads for one in exploration.settings for verdict in one.verdicts} == {"as it is", "fitted", "no"}


def test_a_verdict_says_which_rank_a_server_has_to_allow(tmp_path):
    found = decompose(open_adapter(make_adapter(tmp_path / "a", r=24)))
    verdicts = {one.runtime: one for one in judge(found.adapter, choose_ranks(found, "fixed=24"))}
    assert list(verdicts) == list(RUNTIMES)
    assert verdicts["vllm"].needs == ("a server started with --max-lora-rank 32",)
    assert verdicts["sglang"].loads == "as it is"
    assert verdicts["diffusers"].loads == "no"
    capped = judge(found.adapter, choose_ranks(found, "fixed=24"), runtime="vllm", max_lora_rank=16)
    assert {one.runtime: one.loads for one in capped}["vllm"] == "no"


def test_what_no_squeeze_can_change_is_a_no_with_its_reason(tmp_path):
    folder = make_adapter(tmp_path / "a", BERT, r=4)  # its classifier is trained in full
    found = decompose(open_adapter(folder))
    vllm = next(one for one in judge(found.adapter, choose_ranks(found, "fixed=2")) if one.runtime == "vllm")
    assert vllm.loads == "no"
    assert "modules_to_save" in vllm.reasons[0]


def test_settings_that_were_asked_for_are_there_and_come_first(decomposition):
    found = explore_adapter(decomposition, ["energy=0.91234", "params=123"])
    assert found.first == "energy=0.91234"
    assert {"energy=0.91234", "params=123"} <= {setting.spelling for setting in found.settings}


@pytest.mark.parametrize("wrong", ["energie=0.9", "energy=2", "size=1B"])
def test_an_impossible_setting_that_was_asked_for_is_an_error(decomposition, wrong):
    with pytest.raises(RankError):
        explore_adapter(decomposition, [wrong])


def test_limits_and_runtimes_hold_for_all_settings(decomposition):
    found = explore_adapter(decomposition, limits=Limits(multiple_of=4), runtime="sglang", options=["--for", "sglang"])
    assert {len(set(setting.ranks)) for setting in found.settings} == {1}
    assert {rank for setting in found.settings for rank in setting.ranks} <= {4, 8, 12}
    assert {next(v for v in one.verdicts if v.runtime == "sglang").loads for one in found.settings} == {"as it is"}
    assert found.options == ("--for", "sglang")


def test_limits_that_contradict_each_other_are_an_error(decomposition):
    with pytest.raises(RankError, match="above max_rank"):
        explore_adapter(decomposition, limits=Limits(min_rank=4, max_rank=2))


def test_plans_that_a_format_cannot_store_are_left_out(tmp_path):
    folder = make_adapter(tmp_path / "dora", r=6, use_dora=True)  # magnitudes: no layer can be left out
    found = explore_adapter(decompose(open_adapter(folder)))
    assert {"params", "para-rank"} <= {setting.policy for setting in found.settings}
    assert {setting.outcome.layers_left_out for setting in found.settings} == {0}


def test_the_record_is_read_back(exploration):
    assert Exploration.from_json(exploration.to_json()) == exploration


@pytest.mark.parametrize("damage", [{"settings": [{}]}, {"first": "energy=0.123"}, {"verdicts": []}, {"record": "x"}])
def test_a_damaged_record_is_an_error(exploration, damage):
    import json

    text = json.dumps({**json.loads(exploration.to_json()), **damage})
    with pytest.raises(LoraSqueezeError):
        Exploration.from_json(text)


def test_curves_have_every_rank(exploration):
    assert exploration.curves.target_ranks == tuple(range(1, 13))
    assert exploration.curves.mean_variance[8] == exploration.analysis.mean_variance[8]


def test_an_analysis_is_enough_for_all_but_bytes_and_runtimes(exploration):
    found = explore_analysis(exploration.analysis)
    assert "size" not in {setting.policy for setting in found.settings}
    same = {one.spelling: one for one in exploration.settings}
    common = [one for one in found.settings if one.spelling in same]
    assert len(common) > 50
    for setting in common:
        assert setting.ranks == same[setting.spelling].ranks
        assert setting.outcome == dataclasses.replace(same[setting.spelling].outcome, file_bytes=0)
        assert setting.verdicts == ()
    with pytest.raises(RankError, match="needs the adapter"):
        explore_analysis(exploration.analysis, ["size=1MB"])


def test_settings_lie_close_enough_for_a_slider():
    spectra = [
        Spectrum(f"layers.{i}", 64, 64 + 32 * (i % 3), 64, tuple(torch.logspace(0, -1 - i / 8, 64).tolist()))
        for i in range(24)
    ]
    found = explore_analysis(analyze(spectra)).settings
    for policy in ("energy", "cumulative", "sigma-ratio", "stable-rank", "effective-rank", "knee", "para-energy"):
        kept = [one.outcome.parameters / one.outcome.source_parameters for one in found if one.policy == policy]
        steps = [high - low for low, high in pairwise(kept) if high < 0.8]  # the last digits of a share cost most
        assert max(steps) < 0.06, policy
    assert sorted(BUDGETS) == list(BUDGETS)
    assert sorted(RETENTIONS) == list(RETENTIONS)
    assert (BUDGETS[-1], RETENTIONS[-1]) == (1.0, 1.0)


def test_effective_rank_is_the_exponential_of_the_entropy(tmp_path):
    equal = Spectrum("a", 8, 8, 4, (2.0, 2.0, 2.0, 2.0))
    one = Spectrum("b", 8, 8, 4, (3.0, 0.0, 0.0, 0.0))
    nothing = Spectrum("c", 8, 8, 4, (0.0,) * 4)
    assert [s.effective_rank for s in (equal, one, nothing)] == [pytest.approx(4), pytest.approx(1), 0.0]


def test_an_adapter_that_does_nothing_can_be_explored(tmp_path):
    tensors = {key: torch.zeros_like(value) for key, value in pair("model.layers.0.q_proj", 8, 4, 8).items()}
    found = explore_adapter(decompose(open_adapter(write_raw(tmp_path / "a", tensors))))
    assert found.settings
    assert {setting.outcome.energy_kept for setting in found.settings} == {1.0}
