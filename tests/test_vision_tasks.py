"""The vision-language tasks of reproductions/: rows, images, measures, and a campaign from training to accuracy."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated import save_adapter
from PIL import Image
from reproduced import HERE, accuracy, generation, measures, reduced, score, vision_tasks
from safetensors import safe_open
from tiny import save_tiny_gemma

from lora_squeeze.campaign.launch import begin, run_campaign
from lora_squeeze.campaign.spec import campaign_of
from lora_squeeze.data import Answered, Choice, images_of, opened, read_examples, without_sight
from lora_squeeze.encoding import encode
from lora_squeeze.errors import DataError
from lora_squeeze.evaluation.subject import Subject, loaded, open_subject

# Rows of the ten data sets about a red image and a blue one, and the answers that shall be read from them.
OPTIONS = {"question": "Which?", "options": ["ice", "fire"]}
RED: dict[str, dict[str, Any]] = {
    "ai2d": {**OPTIONS, "answer": "1"},
    "a-okvqa": {"question": "Which?", "direct_answers": "['fire', 'ice', 'fire']", "choices": ["a"]},
    "countbenchqa": {"question": "How many?", "number": 2, "text": "Two."},
    "docvqa": {"question": "Which?", "answers": ["fire"], "questionId": 7},
    "infovqa": {"question": "Which?", "answers": ["fire"]},
    "ocr-vqa": {"questions": ["Which?", "Who?"], "answers": ["fire", "Jo"]},
    "ok-vqa": {"question": "Which?", "answers": ["fire"] * 10},
    "scienceqa": {"question": "Which?", "choices": ["ice", "fire"], "answer": 1, "hint": "Look."},
    "tallyqa": {"qa": [{"question": "How many?", "answer": 2, "is_simple": True}]},
    "textvqa": {"question": "Which?", "answers": ["2", "2", "2", "x"]},
}
BLUE: dict[str, dict[str, Any]] = {
    **RED,
    "ai2d": {**OPTIONS, "answer": "0"},
    "textvqa": {"question": "Which?", "answers": ["1", "1", "1", "x"]},
}
LEARNT = {
    **dict.fromkeys(("ai2d", "scienceqa"), "B"),
    **dict.fromkeys(("a-okvqa", "docvqa", "infovqa", "ocr-vqa", "ok-vqa"), " fire"),
    **dict.fromkeys(("countbenchqa", "tallyqa", "textvqa"), " 2"),
}


def slices_of(folder: Path, name: str, *rows: Mapping[str, Any], times: int = 1) -> Path:
    """A folder as --from takes it, where the rows of both splits are these."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for color in ("red", "blue"):
        Image.new("RGB", (28, 28), color).save(folder / name / f"{color}.png")
    for part in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"{part}.jsonl").write_text(text * times)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Where campaigns are run: all tasks lie where they look for them, and a tiny model."""
    folder = tmp_path_factory.mktemp("built")
    for name in vision_tasks.TASKS:
        rows = ({**RED[name], "image": "red.png"}, {**BLUE[name], "image": "blue.png"})
        slices_of(folder / "slices", name, *rows, times=2)
        counts = vision_tasks.write_task(name, folder / "build/vision", slices=folder / "slices")
        assert counts == dict.fromkeys(("train", "test"), 8 if name == "ocr-vqa" else 4)
    save_tiny_gemma(folder / "sees", sees=True)
    return folder


@pytest.fixture(scope="module")
def subject(built) -> Subject:
    """The model with an adapter at random on its text part."""
    save_adapter(built / "sees", built / "adapter", target_modules=r".*language_model\.layers\..*_proj")
    examples = read_examples(str(built / "build/vision/docvqa/test.jsonl"))
    return open_subject([str(built / "adapter")], base=str(built / "sees"), examples=examples)


@pytest.mark.parametrize("name", vision_tasks.TASKS)
def test_rows_of_every_task_are_read_encoded_and_measured(built, subject, monkeypatch, name):
    monkeypatch.setattr(accuracy, "LONGEST_SEEN", 4)  # tokens: a model at random does not stop
    folder = built / "build/vision" / name
    assert sorted(one.name for one in (folder / "images/test").iterdir()) == ["0.png", "1.png"]  # each image once
    examples = read_examples(str(folder / "test.jsonl"))
    one = examples[0]
    assert opened(images_of(one)[0]).getpixel((0, 0)) == (255, 0, 0)
    if vision_tasks.TASKS[name].metric == "accuracy":
        assert isinstance(one, Choice)
        hint = "Look.\n" if name == "scienceqa" else ""
        assert (one.question, one.choices[one.answer]) == (f"\ufffc{hint}Which?\nA. ice\nB. fire", LEARNT[name])
    else:
        assert isinstance(one, Answered)
        question = "How many?" if LEARNT[name] == " 2" and name != "textvqa" else "Which?"
        assert (one.prompt, one.answer) == (f"\ufffc{question}\nAnswer briefly:", LEARNT[name])
        assert one.answer.strip() in one.fields["accepted"]
    encoded = encode(one, subject.reader)
    assert len(encoded.images) == 1
    assert subject.tokenizer.decode([label for label in encoded.labels if label >= 0]).strip() == (
        f"{LEARNT[name].strip()}<eos>"
    )
    for seen in (examples, tuple(map(without_sight, examples))):
        (found,) = accuracy._accuracies(subject, [loaded(subject)], seen, name, 3)
        assert 0 <= found <= 1


@pytest.mark.parametrize(
    ("name", "written", "mean"),
    [
        # "fire" was said by two of three: (1/3 + 1/3 + 2/3) / 3; "the Ice." by one: (1/3 + 1/3 + 0) / 3.
        ("a-okvqa", ["fire", "the Ice.", "", "fire"], (4 / 9 + 2 / 9 + 0 + 4 / 9) / 4),
        ("docvqa", ["Fire", "fine", "wind", " fire\n"], (1 + 3 / 4 + 0 + 1) / 4),
        ("tallyqa", ["2", " 2 ", "two", "12"], 2 / 4),
    ],
)
def test_free_answers_are_worth_what_the_task_s_measure_says(built, subject, monkeypatch, name, written, mean):
    monkeypatch.setattr(accuracy, "completions", lambda *_, **__: [written])
    examples = read_examples(str(built / f"build/vision/{name}/test.jsonl"))
    assert accuracy._accuracies(subject, [loaded(subject)], examples, name, 3) == [pytest.approx(mean)]


def test_prompts_of_different_lengths_are_completed_as_alone(built, subject):
    picture = images_of(read_examples(str(built / "build/vision/docvqa/test.jsonl"))[0])
    asked = [
        Answered(f"{question}\nAnswer:", " x", {}, images)
        for question, images in (("Who?", picture), ("Which of them is it?", picture), ("No image: where?", ()))
    ]
    batch = generation.prompts(asked, subject.reader)
    assert "labels" not in batch
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert [subject.tokenizer.decode(one[-8:]) for one in batch["input_ids"]] == ["\nAnswer:"] * 3
    together = subject.model(**batch).logits[:, -1]
    for one, logits in zip(asked, together, strict=True):
        alone = subject.model(**generation.prompts([one], subject.reader)).logits[0, -1]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
    whole, single = (
        generation.completions(subject, [loaded(subject)], asked, batch_size=size, max_tokens=6) for size in (3, 1)
    )
    assert whole == single
    assert [len(texts) for texts in whole] == [3]


def test_a_campaign_that_has_to_look(built, monkeypatch):
    """Both kinds of answers depend on the image alone: half of them can be right without it."""
    monkeypatch.chdir(built)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = HERE / "lora-squeeze/4b-vision-direct.toml"
    campaign = reduced(path, "sees", {"ai2d", "textvqa"}, {8}, max_steps=24, batch_size=4)
    folder = begin(campaign, built / "direct")
    manifest = run_campaign(folder)
    assert [(entry.status, entry.error) for entry in manifest.runs] == [("finished", "")] * 2
    with safe_open(folder / manifest.runs[0].folder / "final/adapter_model.safetensors", "pt") as file:
        assert all(".language_model.layers." in name for name in file.keys())  # noqa: SIM118
    measured = score(path, folder)
    assert measured == accuracy.read_measured(folder) == score(path, folder)  # kept
    assert {(one.task, one.policy) for one in measured} == {
        (task, policy) for task in ("ai2d", "textvqa") for policy in ("", "fixed=1", "fixed=2", "fixed=4")
    }
    by_task = {one.task: one for one in measured if not one.policy}
    assert (by_task["ai2d"].accuracy, by_task["ai2d"].grey) == (1.0, 0.5)
    assert by_task["textvqa"].accuracy == 0.75  # what three of four people said
    assert by_task["textvqa"].grey in (0, 0.375)
    grey = (0.5 + by_task["textvqa"].grey) / 2
    lines = accuracy.summary(measured)
    assert "images grey" in lines[0]
    assert lines[1].split()[4:] == ["87.50%", "±", "0.00%", f"{grey:.2%}", "±", "0.00%", "2"]


def test_the_campaign_down_to_rank_one(built, monkeypatch):
    monkeypatch.chdir(built)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(accuracy, "LONGEST_SEEN", 4)
    path = HERE / "lora-squeeze/4b-vision-down-to-one.toml"
    document = reduced(path, "sees", {"tallyqa"}, {8}).document
    ways = document["campaign"]["conditions"]
    document["campaign"]["conditions"] = [one for one in ways if one["schedule"] in ("cont=2", "standard")]
    folder = begin(campaign_of(document, path), built / "down")
    manifest = run_campaign(folder)
    assert [(entry.status, entry.error, entry.rank) for entry in manifest.runs] == [("finished", "", 1)] * 2
    measured = score(path, folder)
    assert {one.how for one in measured} == {"cont=2", "standard"}
    assert all(one.accuracy in (0, 1) and one.grey in (0, 1) for one in measured)  # always 2


def test_images_of_a_data_set_are_copied_as_they_are(tmp_path, monkeypatch):
    """As `datasets` gives them, one image with several questions being one file."""
    import datasets

    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (9, 7), "green").save(photo)
    rows = {"image": [str(photo)] * 2, "question": ["Which?", "Who?"], "answers": [["ice"], ["Jo"]]}
    known = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    # What is saved has the bytes in it, as on the Hub.
    datasets.DatasetDict({"train": known, "test": known}).save_to_disk(str(tmp_path / "saved"))
    task = replace(vision_tasks.TASKS["docvqa"], train=f"{tmp_path}/saved:train", test=f"{tmp_path}/saved:test")
    monkeypatch.setitem(vision_tasks.TASKS, "docvqa", task)
    assert vision_tasks.write_task("docvqa", tmp_path / "out") == {"train": 2, "test": 2}
    written = [json.loads(line) for line in (tmp_path / "out/docvqa/train.jsonl").read_text().splitlines()]
    assert [row["image"] for row in written] == ["images/train/0.jpeg"] * 2
    assert (tmp_path / "out/docvqa/images/train/0.jpeg").read_bytes() == photo.read_bytes()
    # A split in --from comes from there, the other from its source.
    slices_of(tmp_path / "slices", "docvqa", {**RED["docvqa"], "image": "red.png"})
    (tmp_path / "slices/docvqa/test.jsonl").unlink()
    counts = vision_tasks.write_task("docvqa", tmp_path / "mixed", slices=tmp_path / "slices")
    assert counts == {"train": 1, "test": 2}


def test_an_image_that_is_missing_or_broken_names_its_row_and_none_is_left_out(tmp_path):
    folder = slices_of(tmp_path, "textvqa", {**RED["textvqa"], "image": "gone.png"})
    with pytest.raises(DataError, match=r"line 1: its image 'gone\.png' is not there"):
        vision_tasks.write_task("textvqa", tmp_path / "out", slices=folder)
    slices_of(tmp_path, "textvqa", {**RED["textvqa"], "image": "broken.png"})
    (tmp_path / "textvqa/broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"line 1: image 'broken\.png': cannot be read"):
        vision_tasks.write_task("textvqa", tmp_path / "out", slices=folder)
    slices_of(tmp_path, "scienceqa", {**RED["scienceqa"], "image": None})
    assert vision_tasks.write_task("scienceqa", tmp_path / "out", slices=tmp_path) == {"train": 0, "test": 0}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"question": "Which?"}, "line 1: has no column 'answers', only question, image"),
        (
            {"question": "Which?", "answers": []},
            "line 1: its answer cannot be used: there is none; leave such rows out",
        ),
        ({"question": "Which?", "answers": None}, "line 1: its answer cannot be used: there is none"),
        ({"question": "Which?", "answers": "['ice'"}, "line 1: its answer cannot be used"),
    ],
)
def test_a_row_without_a_usable_answer_is_named(tmp_path, fields, why):
    folder = slices_of(tmp_path, "textvqa", {**fields, "image": "red.png"})
    with pytest.raises(DataError, match=why):
        vision_tasks.write_task("textvqa", tmp_path / "out", slices=folder)


def test_one_answer_may_be_a_text_and_not_a_list():
    assert vision_tasks.free({"question": "Which?", "answers": "ice"})[0]["accepted"] == ["ice"]


def test_the_script_goes_on_to_the_tasks_that_it_has(tmp_path, monkeypatch, capsys):
    slices_of(tmp_path / "slices", "ai2d", {**RED["ai2d"], "image": "red.png"})
    command = ["vision_tasks.py", str(tmp_path / "out"), "--only", "countbenchqa", "ai2d"]
    monkeypatch.setattr("sys.argv", [*command, "--from", str(tmp_path / "slices")])
    with pytest.raises(SystemExit) as stopped:
        vision_tasks.main()
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert said.out.split() == ["ai2d", "1", "train", "1", "test"]
    assert said.err == (
        "Error: countbenchqa: no data set with its train split is known; give countbenchqa/train.jsonl in a folder, "
        "with --from\n"
    )


def test_measures():
    ten = ["cat"] * 3 + ["dog"] * 7
    assert measures.soft_accuracy("The cat.", ten) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert measures.soft_accuracy("dog", ten) == 1
    assert measures.soft_accuracy("cow", ten) == 0
    assert measures.anls("Word", ["word"]) == 1
    assert measures.anls("wird", ["word", "x"]) == pytest.approx(0.75)
    assert measures.anls("none", ["word"]) == 0
    assert measures.exact(" The  Bears\n", ["bears", "the bears"]) == 1
    assert measures.exact("bear", ["bears"]) == 0
    for metric in measures.METRICS.values():
        with pytest.raises(DataError, match="no answers to compare with"):
            metric("cat", [])
