"""The smallest adapter that is good enough: what is returned has passed, and the path is told."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from evaluated import save_adapter
from tiny import save_tiny_bert, save_tiny_llama

from lora_squeeze import decompose, open_adapter
from lora_squeeze.cli import main
from lora_squeeze.data import Choice, read_examples
from lora_squeeze.errors import DataError, RankError, SettingsError
from lora_squeeze.evaluation.keep import Criterion, bisected, judge, keep_quality, ladder
from lora_squeeze.evaluation.measure import run, trial_of
from lora_squeeze.evaluation.subject import loaded, open_subject
from lora_squeeze.limits import Limits


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    language, classifier = save_tiny_llama(folder / "llama"), save_tiny_bert(folder / "bert")
    save_adapter(language, folder / "a", r=8, size=0.15)
    save_adapter(classifier, folder / "c", task="SEQ_CLS", target_modules=["query", "value", "dense"], r=8, size=0.1)
    return folder


def subject_of(world, name, examples):
    base = world / ("bert" if name == "c" else "llama")
    return open_subject([str(world / name)], base=str(base), examples=examples, dtype="f32")


DATA = {
    "loss": ("a", "builtin:sums:12"),
    "accuracy": ("c", "builtin:sentiment:40"),
    "agreement": ("a", "builtin:texts:5"),
}


def search(world, tmp_path, metric, keep, **options):
    name, source = DATA[metric]
    examples = read_examples(source)
    subject = subject_of(world, name, examples)
    decomposition = decompose(subject.adapters["default"])
    criterion = Criterion(metric, keep, confident=options.pop("confident", False), draws=200)
    trial = trial_of(subject, examples)
    return keep_quality(subject, decomposition, tmp_path / "out", trial, criterion, **options)


@pytest.mark.parametrize("policies", [["params"], ["fixed"], ["fixed", "para-rank"]], ids=str)
@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("metric", DATA)
def test_what_is_written_passes_its_own_criterion(world, tmp_path, metric, keep, policies):
    kept = search(world, tmp_path, metric, keep, policies=policies)
    name, source = DATA[metric]
    examples = read_examples(source)
    base = world / ("bert" if name == "c" else "llama")
    subject = open_subject([str(world / name), str(tmp_path / "out")], base=str(base), examples=examples, dtype="f32")
    scores = run(subject, [loaded(subject), loaded(subject, "adapter1")], trial_of(subject, examples))
    first, own = (float(one[metric][0].sum() / one[metric][1].sum()) for one in scores)
    assert own == pytest.approx(kept.confirmed.value, rel=1e-5)
    assert kept.original == pytest.approx(first, rel=1e-5)
    reached = {"loss": first / own, "accuracy": own / first, "agreement": own}[metric]
    assert reached >= keep - 1e-6
    assert kept.confirmed.passes
    assert kept.confirmed.policy.endswith(", as written")
    assert kept.confirmed.parameters == open_adapter(tmp_path / "out").parameters == kept.compression.parameters_after


@pytest.mark.parametrize("metric", DATA)
def test_the_next_smaller_plan_that_was_tried_fails(world, tmp_path, metric):
    kept = search(world, tmp_path, metric, 0.95, policies=["fixed"])
    sizes = {step.parameters: step.passes for step in kept.steps[:-1]}
    smaller = [size for size, passes in sizes.items() if size < kept.confirmed.parameters]
    assert not any(sizes[size] for size in smaller)
    assert len(kept.steps) <= 3 + 1  # 8 ranks: three halvings, and the confirmation


def test_less_to_keep_is_never_larger(world, tmp_path):
    sizes = [
        search(world, tmp_path, "loss", keep, overwrite=True).confirmed.parameters for keep in (0.3, 0.8, 0.95, 0.9999)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_confidence_asks_for_more(world, tmp_path):
    plain = search(world, tmp_path, "accuracy", 0.9)
    confident = search(world, tmp_path, "accuracy", 0.9, confident=True, overwrite=True)
    assert confident.confirmed.parameters >= plain.confirmed.parameters
    assert confident.confirmed.confidence >= 0.95


def test_a_result_of_chance_is_marked():
    torch.manual_seed(0)
    ones = torch.ones(50, dtype=torch.float64)
    original = {"accuracy": ((torch.rand(50) < 0.8).double(), ones)}
    other = {"accuracy": (original["accuracy"][0].roll(7), ones)}
    value, passes, confidence = judge(Criterion("accuracy", 1.0), other, original)
    assert passes
    assert value == pytest.approx(float(original["accuracy"][0].mean()))
    assert 0.3 < confidence < 0.8
    assert not judge(Criterion("accuracy", 1.0, confident=True), other, original)[1]
    assert judge(Criterion("accuracy", 1.0, confident=True), original, original) == (value, True, 1.0)


def test_a_handful_of_examples_is_no_ground_for_confidence(world, tmp_path):
    examples = read_examples("builtin:sums:5")
    subject = subject_of(world, "a", examples)
    asked = subject, decompose(subject.adapters["default"]), tmp_path / "out", trial_of(subject, examples)
    with pytest.raises(DataError, match=r"5 examples are too few to be confident.*at least 6"):
        keep_quality(*asked, Criterion("loss", 0.5, confident=True, draws=100))
    assert not (tmp_path / "out").exists()
    kept = keep_quality(*asked, Criterion("loss", 0.5, draws=100))
    assert any("5 examples are too few to tell" in note for note in kept.compression.notes)


def test_the_note_about_noise(world, tmp_path):
    for keep in (0.97, 0.98, 0.99, 0.995):
        kept = search(world, tmp_path, "loss", keep, overwrite=True)
        noted = any("may be noise" in note for note in kept.compression.notes)
        assert noted == (kept.confirmed.confidence < 0.95)


def test_where_nothing_smaller_passes_it_is_the_adapter_as_it_is(world, tmp_path):
    kept = search(world, tmp_path, "agreement", 1.0)
    assert kept.confirmed.value == 1.0
    if kept.confirmed.parameters == open_adapter(world / "a").parameters:
        assert any("nothing smaller passes" in note for note in kept.compression.notes)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("FFTT", 2), ("TTTT", 0), ("FFFT", 3), ("T", 0), ("FTFT", 1), ("TFFT", 3), ("FFTFTTTT", 4)],
)
def test_bisection_returns_a_place_that_passes(pattern, found):
    asked: list[int] = []

    def passes(place):
        asked.append(place)
        return pattern[place] == "T"

    assert bisected(len(pattern), passes) == found
    assert pattern[found] == "T"
    assert len(asked) <= len(pattern).bit_length()


@pytest.mark.parametrize("policy", ["params", "fixed", "size", "energy", "para-energy", "sigma-ratio", "knee"])
def test_a_ladder_rises_to_the_adapter_as_it_is(world, policy):
    decomposition = decompose(open_adapter(world / "a"))
    plans = ladder(decomposition, policy)
    sizes = [sum(s.component_size * plan.by_layer[s.name] for s in decomposition.spectra) for plan in plans]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == decomposition.adapter.parameters
    assert len(plans) >= (4 if policy != "knee" else 2)


def test_limits_hold_on_the_way(world, tmp_path):
    kept = search(world, tmp_path, "loss", 0.5, limits=Limits(multiple_of=4, min_rank=4))
    assert {spec.rank for spec in open_adapter(tmp_path / "out").layers.values()} <= {4, 8}
    assert kept.confirmed.passes


LIMITS = {
    "rank for and max rank": (["--rank-for", "q_proj=2", "--max-rank", 4], {1, 2, 3, 4}),
    "max rank": (["--max-rank", 4], {1, 2, 3, 4}),
    "steps": (["--max-rank", 6, "--steps", "2,4,8"], {2, 4}),
    "a server's": (["--for", "vllm", "--max-lora-rank", 1], {1}),
    "a server's, by other policy": (["--for", "vllm", "--max-lora-rank", 1, "--policy", "knee"], {1}),
}


@pytest.mark.parametrize("limits", LIMITS)
def test_limits_hold_where_nothing_smaller_passes(world, tmp_path, limits):
    options, allowed = LIMITS[limits]
    common = ["compress", world / "a", tmp_path / "out", "--base", world / "llama", "--data", "builtin:texts:5"]
    common += ["--metric", "agreement", *options]
    refused = cli(*common, "--keep", "1")
    assert refused.exit_code == 1, refused.output
    said = " ".join(refused.output.split())
    assert re.search(r"agreement is 0\.\d+ with the largest ranks that the limits allow \([\d,]+ parameters", said)
    assert "and has to be at least 1: allow larger ranks, or keep less" in said
    assert not (tmp_path / "out").exists()
    assert cli(*common, "--keep", "0.01").exit_code == 0
    assert {spec.rank for spec in open_adapter(tmp_path / "out").layers.values()} <= allowed


def test_a_ladder_ends_at_what_the_limits_allow(world):
    decomposition = decompose(open_adapter(world / "a"))
    limits = Limits(max_rank=4, rank_for=(("q_proj", 2),))
    for policy in ("params", "fixed", "knee", "energy"):
        last = ladder(decomposition, policy, limits=limits)[-1].by_layer
        assert last == {name: 2 if name.endswith("q_proj") else 4 for name in decomposition.adapter.layers}
    with pytest.raises(RankError, match="none of the steps"):
        ladder(decomposition, "params", limits=Limits(steps=(3,), multiple_of=2))
    assert ladder(decomposition, "params", runtime="vllm")[-1].policy == "full rank"


def test_impossible_wishes_are_named(world, tmp_path):
    with pytest.raises(SettingsError, match=r"keep=1\.2 is not possible"):
        Criterion("loss", 1.2)
    with pytest.raises(SettingsError, match="metric 'perplexity' cannot be kept"):
        Criterion("perplexity", 0.9)
    with pytest.raises(RankError, match=r"'energy=0\.9': its value is what is sought; say --policy energy"):
        search(world, tmp_path, "loss", 0.9, policies=["energy=0.9"])
    with pytest.raises(RankError, match="unknown policy 'parms'"):
        search(world, tmp_path, "loss", 0.9, policies=["parms"])
    examples = read_examples("builtin:texts:2")
    subject = subject_of(world, "a", examples)
    with pytest.raises(DataError, match="metric 'accuracy' cannot be had of texts"):
        keep_quality(
            subject,
            decompose(subject.adapters["default"]),
            tmp_path / "out",
            trial_of(subject, examples),
            Criterion("accuracy", 0.9),
        )
    assert not (tmp_path / "out").exists()


# --- the commands -----------------------------------------------------------------------------------------------


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_compress_keep(world, tmp_path):
    common = [world / "a", tmp_path / "out", "--base", world / "llama", "--data", "builtin:sums:12"]
    done = cli("compress", *common, "--keep", "0.9", "--policy", "fixed")
    assert done.exit_code == 0, done.output
    for said in ("Criterion: loss at most", "as written", "passes", "Retained variance"):
        assert said in done.output
    assert cli("verify", tmp_path / "out", world / "a").exit_code == 0
    done = cli("compress", *common, "--keep", "0.9", "--policy", "fixed", "--overwrite", "--json")
    record = json.loads(done.stdout)
    assert record["steps"][-1]["passes"]
    assert record["compression"]["bytes_after"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "0.9"], "--keep needs --data"),
        (["--keep", "0.9", "--data", "builtin:sums:3", "--rank", "2"], "--keep seeks the ranks itself"),
        (["--data", "builtin:sums:3", "--rank", "2"], "--data belongs to --keep"),
        (["--keep", "1.9", "--data", "builtin:sums:3"], "not possible"),
        (["--keep", "0.9", "--data", "builtin:sums:3", "--policy", "params=0.5"], "its value is what is sought"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(world, tmp_path, options, said):
    done = cli("compress", world / "a", tmp_path / "out", "--base", world / "llama", *options)
    assert done.exit_code != 0
    assert said in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_curve_as_table_record_and_figure(world, tmp_path):
    pytest.importorskip("matplotlib")
    moments = tmp_path / "moments.safetensors"
    base = ["--base", world / "llama", "--data", "builtin:sums:12"]
    assert cli("calibrate", world / "a", *base, "-o", moments).exit_code == 0
    options = ["--params", "0.5,0.25", "--metric", "loss", "--calibration", moments, "--draws", "100"]
    done = cli("curve", world / "a", *base, *options, "-o", tmp_path / "curve.png")
    assert done.exit_code == 0, done.output
    assert "params=0.5 on data" in done.output
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "curve.json").write_text("old")
    for file, told in ((tmp_path / "new" / "curve.json", []), (tmp_path / "old" / "curve.json", ["--overwrite"])):
        record = json.loads(cli("curve", world / "a", *base, *options, "-o", file, *told, "--json").stdout)
        assert json.loads(file.read_text()) == record
    assert record["adapter_sha256"] == open_adapter(world / "a").sha256()
    points = {(one["policy"], one["label"], one["outcome"]["fraction"]): one for one in record["points"]}
    assert set(points) == {(p, label, f) for p in ("fixed", "params") for label in ("", "on data") for f in (0.5, 0.25)}
    alone = json.loads(cli("evaluate", world / "a", *base, "--ranks", "4", "--metric", "loss", "--json").stdout)
    expected = alone[0]["adapters"][1]["metrics"]["loss"]["value"]
    assert points["fixed", "", 0.5]["metrics"]["loss"]["value"] == pytest.approx(expected)
    assert points["fixed", "", 0.5]["outcome"]["parameters"] * 2 == alone[0]["adapters"][0]["parameters"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policy", "parms"], "unknown policy 'parms'"),
        (["--params", "a"], "not a list of fractions"),
        (["--params", "2"], "fraction of 2"),
        (["--metric", "accuracy"], "cannot be had of texts"),
    ],
    ids=str,
)
def test_mistakes_of_curve_are_one_line(world, options, said):
    done = cli("curve", world / "a", "--base", world / "llama", "--data", "builtin:sums:2", *options)
    assert done.exit_code != 0
    assert said in done.output


def test_choices_can_be_kept(world, tmp_path):
    examples = tuple(Choice(f"{n}?", ("one", "two", "three"), n % 3) for n in range(9))
    subject = subject_of(world, "a", examples)
    kept = keep_quality(
        subject,
        decompose(subject.adapters["default"]),
        tmp_path / "out",
        trial_of(subject, examples),
        Criterion("agreement", 0.8, draws=100),
    )
    assert kept.confirmed.value >= 0.8
