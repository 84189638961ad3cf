"""`python -m benchmarks.faults_of_jobs`: long jobs that are ended at random moments, and started again.

`batch`, `train` and `campaign run` are ended by a signal at a random moment, twice in a row, and then given
once more, undisturbed. What has to hold: after every end, every adapter that is there is complete, the manifest can
be read, and the sources are the same to the byte; in the end, the job has succeeded, the adapters are those of a
job that nobody disturbed, bit by bit, and nothing hidden is left.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import PROGRAM, content
from benchmarks.synthetic import Shape, write_adapter
from lora_squeeze import open_adapter, verify
from lora_squeeze.campaign.manifest import read_manifest

ROOT = Path(__file__).parent.parent
SHAPE = Shape("small", layers=4, hidden=512, ffn=1408, kv=128)
ENDS = 2  # how often a job is ended before it may finish

TRAINING = """\
[model]
model = "model"
device = "cpu"
lora_rank = 8

[training]
max_steps = 60
batch_size = 8
lr = 3e-3
save_every = 10

[in_squeeze]
schedule = "8@0, 4@50%"

[data]
source = "builtin:sums:200"
eval_fraction = 0.1
"""
CAMPAIGN = f"""\
[campaign]
seeds = [1, 2]
parallel = true
max_workers = 2

[squeeze]
min_variance_retention = 0.95
output_path = "squeezed"

{TRAINING}"""


@dataclass(frozen=True)
class Job:
    """A command, the files that it may not touch, and where its adapters lie afterwards."""

    command: list[str]
    sources: tuple[str, ...]
    adapters: Callable[[Path], list[Path]]

    def start(self, root: Path) -> subprocess.Popen[str]:
        """Start it in a process group of its own, as a terminal does."""
        return subprocess.Popen(
            [*PROGRAM, *self.command],
            cwd=root,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # What runs in the background ignores Ctrl-C, and its children would, too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def finals(root: Path) -> list[Path]:
    """Adapters of runs, the last ones and those in checkpoints."""
    return [path.parent for path in root.rglob("adapter_config.json") if "partial" not in str(path)]


JOBS = {
    "batch": Job(
        ["batch", "sources", "--out", "out", "--policy", "params=0.25"],
        ("sources",),
        lambda root: [path.parent for path in root.glob("out/*/adapter_config.json")],
    ),
    "train": Job(["train", "run.toml", "--out", "out"], ("run.toml", "model"), lambda root: finals(root / "out")),
    "campaign run": Job(
        ["campaign", "run", "campaign.toml", "--out", "out"],
        ("campaign.toml", "model"),
        lambda root: [*finals(root / "out"), *finals(root / "squeezed")],
    ),
}
SIGNALS = {"kill −9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}


def prepared(root: Path, model: Path) -> Path:
    """A folder with everything that the jobs read."""
    shutil.copytree(model / "model", root / "model")
    shutil.copytree(model / "sources", root / "sources")
    (root / "run.toml").write_text(TRAINING)
    (root / "campaign.toml").write_text(CAMPAIGN)
    return root


def weights(job: Job, root: Path) -> dict[str, bytes]:
    """The weights of the adapters that the finished job leaves: path → bytes.

    Without checkpoints, and without what a campaign squeezes: the run that finishes first, which need not be the same.
    """
    kept = [path for path in job.adapters(root) if "checkpoint" not in str(path) and root / "out" in path.parents]
    return {str(path.relative_to(root)): (path / "adapter_model.safetensors").read_bytes() for path in kept}


def trial(job: Job, number: signal.Signals, model: Path, expected: dict[str, bytes], takes: float) -> int:
    """End the job, let it finish; returns how many of the ends came before it had finished by itself."""
    with tempfile.TemporaryDirectory(prefix="lora-squeeze-jobs-") as scratch:
        root = prepared(Path(scratch), model)
        before = {name: content(root / name) for name in job.sources}
        ended = 0
        for _ in range(ENDS):
            process = job.start(root)
            time.sleep(random.uniform(0, takes))
            process.send_signal(number)
            _, said = process.communicate(timeout=300)
            ended += process.returncode != 0
            assert "Traceback" not in said, said
            sound(job, root)
        process = job.start(root)
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, f"in the end: {said}"
        sound(job, root)
        assert {name: content(root / name) for name in job.sources} == before, "a source was touched"
        found = weights(job, root)
        assert found.keys() == expected.keys(), f"in the end there are {sorted(found)}, not {sorted(expected)}"
        assert found == expected, f"other weights: {[name for name in found if found[name] != expected[name]]}"
        hidden = [path for path in root.rglob(".*.partial") if path.is_dir()]
        assert not hidden, f"left behind: {hidden}"
        return ended


def sound(job: Job, root: Path) -> None:
    """Every adapter that is there can be read to its last byte, and so can the manifest."""
    for path in job.adapters(root):
        adapter = open_adapter(path)
        for name in adapter.layers:
            adapter.load(name)
        if job is JOBS["batch"] or path.name == "squeezed":
            assert verify(path).passed, path
    if (root / "out" / "manifest.json").exists():
        read_manifest(root / "out")


def make_model(folder: Path) -> None:
    """A model that adds digits, and five adapters."""
    script = ROOT / "examples" / "tiny_arithmetic.py"
    subprocess.run([sys.executable, script, folder / "model", "--steps", "20"], check=True, capture_output=True)
    for number in range(5):
        write_adapter(folder / "sources" / f"adapter-{number}", SHAPE, rank=32)


def main() -> None:
    """Print a table for docs/reliability.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults_of_jobs", description=__doc__)
    parser.add_argument("--trials", type=int, default=3, help="of every signal and job (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="JOB", help="one of batch, train, campaign run")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    lines = [
        "| Job | Signal | Trials | Ended before its end | Same adapters in the end |",
        "| --- " * 2 + "| ---: " * 3 + "|",
    ]
    broken = 0
    with tempfile.TemporaryDirectory(prefix="lora-squeeze-jobs-") as scratch:
        model = Path(scratch, "model")
        make_model(model)
        for name, job in JOBS.items():
            if arguments.only not in name:
                continue
            undisturbed = prepared(Path(scratch, name.replace(" ", "-")), model)
            start = time.monotonic()
            assert job.start(undisturbed).wait() == 0, f"{name} fails undisturbed"
            takes, expected = time.monotonic() - start, weights(job, undisturbed)
            assert expected, f"{name} leaves no adapter"
            for called, number in SIGNALS.items():
                counts: Counter[str] = Counter()
                for _ in range(arguments.trials):
                    try:
                        counts["ended"] += trial(job, number, model, expected, takes)
                        counts["same"] += 1
                    except AssertionError as error:
                        broken += 1
                        print(f"{name}, {called}: {error}", file=sys.stderr, flush=True)
                row = (
                    name,
                    called,
                    arguments.trials,
                    f"{counts['ended']} of {ENDS * arguments.trials}",
                    counts["same"],
                )
                lines.append(f"| {' | '.join(map(str, row))} |")
                print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
