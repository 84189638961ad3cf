"""Nothing of the environment, and no code from a file, gets where it should not."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from adapters import make_adapter
from click.testing import CliRunner
from images import kohya_pair, save

from lora_squeeze.cli import main

PACKAGE = Path(__file__).parent.parent / "lora_squeeze"


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def sources():
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")
    }


def test_pickles_are_read_as_weights_only():
    unsafe = [
        f"{name}:{node.lineno}"
        for name, tree in sources().items()
        for function, node in calls(tree)
        if function in ("torch.load", "load") and ast.unparse(node).startswith("torch.load")
        if not any(one.arg == "weights_only" and ast.unparse(one.value) == "True" for one in node.keywords)
    ]
    assert unsafe == []


def test_nothing_unpickles_or_evaluates():
    forbidden = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    for name, tree in sources().items():
        imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names] + [
            str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        ]
        assert not [one for one in imported if one.partition(".")[0] in forbidden], name
        found = [function for function, _ in calls(tree)]
        assert not {"eval", "exec", "compile", "os.system", "__import__"} & set(found), name
        assert not [function for function in found if function.endswith("extractall")], name
        assert not [one for one in found if one.startswith("yaml.") and not one.startswith("yaml.safe_")], name


def test_code_of_a_model_is_not_trusted_by_default():
    """`trust_remote_code` is never simply true: it is what the user says."""
    for name, tree in sources().items():
        for _, node in calls(tree):
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) != "True", f"{name}:{node.lineno}"


NAMES = "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TINKER_API_KEY", "AWS_SECRET_ACCESS_KEY"
SECRETS = {name: f"secret-{number}-a81f3c" for number, name in enumerate(NAMES)}

EVERYTHING = """
import sys
from lora_squeeze.cli import main
for line in sys.stdin:
    main(line.split(), standalone_mode=False)
"""


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, **SECRETS, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}


def test_no_token_gets_into_what_is_written_or_said(tmp_path, environment):
    make_adapter(tmp_path / "adapter")
    save(tmp_path / "kohya.safetensors", kohya_pair("lora_unet_x", 8, 4, 6, alpha=2.0))
    (tmp_path / "squeeze.toml").write_text('[squeeze]\nadapter_path = "adapter"\noutput_path = "run"\n')
    lines = """
        show adapter --json
        analyze adapter --json
        plan adapter --policy energy=0.9 -o ranks.json
        compress adapter out --rank 2 --json
        compress kohya.safetensors out.safetensors --rank 2
        verify out adapter --json
        check out --for vllm
        compare adapter --json
        run squeeze.toml
    """
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING],
        input="\n".join(line for line in lines.splitlines() if line.strip()),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"ranks.json", "out.safetensors", "adapter_model.safetensors"} <= {path.name for path in written}
    assert done.returncode == 0, done.stderr
    for value in SECRETS.values():
        assert value not in done.stdout + done.stderr
        assert [path for path in written if value.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("scheme", ["hf://", "https://", "tinker://", ""])
def test_an_address_with_a_token_is_refused_without_repeating_it(scheme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = f"{scheme}user:secret-a81f3c@huggingface.co/x/y"
    for command in (["show", address], ["compress", address, "out", "--rank", "2"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert "may hold no password or token" in " ".join(result.output.split())
        assert "secret-a81f3c" not in result.output
    assert list(tmp_path.iterdir()) == []


NO_NETWORK = """
import socket, sys
def refuse(*arguments, **_):
    raise AssertionError(f"a connection was tried: {arguments[1:]}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
"""


def test_local_work_opens_no_connection(tmp_path, environment):
    make_adapter(tmp_path / "adapter")
    lines = "analyze adapter\ncompress adapter out --rank 2\nverify out adapter\ncheck out --for vllm\n"
    online = {key: value for key, value in environment.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK + EVERYTHING],
        input=lines, env=online, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
