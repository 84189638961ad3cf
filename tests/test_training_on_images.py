"""A tiny Gemma 3 learns to name colours that only its images show; what is squeezed and evaluated still sees them."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny_bert, save_tiny_gemma, save_tiny_llama
from transformers import AutoModelForImageTextToText, AutoProcessor

from lora_squeeze import open_adapter
from lora_squeeze.cli import main

COLOURS = {"red": (250, 0, 0), "blue": (0, 0, 250)}


def images(folder: Path, count: int) -> list[tuple[str, str]]:
    """Image files of one colour each, and its name."""
    (folder / "images").mkdir(parents=True)
    made: list[tuple[str, str]] = []
    for number in range(count):
        name = list(COLOURS)[number % 2]
        Image.new("RGB", (20 + number, 30), COLOURS[name]).save(folder / f"images/{number}.png")
        made.append((f"images/{number}.png", name))
    return made


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    save_tiny_gemma(folder / "sees", sees=True)
    made = images(folder, 40)
    write(
        folder / "learn.jsonl", [{"prompt": "Colour?", "completion": f" {name}", "image": path} for path, name in made]
    )
    asked = [
        {"question": "Colour?", "choices": list(COLOURS), "answer": name, "image": path} for path, name in made[:20]
    ]
    write(folder / "ask.jsonl", asked)
    (folder / "run.toml").write_text(f"""
[model]
model = "{folder / "sees"}"
lora_rank = 8
[training]
max_steps = 120
batch_size = 8
lr = 0.01
save_every = 60
[data]
source = "{folder / "learn.jsonl"}"
eval_fraction = 0.2
[in_squeeze]
schedule = "8@0, 4@50%"
""")
    return folder


def run(*command: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(one) for one in command])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def trained(here):
    run("train", here / "run.toml", "--out", here / "run")
    return here / "run/final"


def accuracies(here: Path, *adapters: Path) -> list[list[float]]:
    """With the images and with grey ones: the accuracy of each adapter."""
    said = run("evaluate", *adapters, "--data", here / "ask.jsonl", "--prompt", "{text}", "--ablate-images", "--json")
    records = json.loads(said)
    assert records[1]["data"].endswith("ask.jsonl, every image grey")
    return [[one["metrics"]["accuracy"]["value"] for one in record["adapters"]] for record in records]


def test_what_was_learnt_is_in_the_images(here, trained, tmp_path):
    run("compress", trained, tmp_path / "r1", "--rank", 1)
    assert open_adapter(trained).rank == 4  # In-Squeeze, while it learnt to see
    (seen, squeezed), (grey, _) = accuracies(here, trained, tmp_path / "r1")
    assert (seen, squeezed) == (1.0, 1.0)
    assert grey == 0.5


def test_the_vision_tower_and_the_projector_stay_as_they_are(trained):
    keys = load_file(trained / "adapter_model.safetensors")
    assert len(keys) == 2 * 2 * 7
    assert all(".language_model." in key for key in keys)


def test_the_result_loads_where_there_is_only_peft(here, trained):
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(here / "sees"), trained).eval()
    processor = AutoProcessor.from_pretrained(trained)  # saved beside the adapter
    for number, name in ((0, "red"), (1, "blue")):
        image = Image.open(here / f"images/{number}.png")
        inputs = processor(text=["<image_starts>Colour?"], images=[[image]], return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == name


def test_calibration_and_continued_training_see_the_images(here, trained, tmp_path):
    moments = tmp_path / "moments.safetensors"
    assert "40 examples" in run("calibrate", trained, "--data", here / "learn.jsonl", "-o", moments, "--gradients")
    run("compress", trained, tmp_path / "r2", "--rank", 2, "--calibration", moments)
    grown = ("--rank", 1, "--steps", 4, "--data", here / "learn.jsonl", "--out", tmp_path / "more")
    run("continue", trained, *grown)
    assert open_adapter(tmp_path / "more/final").rank == 1


def test_the_smallest_adapter_that_still_sees(here, trained, tmp_path):
    data = ("--data", here / "ask.jsonl", "--prompt", "{text}", "--metric", "accuracy")
    run("compress", trained, tmp_path / "small", "--keep", 0.99, *data)
    assert accuracies(here, tmp_path / "small")[0] == [1.0]


@pytest.mark.parametrize("method", ["dpo", "grpo", "classify"])
def test_other_methods_refuse_images(here, tmp_path, method):
    seen = {"image": str(here / "images/0.png")}
    rows = {
        "dpo": {"prompt": "", "chosen": "a", "rejected": "b"},
        "grpo": {"prompt": "a", "answer": "b"},
        "classify": {"text": "a", "label": "b"},
    }
    write(tmp_path / "rows.jsonl", [{**rows[method], **seen}])
    settings = f'[model]\nmodel = "x"\n[training]\nmethod = "{method}"\n[data]\nsource = "{tmp_path}/rows.jsonl"\n'
    (tmp_path / "run.toml").write_text(settings)
    said = run("train", tmp_path / "run.toml", "--out", tmp_path / "run", code=1)
    assert "no method for preferences about images" in said or "which only method sft learns from" in said
    assert "image = ''" in said


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_bert])
def test_a_model_that_reads_only_texts_says_so(here, tmp_path, save):
    save(tmp_path / "blind")
    text = (here / "run.toml").read_text().replace(str(here / "sees"), str(tmp_path / "blind"))
    (tmp_path / "run.toml").write_text(text)
    said = " ".join(run("train", tmp_path / "run.toml", "--out", tmp_path / "run", code=1).split())
    assert f"{tmp_path}/blind: there are images in the data; it reads only texts" in said
    assert "ignores them" in said
    assert not (tmp_path / "run/final").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_ends_the_training_with_its_name(here, tmp_path, workers):
    (tmp_path / "bad.png").write_bytes(b"no image")
    write(tmp_path / "rows.jsonl", [{"prompt": "Colour?", "completion": "red", "image": "bad.png"}] * 4)
    text = (here / "run.toml").read_text().replace(str(here / "learn.jsonl"), str(tmp_path / "rows.jsonl"))
    text = text.replace("eval_fraction = 0.2", "").replace("save_every", f"data_workers = {workers}\nsave_every")
    (tmp_path / "run.toml").write_text(text)
    said = run("train", tmp_path / "run.toml", "--out", tmp_path / "run", code=1)
    assert f"{tmp_path}/rows.jsonl, line " in said
    assert "image 'bad.png': cannot be read" in said
    assert "Traceback" not in said


def test_an_adapter_of_texts_alone_is_not_taken_for_one_that_sees(here, tmp_path):
    save_tiny_gemma(tmp_path / "blind")
    learn = f'[model]\nmodel = "{tmp_path}/blind"\nlora_rank = 2\n[lora]\ntarget_modules = ["q_proj"]\n'
    (tmp_path / "run.toml").write_text(f'{learn}[training]\nmax_steps = 1\n[data]\nsource = "builtin:sums:10"\n')
    run("train", tmp_path / "run.toml", "--out", tmp_path / "run")
    said = run("evaluate", tmp_path / "run/final", "--base", here / "sees", "--data", here / "ask.jsonl", code=1)
    assert "it was trained on another model, or on another class of it" in " ".join(said.split())


def test_texts_alone_are_measured_on_an_adapter_that_sees(trained):
    assert json.loads(run("evaluate", trained, "--data", "builtin:sums:5", "--json"))[0]["examples"] == 5


def test_without_pillow_the_extra_is_named(here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    said = run("train", here / "run.toml", "--out", tmp_path / "run", code=1)
    assert "pip install 'lora-squeeze[vision]'" in said
