"""What adapters score: against numbers computed one example at a time, in place against from disk."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from evaluated import save_world
from peft import PeftModel
from torch.nn import functional

from lora_squeeze import decompose, fixed, squeeze
from lora_squeeze.cli import main
from lora_squeeze.data import Choice, Labelled, Text, read_examples
from lora_squeeze.encoding import IGNORED
from lora_squeeze.errors import DataError, MissingExtra, ModelError
from lora_squeeze.evaluation.measure import evaluate, run, squeezed, trial_of
from lora_squeeze.evaluation.rows import rows_of
from lora_squeeze.evaluation.subject import activate, loaded, open_subject, without_adapter
from lora_squeeze.models import load_model
from lora_squeeze.records import Ranks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("world"))


def language_subject(world, *names):
    return open_subject([str(world / name) for name in names or ("a",)], base=str(world / "llama"), dtype="f32")


def classifier_subject(world, examples, *names):
    paths = [str(world / name) for name in names or ("c",)]
    return open_subject(paths, base=str(world / "bert"), examples=examples, dtype="f32")


def one_by_one(model, rows):
    """Log-probabilities at the positions that count, of every row without any padding."""
    for row in rows:
        ids, labels = torch.tensor([row.encoded.input_ids]), torch.tensor(row.encoded.labels[1:])
        with torch.no_grad():
            log_p = functional.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
        yield row, log_p[labels != IGNORED], labels[labels != IGNORED]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("source", ["builtin:texts:5", "builtin:sums:6", "builtin:chat:3"])
def test_loss_divergence_and_agreement_of_texts(world, source, batch_size):
    subject = language_subject(world, "a", "b")
    trial = trial_of(subject, read_examples(source), batch_size=batch_size)
    contestants = [loaded(subject), loaded(subject, "adapter1"), without_adapter()]
    found = evaluate(subject, contestants, trial, draws=100)
    models = [
        PeftModel.from_pretrained(load_model(str(world / "llama"), dtype="f32"), str(world / name)).eval()
        for name in "ab"
    ]
    runs = [list(one_by_one(model, trial.rows)) for model in (*models, load_model(str(world / "llama"), dtype="f32"))]
    for evaluated, own in zip(found.adapters, runs, strict=True):
        losses = torch.cat([-log_p.gather(1, wanted[:, None])[:, 0] for _, log_p, wanted in own])
        log_p, log_q = (torch.cat([one[1] for one in rows]) for rows in (own, runs[0]))
        metrics = {name: estimate.value for name, estimate in evaluated.metrics.items()}
        assert metrics == pytest.approx(
            {
                "loss": float(losses.mean()),
                "perplexity": float(losses.mean().exp()),
                "divergence": float((log_q.exp() * (log_q - log_p)).sum(1).mean()),
                "agreement": float((log_p.argmax(1) == log_q.argmax(1)).double().mean()),
            },
            rel=1e-4,
            abs=1e-6,
        )
    assert found.tokens == len(losses)
    assert found.examples == trial.count
    assert found.original.metrics["divergence"].value == 0
    assert found.original.metrics["agreement"].value == 1


QUESTIONS = (
    Choice("Which is a colour?", ("red", "seven apples", "to"), 0),
    Choice("Which is a number?", ("seven", "red"), 1),
    Choice("What follows?", ("b", "c", "d", "e"), 3),
)


def test_choices_are_scored_by_the_probability_of_each_answer(world):
    subject = language_subject(world, "a", "b")
    contestants = [loaded(subject), loaded(subject, "adapter1")]
    trial = trial_of(subject, QUESTIONS, batch_size=4)
    found = evaluate(subject, contestants, trial, draws=100)
    originals = None
    for contestant, evaluated in zip(contestants, found.adapters, strict=True):
        activate(subject, contestant)
        sums = {
            (row.example, row.candidate): (log_p, wanted)
            for row, log_p, wanted in one_by_one(subject.model, trial.rows)
        }
        logs = [
            torch.stack(
                [sums[number, k][0].gather(1, sums[number, k][1][:, None]).sum() for k in range(len(one.choices))]
            )
            for number, one in enumerate(QUESTIONS)
        ]
        originals = originals or logs
        sizes = [torch.tensor([len(choice) for choice in one.choices]) for one in QUESTIONS]
        right = [one.answer for one in QUESTIONS]
        mean = lambda values: sum(map(float, values)) / len(QUESTIONS)  # noqa: E731
        divergences = [
            (q.softmax(0) * (q.log_softmax(0) - p.log_softmax(0))).sum() for p, q in zip(logs, originals, strict=True)
        ]
        metrics = {name: estimate.value for name, estimate in evaluated.metrics.items()}
        assert metrics == pytest.approx(
            {
                "loss": mean(-p[k] for p, k in zip(logs, right, strict=True)),
                "accuracy": mean(p.argmax() == k for p, k in zip(logs, right, strict=True)),
                "accuracy-norm": mean((p / n).argmax() == k for p, n, k in zip(logs, sizes, right, strict=True)),
                "divergence": mean(divergences),
                "agreement": mean(p.argmax() == q.argmax() for p, q in zip(logs, originals, strict=True)),
            },
            rel=1e-4,
            abs=1e-6,
        )


def test_a_language_model_can_be_asked_for_a_class(world):
    subject = open_subject([str(world / "a")], base=str(world / "llama"), examples=read_examples("builtin:sentiment:4"))
    assert subject.labels == ("negative", "positive")
    examples = (Labelled("good", "positive"),)
    rows = rows_of(examples, subject.tokenizer, task=subject.task, labels=subject.labels, prompt="Text: {text} It is")
    texts = [subject.tokenizer.decode(row.encoded.input_ids) for row in rows]
    assert texts == ["Text: good It is negative", "Text: good It is positive"]
    learnt = [sum(label != IGNORED for label in row.encoded.labels) for row in rows]
    assert learnt == [len(" negative"), len(" positive")]  # and no token for the end
    found = evaluate(subject, [loaded(subject)], trial_of(subject, read_examples("builtin:sentiment:6")), draws=100)
    assert set(found.original.metrics) == {"loss", "accuracy", "accuracy-norm", "divergence", "agreement"}


def test_classifiers_with_heads_of_their_own(world):
    examples = read_examples("builtin:sentiment:12")
    subject = classifier_subject(world, examples, "c", "d")
    found = evaluate(
        subject, [loaded(subject), loaded(subject, "adapter1")], trial_of(subject, examples, batch_size=5), draws=100
    )
    for name, evaluated in zip("cd", found.adapters, strict=True):
        base = load_model(
            str(world / "bert"), task="sequence-classification", labels=("negative", "positive"), dtype="f32"
        )
        model = PeftModel.from_pretrained(base, str(world / name)).eval()
        losses, right = [], []
        for example in examples:
            wanted = torch.tensor([("negative", "positive").index(example.label)])
            with torch.no_grad():
                logits = model(**subject.tokenizer(example.text, return_tensors="pt")).logits
            losses.append(functional.cross_entropy(logits, wanted))
            right.append(logits.argmax(-1) == wanted)
        assert evaluated.metrics["loss"].value == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
        assert evaluated.metrics["accuracy"].value == pytest.approx(float(torch.cat(right).double().mean()))


@pytest.mark.parametrize("name", ["a", "c"])
def test_lower_ranks_in_place_are_what_would_be_written(world, tmp_path, name):
    examples = read_examples("builtin:sentiment:8" if name == "c" else "builtin:texts:4")
    subject = classifier_subject(world, examples) if name == "c" else language_subject(world)
    decomposition = decompose(subject.adapters["default"])
    plans = [fixed(decomposition.spectra, 2), fixed(decomposition.spectra, 1)]
    left_out = {layer: number % 2 for number, layer in enumerate(subject.adapters["default"].layers)}
    plans.append(Ranks("some left out", left_out))
    contestants = [loaded(subject), *squeezed(subject, decomposition, plans)]
    in_place = run(subject, contestants, trial_of(subject, examples))
    paths = [str(world / name)]
    for number, plan in enumerate(plans):
        paths.append(str(tmp_path / str(number)))
        squeeze(decomposition, plan, paths[-1])
    for path, scores, contestant in zip(paths, in_place, contestants, strict=True):
        base = str(world / ("bert" if name == "c" else "llama"))
        alone = open_subject([path], base=base, examples=examples, dtype="f32")
        (expected,) = run(alone, [loaded(alone)], trial_of(alone, examples))
        assert torch.allclose(scores["loss"][0], expected["loss"][0], rtol=1e-5)
        assert contestant.parameters == alone.adapters["default"].parameters
    # And the original is what it was.
    again = run(subject, contestants[:1], trial_of(subject, examples))
    assert torch.equal(again[0]["loss"][0], in_place[0]["loss"][0])


def test_numbers_that_are_not_finite_are_an_error(world):
    subject = language_subject(world)
    subject.model.base_model.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"a: the model's numbers are NaN.*--dtype f32"):
        run(subject, [loaded(subject)], trial_of(subject, read_examples("builtin:texts:2")))


def test_data_that_do_not_fit_the_model(world):
    subject = language_subject(world)
    with pytest.raises(DataError, match=r"metric 'accuracy' cannot be had of texts; .*loss, perplexity"):
        evaluate(subject, [loaded(subject)], trial_of(subject, (Text("one"),)), metrics=["accuracy"])
    with pytest.raises(DataError, match="classifies texts"):
        trial_of(classifier_subject(world, read_examples("builtin:sentiment:9")), (Text("one"),))
    with pytest.raises(DataError, match="example 1 has no token whose loss counts"):
        trial_of(subject, (Text("one"), Text("")), max_length=1)
    with pytest.raises(DataError, match=r"no \{text\} in it"):
        trial_of(subject, QUESTIONS, prompt="Question:")


# --- lm-eval ----------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path):
    """A multiple-choice task of one's own: a YAML file and a data file."""
    rows = [
        {"question": f"{first} + {second} =", "choices": ["1", "5", "9"], "answer": (first + second) % 3}
        for first in range(4)
        for second in range(4)
    ]
    (tmp_path / "sums.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(
        "task: tiny_sums\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {{test: {tmp_path / 'sums.json'}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    return tmp_path


def test_a_task_of_lm_eval_by_name(world, task, tmp_path_factory, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    options = ["--task", "tiny_sums", "--include", task, "--ranks", "1", "--without-adapter", "--json"]
    done = cli("evaluate", world / "a", world / "b", "--base", world / "llama", "--dtype", "f32", *options)
    assert done.exit_code == 0, done.output
    (record,) = json.loads(done.stdout)
    assert record["data"] == "lm-eval tiny_sums"
    assert record["examples"] == 16
    assert [one["adapter"] for one in record["adapters"]] == ["a", "b", "a fixed=1", "no adapter"]
    choices = tuple(
        Choice(row["question"], tuple(row["choices"]), row["answer"])
        for row in map(json.loads, (task / "sums.json").read_text().splitlines())
    )
    subject = language_subject(world, "a", "b")
    ours = evaluate(
        subject,
        [loaded(subject), loaded(subject, "adapter1")],
        trial_of(subject, choices, prompt="{text}"),
        metrics=["accuracy"],
        draws=100,
    )
    for theirs, own in zip(record["adapters"], ours.adapters, strict=False):
        assert theirs["metrics"]["acc"]["value"] == pytest.approx(own.metrics["accuracy"].value)
        assert theirs["metrics"]["acc"]["low"] <= theirs["metrics"]["acc"]["value"] <= theirs["metrics"]["acc"]["high"]
    assert record["adapters"][1]["metrics"]["acc"]["verdict"] in ("same", "better", "worse", "within noise")
    assert {"acc", "acc_norm"} <= set(record["adapters"][0]["metrics"])


def test_tasks_that_do_not_exist_and_classifiers(world):
    pytest.importorskip("lm_eval")
    done = cli("evaluate", world / "a", "--base", world / "llama", "--task", "no_such_task")
    assert done.exit_code == 1
    assert "lm-eval knows no task 'no_such_task'" in done.output
    done = cli("evaluate", world / "c", "--base", world / "bert", "--task", "no_such_task")
    assert "this is a classifier" in done.output


def test_without_lm_eval_the_extra_is_named(world, monkeypatch):
    import lora_squeeze.evaluation.harness as harness

    def missing(module, extra):
        raise MissingExtra(module, extra)

    monkeypatch.setattr(harness, "require", missing)
    done = cli("evaluate", world / "a", "--base", world / "llama", "--task", "piqa")
    assert "pip install 'lora-squeeze[lm-eval]'" in done.output


# --- the command ------------------------------------------------------------------------------------------------


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_table_says_what_is_noise(world):
    done = cli(
        "evaluate", world / "a", world / "b", "--base", world / "llama", "--data", "builtin:sums:20", "--ranks", "2,4"
    )
    assert done.exit_code == 0, done.output
    lines = {line.split("  ")[0]: line for line in done.output.splitlines()}
    assert {"a", "b", "a fixed=2", "a fixed=4"} <= set(lines)
    assert "the same" in lines["a fixed=4"]
    assert any(word in lines["b"] for word in ("worse", "better", "within noise"))
    assert "20 examples" in done.output


@pytest.mark.parametrize("count", [1, 3])
def test_the_table_says_that_a_handful_of_examples_says_nothing(world, count):
    asked = ["evaluate", world / "a", world / "b", "--base", world / "llama", "--data", f"builtin:sums:{count}"]
    done = cli(*asked)
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.output.splitlines() if line.startswith("b ")]
    assert "too few examples" in row
    assert "better" not in row
    assert "worse" not in row
    assert ("[" in row) == (count > 1)
    assert "they are too few to say better or worse" in " ".join(done.output.split())
    (record,) = json.loads(cli(*asked, "--json").stdout, parse_constant=pytest.fail)
    assert (record["adapters"][1]["metrics"]["loss"]["difference_low"] is None) == (count == 1)


def test_adapters_of_one_name_are_told_apart(world, tmp_path):
    for run_name, adapter in (("log1", "a"), ("log2", "b")):
        shutil.copytree(world / adapter, tmp_path / run_name / "final")
    common = ["evaluate", tmp_path / "log1" / "final", tmp_path / "log2" / "final", "--base", world / "llama"]
    common += ["--data", "builtin:texts:2", "--ranks", "1"]
    done = cli(*common, "--json")
    assert done.exit_code == 0, done.output
    (record,) = json.loads(done.stdout)
    assert [one["adapter"] for one in record["adapters"]] == ["log1/final", "log2/final", "log1/final fixed=1"]
    lines = cli(*common).stdout.splitlines()
    assert [sum(line.startswith(f"{name}/final ") for line in lines) for name in ("log1", "log2")] == [2, 1]


def test_labels_that_are_too_few_are_counted(world):
    done = cli("evaluate", world / "c", "--base", world / "bert", "--data", "builtin:sentiment:4", "--labels", "pos")
    assert done.exit_code == 1
    assert "its head has 2 classes, and --labels names 1 (pos)" in " ".join(done.output.split())


def test_columns_limit_and_metrics(world, tmp_path):
    rows = [{"sentence": "good day", "sentiment": "positive"}, {"sentence": "bad", "sentiment": "negative"}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--columns", "text=sentence", "--columns", "label=sentiment", "--limit", "4", "--metric", "accuracy"]
    done = cli("evaluate", world / "c", "--base", world / "bert", "--data", tmp_path / "rows.jsonl", *options, "--json")
    assert done.exit_code == 0, done.output
    (record,) = json.loads(done.stdout)
    assert record["examples"] == 4
    assert list(record["adapters"][0]["metrics"]) == ["accuracy"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --data"),
        (["--data", "builtin:texts:2", "--task", "piqa"], "give --data"),
        (["--data", "nothing.jsonl"], "no such file"),
        (["--data", "builtin:texts:2", "--metric", "accuracy"], "cannot be had of texts"),
        (["--data", "builtin:texts:2", "--calibration", "x"], "--calibration is for"),
        (["--data", "builtin:texts:2", "--policy", "energie=1"], "unknown policy"),
        (["--data", "builtin:texts:2", "--device", "warp"], "device"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(world, options, said):
    done = cli("evaluate", world / "a", "--base", world / "llama", *options)
    assert done.exit_code != 0
    assert said in done.output
    assert "Traceback" not in done.output
