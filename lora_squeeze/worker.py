"""One job in a process of its own: `python -m lora_squeeze.worker JOB`.

JOB is JSON: a function's dotted path, its arguments, and the file that everything printed goes to. The
process ends when the one that started it does, however that ended: its standard input is then closed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_squeeze.dotted import import_function
from lora_squeeze.errors import LoraSqueezeError

__all__ = ["Ending", "Job", "end_with_parent", "perform", "spawn", "verdict"]


@dataclass(frozen=True)
class Job:
    """What is to be done: function(**arguments), with JSON values; what it prints goes to `log`."""

    name: str
    function: str
    arguments: Mapping[str, Any]
    log: str
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Ending:
    """How a job ended: exit code 0 and no error, or both."""

    code: int
    error: str = ""


def perform(job: Job) -> Ending:
    """Do a job in this process, without its log. Whatever it raises becomes the ending, but for Ctrl-C and the like."""
    try:
        import_function(job.function, key="job")(**job.arguments)
    except LoraSqueezeError as error:
        said = str(error)
    except Exception as error:
        traceback.print_exception(error)
        said = f"{type(error).__name__}: {error}"
    else:
        return Ending(0)
    print(f"Error: {said}", flush=True)
    return Ending(1, said)


def spawn(job: Job) -> subprocess.Popen[bytes]:
    """Start a job in a process of its own."""
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lora_squeeze.worker", json.dumps({**asdict(job), "environment": {}})]
    # The current folder holds the user's own functions; the package may be imported from where it lies.
    places = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), **job.environment}
    with Path(job.log).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment)


def verdict(job: Job, code: int) -> Ending:
    """What the exit code of a job's process means; the reason is the last line of its log."""
    if code == 0:
        return Ending(0)
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; was there too little memory?" if name == "SIGKILL" else ""
        return Ending(code, f"its process was ended by {name}{hint}")
    try:
        lines = [line for line in Path(job.log).read_text(encoding="utf-8", errors="replace").splitlines() if line]
    except OSError:
        lines = []
    said = lines[-1].removeprefix("Error: ") if lines else "nothing was printed"
    return Ending(code, said)


def end_with_parent() -> None:
    """End this process when whoever holds the other end of standard input has ended."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _main() -> None:
    end_with_parent()
    ending = perform(Job(**json.loads(sys.argv[1])))
    sys.stdout.flush()
    os._exit(ending.code)  # without waiting for threads of libraries


if __name__ == "__main__":
    _main()
