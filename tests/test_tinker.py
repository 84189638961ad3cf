"""Checkpoints at Tinker, through its real SDK and a server on this machine."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save
from test_hub import adapter_files
from test_unpacking import tar_bytes
from tinker_server import KEY, SIGNATURE, tinker_service

from lora_squeeze import compress_adapter, open_adapter
from lora_squeeze.cli import main
from lora_squeeze.errors import AdapterError, FetchError, MissingExtra, SettingsError, UnsupportedAdapter
from lora_squeeze.formats import downloads
from lora_squeeze.formats.downloads import download
from lora_squeeze.formats.remote import cache_folder
from lora_squeeze.formats.tinker import TinkerPath, parse_tinker_path
from lora_squeeze.provenance import provenance_of

rest_client = pytest.importorskip("tinker.lib.public_interfaces.rest_client")

SIGNS_ARCHIVES = hasattr(rest_client.RestClient, "get_checkpoint_archive_url_from_tinker_path")
with_archives = pytest.mark.skipif(not SIGNS_ARCHIVES, reason="this SDK fetches no archives")
without_archives = pytest.mark.skipif(SIGNS_ARCHIVES, reason="this SDK fetches archives")

EXTERNAL = "tinker://run:train:0/external_weights/final"
TRAINING = "tinker://run:train:0/weights/final"
SAMPLER = "tinker://run:train:0/sampler_weights/final"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A service that the SDK believes to be the real one, with two checkpoints, and an empty cache."""
    with tinker_service() as state:
        monkeypatch.setenv("TINKER_BASE_URL", state.url)
        monkeypatch.setenv("TINKER_API_KEY", KEY)
        monkeypatch.setenv("TINKER_TELEMETRY", "0")
        monkeypatch.setenv("LORA_SQUEEZE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("TINKER_CREDENTIAL_CMD", raising=False)
        monkeypatch.delenv("LORA_SQUEEZE_MAX_DOWNLOAD", raising=False)
        monkeypatch.setattr(downloads, "_PAUSE", 0.01)
        monkeypatch.chdir(tmp_path)
        files = {**adapter_files(), "checkpoint_complete": b""}
        for path in (EXTERNAL, TRAINING):
            state.checkpoints[path.removeprefix("tinker://")] = files
        for path in (TRAINING, SAMPLER):
            state.archives[path.removeprefix("tinker://")] = tar_bytes(*files.items())
        yield state


def leftovers() -> list[str]:
    """What a fetch that failed has left in the cache."""
    root = cache_folder() / "tinker"
    return [str(file.relative_to(root)) for file in root.rglob("*")] if root.exists() else []


# --- paths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [EXTERNAL, TRAINING, SAMPLER])
def test_what_a_path_means(path):
    run, kind, name = path.removeprefix("tinker://").split("/")
    assert parse_tinker_path(path) == TinkerPath(run, kind, name)
    assert parse_tinker_path(str(Path(path))) == TinkerPath(run, kind, name)  # pathlib drops a slash
    assert str(parse_tinker_path(path)) == path


@pytest.mark.parametrize(
    "path", ["tinker://", "tinker://run", "tinker://run/weights", "tinker://run/other/x", "tinker://r/weights/a/b"]
)
def test_what_is_no_path_is_refused(path):
    with pytest.raises(FetchError, match="not a Tinker path; write tinker://RUN/weights/NAME"):
        open_adapter(path)


# --- the ways to the files --------------------------------------------------------------------------------------


def test_external_weights(server):
    adapter = open_adapter(EXTERNAL)
    assert (adapter.rank, adapter.format, adapter.origin, adapter.source) == (4, "peft", EXTERNAL, EXTERNAL)
    assert adapter.files == {}  # the service's own mark is no part of the adapter
    assert any("fetched from Tinker on" in note and str(cache_folder()) in note for note in adapter.notes)


@without_archives
def test_a_training_checkpoint_is_exported_and_the_export_deleted(server):
    adapter = open_adapter(TRAINING)
    assert adapter.rank == 4
    assert len(server.deleted) == 1
    assert server.finished == ["success"]
    assert sorted(server.checkpoints) == sorted(path.removeprefix("tinker://") for path in (EXTERNAL, TRAINING))


@without_archives
def test_the_export_is_deleted_when_the_download_fails(server):
    server.expired = True
    with pytest.raises(FetchError, match="refused the download"):
        open_adapter(TRAINING)
    assert len(server.deleted) == 1
    assert server.finished == ["errored"]
    assert leftovers() == []


@without_archives
def test_a_sampler_checkpoint_says_what_to_do_instead(server):
    with pytest.raises(FetchError, match=r"can no longer be downloaded .* save_weights_external"):
        open_adapter(SAMPLER)


@with_archives
@pytest.mark.parametrize("path", [TRAINING, SAMPLER])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive(server, path, mode):
    name = path.removeprefix("tinker://")
    server.archives[name] = tar_bytes(*server.checkpoints[EXTERNAL.removeprefix("tinker://")].items(), mode=mode)
    assert open_adapter(path).rank == 4
    assert server.fetched == ["archive"]


@with_archives
@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (tar_bytes(("../escaped", b"x")), "would not lie inside its own folder"),
        (tar_bytes(("README", b"x")), "holds no adapter_config.json, so it is no PEFT adapter; it holds README"),
        (tar_bytes(*adapter_files().items())[:1500], "damaged or cut off"),
    ],
)
def test_archives_that_are_refused(server, archive, message):
    server.archives[SAMPLER.removeprefix("tinker://")] = archive
    with pytest.raises(AdapterError, match=message):
        open_adapter(SAMPLER)
    assert leftovers() == []


# --- the cache --------------------------------------------------------------------------------------------------


def test_a_second_time_nothing_is_asked(server, monkeypatch):
    first = open_adapter(EXTERNAL)
    server.asked.clear()
    monkeypatch.delenv("TINKER_API_KEY")
    monkeypatch.setitem(sys.modules, "tinker", None)
    again = open_adapter(EXTERNAL)
    assert server.asked == []
    assert (again.weights, again.notes) == (first.weights, first.notes)


def test_the_same_content_is_kept_once(server):
    server.checkpoints["run:train:0/external_weights/other"] = server.checkpoints[EXTERNAL.removeprefix("tinker://")]
    first, second = open_adapter(EXTERNAL), open_adapter(EXTERNAL.replace("final", "other"))
    assert first.weights == second.weights
    assert first.origin != second.origin
    assert len(list((cache_folder() / "tinker" / "content").iterdir())) == 1


def test_a_damaged_copy_is_fetched_again(server):
    copy = open_adapter(EXTERNAL).weights
    assert copy is not None
    copy.write_bytes(copy.read_bytes()[:-1])
    assert open_adapter(EXTERNAL).sha256() == open_adapter(EXTERNAL).sha256()
    assert server.fetched.count("adapter_model.safetensors") == 2
    for record in (cache_folder() / "tinker" / "paths").iterdir():
        record.write_text("{")
    open_adapter(EXTERNAL)
    assert server.fetched.count("adapter_model.safetensors") == 3
    assert not [name for name in leftovers() if "partial" in name]


def test_another_service_is_another_checkpoint(server):
    open_adapter(EXTERNAL)
    with tinker_service() as other, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_BASE_URL", other.url)
        other.checkpoints[EXTERNAL.removeprefix("tinker://")] = adapter_files(2)
        assert open_adapter(EXTERNAL).sha256() != ""
        assert len(other.fetched) == 2


def test_several_at_once(server):
    found, failed = [], []

    def fetch() -> None:
        try:
            found.append(open_adapter(EXTERNAL).weights)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(set(found)) == 1
    assert not [name for name in leftovers() if "partial" in name]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_SQUEEZE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lora-squeeze"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lora-squeeze"
    monkeypatch.setenv("LORA_SQUEEZE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_a_cache_that_cannot_be_written(server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LORA_SQUEEZE_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match=r"cannot be written: .*; set LORA_SQUEEZE_CACHE"):
        open_adapter(EXTERNAL)


# --- what can go wrong ------------------------------------------------------------------------------------------


def test_no_sdk(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lora-squeeze\[tinker\]'"):
        open_adapter(EXTERNAL)


def test_no_key(server, monkeypatch):
    monkeypatch.delenv("TINKER_API_KEY")
    with pytest.raises(FetchError, match="no key for Tinker; set TINKER_API_KEY"):
        open_adapter(EXTERNAL)
    assert server.asked == []


@pytest.mark.parametrize("key", ["tml-wrong-key-0123456789", "no-key-at-all"])
def test_a_wrong_key_is_in_no_message(server, monkeypatch, key):
    monkeypatch.setenv("TINKER_API_KEY", key)
    with pytest.raises(FetchError) as caught:
        open_adapter(EXTERNAL)
    assert "key" in str(caught.value)
    assert key not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_no_network(server, monkeypatch):
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match=r"127\.0\.0\.1 cannot be reached \(ConnectError\)"):
        open_adapter(EXTERNAL)


@pytest.mark.parametrize("kind", ["external_weights", "weights"])
def test_no_such_checkpoint(server, kind):
    with pytest.raises(FetchError, match="has no such checkpoint, or it has expired"):
        open_adapter(f"tinker://nobody/{kind}/final")
    assert leftovers() == []


def test_an_address_that_has_expired(server):
    server.expired = True
    with pytest.raises(FetchError, match=r"127\.0\.0\.1 refused the download \(403\): .*run again") as caught:
        open_adapter(EXTERNAL)
    assert SIGNATURE not in str(caught.value)
    assert leftovers() == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_is_taken_up_again(server, ranges):
    server.break_after = [10**6, 300]  # the second file
    server.ranges = ranges
    assert open_adapter(EXTERNAL).rank == 4
    again = "adapter_model.safetensors@300" if ranges else "adapter_model.safetensors"
    assert server.fetched[:3] == ["adapter_config.json", "adapter_model.safetensors", again]


def test_a_download_that_keeps_breaking_off(server):
    server.break_after = [10] * 100
    with pytest.raises(FetchError, match="the download broke off after 40 B, 4 times"):
        open_adapter(EXTERNAL)
    assert leftovers() == []


@pytest.mark.parametrize("announce", [True, False])
def test_what_is_too_large(server, monkeypatch, announce):
    monkeypatch.setenv("LORA_SQUEEZE_MAX_DOWNLOAD", "0.5kB")
    server.announce = announce
    with pytest.raises(FetchError, match=r"is more than the 500 B that may be downloaded; .*LORA_SQUEEZE_MAX_DOWNLOAD"):
        open_adapter(EXTERNAL)
    assert leftovers() == []


def test_a_limit_that_is_no_size(server, monkeypatch):
    monkeypatch.setenv("LORA_SQUEEZE_MAX_DOWNLOAD", "plenty")
    with pytest.raises(SettingsError, match="'plenty', which is no size; write it as 8GB"):
        open_adapter(EXTERNAL)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FetchError, "holds no files"),
        ({"README": b"x"}, AdapterError, "holds no adapter_config.json, so it is no PEFT adapter; it holds README"),
        ({"a/adapter_config.json": b"{}", "b/adapter_config.json": b"{}"}, AdapterError, "several adapters: a, b"),
        ({"adapter_config.json.age": b"x"}, FetchError, "is encrypted with age"),
        ({"../escaped": b"x"}, FetchError, "would not lie inside its own folder"),
    ],
)
def test_checkpoints_that_are_refused(server, files, error, message):
    server.checkpoints[EXTERNAL.removeprefix("tinker://")] = files
    with pytest.raises(error, match=message):
        open_adapter(EXTERNAL)
    assert leftovers() == []


def test_the_service_s_own_format_for_experts(server):
    name = "base_model.model.model.layers.0.mlp.experts.w1"
    tensors = {f"{name}.lora_A.weight": torch.randn(3, 4, 16), f"{name}.lora_B.weight": torch.randn(3, 12, 4)}
    files = {**adapter_files(), "adapter_model.safetensors": save(tensors)}
    server.checkpoints[EXTERNAL.removeprefix("tinker://")] = files
    with pytest.raises(UnsupportedAdapter, match=r"w1\.lora_A\.weight' holds all experts .*build_lora_adapter"):
        open_adapter(EXTERNAL)


def test_an_adapter_in_a_folder_of_its_own(server):
    files = {f"adapter/{name}": content for name, content in adapter_files().items()}
    server.checkpoints[EXTERNAL.removeprefix("tinker://")] = {**files, "metrics.json": b"{}"}
    adapter = open_adapter(EXTERNAL)
    assert (adapter.rank, adapter.files) == (4, {})


def test_a_server_that_answers_with_an_error(server, tmp_path):
    with pytest.raises(FetchError, match=r"here: 127\.0\.0\.1 answered 404 instead of the file"):
        download(f"{server.url}/nothing?signature={SIGNATURE}", tmp_path / "file", origin="here", limit=10)


# --- what comes of it -------------------------------------------------------------------------------------------


def test_progress_is_reported_and_nothing_is_printed(server, capfd):
    seen = []
    open_adapter(EXTERNAL, on_download=lambda *call: seen.append(call))
    size = len(adapter_files()["adapter_model.safetensors"])
    assert ("Fetching adapter_model.safetensors", size, size) in seen
    assert capfd.readouterr() == ("", "")


def test_provenance_names_the_checkpoint(server, tmp_path):
    assert compress_adapter(EXTERNAL, tmp_path / "out", 2).source == EXTERNAL
    provenance = provenance_of(open_adapter(tmp_path / "out"))
    assert provenance is not None
    assert provenance.source == EXTERNAL
    assert KEY not in provenance.to_json()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_command_line(server):
    Path("squeeze.toml").write_text(f'[squeeze]\nadapter_path = "{EXTERNAL}"\noutput_path = "out"\ncompress_to = 2\n')
    done = CliRunner().invoke(main, ["run", "squeeze.toml"])
    assert done.exit_code == 0, done.output
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 2
    done = CliRunner().invoke(main, ["show", "tinker://nobody/external_weights/final"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: tinker://nobody/external_weights/final: Tinker has no such checkpoint")
