"""Pushing to the Hub, through the real huggingface_hub and a server on this machine."""

import json

import huggingface_hub.constants as hub_settings
import pytest
import yaml
from click.testing import CliRunner
from hub_server import TOKEN
from test_hub import adapter_files, image_file, server  # noqa: F401

from lora_squeeze import compress_adapter, open_adapter, push
from lora_squeeze.cli import main
from lora_squeeze.errors import OutputError, SettingsError
from lora_squeeze.upload import check_push

CARD = b"---\nlicense: mit\npipeline_tag: text-generation\n---\n\n# The large one\n"


@pytest.fixture
def hub(server, monkeypatch):  # noqa: F811
    """A Hub with an adapter and a token for it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.add("user/large", {**adapter_files(), "README.md": CARD, "tokenizer.json": b"{}"})
    return server


def pushed(hub, name: str, branch: str = "main") -> dict[str, bytes]:
    return hub.repos[name].files(branch)


def test_push(hub, tmp_path):
    compression = compress_adapter("user/large", tmp_path / "out", 2)
    address = push(compression, "user/small")
    repo = hub.repos["user/small"]
    assert address == f"{hub.url}/user/small/commit/{repo.refs['main']}"
    assert repo.messages == ["Adapter squeezed with lora-squeeze: fixed=2"]
    files = pushed(hub, "user/small")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        assert files[name] == (tmp_path / "out" / name).read_bytes()
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license"] == "mit"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["base_model"] == "a/b"
    assert "# The large one" in card
    assert f"[user/large](https://huggingface.co/user/large/tree/{hub.repos['user/large'].refs['main']})" in card
    assert f"{compression.retained_variance:.2%}" in card
    assert open_adapter("user/small").rank == 2
    assert (tmp_path / "out" / "README.md").read_bytes() == CARD  # what lies here stays as it is


def test_the_repository_s_own_card_goes_first(hub, tmp_path):
    compression = compress_adapter("user/large", tmp_path / "out", 2)
    own = b"---\nlicense: gpl\nmodel-index: []\n---\n# Mine\n\nBy hand.\n"
    hub.add("user/small", {"README.md": own, "LICENSE": b"..."})
    push(compression, "user/small")
    card = pushed(hub, "user/small")["README.md"].decode()
    assert "By hand." in card
    assert "The large one" not in card
    assert "license: gpl" in card
    assert "model-index" in card
    assert pushed(hub, "user/small")["LICENSE"] == b"..."
    push(compress_adapter("user/large", tmp_path / "out-1", 1), "user/small", commit_message="smaller")
    again = pushed(hub, "user/small")["README.md"].decode()
    assert again.count("## Squeezed") == 1
    assert "4 → 1" in again
    assert hub.repos["user/small"].messages[-1] == "smaller"


def test_a_branch(hub, tmp_path):
    compression = compress_adapter("user/large", tmp_path / "out", 2)
    hub.add("user/small", {"README.md": b"# Mine\n"})
    push(compression, "user/small@rank-2")
    assert "adapter_config.json" not in pushed(hub, "user/small")
    card = pushed(hub, "user/small", "rank-2")["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "user/small", revision="rank-2")' in card
    assert "# Mine" in card
    assert open_adapter("user/small@rank-2").rank == 2


@pytest.mark.parametrize("private", [True, False, None])
def test_private(hub, tmp_path, private):
    push(compress_adapter("user/large", tmp_path / "out", 2), "user/small", private=private)
    assert hub.repos["user/small"].private is bool(private)


def test_what_should_be_private_is_not_put_into_a_public_repository(hub, tmp_path):
    hub.add("user/small", {"README.md": b"# Mine\n"})
    with pytest.raises(OutputError, match="this repository exists and is public"):
        push(compress_adapter("user/large", tmp_path / "out", 2), "user/small", private=True)
    assert set(pushed(hub, "user/small")) == {"README.md"}


def test_a_name_without_an_account(hub, tmp_path):
    push(compress_adapter("user/large", tmp_path / "out", 2), "small")
    assert 'from_pretrained(base, "me/small")' in pushed(hub, "me/small")["README.md"].decode()


def test_an_adapter_of_one_file(hub, tmp_path):
    hub.add("user/style", {"style.safetensors": image_file()})
    push(compress_adapter("user/style", tmp_path / "small-style.safetensors", 2), "user/small-style")
    files = pushed(hub, "user/small-style")
    assert files["small-style.safetensors"] == (tmp_path / "small-style.safetensors").read_bytes()
    assert 'weight_name="small-style.safetensors"' in files["README.md"].decode()
    assert "library_name: diffusers" in files["README.md"].decode()


@pytest.mark.parametrize("repo", ["", "a/b/c", "hf://a/b/sub", "./out", "hf://datasets/a/b", "a b"])
def test_impossible_names(hub, repo):
    with pytest.raises((SettingsError, OutputError), match=r"no name of a repository|not a model on the Hub"):
        check_push(repo)


def test_without_a_token_nothing_is_computed(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    hub.asked.clear()
    done = CliRunner().invoke(main, ["compress", "user/large", "out", "--rank", "2", "--push", "user/small"])
    assert done.exit_code == 1
    assert "pushing needs a token; log in with `hf auth login` or set HF_TOKEN" in done.output
    assert hub.asked == []
    assert not (tmp_path / "out").exists()


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set, so nothing can be pushed"):
        check_push("user/small")


def test_a_token_without_the_right(hub, tmp_path, monkeypatch):
    compression = compress_adapter("user/large", tmp_path / "out", 2)
    monkeypatch.setenv("HF_TOKEN", "hf_another_one")
    with pytest.raises(OutputError, match="nothing was pushed") as caught:
        push(compression, "user/small")
    assert "hf_another_one" not in str(caught.value)
    assert "user/small" not in hub.repos


def test_without_a_connection(hub, tmp_path, monkeypatch):
    compression = compress_adapter("user/large", tmp_path / "out", 2)
    monkeypatch.setattr(hub_settings, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutputError, match=r"the Hub cannot be reached .*; nothing was pushed"):
        push(compression, "user/small")


def test_a_card_with_broken_metadata_is_not_overwritten(hub, tmp_path):
    compression = compress_adapter("user/large", tmp_path / "out", 2)
    broken = b"---\na: [1\n---\n# Mine\n"
    hub.add("user/small", {"README.md": broken})
    with pytest.raises(OutputError, match="not valid YAML"):
        push(compression, "user/small")
    assert pushed(hub, "user/small") == {"README.md": broken}


def test_an_output_that_is_gone(hub, tmp_path):
    compression = compress_adapter("user/large", tmp_path / "out", 2)
    (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(OutputError, match="there is no adapter any more that could be pushed"):
        push(compression, "user/small")


def test_the_command_line(hub, tmp_path):
    command = ["compress", "user/large", "out", "--rank", "2", "--push", "user/small", "--private"]
    done = CliRunner().invoke(main, [*command, "--commit-message", "first", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["policy"] == "fixed=2"
    assert done.stderr == f"Pushed to {hub.url}/user/small/commit/{hub.repos['user/small'].refs['main']}\n"
    assert hub.repos["user/small"].messages == ["first"]
    assert hub.repos["user/small"].private


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--private"], "--private and --commit-message belong to --push"),
        (["--commit-message", "x"], "--private and --commit-message belong to --push"),
        (["--push", "a/b", "--policy", "energy=0.9", "--policy", "fixed=2"], "--push puts one adapter on the Hub"),
    ],
)
def test_options_that_do_not_fit(hub, options, message):
    done = CliRunner().invoke(main, ["compress", "user/large", "out", *options])
    assert done.exit_code == 2
    assert message in done.output
