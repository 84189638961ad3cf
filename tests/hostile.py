"""What every command must do with files as nobody should send them (`hostile_files` makes them up).

A case is a folder's content: relative path → bytes. `attempt` writes it, runs the commands that would
read it, and holds what holds for all of them:

- exit code 0, 1 or 2, and a message where it is not 0; no other exception
- nothing written but the output, and nothing if the command failed
- no more memory than `MEMORY` beyond what the process had
- an output that was written passes `verify`
"""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters import snapshot
from click.testing import CliRunner

from lora_squeeze.cli import main
from lora_squeeze.errors import FetchError
from lora_squeeze.formats.unpacking import unpack

Case = Mapping[str, bytes]

CORPUS = Path(__file__).parent / "corpus"
MEMORY = 512 << 20
LIMIT = 1 << 20  # bytes that an archive may unpack to
NO_MEMORY = "there is not enough memory"


# --- what must hold -----------------------------------------------------------------------------------------------


def attempt(case: Case) -> None:
    """Run every command that would read these files."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name, _inside(name), _little_memory():
        for path, content in case.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content)
        if "archive" in case:
            _attempt_archive()
            return
        before = snapshot(Path())
        for number, command in enumerate(_commands(case)):
            output = Path(f"out-{number}", "x.safetensors")
            result = CliRunner().invoke(main, [part.replace("OUT", str(output)) for part in command])
            _judge(command, result)
            after = snapshot(Path())
            written = {path for path in after if path not in before}
            assert {path: after.get(path) for path in before} == before, f"{command} changed its input"
            assert all(path.startswith(f"out-{number}/") for path in written), f"{command} wrote {written}"
            assert result.exit_code == 0 or not written, f"{command} failed and left {written}"
            if written and command[0] == "compress":
                _judge(("verify",), checked := CliRunner().invoke(main, ["verify", str(output), command[1]]))
                assert checked.exit_code == 0, f"{command}: {checked.output}"
                before = after


def _attempt_archive() -> None:
    """What a fetched archive may do: become plain files in its folder, within a limit, or be refused."""
    Path("out-0").mkdir()
    with contextlib.suppress(FetchError):
        unpack(Path("archive"), Path("out-0"), origin="tinker://x", limit=LIMIT)
    found = sorted(Path("out-0").rglob("*"))
    assert not [path for path in found if path.is_symlink() or not (path.is_file() or path.is_dir())]
    assert sum(path.stat().st_size for path in found if path.is_file()) <= LIMIT
    assert {path.name for path in Path().iterdir()} == {"archive", "out-0"}


def _judge(command: tuple[str, ...], result: Any) -> None:
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{command}: {result.exception!r}") from result.exception
    assert result.exit_code in (0, 1, 2), f"{command}: exit code {result.exit_code}"
    assert result.exit_code == 0 or "Error: " in result.output or command[0] in ("verify", "check"), result.output
    assert NO_MEMORY not in result.output, f"{command}: {result.output}"
    assert "\x1b" not in result.output, f"{command}: an escape sequence came through"


def _commands(case: Case) -> Iterator[tuple[str, ...]]:
    if "squeeze.toml" in case:
        yield "run", "squeeze.toml", "--explain"
        yield "run", "squeeze.toml"
        return
    if "run.toml" in case:
        yield "run", "run.toml", "--explain"
        yield "train", "run.toml", "--explain"
        yield "campaign", "run", "run.toml", "--explain"
        return
    (name,) = {path.partition("/")[0] for path in case} - {"ranks.json", "moments.safetensors"}
    if "ranks.json" in case:
        yield "compress", name, "OUT", "--ranks", "ranks.json"
        return
    if "moments.safetensors" in case:
        yield "analyze", name, "--json", "--calibration", "moments.safetensors"
        yield "compress", name, "OUT", "--rank", "1", "--calibration", "moments.safetensors"
        yield "calibrate", "moments.safetensors", "--merge", "-o", "OUT"
        return
    yield "show", name
    yield "analyze", name, "--json"
    yield "verify", name
    yield "check", name, "--for", "vllm"
    yield "plan", name, "--policy", "energy=0.9"
    yield "compress", name, "OUT", "--rank", "1"
    yield "compress", name, "OUT", "--policy", "size=0.5", "--for", "sglang"
    yield "convert", name, "OUT", "--to", "diffusers"


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Allocations that go far beyond what small files need fail, and with them the command."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        (now,) = [int(line.split()[1]) << 10 for line in status if line.startswith("VmData:")]
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# --- the corpus ---------------------------------------------------------------------------------------------------


def corpus() -> dict[str, Case]:
    """The inputs kept in the repository, by name."""
    return {
        folder.name: {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        for folder in sorted(CORPUS.iterdir())
    }


def keep(case: Case, name: str) -> None:
    """Put an input into the corpus."""
    for path, content in case.items():
        (CORPUS / name / path).parent.mkdir(parents=True, exist_ok=True)
        (CORPUS / name / path).write_bytes(content)
