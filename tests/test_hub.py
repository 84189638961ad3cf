"""Adapters on the Hub, through the real huggingface_hub and a server on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as hub_settings
import pytest
import torch
from click.testing import CliRunner
from hub_server import TOKEN, hub
from safetensors import safe_open
from safetensors.torch import save

from lora_squeeze import analyze_adapter, compress_adapter, open_adapter
from lora_squeeze.cli import main
from lora_squeeze.errors import AdapterError, FetchError
from lora_squeeze.formats.hub import HubPath, choose_files, parse_hub_path

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "a/b"}


def adapter_files(seed: int = 0) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(seed)
    name = "base_model.model.layers.0.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(4, 16, generator=generator),
        f"{name}.lora_B.weight": torch.randn(12, 4, generator=generator),
    }
    return {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": save(tensors)}


def image_file(seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save(
        {
            "lora_unet_q.lora_down.weight": torch.randn(4, 16, generator=generator),
            "lora_unet_q.lora_up.weight": torch.randn(12, 4, generator=generator),
            "lora_unet_q.alpha": torch.tensor(4.0),
        }
    )


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that huggingface_hub believes to be the real one, with an empty cache."""
    with hub() as state:
        monkeypatch.setattr(hub_settings, "ENDPOINT", state.url)
        template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub_settings, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_settings, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(hub_settings, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(hub_settings, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.chdir(tmp_path)
        yield state


# --- addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("user/repo", HubPath("user/repo")),
        ("user/repo@v1.0", HubPath("user/repo", "v1.0")),
        ("user/repo@main/a/b", HubPath("user/repo", "main", "a/b")),
        ("user/repo@refs/pr/3", HubPath("user/repo", "refs/pr/3")),
        ("hf://user/repo", HubPath("user/repo")),
        ("hf://models/user/repo", HubPath("user/repo")),
        ("hf://user/repo/sub/folder/", HubPath("user/repo", "", "sub/folder")),
        ("hf://user/repo@refs/pr/3/sub", HubPath("user/repo", "refs/pr/3", "sub")),
        ("hf://user/repo@feature%2Fx/file.safetensors", HubPath("user/repo", "feature/x", "file.safetensors")),
        ("hf:/user/repo", HubPath("user/repo")),  # what pathlib makes of it
        ("https://huggingface.co/user/repo", HubPath("user/repo")),
        ("https://huggingface.co/user/repo/tree/main/sub", HubPath("user/repo", "main", "sub")),
        (
            "https://hf.co/user/repo/blob/main/a.safetensors?download=true",
            HubPath("user/repo", "main", "a.safetensors"),
        ),
        ("user/repo/sub", None),
        ("./user/repo", None),
        ("/user/repo", None),
        ("~/repo", None),
        ("../repo", None),
        ("folder/file.safetensors", None),
        ("name", None),
        ("", None),
    ],
)
def test_what_an_address_means(text, place):
    assert parse_hub_path(text) == place


@pytest.mark.parametrize("text", ["hf://user", "hf://", "hf://datasets/user/data", "hf://spaces/user/space"])
def test_what_begins_as_an_address_and_is_none_is_refused(text):
    with pytest.raises(FetchError, match="not a model on the Hub"):
        parse_hub_path(text)


def test_an_address_is_written_as_it_is_read():
    for place in (HubPath("u/r"), HubPath("u/r", "main"), HubPath("u/r", "refs/pr/1", "a/b"), HubPath("u/r", "", "x")):
        assert parse_hub_path(str(place)) == place


# --- which files ------------------------------------------------------------------------------------------------


def test_only_what_belongs_to_the_adapter_is_fetched(server):
    beside = {
        "README.md": b"# card\n",
        "tokenizer.json": b"{}",
        "additional_chat_templates/tool.jinja": b"x",
        "optimizer.pt": b"0" * 1000,
        "model.gguf": b"0" * 1000,
        "checkpoint-100/adapter_config.json": b"{}",
        "checkpoint-100/adapter_model.safetensors": b"0" * 1000,
        "older/adapter_config.json": b"{}",
        "older/notes.txt": b"x",
        "adapter_model.bin": b"0" * 1000,
        ".gitattributes": b"x",
    }
    server.add("user/repo", {**adapter_files(), **beside})
    adapter = open_adapter("user/repo")
    companions = {"README.md", "tokenizer.json", "additional_chat_templates/tool.jinja"}
    assert set(server.fetched) == {"adapter_config.json", "adapter_model.safetensors", *companions}
    assert set(adapter.files) == companions
    assert any("left on the Hub" in note and "model.gguf" in note for note in adapter.notes)


def test_what_else_the_cache_holds_is_not_carried_over(server, tmp_path):
    from huggingface_hub import hf_hub_download

    server.add("user/repo", {**adapter_files(), "model.gguf": b"0" * 1000, "README.md": b"# card\n"})
    hf_hub_download("user/repo", "model.gguf")
    assert set(open_adapter("user/repo").files) == {"README.md"}


def test_a_second_time_nothing_is_fetched(server):
    server.add("user/repo", adapter_files())
    first = open_adapter("user/repo")
    server.fetched.clear()
    again = open_adapter("hf://user/repo")
    assert server.fetched == []
    assert again.weights == first.weights


def test_a_subfolder(server):
    server.add("user/repo", {f"deep/er/{name}": data for name, data in adapter_files().items()} | {"README.md": b"x"})
    adapter = open_adapter("hf://user/repo/deep/er")
    assert adapter.rank == 4
    assert adapter.origin.endswith("/deep/er")
    assert set(server.fetched) == {"deep/er/adapter_config.json", "deep/er/adapter_model.safetensors"}


@pytest.mark.parametrize("named", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_a_peft_adapter_means_its_folder(server, named):
    server.add("user/repo", adapter_files())
    assert open_adapter(f"https://huggingface.co/user/repo/blob/main/{named}").format == "peft"


def test_the_one_file_of_an_image_adapter(server):
    server.add("user/style", {"style.safetensors": image_file(), "sample.png": b"x" * 100, "README.md": b"x"})
    adapter = open_adapter("user/style")
    assert adapter.format == "kohya"
    assert server.fetched == ["style.safetensors"]


def test_of_several_files_one_has_to_be_named(server):
    server.add("user/styles", {"a.safetensors": image_file(1), "b.safetensors": image_file(2)})
    with pytest.raises(FetchError, match=r"2 \.safetensors files: a\.safetensors, b\.safetensors; name one, as in"):
        open_adapter("user/styles")
    assert server.fetched == []
    assert open_adapter("hf://user/styles/b.safetensors").format == "kohya"
    assert server.fetched == ["b.safetensors"]


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({"config.json": 5, "model.safetensors": 10**10}, "", "a whole model, not an adapter"),
        ({"README.md": 5}, "", "holds neither adapter_config.json nor a .safetensors file"),
        ({"a/adapter_config.json": 5}, "", "adapters lie in a: name one, as in hf://u/r/a"),
        ({"a/adapter_config.json": 5}, "b", "no such file or folder in this repository; adapters lie in a"),
        ({"notes.txt": 5}, "notes.txt", "not an adapter; give its folder"),
    ],
)
def test_repositories_without_an_adapter(files, path, message):
    with pytest.raises(FetchError, match=message):
        choose_files(HubPath("u/r", "", path), files)


def test_a_name_with_pattern_characters(server):
    server.add("user/odd", {"[v1]*.safetensors": image_file()})
    assert open_adapter("user/odd").rank == 4


def test_what_is_too_large_is_not_fetched(server, monkeypatch):
    server.add("user/repo", adapter_files())
    monkeypatch.setenv("LORA_SQUEEZE_MAX_DOWNLOAD", "500B")
    with pytest.raises(FetchError, match=r"more than the 500 B that may be downloaded; .*LORA_SQUEEZE_MAX_DOWNLOAD"):
        open_adapter("user/repo")
    assert server.fetched == []


# --- revisions, cache, connection -------------------------------------------------------------------------------


def test_revisions(server):
    repo = server.add("user/repo", adapter_files(1))
    first = repo.refs["main"]
    repo.commit(adapter_files(2))
    repo.refs["v1"] = first
    newest, tagged, pinned = (open_adapter(f"user/repo{at}") for at in ("", "@v1", f"@{first}"))
    assert newest.sha256() != tagged.sha256() == pinned.sha256()
    assert tagged.origin == pinned.origin == f"hf://user/repo@{first}"
    assert newest.origin == f"hf://user/repo@{repo.refs['main']}"
    with pytest.raises(FetchError, match="no such branch, tag or commit"):
        open_adapter("user/repo@v2")


def test_offline_the_cache_is_enough(server, monkeypatch):
    server.add("user/repo", {**adapter_files(), "README.md": b"x"})
    server.add("user/style", {"style.safetensors": image_file()})
    online = [open_adapter("user/repo"), open_adapter("user/style")]
    monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    for before, name in zip(online, ("user/repo", "user/style"), strict=True):
        adapter = open_adapter(name)
        assert (adapter.sha256(), adapter.origin, set(adapter.files)) == (
            before.sha256(),
            before.origin,
            set(before.files),
        )
        assert any("the Hub was not asked" in note for note in adapter.notes)
    assert server.asked == []


def test_offline_and_not_in_the_cache(server, monkeypatch):
    monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set, so the Hub is not asked; nor is it in the cache"):
        open_adapter("hf://user/repo")


def test_without_a_connection(server, monkeypatch):
    server.add("user/repo", adapter_files())
    open_adapter("user/repo")
    monkeypatch.setattr(hub_settings, "ENDPOINT", "http://127.0.0.1:9")
    assert open_adapter("user/repo").rank == 4
    with pytest.raises(FetchError, match=r"the Hub cannot be reached .*; nor is it in the cache"):
        open_adapter("hf://user/other")


def test_a_local_path_goes_first(server, tmp_path):
    folder = tmp_path / "user" / "repo"
    folder.mkdir(parents=True)
    for name, content in adapter_files().items():
        (folder / name).write_bytes(content)
    adapter = open_adapter("user/repo")
    assert (adapter.origin, adapter.source, server.asked) == ("", "user/repo", [])


# --- access -----------------------------------------------------------------------------------------------------


def test_a_name_that_is_neither_here_nor_there(server):
    with pytest.raises(
        FetchError, match=r"runs/final: no such file or folder here; taken for a name on the Hub: .*no such"
    ):
        open_adapter("runs/final")


@pytest.mark.parametrize("path", ["runs/7/final", "/nowhere/final", "./a/b", "final"])
def test_other_paths_are_not_looked_up(server, path):
    with pytest.raises(AdapterError, match="no such file or folder"):
        open_adapter(path)
    assert server.asked == []


def test_private_and_gated(server, monkeypatch):
    server.add("user/mine", adapter_files(), private=True)
    server.add("user/gated", adapter_files(), gated=True)
    with pytest.raises(FetchError, match=r"no such model on the Hub, or it is private .*HF_TOKEN"):
        open_adapter("hf://user/mine")
    with pytest.raises(FetchError, match=r"access has to be granted first: .*HF_TOKEN"):
        open_adapter("hf://user/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    with pytest.raises(FetchError) as caught:
        open_adapter("hf://user/mine")
    assert "hf_wrong_one" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_adapter("user/mine").rank == open_adapter("user/gated").rank == 4


def test_a_name_that_the_hub_does_not_allow(server):
    with pytest.raises(FetchError, match="not a name that the Hub allows"):
        open_adapter("hf://user/a--b")


# --- what comes of it -------------------------------------------------------------------------------------------


def test_progress_is_reported_and_nothing_is_printed(server, capfd):
    server.add("user/repo", {**adapter_files(), "tokenizer.json": b"0" * 10**5})
    seen = []
    open_adapter("user/repo", on_download=lambda *call: seen.append(call))
    total = sum(len(data) for data in server.repos["user/repo"].files().values())
    assert seen[-1] == ("Fetching user/repo", total, total)
    assert capfd.readouterr() == ("", "")


def test_provenance_names_the_commit(server, tmp_path):
    repo = server.add("user/repo", {**adapter_files(), "README.md": b"# mine\n"})
    compression = compress_adapter("user/repo", tmp_path / "out", 2)
    assert compression.source == f"hf://user/repo@{repo.refs['main']}"
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        provenance = json.loads(file.metadata()["lora_squeeze"])
    assert provenance["source"] == compression.source
    assert (tmp_path / "out" / "README.md").read_text() == "# mine\n"
    assert not (tmp_path / "out" / "README.md").is_symlink()
    assert analyze_adapter("user/repo").source == compression.source


def test_every_command_takes_it(server, tmp_path):
    server.add("user/repo", adapter_files())
    server.add("user/style", {"style.safetensors": image_file()})
    Path("squeeze.toml").write_text('[squeeze]\nadapter_path = "user/repo"\n')
    for arguments in (
        ["show", "user/repo"],
        ["analyze", "hf://user/repo"],
        ["plan", "user/repo", "--policy", "energy=0.9"],
        ["compress", "user/repo", "out", "--rank", "2"],
        ["compare", "user/repo", "--params", "0.5"],
        ["check", "user/repo", "--for", "peft"],
        ["convert", "user/style", "out.safetensors", "--to", "kohya"],
        ["run", "squeeze.toml"],
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, (arguments, done.output)


def test_the_command_line_with_nothing_but_the_environment(server, tmp_path):
    server.add("user/repo", adapter_files(), private=True)
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    script = "from lora_squeeze.cli import main; main()"
    command = [sys.executable, "-c", script, "show", "user/repo", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["source"].startswith("hf://user/repo@")
    assert TOKEN not in done.stdout
