"""All of the package is documented, and what is documented works."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from lora_squeeze.cli import main
from lora_squeeze.formats import FORMATS
from lora_squeeze.policies import POLICIES
from lora_squeeze.settings import SqueezeSettings

ROOT = Path(__file__).parent.parent


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def documentation() -> str:
    return "\n".join([readme(), *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))])


def blocks(text: str, *languages: str) -> list[str]:
    """Code blocks of a Markdown text in these languages."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def command_lines() -> list[str]:
    shells = "\n".join(blocks(documentation(), "sh", "bash", "console", "shell", ""))
    joined = re.sub(r"\\\n\s*", " ", shells)
    return [line.removeprefix("$ ") for line in joined.splitlines() if re.match(r"(\$ )?lora-squeeze ", line)]


@pytest.mark.parametrize("name", main.commands)
def test_every_command_is_in_the_readme(name):
    assert f"lora-squeeze {name}" in readme()


@pytest.mark.parametrize("name", main.commands)
def test_every_option_is_documented(name):
    text = documentation()
    options = [one for one in main.commands[name].params if isinstance(one, click.Option)]
    spelled = lambda opts: "|".join(rf"(?<![\w-]){opt}(?![\w-])" for opt in opts)  # noqa: E731
    assert [one.opts for one in options if not re.search(spelled(one.opts), text)] == []


def test_every_key_of_squeeze_settings_is_documented():
    text = documentation()
    assert [key for key in SqueezeSettings.__dataclass_fields__ if key not in text] == []


def test_every_policy_and_format_is_documented():
    text = documentation()
    assert [name for name in (*POLICIES, *FORMATS) if name not in text.replace("PEFT", "peft")] == []


def test_both_functions_of_the_document_are_in_the_readme():
    assert "analyze_adapter(" in readme()
    assert "compress_adapter(" in readme()


def test_documented_command_lines_can_be_parsed():
    assert command_lines()
    for line in command_lines():
        _, name, *arguments = shlex.split(re.split(r"\s[|#>]", line)[0])
        if name.startswith("-"):
            continue
        with main.commands[name].make_context(name, [one for one in arguments if one not in ("-h", "--help")]):
            pass


def test_documented_python_is_python_and_imports_what_exists():
    sources = [block for block in blocks(documentation(), "python", "py") if "import " in block]
    assert sources
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lora_squeeze"):
                module = importlib.import_module(str(node.module))
                assert [one.name for one in node.names if not hasattr(module, one.name)] == []
