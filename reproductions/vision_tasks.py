"""Vision-language tasks of LoRA-Squeeze (arXiv 2602.10993): rows with a question, an answer and an image file.

    python reproductions/vision_tasks.py build/vision --only textvqa
    python reproductions/vision_tasks.py build/vision --from slices      # slices/textvqa/train.jsonl, …

writes TASK/train.jsonl and test.jsonl, and the images as files beside them; `image` is a path relative to the
rows. `lora-squeeze` reads only the texts of such rows: to train on the images, another trainer is needed.
`soft_accuracy` and `anls` are the measures of free answers; questions with options are scored by accuracy.

Where a task names no source, no data set of the Hub with its training split is known here: give --from.
"""

from __future__ import annotations

import argparse
import ast
import json
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tasks import Fields, lettered

from lora_squeeze.data import Row, read_rows
from lora_squeeze.errors import DataError


@dataclass(frozen=True)
class VisionTask:
    """Where a task's rows come from, what becomes of one, and how answers are measured.

    metric
        "accuracy", "exact", "soft" (see `soft_accuracy`) or "anls" (see `anls`).
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


def free(row: Fields) -> list[dict[str, Any]]:
    """question, answers or direct_answers: the most frequent is learnt, all are accepted."""
    answers = row["direct_answers"] if "direct_answers" in row else row["answers"]
    # A-OKVQA gives its list as Python's text; JSON of strings reads the same.
    answers = ast.literal_eval(answers) if isinstance(answers, str) and answers.startswith("[") else answers
    return [answered(row["question"], answers)]


def counted(row: Fields) -> list[dict[str, Any]]:
    """question, and number or answer: how many."""
    return [answered(row["question"], [str(row["number"] if "number" in row else row["answer"])])]


def several(row: Fields) -> list[dict[str, Any]]:
    """questions and answers, of the same length, all about one image."""
    return [answered(question, [one]) for question, one in zip(row["questions"], row["answers"], strict=True)]


def answered(question: str, answers: Sequence[str]) -> dict[str, Any]:
    """A question that is answered freely."""
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
    "scienceqa": VisionTask("derek-thomas/ScienceQA:train", "derek-thomas/ScienceQA:test", options, "accuracy"),
    "tallyqa": VisionTask("", "", counted, "exact"),
    "textvqa": VisionTask("lmms-lab/textvqa:train", "lmms-lab/textvqa:validation", free, "soft"),
}


def plain(text: str) -> str:
    """Without case, articles and punctuation at its ends."""
    words = (word.strip(string.punctuation) for word in text.lower().split())
    return " ".join(word for word in words if word and word not in ("a", "an", "the"))


def soft_accuracy(written: str, answers: Sequence[str]) -> float:
    """VQA accuracy: the mean over people left out of min(1, others who said it / 3) (arXiv 1505.00468)."""
    said = [plain(one) == plain(written) for one in answers]
    return sum(min(1.0, (sum(said) - one) / 3) for one in said) / len(said)


def anls(written: str, answers: Sequence[str]) -> float:
    """1 − edit distance / longer length to the nearest answer; below a half it is 0 (arXiv 1907.00490)."""
    pairs = [(" ".join(written.lower().split()), " ".join(one.lower().split())) for one in answers]
    nearest = max(1 - _edits(one, other) / max(len(one), len(other), 1) for one, other in pairs)
    return nearest if nearest >= 0.5 else 0.0


def _edits(one: str, other: str) -> int:
    before = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        now = [row]
        for column, right in enumerate(other, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (left != right)))
        before = now
    return before[-1]


def write_task(name: str, folder: Path, *, slices: Path | None = None) -> dict[str, int]:
    """Write a task's train.jsonl, test.jsonl and images, and return how many rows each has; see `tasks.write_task`.

    Rows without an image are left out. Raises DataError, naming the row, for an image that is not there.
    """
    task, counts = TASKS[name], {}
    for part, source in (("train", task.train), ("test", task.test)):
        if not slices and not source:
            raise DataError(f"{name}: no data set with its {part} split is known; give it with --from")
        images = folder / name / "images" / part
        images.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        for number, one in enumerate(read_rows(str(slices / name / f"{part}.jsonl") if slices else source)):
            if one.fields.get("image") is None:
                continue
            file = images / f"{number}.png"
            _opened(one.fields["image"], one.place, slices / name if slices else Path()).save(file)
            image = str(file.relative_to(folder / name))
            lines += [json.dumps({**row, "image": image}, ensure_ascii=False) for row in _made(task, one)]
        (folder / name / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        counts[part] = len(lines)
    return counts


def _made(task: VisionTask, one: Row) -> list[dict[str, Any]]:
    try:
        return task.row(one.fields)
    except KeyError as error:
        raise DataError(f"{one.place}: has no column {error}, only {', '.join(one.fields)}") from error
    except (ValueError, IndexError, SyntaxError) as error:
        raise DataError(f"{one.place}: its answer cannot be used: {error}") from error


def _opened(image: Any, place: str, beside: Path) -> Image.Image:
    if not isinstance(image, str):
        return image.convert("RGB")
    try:
        return Image.open(beside / image).convert("RGB")
    except OSError as error:
        raise DataError(f"{place}: its image {beside / image} cannot be read: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the vision-language tasks as rows and image files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--from", dest="slices", type=Path, help="folder of local slices, instead of the Hub")
    chosen = parser.parse_args()
    for name in chosen.only:
        try:
            counts = write_task(name, chosen.folder, slices=chosen.slices)
        except DataError as error:
            raise SystemExit(f"Error: {error}") from error
        print(f"{name:<14} {counts['train']:>7,} train  {counts['test']:>6,} test")


if __name__ == "__main__":
    main()
