"""Rows with images: where the images come from, where in a text they stand, and what is refused."""

import base64
import io
import json

import pytest
from click.testing import CliRunner
from PIL import Image

from lora_squeeze.cli import main
from lora_squeeze.data import (
    Answered,
    Chat,
    Choice,
    Completion,
    Labelled,
    Picture,
    Text,
    images_of,
    opened,
    picture_of,
    read_examples,
    split,
    without_sight,
)
from lora_squeeze.errors import DataError

PLACE = "\ufffc"


def png(colour=(200, 30, 60), size=(5, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def rows(tmp_path):
    """Writes rows beside an image, photos/one.png, and reads them."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.png").write_bytes(png())

    def read(*fields, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in fields), encoding="utf-8")
        return read_examples(str(path), **options)

    return read


KINDS = {
    "texts": ({"text": "a dog"}, Text, "text"),
    "completions": ({"prompt": "what?", "completion": "a dog"}, Completion, "prompt"),
    "answers": ({"question": "what?", "answer": "a dog"}, Answered, "prompt"),
    "classes": ({"text": "a dog", "label": "x"}, Labelled, "text"),
    "choices": ({"question": "what?", "choices": ["dog", "cat"], "answer": 0}, Choice, "question"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_image_of_a_row_stands_before_its_text(rows, name):
    fields, kind, text = KINDS[name]
    (example,) = rows({**fields, "image": "photos/one.png"})
    assert isinstance(example, kind)
    assert getattr(example, text) == PLACE + fields.get(text, fields.get("question"))
    (image,) = images_of(example)
    assert image.name == "photos/one.png"
    assert opened(image).getpixel((0, 0)) == (200, 30, 60)


def test_a_text_says_where_its_images_stand(rows):
    there = [
        {"prompt": f"a {mark} b {mark}", "completion": "", "images": ["photos/one.png"] * 2}
        for mark in ("<image>", PLACE)
    ]
    assert [one.prompt for one in rows(*there)] == [f"a {PLACE} b {PLACE}"] * 2
    with pytest.raises(DataError, match=r"line 1: its text has places for 2 images, and there are 1"):
        rows({"prompt": "a <image> b <image>", "completion": "", "image": "photos/one.png"})


def test_in_a_conversation_the_image_is_the_users(rows):
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    (chat,) = rows({"messages": turns, "image": "photos/one.png"})
    assert [one.content for one in chat.messages] == ["system", f"{PLACE}user", "assistant"]


@pytest.mark.parametrize(
    "part",
    [
        {"image": "photos/one.png"},
        {"path": "photos/one.png"},
        {"image_url": {"url": "photos/one.png"}, "type": "image_url"},
    ],
)
def test_messages_in_parts_bring_their_images(rows, part):
    asked = [{"type": "text", "text": "see "}, {"type": "image", **part}, {"type": "text", "text": " there"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    (chat,) = rows({"messages": turns})
    assert isinstance(chat, Chat)
    assert [one.content for one in chat.messages] == [f"see {PLACE} there", "yes"]
    assert [one.name for one in chat.images] == ["photos/one.png"]


def test_parts_may_leave_their_images_to_a_column(rows):
    turns = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "yes"}]
    (chat,) = rows({"messages": turns, "images": ["photos/one.png"]})
    assert (chat.messages[0].content, len(chat.images)) == (PLACE, 1)


def test_a_row_without_an_image_is_read_as_before(rows):
    seen, unseen = rows({"text": "a", "image": "photos/one.png"}, {"text": "b", "image": None})
    assert (len(images_of(seen)), unseen) == (1, Text("b"))
    assert rows({"text": "c", "image": {"bytes": None, "path": None}}) == (Text("c"),)
    assert rows({"text": "a", "photo": "photos/one.png"}, {"text": "b"}, columns={"image": "photo"})[1] == Text("b")


def test_images_can_be_ignored(rows):
    ignored = {"image": ""}
    assert rows({"text": "a", "image": "nowhere.png"}, columns=ignored) == (Text("a"),)
    assert rows({"text": "a <image>", "images": ["nowhere.png"]}, columns=ignored) == (Text("a "),)
    asked = [{"type": "image", "image": "nowhere.png"}, {"type": "text", "text": "q"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a"}]
    assert [one.content for one in rows({"messages": turns}, columns=ignored)[0].messages] == ["q", "a"]


def test_other_fields_of_a_row_may_look_like_messages(rows):
    assert rows({"text": "a", "meta": [{"content": [1, 2]}]}) == (Text("a"),)


def test_a_list_may_stand_under_image(rows):
    assert len(images_of(rows({"text": "a", "image": ["photos/one.png", "photos/one.png"]})[0])) == 2


REFUSED = {
    "a file that is not there": ({"text": "", "image": "photos/two.png"}, "image 'photos/two.png' is not there"),
    "an address": ({"text": "", "image": "https://x.org/a.png"}, "images are not fetched: save it"),
    "a number": ({"text": "", "image": 7}, "not int"),
    "nothing": ({"text": "", "image": ""}, "not str"),
    "a data: URI that is none": ({"text": "", "image": "data:image/png;base64,???"}, "not a data: URI in base64"),
    "a folder": ({"text": "", "image": "photos"}, "'photos' is not a file"),
    "base64 without its head": ({"text": "", "image": "iVBORw0KGgo" * 400}, "base64 is spelled data:image/png;base64,"),
    "bytes as text": ({"text": "", "image": {"bytes": "iVBORw0K", "path": None}}, "a data: URI"),
    "a place without an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
        "places for 1 images, and there are none",
    ),
    "a text part without a text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        "is called a text and holds none",
    ),
    "preferences": (
        {"prompt": "", "chosen": "", "rejected": "", "image": "photos/one.png"},
        "no method for preferences about images",
    ),
    "a sound": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a text or an image, not audio"),
    "images here and there": (
        {
            "image": "photos/one.png",
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "photos/one.png"}]},
                {"role": "assistant", "content": ""},
            ],
        },
        "in its messages and in a column",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_with_its_row(rows, name):
    fields, reason = REFUSED[name]
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: ") as caught:
        rows({"text": "a"}, fields)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_damaged_image_is_named_when_it_is_opened(tmp_path):
    (tmp_path / "bad.png").write_bytes(png()[:40])
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "image": "bad.png"}')
    (example,) = read_examples(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: image 'bad\.png': cannot be read"):
        opened(example.images[0])


@pytest.mark.parametrize(
    "value",
    [
        png(),
        {"bytes": png(), "path": "gone.png"},
        "data:image/png;base64," + base64.b64encode(png()).decode(),
        Image.new("RGB", (5, 3), (200, 30, 60)),
    ],
    ids=["bytes", "as datasets has it", "data: URI", "PIL"],
)
def test_images_that_are_no_files_are_known_by_their_content(value):
    picture = picture_of(value)
    assert len(picture.name) == 64
    assert opened(picture).size == (5, 3)
    assert picture_of(picture) is picture


def test_a_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (5, 3), (200, 30, 60)).save(tmp_path / "photo.jpg", exif=exif)
    assert opened(picture_of("photo.jpg", tmp_path)).size == (3, 5)


def test_a_grey_image_has_the_same_size(rows):
    (example,) = rows({"text": "a", "image": "photos/one.png"})
    (grey,) = images_of(without_sight(example))
    assert opened(grey).getcolors() == [(15, (128, 128, 128))]
    assert without_sight(Text("a")) == Text("a")


def test_images_of_a_data_set_stay_in_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"text": ["a", "b"], "image": [Image.new("RGB", (5, 3), (200, 30, 60)), None]}
    datasets.Dataset.from_dict(
        columns, features=datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    ).save_to_disk(tmp_path / "saved")
    seen, unseen = read_examples(str(tmp_path / "saved"))
    assert isinstance(seen.images[0], Picture)
    assert opened(seen.images[0]).getpixel((4, 2)) == (200, 30, 60)
    assert unseen.images == ()


def test_lists_of_images_of_a_data_set_stay_in_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    pictures = [Image.new("RGB", (5, 3), (200, 30, 60)), Image.new("RGB", (4, 4), (1, 2, 3))]
    datasets.Dataset.from_dict({"text": ["a"], "images": [pictures]}, features=features).save_to_disk(
        tmp_path / "saved"
    )
    (example,) = read_examples(str(tmp_path / "saved"))
    assert [opened(one).size for one in example.images] == [(5, 3), (4, 4)]
    assert all("partial(bytes" not in repr(one.read) and one.read.func.__name__ == "_cell" for one in example.images)


def test_images_in_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"text": ["a"], "image": [Image.new("RGB", (5, 3), (200, 30, 60))]}
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    (example,) = read_examples(str(tmp_path / "rows.parquet"))
    assert opened(example.images[0]).size == (5, 3)


def test_questions_about_one_image_stay_on_one_side_of_a_split():
    pictures = [picture_of(png((number, 0, 0))) for number in range(20)]
    examples = [Completion(f"{number}", "", (pictures[number % 20],)) for number in range(100)]
    examples += [Completion("both", "", (pictures[0], pictures[1])), Completion("both", "", (pictures[1], pictures[2]))]
    training, held_out = split(examples, held_out=0.25, seed=1)
    assert 20 <= len(held_out) <= 45
    assert not {image for one in training for image in one.images} & {image for one in held_out for image in one.images}
    assert len(training) + len(held_out) == len(examples)


def test_images_of_one_name_in_two_folders_are_two(tmp_path):
    for folder, colour in (("a", (1, 2, 3)), ("b", (200, 100, 5))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(png(colour, size=(50, 40) if folder == "b" else (5, 3)))
    assert picture_of("1.png", tmp_path / "a") != picture_of("1.png", tmp_path / "b")


def test_wide_and_transparent_images_keep_what_they_show():
    deep = Image.new("I;16", (2, 2), 40_000)
    assert opened(picture_of(deep)).getpixel((0, 0)) == (156, 156, 156)
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert opened(picture_of(clear)).getpixel((0, 0)) == (255, 255, 255)


def test_ablating_needs_images(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    command = ["evaluate", "nowhere", "--data", str(tmp_path / "rows.jsonl"), "--ablate-images"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code != 0
    assert "there are none" in result.output
