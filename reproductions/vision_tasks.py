"""The 10 vision-language tasks of LoRA-Squeeze (arXiv 2602.10993): data sets of the Hub → rows and image files.

    python reproductions/vision_tasks.py build/vision --only textvqa
    python reproductions/vision_tasks.py build/vision --from slices      # slices/textvqa/train.jsonl, …

writes TASK/train.jsonl and test.jsonl, and the images as files beside them; `image` is a path relative to the
rows, as `lora-squeeze` reads it. An image with several questions is one file.

Questions with options become question, choices and answer, others prompt, answer and `accepted`: all answers that
count, by the task's measure (see `measures.py`).

Where a task names no source, no data set of the Hub with that split is known here: give it with --from; what is
not in that folder comes from the Hub. The paper does not give its prompts: these are ours.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import Fields, lettered, write_rows

from lora_squeeze.data import Picture, Row, opened, picture_of, read_rows
from lora_squeeze.errors import DataError


@dataclass(frozen=True)
class VisionTask:
    """Where a task's rows come from, what becomes of one, and how answers are measured.

    metric
        "accuracy" of questions with options, else one of `measures.METRICS`.
    """

    train: str
    test: str
    row: Callable[[Fields], list[dict[str, Any]]]
    metric: str


def options(row: Fields) -> list[dict[str, Any]]:
    """question, options or choices, and the right one's place."""
    listed = row["options"] if "options" in row else row["choices"]
    place = row["correct_choice_idx"] if "correct_choice_idx" in row else row["answer"]
    return [lettered(row["question"], listed, int(place))]


def scienceqa(row: Fields) -> list[dict[str, Any]]:
    """question, choices, answer, and hint: what is to be read before, if it is not empty."""
    return options({**row, "question": "\n".join(filter(None, [row.get("hint"), row["question"]]))})


def free(row: Fields) -> list[dict[str, Any]]:
    """question, answers or direct_answers: the most frequent is learnt, all are accepted."""
    answers = row["direct_answers"] if "direct_answers" in row else row["answers"]
    if isinstance(answers, str):  # A-OKVQA gives its list as Python's text; JSON of strings reads the same
        answers = ast.literal_eval(answers) if answers.startswith("[") else [answers]
    return [answered(row["question"], answers or [])]


def counted(row: Fields) -> list[dict[str, Any]]:
    """question, and number or answer: how many; or `qa`, a list of such about one image."""
    asked = row.get("qa", [row])
    return [answered(one["question"], [str(one["number"] if "number" in one else one["answer"])]) for one in asked]


def several(row: Fields) -> list[dict[str, Any]]:
    """questions and answers, of the same length, all about one image."""
    return [answered(question, [one]) for question, one in zip(row["questions"], row["answers"], strict=True)]


def answered(question: str, answers: Sequence[str]) -> dict[str, Any]:
    """A question that is answered freely. Raises ValueError for one without answers."""
    if not answers:
        raise ValueError("there is none; leave such rows out")
    learnt = Counter(answers).most_common(1)[0][0]
    return {"prompt": f"{question}\nAnswer briefly:", "answer": f" {learnt}", "accepted": list(answers)}


TASKS: Mapping[str, VisionTask] = {
    "ai2d": VisionTask("", "lmms-lab/ai2d:test", options, "accuracy"),
    "a-okvqa": VisionTask("HuggingFaceM4/A-OKVQA:train", "HuggingFaceM4/A-OKVQA:validation", free, "soft"),
    "countbenchqa": VisionTask("", "vikhyatk/CountBenchQA:test", counted, "exact"),
    "docvqa": VisionTask("HuggingFaceM4/DocumentVQA:train", "HuggingFaceM4/DocumentVQA:validation", free, "anls"),
    "infovqa": VisionTask("", "lmms-lab/DocVQA:InfographicVQA:validation", free, "anls"),
    "ocr-vqa": VisionTask("howard-hou/OCR-VQA:train", "howard-hou/OCR-VQA:test", several, "exact"),
    "ok-vqa": VisionTask("", "lmms-lab/OK-VQA:val2014", free, "soft"),
    "scienceqa": VisionTask("derek-thomas/ScienceQA:train", "derek-thomas/ScienceQA:test", scienceqa, "accuracy"),
    "tallyqa": VisionTask("", "vikhyatk/tallyqa-test:test", counted, "exact"),
    "textvqa": VisionTask("lmms-lab/textvqa:train", "lmms-lab/textvqa:validation", free, "soft"),
}


def write_task(name: str, folder: Path, *, slices: Path | None = None) -> dict[str, int]:
    """Write a task's train.jsonl, test.jsonl and images, and return how many rows each has.

    Rows without an image are left out.
    slices
        a folder with `name`/train.jsonl or test.jsonl in the data set's own columns, `image` being a path beside
        them; a part that is not there comes from the Hub.

    Raises DataError if there is no source, and, naming the row, for an image that cannot be read and for a question
    without a usable answer.
    """
    task = TASKS[name]
    counts: dict[str, int] = {}
    for part, source in (("train", task.train), ("test", task.test)):
        file = slices / name / f"{part}.jsonl" if slices else None
        if file is not None and file.exists():
            source = str(file)
        if not source:
            raise DataError(
                f"{name}: no data set with its {part} split is known; give {name}/{part}.jsonl in a folder, with --from"
            )
        rows: list[dict[str, Any]] = []
        saved: dict[str, str] = {}
        (folder / name / "images" / part).mkdir(parents=True, exist_ok=True)
        for one in read_rows(source):
            if one.fields.get("image") is None:
                continue
            made, picture = _made(task, one), _picture(one)
            if picture.name not in saved:
                saved[picture.name] = _saved(picture, folder / name, f"images/{part}/{len(saved)}", one.place)
            rows += [{**row, "image": saved[picture.name]} for row in made]
        write_rows(rows, folder / name / f"{part}.jsonl")
        counts[part] = len(rows)
    return counts


def _made(task: VisionTask, one: Row) -> list[dict[str, Any]]:
    try:
        return task.row(one.fields)
    except KeyError as error:
        raise DataError(f"{one.place}: has no column {error}, only {', '.join(one.fields)}") from error
    except (ValueError, TypeError, IndexError, SyntaxError) as error:
        raise DataError(f"{one.place}: its answer cannot be used: {error}") from error


def _picture(one: Row) -> Picture:
    try:
        return picture_of(one.fields["image"], one.folder)
    except ValueError as error:
        raise DataError(f"{one.place}: {error}") from error


def _saved(picture: Picture, folder: Path, name: str, place: str) -> str:
    """Copy an image file as it is, and return its name with the ending of its format."""
    from PIL import Image

    try:
        opened(picture)  # what cannot be read is found here, not in the middle of a training
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    content = picture.read()
    with Image.open(io.BytesIO(content)) as image:
        file = f"{name}.{str(image.format).lower()}"
    (folder / file).write_bytes(content)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the vision-language tasks as rows and image files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--from", dest="slices", type=Path, help="folder of what shall not come from the Hub")
    chosen = parser.parse_args()
    failed = False
    for name in chosen.only:
        try:
            counts = write_task(name, chosen.folder, slices=chosen.slices)
        except DataError as error:  # the other tasks need not wait for this one
            print(f"Error: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{name:<14} {counts['train']:>7,} train  {counts['test']:>6,} test")
    sys.exit(failed)


if __name__ == "__main__":
    main()
