"""The 13 text tasks of LoRA-Squeeze (arXiv 2602.10993): data sets of the Hub → rows that `lora-squeeze` reads.

    python reproductions/tasks.py build/tasks                        # all, from the Hub
    python reproductions/tasks.py build/tasks --only boolq piqa
    python reproductions/tasks.py build/tasks --from slices          # from slices/boolq/train.jsonl, …

writes build/tasks/TASK/train.jsonl and test.jsonl. `test` is the split that is scored: the test set where its
answers are public, else the validation set.

Questions with options list them under letters, and the answer is a letter; classes are answered by their
names. DROP is answered freely. The paper does not give its prompts: these are ours.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_squeeze.data import read_rows

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from, and what becomes of one.

    train, test
        sources as `lora_squeeze.data` spells them: NAME:CONFIG:SPLIT.
    row
        a row of the data set → a row with question, choices and answer, or with prompt and answer.
    """

    train: str
    test: str
    row: Callable[[Fields], dict[str, Any]]


def lettered(question: str, options: Sequence[str], answer: int) -> dict[str, Any]:
    """A question whose options are listed; `answer` is the place of the right one."""
    letters = string.ascii_uppercase[: len(options)]
    listed = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return {"question": "\n".join([question, *listed]), "choices": list(letters), "answer": letters[answer]}


def named(question: str, names: Sequence[str], answer: int | str) -> dict[str, Any]:
    """A question that is answered by the name of a class; `answer` is a name, or its place."""
    return {"question": question, "choices": list(names), "answer": answer if answer in names else names[int(answer)]}


def winogrande(row: Fields) -> dict[str, Any]:
    """sentence with a gap `_`, option1, option2, answer "1" or "2"."""
    question = f"{row['sentence']}\nWhat does the _ stand for?"
    return lettered(question, [row["option1"], row["option2"]], int(row["answer"]) - 1)


def boolq(row: Fields) -> dict[str, Any]:
    """question, passage, answer true or false."""
    return named(f"{row['passage']}\nQuestion: {row['question']}?", ["no", "yes"], int(row["answer"]))


def piqa(row: Fields) -> dict[str, Any]:
    """goal, sol1, sol2, label 0 or 1."""
    return lettered(f"Goal: {row['goal']}\nHow is it reached?", [row["sol1"], row["sol2"]], int(row["label"]))


def hellaswag(row: Fields) -> dict[str, Any]:
    """ctx, four endings, label "0" to "3"."""
    return lettered(f"{row['ctx']}\nHow does it go on?", row["endings"], int(row["label"]))


def openbookqa(row: Fields) -> dict[str, Any]:
    """question_stem, choices, answerKey."""
    return arc({**row, "question": row["question_stem"]})


def arc(row: Fields) -> dict[str, Any]:
    """question, choices {text, label}, answerKey; labels are letters or numbers, three to five of them."""
    answer = list(row["choices"]["label"]).index(row["answerKey"])
    return lettered(f"Question: {row['question']}", row["choices"]["text"], answer)


def social_i_qa(row: Fields) -> dict[str, Any]:
    """context, question, answerA to answerC, label "1" to "3"."""
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return lettered(f"{row['context']}\nQuestion: {row['question']}", options, int(row["label"]) - 1)


def mmlu(row: Fields) -> dict[str, Any]:
    """question, four choices, answer 0 to 3, or A to D where `datasets` names it."""
    answer = "ABCD".index(row["answer"]) if isinstance(row["answer"], str) else row["answer"]
    return lettered(f"Question: {row['question']}", row["choices"], answer)


def paws(row: Fields) -> dict[str, Any]:
    """sentence1, sentence2, label 1 for a paraphrase."""
    question = f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\nDo they mean the same?"
    return named(question, ["no", "yes"], int(row["label"]))


def anli(row: Fields) -> dict[str, Any]:
    """premise, hypothesis, label entailment, neutral, contradiction, or its place."""
    question = f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}\nDoes it follow?"
    return named(question, ["entailment", "neutral", "contradiction"], row["label"])


# fmt: off
EMOTIONS = (
    "admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire",
    "disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy",
    "love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise", "neutral",
)
# fmt: on


def goemotions(row: Fields) -> dict[str, Any]:
    """text, labels: places in EMOTIONS. Of several, the first counts."""
    return named(f"{row['text']}\nWhich emotion is it?", EMOTIONS, row["labels"][0])


def drop(row: Fields) -> dict[str, Any]:
    """passage, question, answers_spans {spans, types}; of the test set, the spans of several annotators.

    Learnt are all spans of the training set's one annotator; `accepted` are these or any one.
    """
    spans = list(dict.fromkeys(row["answers_spans"]["spans"]))
    answer = ", ".join(spans)
    prompt = f"{row['passage']}\nQuestion: {row['question']}\nAnswer:"
    return {"prompt": prompt, "answer": f" {answer}", "accepted": list(dict.fromkeys([answer, *spans]))}


TASKS: Mapping[str, Task] = {
    "winogrande": Task(
        "allenai/winogrande:winogrande_l:train", "allenai/winogrande:winogrande_l:validation", winogrande
    ),
    "boolq": Task("google/boolq:train", "google/boolq:validation", boolq),
    "piqa": Task("baber/piqa:train", "baber/piqa:validation", piqa),
    "drop": Task("ucinlp/drop:train", "ucinlp/drop:validation", drop),
    "anli-r2": Task("facebook/anli:train_r2", "facebook/anli:test_r2", anli),
    "paws-wiki": Task(
        "google-research-datasets/paws:labeled_final:train", "google-research-datasets/paws:labeled_final:test", paws
    ),
    "hellaswag": Task("Rowan/hellaswag:train", "Rowan/hellaswag:validation", hellaswag),
    "openbookqa": Task("allenai/openbookqa:main:train", "allenai/openbookqa:main:test", openbookqa),
    "goemotions": Task(
        "google-research-datasets/go_emotions:simplified:train",
        "google-research-datasets/go_emotions:simplified:test",
        goemotions,
    ),
    "arc-easy": Task("allenai/ai2_arc:ARC-Easy:train", "allenai/ai2_arc:ARC-Easy:test", arc),
    "arc-challenge": Task("allenai/ai2_arc:ARC-Challenge:train", "allenai/ai2_arc:ARC-Challenge:test", arc),
    "social-i-qa": Task("lighteval/siqa:train", "lighteval/siqa:validation", social_i_qa),
    "mmlu": Task("cais/mmlu:all:auxiliary_train", "cais/mmlu:all:test", mmlu),
}


def write_task(name: str, folder: Path, *, slices: Path | None = None) -> dict[str, int]:
    """Write a task's train.jsonl and test.jsonl into `folder`/`name`, and return how many rows each has.

    slices
        a folder with `name`/train.jsonl and test.jsonl in the data set's own columns, instead of the Hub.

    Raises DataError if the source cannot be read.
    """
    task = TASKS[name]
    counts: dict[str, int] = {}
    (folder / name).mkdir(parents=True, exist_ok=True)
    for part, source in (("train", task.train), ("test", task.test)):
        rows = [task.row(one.fields) for one in read_rows(str(slices / name / f"{part}.jsonl") if slices else source)]
        write_rows(rows, folder / name / f"{part}.jsonl")
        counts[part] = len(rows)
    return counts


def write_rows(rows: Sequence[Fields], file: Path) -> None:
    """One row a line; the file is there when all of it is written."""
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the text tasks as rows that lora-squeeze reads.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--from", dest="slices", type=Path, help="folder of local slices, instead of the Hub")
    chosen = parser.parse_args()
    for name in chosen.only:
        counts = write_task(name, chosen.folder, slices=chosen.slices)
        print(f"{name:<14} {counts['train']:>7,} train  {counts['test']:>6,} test")


if __name__ == "__main__":
    main()
