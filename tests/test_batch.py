"""Many adapters in one go: named apart, contained, continued, in this process and in others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import write_raw
from click.testing import CliRunner
from test_hub import image_file, server  # noqa: F401

from lora_squeeze import open_adapter, verify
from lora_squeeze.batch import named, read_batch, squeeze_batch
from lora_squeeze.cli import main
from lora_squeeze.errors import OutputError, SettingsError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapters(tmp_path):
    """Three adapters of rank 4 in a folder, one of them damaged."""
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        tensors = {
            f"{layer}.lora_{side}.weight": torch.randn(*shape, generator=generator)
            for layer in ("first", "second")
            for side, shape in (("A", (4, 12)), ("B", (10, 4)))
        }
        write_raw(tmp_path / "all" / name, tensors, r=4, lora_alpha=4)
    (tmp_path / "all" / "b" / WEIGHTS).write_bytes(b"damaged")
    return tmp_path / "all"


def test_one_that_is_damaged_stops_no_other_and_the_rest_is_not_repeated(adapters, tmp_path):
    records = squeeze_batch([str(adapters)], tmp_path / "out", policy="fixed=2")
    assert [Path(one.source).name for one in records] == ["a", "b", "c"]
    assert [one.status for one in records] == ["finished", "failed", "finished"]
    assert WEIGHTS in records[1].error
    assert (records[0].source_rank, records[0].rank) == (4, 2)
    assert records[0].bytes_after < records[0].bytes_before
    assert 0 < records[0].retained_variance < 1
    assert records == read_batch(tmp_path / "out")
    assert {open_adapter(tmp_path / "out" / name).rank for name in "ac"} == {2}
    written = (tmp_path / "out" / "a" / WEIGHTS).stat().st_mtime_ns
    (adapters / "b" / WEIGHTS).write_bytes((adapters / "c" / WEIGHTS).read_bytes())
    again = squeeze_batch([str(adapters)], tmp_path / "out", policy="fixed=2")
    assert [one.status for one in again] == ["finished"] * 3
    assert (tmp_path / "out" / "a" / WEIGHTS).stat().st_mtime_ns == written
    other = squeeze_batch([str(adapters)], tmp_path / "out", policy="fixed=1")
    assert {one.rank for one in other} == {1}


def test_names_are_kept_apart(adapters, tmp_path):
    assert named(["x/a", "y/b"]) == {"a": "x/a", "b": "y/b"}
    assert named(["x/final", "y/final", "x/final"]) == {"x-final": "x/final", "y-final": "y/final"}
    assert list(named(["one/a b", "one-a b"])) != [named(["one/a b"]), named(["one-a b"])]
    assert len(named(["one/a", "one-a"])) == 2
    assert list(named([str(adapters)])) == ["a", "b", "c"]
    assert named(["us/lora"]) == {"lora": "us/lora"}
    with pytest.raises(SettingsError):
        named([])


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_processes_and_ray_give_the_same(executor, adapters, tmp_path):
    if executor == "ray":
        pytest.importorskip("ray")
    (adapters / "b" / WEIGHTS).unlink()
    here = squeeze_batch([str(adapters)], tmp_path / "here", policy="energy=0.5")
    there = squeeze_batch([str(adapters)], tmp_path / "there", policy="energy=0.5", executor=executor, workers=2)
    assert [one.status for one in there] == ["finished", "failed", "finished"]
    assert "no such file" in there[1].error
    assert [one.relative_error for one in here] == [one.relative_error for one in there]
    for name in "ac":
        one, other = ((tmp_path / where / name / WEIGHTS).read_bytes() for where in ("here", "there"))
        assert one == other


def test_the_command_prints_a_summary(adapters, tmp_path):
    command = ["batch", str(adapters / "a"), str(adapters / "b"), "--policy", "fixed=2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "4 → 2" in result.stdout
    assert "failed" in result.stdout
    records = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert [one["status"] for one in records["adapters"]] == ["finished", "failed"]
    assert CliRunner().invoke(main, [*command[:-1], str(adapters)]).exit_code == 1
    refused = CliRunner().invoke(main, ["batch", "x", "--out", str(tmp_path / "new"), "--policy", "best=1"])
    assert (refused.exit_code, (tmp_path / "new").exists()) == (1, False)


def test_a_single_file_from_the_hub_becomes_a_file(server, tmp_path):  # noqa: F811
    server.add("user/style", {"any_name.safetensors": image_file()})
    arguments = (["user/style"], tmp_path / "out")
    (record,) = squeeze_batch(*arguments, policy="fixed=2")
    assert (record.status, record.output) == ("finished", str(tmp_path / "out" / "style.safetensors")), record.error
    assert open_adapter(record.output).rank == 2
    assert squeeze_batch(*arguments, policy="fixed=2") == (record,)


def test_a_folder_of_something_else_is_left_alone(adapters, tmp_path):
    with pytest.raises(OutputError, match="not the folder of a batch"):
        squeeze_batch([str(adapters / "a")], adapters)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "batch.json").write_text("{}")
    with pytest.raises(OutputError, match=r"batch\.json: cannot be read"):
        squeeze_batch([str(adapters / "a")], tmp_path / "out")


# --- what was squeezed before -----------------------------------------------------------------------------------


def retrain(adapter, number=1.0):
    """Other weights in the same files."""
    write_raw(adapter, {f"first.lora_{side}.weight": number * torch.ones(*shape) for side, shape in SHAPES}, r=4)


SHAPES = (("A", (4, 12)), ("B", (10, 4)))


def a_style(folder, number=1.0):
    retrain(folder / "style", number)
    return str(folder / "style")


def names_of(out):
    return {Path(one.output).name: one.status for one in read_batch(out)}


def test_a_source_that_has_changed_is_squeezed_again(tmp_path):
    source, out = a_style(tmp_path / "x"), tmp_path / "out"
    (before,) = squeeze_batch([source], out, policy="fixed=1")
    retrain(Path(source), 2.0)
    (after,) = squeeze_batch([source], out, policy="fixed=1")
    assert after.identity != before.identity
    assert verify(after.output, source).passed
    config = json.loads((Path(source) / "adapter_config.json").read_text())
    (Path(source) / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    squeeze_batch([source], out, policy="fixed=1")
    assert verify(after.output, source).passed
    (Path(source) / "chat_template.jinja").write_text("{{ messages }}")
    squeeze_batch([source], out, policy="fixed=1")
    assert (Path(after.output) / "chat_template.jinja").read_text() == "{{ messages }}"


def test_what_is_there_stays_where_the_source_is_gone_or_is_spelled_another_way(tmp_path, monkeypatch):
    source, out = a_style(tmp_path / "x"), tmp_path / "out"
    (before,) = squeeze_batch([source], out, policy="fixed=1")
    written = (out / "style" / WEIGHTS).stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    (again,) = squeeze_batch(["./x/style"], Path("out"), policy="fixed=1")
    shutil.rmtree(source)
    (gone,) = squeeze_batch(["x/style"], Path("out"), policy="fixed=1")
    assert {before.identity, again.identity, gone.identity} == {before.identity}
    assert gone.status == "finished"
    assert (out / "style" / WEIGHTS).stat().st_mtime_ns == written
    assert names_of(out) == {"style": "finished"}


@pytest.mark.parametrize("harm", ["deleted", "cut off", "emptied"])
def test_a_result_without_its_weights_is_made_anew(tmp_path, harm):
    source, out = a_style(tmp_path / "x"), tmp_path / "out"
    squeeze_batch([source, a_style(tmp_path / "y")], out, policy="fixed=1")
    squeeze_batch([source], out, policy="fixed=1")
    weights = out / "x-style" / WEIGHTS
    whole, other = weights.read_bytes(), (out / "y-style" / WEIGHTS).stat().st_mtime_ns
    if harm == "cut off":
        weights.write_bytes(whole[:-1])
    else:
        weights.unlink()
    if harm == "emptied":
        (out / "x-style" / "adapter_config.json").unlink()
    (record, _) = squeeze_batch([source, str(tmp_path / "y" / "style")], out, policy="fixed=1")
    assert record.status == "finished", record.error
    assert weights.read_bytes() == whole
    assert verify(record.output, source).passed
    assert (out / "y-style" / WEIGHTS).stat().st_mtime_ns == other


def test_a_single_file_that_was_cut_off_is_not_called_finished(tmp_path):
    """What is no adapter is not replaced, here as elsewhere: the record says so until it is moved away."""
    (tmp_path / "style.safetensors").write_bytes(image_file())
    arguments = ([str(tmp_path / "style.safetensors")], tmp_path / "out")
    (record,) = squeeze_batch(*arguments, policy="fixed=2")
    output = Path(record.output)
    whole = output.read_bytes()
    output.write_bytes(whole[:-1])
    for _ in range(2):
        (failed,) = squeeze_batch(*arguments, policy="fixed=2")
        assert failed.status == "failed"
        assert f"{output}: is a file, but no adapter" in failed.error
    output.unlink()
    assert squeeze_batch(*arguments, policy="fixed=2") == (record,)
    assert output.read_bytes() == whole


def test_another_source_of_the_same_name_replaces_nothing(tmp_path):
    one, other, out = a_style(tmp_path / "x"), a_style(tmp_path / "y", 2.0), tmp_path / "out"
    squeeze_batch([one], out, policy="fixed=1")
    (record,) = squeeze_batch([other], out, policy="fixed=1")
    assert names_of(out) == {"style": "finished", "y-style": "finished"}
    assert Path(record.output) == out / "y-style"
    assert verify(out / "style", one).passed
    assert verify(out / "y-style", other).passed
    written = {name: (out / name / WEIGHTS).stat().st_mtime_ns for name in names_of(out)}
    for sources in ([other], [one, other], [str(tmp_path / "x")]):
        squeeze_batch(sources, out, policy="fixed=1")
    assert written == {name: (out / name / WEIGHTS).stat().st_mtime_ns for name in names_of(out)}
    done = CliRunner().invoke(main, ["batch", other, "--out", str(out), "--policy", "fixed=1", "--json"])
    assert [Path(one["output"]).name for one in json.loads(done.stdout)["adapters"]] == ["y-style"]


def test_what_no_record_speaks_of_is_not_replaced(tmp_path):
    one, out = a_style(tmp_path / "x"), tmp_path / "out"
    squeeze_batch([one], out, policy="fixed=1")
    retrain(out / "other")
    retrain(tmp_path / "y" / "other")
    with pytest.raises(OutputError, match=r"other: is there already, and batch\.json does not say"):
        squeeze_batch([str(tmp_path / "y" / "other")], out)
    shutil.rmtree(out / "style")
    (record,) = squeeze_batch([a_style(tmp_path / "y")], out, policy="fixed=1")
    assert (names_of(out), Path(record.output).name) == ({"style": "finished"}, "style")


@pytest.mark.parametrize("name", ["logs", "batch.json"])
def test_names_that_the_batch_needs_are_refused(tmp_path, name):
    retrain(tmp_path / "x" / name)
    source, out = str(tmp_path / "x" / name), tmp_path / "out"
    done = CliRunner().invoke(main, ["batch", source, "--out", str(out)])
    assert (done.exit_code, f"'{name}', which is the batch's own" in done.output) == (1, True), done.output
    assert not out.exists()
    assert list(named([source, str(tmp_path / "y" / name)])) == [f"x-{name}", f"y-{name}"]


def test_records_without_a_place_and_an_identity_are_read_and_made_anew(tmp_path):
    source, out = a_style(tmp_path / "x"), tmp_path / "out"
    (record,) = squeeze_batch([source], out, policy="fixed=1")
    old = json.loads((out / "batch.json").read_text())
    for one in old["adapters"]:
        del one["place"], one["identity"]
    (out / "batch.json").write_text(json.dumps(old))
    assert read_batch(out)[0].identity == ""
    assert squeeze_batch([source], out, policy="fixed=1") == (record,)


def test_a_new_commit_on_the_hub_is_squeezed_and_no_answer_changes_nothing(server, tmp_path):  # noqa: F811
    server.add("user/style", {"any_name.safetensors": image_file()})
    arguments = (["user/style"], tmp_path / "out")
    (first,) = squeeze_batch(*arguments, policy="fixed=2")
    server.add("user/style", {"any_name.safetensors": image_file(seed=1)})
    (second,) = squeeze_batch(*arguments, policy="fixed=2")
    assert first.identity != second.identity
    assert second.output == first.output
    assert verify(second.output, "user/style").passed
    server.repos.clear()
    assert squeeze_batch(*arguments, policy="fixed=2") == (second,)


def test_several_policies_are_refused(adapters, tmp_path):
    command = ["batch", str(adapters), "--policy", "fixed=2", "--policy", "fixed=3", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, "a batch has one --policy, not fixed=2 and fixed=3" in done.output) == (2, True)
    assert not (tmp_path / "out").exists()
    command = ["batch", str(adapters / "a"), "--policy", "fixed=3", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert open_adapter(tmp_path / "out" / "a").rank == 3
