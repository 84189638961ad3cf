"""Two adapters side by side: against dense float64 updates and their singular vectors."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from lora_squeeze import compress_adapter, decompose, open_adapter, verify
from lora_squeeze.cli import main
from lora_squeeze.errors import AdapterError, RankError
from lora_squeeze.pairing import pair_up
from tests.adapters import CONVOLUTIONS, LLAMA, make_adapter, pair, updates, write_raw
from tests.campaigns import make_campaign
from tests.commands import write_plan


def decomposed(folder):
    return decompose(open_adapter(folder))


def run(*arguments: object):
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.fixture
def folders(tmp_path):
    return make_adapter(tmp_path / "a", r=8, seed=1), make_adapter(tmp_path / "b", r=4, seed=2, lora_alpha=3)


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("base", [LLAMA, CONVOLUTIONS], ids=["llama", "convolutions"])
def test_it_is_what_dense_updates_say(tmp_path, base, rank):
    a, b = (
        make_adapter(tmp_path / "a", base, r=8, seed=1),
        make_adapter(tmp_path / "b", base, r=4, seed=2, lora_alpha=3),
    )
    found = pair_up(decomposed(a), decomposed(b), rank=rank)
    dense_a, dense_b = updates(base, a), updates(base, b)
    assert {one.name for one in found.layers} == set(dense_a)
    for one in found.layers:
        left, right = dense_a[one.name].flatten(1), dense_b[one.name].flatten(1)
        if one.a.out_features != left.shape[0]:  # an embedding is stored the other way round
            left, right = left.T, right.T
        assert one.inner == pytest.approx(float((left * right).sum()), rel=1e-9, abs=1e-12)
        assert one.cosine == pytest.approx(float((left * right).sum() / left.norm() / right.norm()), abs=1e-9)
        assert one.distance == pytest.approx(float((right - left).norm() / left.norm()), rel=1e-9)
        (ua, _, va), (ub, _, vb) = (torch.linalg.svd(x, full_matrices=False) for x in (left, right))
        assert one.overlap_rank == rank
        assert one.overlap_out == pytest.approx(float((ua[:, :rank].T @ ub[:, :rank]).square().sum()) / rank, abs=1e-7)
        assert one.overlap_in == pytest.approx(float((va[:rank] @ vb[:rank].T).square().sum()) / rank, abs=1e-7)
    whole_a, whole_b = (torch.cat([dense[n].flatten() for n in sorted(dense)]) for dense in (dense_a, dense_b))
    assert found.distance == pytest.approx(float((whole_b - whole_a).norm() / whole_a.norm()), rel=1e-9)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(whole_a, whole_b, dim=0)), abs=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_device_says_the_same(folders):
    here = pair_up(*(decomposed(folder) for folder in folders))
    there = pair_up(*(decompose(open_adapter(folder), device="cuda") for folder in folders))
    assert there.cosine == pytest.approx(here.cosine, abs=1e-9)
    assert there.distance == pytest.approx(here.distance, rel=1e-9)


def test_an_adapter_is_like_itself(folders):
    found = pair_up(decomposed(folders[0]), decomposed(folders[0]))
    assert found.cosine == pytest.approx(1.0)
    assert found.distance == pytest.approx(0.0, abs=1e-6)
    assert [one.overlap_out for one in found.layers] == [pytest.approx(1.0)] * 6
    assert [one.overlap_rank for one in found.layers] == [math.ceil(one.a.effective_rank) for one in found.layers]


def test_a_squeezed_adapter_keeps_the_leading_directions_and_loses_what_compress_says(folders, tmp_path):
    said = compress_adapter(folders[0], tmp_path / "small", 3, dtype="F64")
    found = pair_up(decomposed(folders[0]), decomposed(tmp_path / "small"), rank=3)
    assert found.distance == pytest.approx(said.relative_error, rel=1e-6)
    assert all(one.overlap_in == pytest.approx(1.0, abs=1e-6) for one in found.layers)


def test_layers_that_only_one_adapts_are_named(tmp_path):
    a = write_raw(tmp_path / "a", {**pair("x.q", 8, 4, 6), **pair("x.k", 8, 4, 6)})
    b = write_raw(tmp_path / "b", {**pair("x.q", 8, 4, 6, seed=1), **pair("x.v", 8, 4, 6)})
    found = pair_up(decomposed(a), decomposed(b))
    assert ([one.name for one in found.layers], found.only_a, found.only_b) == (["x.q"], ("x.k",), ("x.v",))


def test_a_layer_that_one_lacks_is_zero_there(tmp_path):
    a = write_raw(tmp_path / "a", {**pair("x.q", 8, 4, 6), **pair("x.k", 8, 4, 6, seed=3)})
    b = write_raw(tmp_path / "b", {**pair("x.q", 8, 4, 6, seed=1), **pair("x.v", 8, 4, 6, seed=2)})
    dense_a, dense_b = dense(a), dense(b)
    found = pair_up(decomposed(a), decomposed(b))
    zero = torch.zeros(8, 6, dtype=torch.float64)
    whole_a, whole_b = (
        torch.cat([one.get(name, zero).flatten() for name in ("x.q", "x.k", "x.v")]) for one in (dense_a, dense_b)
    )
    assert found.energy_a == pytest.approx(float(whole_a.square().sum()), rel=1e-9)
    assert found.energy_b == pytest.approx(float(whole_b.square().sum()), rel=1e-9)
    assert found.energy_only_a == pytest.approx(float(dense_a["x.k"].square().sum()), rel=1e-9)
    assert found.energy_only_b == pytest.approx(float(dense_b["x.v"].square().sum()), rel=1e-9)
    assert found.distance == pytest.approx(float((whole_b - whole_a).norm() / whole_a.norm()), rel=1e-9)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(whole_a, whole_b, dim=0)), abs=1e-9)
    record = json.loads(run("compare", a, b, "--json").output)
    assert [record[name] for name in ("energy_a", "energy_b", "cosine", "distance")] == pytest.approx(
        [found.energy_a, found.energy_b, found.cosine, found.distance], rel=1e-9
    )
    shown = " ".join(run("compare", a, b).output.split())
    assert f"‖Δ‖ {found.energy_a**0.5:.4g} {found.energy_b**0.5:.4g}" in shown
    assert f"Layers only here 1, {found.energy_only_a / found.energy_a:.1%} of the energy (first: x.k)" in shown


def dense(folder):
    adapter = open_adapter(folder)
    layers = (adapter.load(name) for name in adapter.layers)
    return {layer.name: layer.scale * layer.up.double() @ layer.down.double() for layer in layers}


def test_layers_that_were_left_out_are_lost_as_compress_says(folders, tmp_path):
    plan = write_plan(tmp_path / "plan.json", folders[0], **{"model.layers.0.mlp.down_proj": 0})
    done = run("compress", folders[0], tmp_path / "small", "--ranks", plan, "--dtype", "f32")
    assert done.exit_code == 0, done.output
    found = pair_up(decomposed(folders[0]), decomposed(tmp_path / "small"))
    assert found.only_a == ("model.layers.0.mlp.down_proj",)
    before, after = updates(LLAMA, folders[0]), updates(LLAMA, tmp_path / "small")
    whole_a, whole_b = (
        torch.cat([one.get(name, torch.zeros_like(before[name])).flatten() for name in before])
        for one in (before, after)
    )
    assert found.distance == pytest.approx(float((whole_b - whole_a).norm() / whole_a.norm()), rel=1e-6)
    assert found.distance == pytest.approx(verify(tmp_path / "small", folders[0]).loss.relative_error, rel=1e-6)


def test_a_layer_that_does_nothing_is_like_no_other(tmp_path):
    nothing = {key: torch.zeros_like(value) for key, value in pair("x.q", 8, 4, 6).items()}
    a, b = write_raw(tmp_path / "a", nothing), write_raw(tmp_path / "b", pair("x.q", 8, 4, 6))
    (layer,) = pair_up(decomposed(a), decomposed(b)).layers
    assert (layer.cosine, layer.distance, layer.overlap_rank, layer.overlap_in) == (0.0, math.inf, 0, 0.0)
    assert json.loads(pair_up(decomposed(a), decomposed(b)).to_json())["distance"] is None


def test_adapters_of_different_models_are_refused(tmp_path):
    a, b = write_raw(tmp_path / "a", pair("x.q", 8, 4, 6)), write_raw(tmp_path / "b", pair("x.q", 8, 4, 7))
    c = write_raw(tmp_path / "c", pair("y.q", 8, 4, 6))
    with pytest.raises(AdapterError, match=r"'x.q' is 8×6 in .*a, but 8×7 in .*b"):
        pair_up(decomposed(a), decomposed(b))
    with pytest.raises(AdapterError, match="no layer in common"):
        pair_up(decomposed(a), decomposed(c))
    with pytest.raises(RankError, match="rank 0"):
        pair_up(decomposed(a), decomposed(a), rank=0)


def test_compare_shows_two_adapters(folders):
    done = run("compare", *folders, "--layers", "--rank", 2)
    assert done.exit_code == 0, done.output
    assert "6 layers in common" in done.output
    assert "model.layers.1.mlp.down_proj" in done.output
    record = json.loads(run("compare", *folders, "--json").output)
    assert (record["record"], len(record["layers"])) == ("Likeness", 6)
    assert f"{record['cosine']:.4f}" in done.output


def test_compare_still_shows_policies(folders):
    done = run("compare", folders[0], "--params", "0.5")
    assert done.exit_code == 0, done.output
    assert "At most 50.00% of the parameters" in done.output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["A", "B", "--params", "0.5"], "--params compares policies"),
        (["A", "--rank", "2"], "--rank compares PATH with OTHER"),
        (["A", "--layers"], "--layers compares PATH with OTHER"),
        (["A", "B", "--metric", "eval_loss"], "--metric compares two campaigns"),
    ],
)
def test_options_of_the_other_kind_are_refused(folders, arguments, why):
    done = run("compare", *({"A": folders[0], "B": folders[1]}.get(one, one) for one in arguments))
    assert done.exit_code == 2
    assert why in done.output


@pytest.mark.parametrize(
    ("other", "why"), [("none", "no such folder"), ("a", "no campaign lies there"), ("", "no such folder")]
)
def test_what_is_no_campaign_beside_one_is_named(folders, tmp_path, monkeypatch, other, why):
    monkeypatch.chdir(tmp_path)
    make_campaign(tmp_path / "c")
    for pair_of in (("c", other), (other, "c")):
        done = run("compare", *pair_of)
        said = f"{other or '(an empty path)'}: {why}, but c is one: give two campaigns, or two adapters"
        assert (done.exit_code, said in " ".join(done.output.split())) == (2, True), done.output


def test_compare_shows_two_campaigns(tmp_path):
    a, b = make_campaign(tmp_path / "a"), make_campaign(tmp_path / "b", shift=0.5, seeds=(1,))
    done = run("compare", a, b)
    assert done.exit_code == 0, done.output
    (row,) = [line.split() for line in done.output.splitlines() if line.startswith("sft~lora_rank=8")]
    assert row == ["sft~lora_rank=8", "1.4", "±", "0.05", "1.85", "+0.45", "±", "0.05"]
    assert "Recommended rank: 4 and 4" in done.output
    assert "eval_loss" in done.output
    assert run("compare", a, b, "--metric", "train_loss").output.count("+0 ±") == 2
    wrong = run("compare", a, b, "--metric", "speed")
    assert wrong.exit_code == 2
    assert "'speed' is not one of eval_accuracy" in wrong.output
    empty = run("compare", make_campaign(tmp_path / "c", finished=False), b)
    assert empty.exit_code == 2
    assert "no run of" in empty.output
