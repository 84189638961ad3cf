"""The papers' campaigns in reproductions/: their tasks, their grids, and each end to end at a reduced size."""

import json
import subprocess
import sys
from typing import Any

import pytest
from reproduced import HERE, accuracy, grids, reduced, score, tasks
from tiny import save_tiny_gemma

from lora_squeeze.campaign.launch import begin, run_campaign
from lora_squeeze.campaign.spec import campaign_of, read_campaign
from lora_squeeze.data import Answered, Choice, read_examples

CAMPAIGNS = sorted(HERE.glob("*/*.toml"))

ARC = {"question": "What melts?", "choices": {"text": ["ice", "air", "fire"], "label": ["1", "2", "3"]}}
FOUR = {"question": "2+2?", "subject": "arithmetic", "choices": ["1", "2", "3", "4"]}

# Rows as the Hub's data sets have them, and the question and answer that they become.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "winogrande": (
        {"sentence": "The _ barks.", "option1": "cat", "option2": "dog", "answer": "2"},
        "The _ barks.\nWhat does the _ stand for?\nA. cat\nB. dog",
        "B",
    ),
    "boolq": (
        {"question": "is snow cold", "passage": "Snow is ice.", "answer": True},
        "Snow is ice.\nQuestion: is snow cold?",
        "yes",
    ),
    "piqa": (
        {"goal": "Get warm.", "sol1": "Light a fire.", "sol2": "Eat ice.", "label": 0},
        "Goal: Get warm.\nHow is it reached?\nA. Light a fire.\nB. Eat ice.",
        "A",
    ),
    "drop": (
        {"passage": "He ran 5 miles.", "question": "How far?", "answers_spans": {"spans": ["5"], "types": ["number"]}},
        "He ran 5 miles.\nQuestion: How far?\nAnswer:",
        " 5",
    ),
    "anli-r2": (
        {"uid": "1", "premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "reason": ""},
        "Premise: It rains.\nHypothesis: It is wet.\nDoes it follow?",
        "entailment",
    ),
    "paws-wiki": (
        {"id": 1, "sentence1": "A saw B.", "sentence2": "B saw A.", "label": 0},
        "Sentence 1: A saw B.\nSentence 2: B saw A.\nDo they mean the same?",
        "no",
    ),
    "hellaswag": (
        {"ctx": "He sits", "endings": ["flies.", "swims.", "sings.", "down."], "label": "3", "ind": 4},
        "He sits\nHow does it go on?\nA. flies.\nB. swims.\nC. sings.\nD. down.",
        "D",
    ),
    "openbookqa": (
        {"question_stem": "Bees make", "choices": {"text": ["wax", "tea"], "label": ["A", "B"]}, "answerKey": "A"},
        "Question: Bees make\nA. wax\nB. tea",
        "A",
    ),
    "goemotions": ({"text": "Thanks!", "labels": [15, 17], "id": "x"}, "Thanks!\nWhich emotion is it?", "gratitude"),
    "arc-easy": ({**ARC, "answerKey": "1"}, "Question: What melts?\nA. ice\nB. air\nC. fire", "A"),
    "arc-challenge": ({**ARC, "answerKey": "3"}, "Question: What melts?\nA. ice\nB. air\nC. fire", "C"),
    "social-i-qa": (
        {
            "context": "Jo fell.",
            "question": "How is Jo?",
            "answerA": "sore",
            "answerB": "tall",
            "answerC": "new",
            "label": "1",
        },
        "Jo fell.\nQuestion: How is Jo?\nA. sore\nB. tall\nC. new",
        "A",
    ),
    "mmlu": ({**FOUR, "answer": 3}, "Question: 2+2?\nA. 1\nB. 2\nC. 3\nD. 4", "D"),
}


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """A folder in which the scripts find small slices, as they find the Hub's data sets."""
    folder = tmp_path_factory.mktemp("slices")
    for name, (row, _, _) in ROWS.items():
        (folder / name).mkdir()
        for part, count in (("train", 6), ("test", 3)):
            (folder / name / f"{part}.jsonl").write_text((json.dumps(row) + "\n") * count)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory, slices):
    """Where campaigns are run: the tasks lie where they look for them, and two tiny models."""
    folder = tmp_path_factory.mktemp("here")
    command = [sys.executable, str(HERE / "tasks.py"), "build/tasks", "--from", str(slices)]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[0].split() == ["winogrande", "6", "train", "3", "test"]
    save_tiny_gemma(folder / "text")
    save_tiny_gemma(folder / "sees", sees=True)
    return folder


def test_rows_of_the_hub_become_questions_and_answers(here):
    assert list(ROWS) == list(tasks.TASKS)
    for name, (_, question, answer) in ROWS.items():
        for part, count in (("train", 6), ("test", 3)):
            examples = read_examples(str(here / "build/tasks" / name / f"{part}.jsonl"))
            assert len(examples) == count
            one = examples[0]
            if name == "drop":
                assert isinstance(one, Answered)
                assert (one.prompt, one.answer, one.fields["accepted"]) == (question, answer, ["5"])
            else:
                assert isinstance(one, Choice)
                assert (one.question, one.choices[one.answer]) == (question, answer)


def test_labels_may_be_names_as_datasets_gives_them():
    assert tasks.anli({"premise": "", "hypothesis": "", "label": "neutral"})["answer"] == "neutral"
    assert tasks.paws({"sentence1": "", "sentence2": "", "label": "1"})["answer"] == "yes"
    assert tasks.mmlu({**FOUR, "answer": "B"})["answer"] == "B"
    several = tasks.drop(
        {"passage": "", "question": "", "answers_spans": {"spans": ["one", "two", "one"], "types": []}}
    )
    assert (several["answer"], several["accepted"]) == (" one, two", ["one, two", "one", "two"])
    assert len(tasks.EMOTIONS) == 28


def test_the_campaigns_are_those_that_the_script_writes():
    written = dict(grids.files())
    assert sorted(written) == CAMPAIGNS
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python reproductions/grids.py"


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("lora-squeeze/4b-rates.toml", 13 * 8 * 5),
        ("lora-squeeze/4b-direct.toml", 13 * 8 * 3),
        ("lora-squeeze/1b-down-to-one.toml", 13 * 6 * 3),
        ("lora-squeeze/12b-direct.toml", 13 * 5),
        ("lora-squeeze/4b-vision-direct.toml", 10 * 8 * 3),
        ("lora-squeeze/4b-vision-down-to-one.toml", 10 * 6 * 3),
        ("para/4b.toml", 13 * 3),
    ],
)
def test_grids_are_whole(name, runs):
    campaign = read_campaign(HERE / name)
    assert len(campaign.runs) == runs
    for run in campaign.runs:
        assert run.settings.lora.alpha == run.settings.rank
        assert run.settings.optimizer.name == "adafactor"
        assert (run.settings.training.batch_size, run.settings.training.max_length) == (8, 1024)
        if "vision" in name:
            assert run.settings.training.lr == 0.01
            assert run.settings.data.source[0].startswith("build/vision/")
        assert bool(run.settings.lora.target_modules) == (not name.startswith("lora-squeeze/1b"))
    if "down" in name:
        stages = {
            run.settings.in_squeeze.schedule: run.settings.schedule(run.settings.training.max_steps, 128)
            for run in campaign.runs
            if run.settings.in_squeeze.schedule
        }
        assert {spelled: one.lengths for spelled, one in stages.items()} == {
            "cont=200": (10_000, 200),
            "cont=700": (10_000, 700),
            "standard": (5371, 2685, 1343, 671, 336, 168, 84, 42),
            "minimum=200": (4768, 2484, 1342, 771, 485, 343, 271, 236),
        }


@pytest.mark.parametrize(
    ("name", "task", "ranks", "runs"),
    [
        ("lora-squeeze/1b-rates.toml", "boolq", {1}, 2),
        ("lora-squeeze/4b-rates.toml", "winogrande", {1}, 2),
        ("lora-squeeze/1b-direct.toml", "anli-r2", {8, 2}, 2),
        ("lora-squeeze/4b-direct.toml", "drop", {4, 1}, 2),
        ("lora-squeeze/1b-down-to-one.toml", "arc-easy", {8, 1}, 6),
        ("lora-squeeze/4b-down-to-one.toml", "social-i-qa", {8}, 4),
        ("lora-squeeze/12b-direct.toml", "mmlu", {2}, 1),
        ("para/1b.toml", "goemotions", {64}, 1),
        ("para/4b.toml", "paws-wiki", {64}, 1),
    ],
)
def test_every_campaign_runs_end_to_end(here, monkeypatch, name, task, ranks, runs):
    monkeypatch.chdir(here)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    campaign = reduced(HERE / name, "text" if "1b" in name else "sees", {task}, ranks)
    folder = begin(campaign, here / name.replace("/", "-").removesuffix(".toml"))
    manifest = run_campaign(folder)
    assert [(entry.status, entry.error) for entry in manifest.runs] == [("finished", "")] * runs
    measured = score(HERE / name, folder)
    assert measured == accuracy.read_measured(folder) == score(HERE / name, folder)  # kept
    assert {one.task for one in measured} == {task}
    assert all(0 <= one.accuracy <= 1 and 0 < one.energy_kept <= 1 for one in measured)
    as_trained = {one.run: one for one in measured if not one.policy}
    assert len(as_trained) == runs
    for entry in manifest.runs:
        assert as_trained[entry.name].rank == entry.rank == (1 if "down" in name else campaign_rank(entry.condition))
    for one in measured:
        if one.policy.startswith("fixed="):
            assert one.source_rank > 1
            assert one.rank == int(one.policy[6:]) < one.source_rank
            assert one.parameters < as_trained[one.run].parameters
    if "para" in name:
        assert len(measured) == 13
        by_policy = {one.policy: one.parameters for one in measured}
        assert by_policy["params=0.25"] <= by_policy[""] / 4


def test_the_script_is_run_at_the_end(here, monkeypatch):
    monkeypatch.chdir(here)
    campaign = reduced(HERE / "lora-squeeze/1b-direct.toml", "text", {"piqa"}, {2, 1})
    document = {**campaign.document}
    document["campaign"] |= {"summary_script": str(HERE / "accuracy.py"), "summary_args": ["--to", "2", "1"]}
    folder = begin(campaign_of(document, "again.toml"), here / "scripted")
    manifest = run_campaign(folder)
    said = (folder / "logs/summary.log").read_text()
    assert manifest.summary == "finished", said
    measured = accuracy.read_measured(folder)
    assert [(one.source_rank, one.policy) for one in measured] == [(1, ""), (2, ""), (2, "fixed=1")]
    lines = accuracy.summary(measured)
    assert len(lines) == 1 + 3
    assert said.endswith("\n".join([*lines, "", *accuracy.heatmap(accuracy.gains(measured))]) + "\n")


def campaign_rank(condition: str) -> int:
    return int(condition.partition("lora_rank=")[2].partition(",")[0])


def test_gains_compare_within_task_and_seed(here):
    def one(rank: int, score: float, *, policy: str = "", lr: float = 0.01, task: str = "a") -> Any:
        return accuracy.Measured(
            run="",
            task=task,
            seed=1,
            steps=1,
            lr=lr,
            how="direct",
            source_rank=rank,
            policy=policy,
            rank=1,
            parameters=1,
            energy_kept=1.0,
            accuracy=score,
        )

    direct = [one(1, 0.5, lr=0.03), one(1, 0.8, lr=0.03, task="b"), one(8, 0.7), one(8, 0.9, task="b")]
    squeezed = [one(8, 0.6, policy="fixed=1"), one(8, 0.7, policy="fixed=1", task="b")]
    assert accuracy.gains(direct + squeezed) == {(8, 1): pytest.approx(0.0)}
    # With several rates, that of the source.
    assert accuracy.gains([*direct, one(1, 0.4), *squeezed])[8, 1] == pytest.approx((0.2 - 0.1) / 2)
    assert accuracy.heatmap({(8, 1): 0.0123}) == ["gain       → 1", "     8   +1.23"]
    table = accuracy.summary(direct)
    assert [line.split()[4] for line in table[1:]] == ["65.00%", "80.00%"]
    assert "grey" not in table[0]
