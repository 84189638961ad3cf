"""Running commands: what one prints, and what one refuses."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from lora_squeeze import open_adapter
from lora_squeeze.cli import main


def invoke(*arguments: object) -> Result:
    """Run a command; anything that is not a clean exit is raised."""
    return CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)


def prints(*arguments: object) -> str:
    """Standard output of a command that succeeds and has nothing else to say."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refuses(*arguments: object, code: int = 1) -> str:
    """What a command says that ends with this exit code and prints nothing else."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def write_plan(file: Path, adapter: Path, **changes: object) -> Path:
    by_layer = dict.fromkeys(open_adapter(adapter).layers, 2) | changes
    file.write_text(json.dumps({"record": "Ranks", "policy": "by hand", "by_layer": by_layer}))
    return file
