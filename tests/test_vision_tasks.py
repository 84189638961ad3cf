"""The vision-language tasks of reproductions/: rows, images and measures."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from lora_squeeze.data import Answered, Choice, read_examples
from lora_squeeze.errors import DataError

sys.path.insert(0, str(Path(__file__).parent.parent / "reproductions"))
import vision_tasks

OPTIONS = {"question": "Which?", "options": ["ice", "fire"], "answer": "1"}
FREE = {"question": "Which?", "answers": ["ice", "fire", "ice"]}
ROWS = {
    "ai2d": OPTIONS,
    "a-okvqa": {"question": "Which?", "direct_answers": "['ice', 'fire', 'ice']"},
    "countbenchqa": {"question": "How many?", "number": 4},
    "docvqa": FREE,
    "infovqa": FREE,
    "ocr-vqa": {"questions": ["Who?", "What?"], "answers": ["Jo", "Art"]},
    "ok-vqa": FREE,
    "scienceqa": {"question": "Which?", "choices": ["ice", "fire"], "answer": 1},
    "tallyqa": {"question": "How many?", "answer": 4},
    "textvqa": FREE,
}


def slices_of(folder: Path, name: str, *, image: str | None = "a.png") -> Path:
    (folder / name).mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / name / "a.png")
    for part in ("train", "test"):
        (folder / name / f"{part}.jsonl").write_text(json.dumps({**ROWS[name], "image": image}) + "\n")
    return folder


@pytest.mark.parametrize("name", vision_tasks.TASKS)
def test_rows_become_questions_with_image_files(tmp_path, name):
    counts = vision_tasks.write_task(name, tmp_path / "out", slices=slices_of(tmp_path, name))
    assert counts == dict.fromkeys(("train", "test"), 2 if name == "ocr-vqa" else 1)
    row = json.loads((tmp_path / "out" / name / "test.jsonl").read_text().splitlines()[0])
    assert Image.open(tmp_path / "out" / name / row["image"]).getpixel((0, 0)) == (255, 0, 0)
    one = read_examples(str(tmp_path / "out" / name / "test.jsonl"))[0]
    if vision_tasks.TASKS[name].metric == "accuracy":
        assert isinstance(one, Choice)
        assert (one.question, one.answer) == ("Which?\nA. ice\nB. fire", 1)
    else:
        assert isinstance(one, Answered)
        assert one.answer == {"Who?": " Jo", "Which?": " ice", "How many?": " 4"}[one.prompt.split("\n")[0]]


def test_a_missing_image_names_row_and_file_and_none_is_left_out(tmp_path):
    slices_of(tmp_path, "textvqa", image="gone.png")
    with pytest.raises(DataError, match=r"line 1: its image .*gone\.png cannot be read"):
        vision_tasks.write_task("textvqa", tmp_path / "out", slices=tmp_path)
    slices_of(tmp_path, "scienceqa", image=None)
    assert vision_tasks.write_task("scienceqa", tmp_path / "out", slices=tmp_path) == {"train": 0, "test": 0}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"question": "Which?"}, r"line 1: has no column 'answers', only question, image"),
        ({"question": "Which?", "answers": []}, "line 1: its answer cannot be used"),
        ({"question": "Which?", "answers": "['ice'"}, "line 1: its answer cannot be used"),
    ],
)
def test_a_row_without_a_usable_answer_is_named(tmp_path, fields, why):
    folder = slices_of(tmp_path, "textvqa")
    (folder / "textvqa" / "train.jsonl").write_text(json.dumps({**fields, "image": "a.png"}) + "\n")
    with pytest.raises(DataError, match=why):
        vision_tasks.write_task("textvqa", tmp_path / "out", slices=folder)


def test_without_a_known_source_slices_are_asked_for(tmp_path):
    with pytest.raises(DataError, match="tallyqa: no data set with its train split is known; give it with --from"):
        vision_tasks.write_task("tallyqa", tmp_path)


def test_soft_accuracy_and_anls():
    ten = ["cat"] * 3 + ["dog"] * 7
    assert vision_tasks.soft_accuracy("The cat.", ten) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vision_tasks.soft_accuracy("dog", ten) == 1
    assert vision_tasks.soft_accuracy("cow", ten) == 0
    assert vision_tasks.anls("Word", ["word"]) == 1
    assert vision_tasks.anls("wird", ["word", "x"]) == pytest.approx(0.75)
    assert vision_tasks.anls("none", ["word"]) == 0
