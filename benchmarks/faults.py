"""`python -m benchmarks.faults`: what goes wrong on a machine, done on purpose, again and again.

Every trial starts the command line in a process of its own, interferes, and looks at what is there:
the source must be the same to the byte, and the output the old one, absent, or complete, which is what
`lora-squeeze verify` says of it. Then the same command runs undisturbed: it must succeed and leave
nothing beside its output.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.synthetic import Shape, mixed_pair, write_adapter
from lora_squeeze import verify

SHAPE = Shape("small", layers=8, hidden=1024, ffn=2816, kv=256)
RANK = 64
OLD, NEW = 4, 16  # ranks of the output that is there before and of the one to come
PROGRAM = [sys.executable, "-c", "from lora_squeeze.cli import main; main()"]


@dataclass
class Place:
    """A folder with a source, a command to be disturbed and its output."""

    root: Path
    command: list[str]
    source: Path
    output: Path
    takes: float = 4.0  # seconds, undisturbed
    old: Path | None = None  # an adapter that is to lie at `output` before
    before: dict[str, bytes] = field(default_factory=dict)  # its content

    def put_old(self) -> None:
        """Copy the old output, if there is to be one, to its place."""
        self.output.parent.mkdir(exist_ok=True)
        if self.old is not None and self.old.is_dir():
            shutil.copytree(self.old, self.output)
        elif self.old is not None:
            shutil.copy(self.old, self.output)

    def start(self, **options: object) -> subprocess.Popen[str]:
        """Start the command."""
        return subprocess.Popen(
            [*PROGRAM, *self.command],
            cwd=self.root,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **options,
        )

    def partial_folders(self) -> list[Path]:
        """What lies hidden beside the output."""
        return list(self.output.parent.glob(f".{self.output.name}.*.partial"))


def content(path: Path) -> dict[str, bytes]:
    """Every file below a folder, or the file itself."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


# --- what is disturbed --------------------------------------------------------------------------------------------


def compress_folder(root: Path, model: Path) -> Place:
    """A PEFT folder."""
    source, output = root / "source", root / "made" / "out"
    shutil.copytree(model / "peft", source)
    return Place(root, ["compress", str(source), str(output), "--rank", str(NEW), "--overwrite"], source, output)


def compress_file(root: Path, model: Path) -> Place:
    """A kohya file, ranks chosen in a first pass."""
    source, output = root / "source.safetensors", root / "made" / "out.safetensors"
    shutil.copy(model / "kohya.safetensors", source)
    command = ["compress", str(source), str(output), "--policy", "params=0.25", "--overwrite"]
    return Place(root, command, source, output)


def run_settings(root: Path, model: Path) -> Place:
    """`run` with a TOML file."""
    place = compress_folder(root, model)
    lines = f'adapter_path = "source"\noutput_path = "made/out"\ncompress_to = {NEW}\noverwrite = true\n'
    (root / "squeeze.toml").write_text(f"[squeeze]\n{lines}")
    return Place(root, ["run", "squeeze.toml"], place.source, place.output)


def convert_file(root: Path, model: Path) -> Place:
    """`convert` of a kohya file to one of diffusers."""
    source, output = root / "source.safetensors", root / "made" / "out.safetensors"
    shutil.copy(model / "kohya.safetensors", source)
    return Place(root, ["convert", str(source), str(output), "--to", "diffusers", "--overwrite"], source, output)


# --- how it is disturbed ------------------------------------------------------------------------------------------


def killed(place: Place, number: signal.Signals, *, writing: bool) -> str:
    """A signal at a random moment: of the whole run, or of the part in which something is written."""
    process = place.start()
    if writing:
        while not place.partial_folders() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.5))
    else:
        time.sleep(random.uniform(0, place.takes))
    process.send_signal(number)
    return outcome(place, process, ended_by=number)


def outcome(place: Place, process: subprocess.Popen[str], *, ended_by: signal.Signals | None = None) -> str:
    """What is there once the process has ended: "old", "absent" or "new"; raises if it is anything else."""
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said or ended_by is signal.SIGINT, said
    if ended_by not in (None, signal.SIGKILL) and process.returncode:
        expected = (1, 130, 128 + ended_by, -ended_by)  # 1 and 130: click's and Python's words for Ctrl-C
        assert process.returncode in expected, f"exit code {process.returncode}: {said}"
    elif ended_by is None:
        assert (process.returncode == 0) == (not said), said
        assert process.returncode in (0, 1), f"exit code {process.returncode}: {said}"
    left = place.partial_folders()
    if ended_by is not signal.SIGKILL and process.returncode not in (-signal.SIGTERM, -signal.SIGINT):
        assert not left, f"left behind: {left}"
    if not place.output.exists():
        return "absent"
    if place.before and content(place.output) == place.before:
        return "old"
    verification = verify(place.output)
    assert verification.passed, [check for check in verification.checks if not check.passed]
    return "new"


def on_a_full_disk(place: Place) -> str:
    """The output on a disk that has room for a part of it."""
    need = 600_000 + int(random.uniform(0, 1) * 5_500_000)
    with small_disk(place.output.parent, len(b"".join(place.before.values())) + need):
        place.put_old()
        return outcome(place, place.start())


def without_room_for_temporary_files(place: Place) -> str:
    """TMPDIR on a disk of 64 KiB."""
    with small_disk(place.root / "disk", 65536):
        return outcome(place, place.start(env={**os.environ, "TMPDIR": str(place.root / "disk")}))


def with_a_limit_on_file_sizes(place: Place) -> str:
    """RLIMIT_FSIZE, as a quota would do it."""
    import resource

    limit = random.randrange(4096, 5_000_000)

    def lower() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return outcome(place, place.start(preexec_fn=lower))


def from_a_read_only_source(place: Place) -> str:
    """The source on a disk that is mounted read-only."""
    mount("--bind", str(place.source), str(place.source))
    try:
        mount("-o", "remount,bind,ro", str(place.source))
        return outcome(place, place.start())
    finally:
        subprocess.run(["umount", str(place.source)], check=True)


def to_a_read_only_disk(place: Place) -> str:
    """The output on a disk that is mounted read-only."""
    with small_disk(place.output.parent, 20_000_000):
        place.put_old()
        mount("-o", "remount,ro", str(place.output.parent))
        return outcome(place, place.start())


def with_a_vanishing_source(place: Place) -> str:
    """The source is moved away at a random moment."""
    process = place.start()
    wait_for_writing(place, process)
    away = place.root / "away"
    shutil.move(place.source, away)
    try:
        return outcome(place, process)
    finally:
        shutil.move(away, place.source)


def with_a_changing_source(place: Place, *, in_place: bool) -> str:
    """Another adapter is written over the source at a random moment, into the file or in its place."""
    process = place.start()
    wait_for_writing(place, process)
    weights = place.source if place.source.is_file() else place.source / "adapter_model.safetensors"
    original = weights.read_bytes()
    other = original[: len(original) // 2] + bytes(len(original) - len(original) // 2)
    if in_place:
        weights.write_bytes(other)
    else:
        (place.root / "other").write_bytes(other)
        (place.root / "other").replace(weights)
    try:
        return outcome(place, process)
    finally:
        weights.write_bytes(original)


def wait_for_writing(place: Place, process: subprocess.Popen[str]) -> None:
    """Until there is something hidden beside the output, and a moment longer."""
    while not place.partial_folders() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.6))


def by_two_at_once(place: Place) -> str:
    """Two processes with the same command."""
    first = place.start()
    time.sleep(random.choice([0, 0.01, 0.1, random.uniform(0, 1.5)]))
    second = place.start()
    said = [process.communicate(timeout=120)[1] for process in (first, second)]
    codes = [process.returncode for process in (first, second)]
    assert 0 in codes, said
    assert all(code == 0 or text.startswith("Error: ") for code, text in zip(codes, said, strict=True)), said
    assert not place.partial_folders()
    assert verify(place.output).passed
    return "new"


# --- disks --------------------------------------------------------------------------------------------------------


def mount(*arguments: str) -> None:
    """Needs root; the trials that mount something are left out where it is not allowed."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """A tmpfs of this size."""
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def may_mount(scratch: Path) -> bool:
    """Whether a tmpfs can be mounted here."""
    try:
        with small_disk(scratch / "probe", 4096):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# --- trials -------------------------------------------------------------------------------------------------------

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
FAULTS: dict[str, tuple[Callable[[Place], str], bool]] = {
    "kill −9 at a random moment": (partial(killed, number=KILL, writing=False), False),
    "kill −9 while it writes": (partial(killed, number=KILL, writing=True), False),
    "SIGTERM while it writes": (partial(killed, number=TERM, writing=True), False),
    "Ctrl-C while it writes": (partial(killed, number=INT, writing=True), False),
    "full disk (tmpfs)": (on_a_full_disk, True),
    "no room for temporary files (tmpfs)": (without_room_for_temporary_files, True),
    "limit on file sizes (RLIMIT_FSIZE)": (with_a_limit_on_file_sizes, False),
    "source on a read-only disk": (from_a_read_only_source, True),
    "output on a read-only disk": (to_a_read_only_disk, True),
    "source moved away while it is read": (with_a_vanishing_source, False),
    "source replaced while it is read": (partial(with_a_changing_source, in_place=False), False),
    "source written over while it is read": (partial(with_a_changing_source, in_place=True), False),
    "two processes, one output": (by_two_at_once, False),
}
SUBJECTS = {
    "compress, PEFT folder": compress_folder,
    "compress, kohya file": compress_file,
    "run": run_settings,
    "convert": convert_file,
}


def trial(
    fault: Callable[[Place], str], subject: Callable[[Path, Path], Place], model: Path, *, old: bool, takes: float
) -> str:
    """One trial in a folder of its own: what was there afterwards."""
    with tempfile.TemporaryDirectory(prefix="lora-squeeze-faults-") as scratch:
        place = subject(Path(scratch), model)
        place.takes = takes
        if old:
            place.old = model / ("old" if place.output.suffix == "" else "old.safetensors")
            place.before = content(place.old)
        place.put_old()
        source = content(place.source)
        found = fault(place)
        assert content(place.source) == source, "the source was touched"
        again = place.start()
        _, said = again.communicate(timeout=120)
        assert again.returncode == 0, f"afterwards: {said}"
        assert not place.partial_folders(), "the next run did not clear up"
        assert verify(place.output, place.source).passed, "the next run's output"
        assert content(place.source) == source, "the source was touched by the next run"
        return found


def make_model(folder: Path) -> float:
    """Sources of 19 and 16 MB, and old outputs; returns the seconds that a command takes here."""
    write_adapter(folder / "peft", SHAPE, rank=RANK)
    tensors: dict[str, torch.Tensor] = {}
    for number in range(24):
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_{number}_attn1_to_q"
        up, down = mixed_pair(1280, 1280, RANK, torch.Generator().manual_seed(number))
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(8.0)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "kohya.safetensors")
    start = time.monotonic()
    for source, old in ((folder / "peft", "old"), (folder / "kohya.safetensors", "old.safetensors")):
        command = ["compress", str(source), str(folder / old), "--rank", str(OLD)]
        subprocess.run([*PROGRAM, *command], check=True, capture_output=True)
    return (time.monotonic() - start) / 2


def main() -> None:
    """Print the table of docs/reliability.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=4, help="of every fault and command (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORDS", help="faults whose name has these words")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    lines = ["| Fault | Trials | Old output | Absent | New, complete |", "| --- | ---: | ---: | ---: | ---: |"]
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lora-squeeze-faults-") as scratch:
        model = Path(scratch, "model")
        takes = make_model(model)
        mounting = may_mount(Path(scratch))
        for name, (fault, mounts) in FAULTS.items():
            if arguments.only not in name or (mounts and not mounting):
                continue
            counts: Counter[str] = Counter()
            for number in range(arguments.trials):
                for subject, prepare in SUBJECTS.items():
                    try:
                        counts[trial(fault, prepare, model, old=number % 2 == 0, takes=takes)] += 1
                    except AssertionError as error:
                        broken.append(f"{name}, {subject}: {error}")
                        print(broken[-1], file=sys.stderr, flush=True)
            row = (name, *map(str, (arguments.trials * len(SUBJECTS), counts["old"], counts["absent"], counts["new"])))
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    if not mounting:
        print("\nNothing may be mounted here, so the faults that need it were left out.")
    print(f"\nSources touched, outputs damaged, leftovers that stayed: {len(broken)}.")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
