"""Sources → rows → examples: every kind, every file type, and errors that name file and line."""

import gzip
import json
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lora_squeeze.data import (
    BUILTINS,
    KINDS,
    Answered,
    Chat,
    Choice,
    Completion,
    Labelled,
    Message,
    Preference,
    Row,
    Text,
    example_of,
    labels_of,
    read_examples,
    read_rows,
    split,
)
from lora_squeeze.errors import DataError

HELLO = Message("user", "hello")
GIVEN = {
    "text": ({"text": "once"}, Text("once")),
    "text with more": ({"text": "once", "source": "a book"}, Text("once")),
    "completion": ({"prompt": "2+2=", "completion": "4"}, Completion("2+2=", "4")),
    "completion of a number": ({"prompt": "2+2=", "completion": 4}, Completion("2+2=", "4")),
    "completion of a conversation": (
        {
            "prompt": [{"role": "user", "content": "hello"}],
            "completion": [{"role": "assistant", "content": "good day"}],
        },
        Completion((HELLO,), "good day"),
    ),
    "chat": (
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
        Chat((HELLO, Message("assistant", "hi"))),
    ),
    "label": ({"text": "so good", "label": "positive"}, Labelled("so good", "positive")),
    "label as a number": ({"text": "so good", "label": 3}, Labelled("so good", "3")),
    "choice by place": ({"question": "q", "choices": ["a", "b"], "answer": 1}, Choice("q", ("a", "b"), 1)),
    "choice by letter": ({"question": "q", "choices": ["x", "y"], "answer": "B"}, Choice("q", ("x", "y"), 1)),
    "choice by text": ({"question": "q", "choices": ["x", "y"], "answer": "y"}, Choice("q", ("x", "y"), 1)),
    "choice by text that looks like a place": (
        {"question": "q", "choices": ["2", "1", "0"], "answer": "1"},
        Choice("q", ("2", "1", "0"), 1),
    ),
    "choice by place though a text looks like it": (
        {"question": "q", "choices": ["2", "3", "0"], "answer": 0},
        Choice("q", ("2", "3", "0"), 0),
    ),
    "choice by label": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answer": "2"},
        Choice("q", ("x", "y", "z"), 1),
    ),
    "choice by label that is a number": (
        {"question": "q", "choices": {"text": ["w", "x", "y", "z"], "label": [1, 2, 3, 4]}, "answer": 3},
        Choice("q", ("w", "x", "y", "z"), 2),
    ),
    "choice by the last label that is a number": (
        {"question": "q", "choices": {"text": ["w", "x", "y", "z"], "label": [1, 2, 3, 4]}, "answer": 4},
        Choice("q", ("w", "x", "y", "z"), 3),
    ),
    "choice by number among labels that are texts": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answer": 1},
        Choice("q", ("x", "y", "z"), 0),
    ),
    "choice by place beside labels that are letters": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answer": 1},
        Choice("q", ("x", "y", "z"), 1),
    ),
    "choice by truth as a label": (
        {"question": "q", "choices": {"text": ["yes", "no"], "label": [True, False]}, "answer": True},
        Choice("q", ("yes", "no"), 0),
    ),
    "choice of truth": ({"question": "q", "choices": ["no", "yes"], "answer": True}, Choice("q", ("no", "yes"), 1)),
    "choice with context": (
        {"context": "c", "question": "q", "choices": ["x", "y"], "answer": 0},
        Choice("c\nq", ("x", "y"), 0),
    ),
    "preference": ({"prompt": "p", "chosen": "c", "rejected": "r"}, Preference("p", "c", "r")),
    "preference between conversations": (
        {
            "chosen": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
            "rejected": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "go away"}],
        },
        Preference((HELLO,), "good day", "go away"),
    ),
    "answer": (
        {"prompt": "2+2=", "answer": 4, "level": 1},
        Answered("2+2=", "4", {"prompt": "2+2=", "answer": 4, "level": 1}),
    ),
    "question and answer": (
        {"question": "how?", "answer": "so"},
        Answered("how?", "so", {"question": "how?", "answer": "so"}),
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_keys_say_what_a_row_is(name):
    fields, expected = GIVEN[name]
    assert example_of(Row("here", fields)) == expected


def test_every_kind_is_tested_and_named():
    assert {type(expected) for _, expected in GIVEN.values()} == set(KINDS)


WRONG = {
    "nothing known": ({"txt": "once"}, "txt"),
    "no key": ({}, "of nothing"),
    "text that is none": ({"text": ["once"]}, "'text'"),
    "text that is true": ({"text": True}, "'text'"),
    "missing text": ({"text": None}, "'text'"),
    "label that is none": ({"text": "t", "label": 0.5}, "'label'"),
    "messages that are none": ({"messages": "hello"}, "'messages'"),
    "message without content": ({"messages": [{"role": "user"}]}, "message 1"),
    "nothing to learn": ({"messages": [{"role": "user", "content": "hello"}]}, "assistant"),
    "one choice": ({"question": "q", "choices": ["x"], "answer": 0}, "at least two"),
    "answer beyond": ({"question": "q", "choices": ["x", "y"], "answer": 2}, "2 choices"),
    "answer below": ({"question": "q", "choices": ["x", "y"], "answer": -1}, "2 choices"),
    "answer unknown": ({"question": "q", "choices": ["x", "y"], "answer": "z"}, '"z"'),
    "answer below labels that are numbers": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": [1, 2, 3]}, "answer": 0},
        "labels 1, 2, 3",
    ),
    "answer beyond labels that are numbers": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": [1, 2, 3]}, "answer": 4},
        "labels 1, 2, 3",
    ),
    "text beyond labels that are numbers": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": [1, 2, 3]}, "answer": "0"},
        "labels 1, 2, 3",
    ),
    "answer that is neither label nor place": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": 2},
        "labels A, B",
    ),
    "label of no choice": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B", "C"]}, "answer": "C"},
        "3 labels for 2 choices",
    ),
    "preference without prompt": ({"chosen": "c", "rejected": "r"}, "'chosen'"),
    "unlike conversations": (
        {
            "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "c"}],
        },
        "differ in the last message",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_does_not_fit_names_its_place(name):
    fields, said = WRONG[name]
    with pytest.raises(DataError, match=r"data\.jsonl, line 7") as caught:
        example_of(Row("data.jsonl, line 7", fields))
    assert said in str(caught.value)


def test_columns_translate_other_names():
    row = Row("here", {"ctx": "They", "ending0": "sit", "ending1": "run", "label": 1})
    columns = {"question": "ctx", "choices": "ending0, ending1", "answer": "label"}
    assert example_of(row, columns) == Choice("They", ("sit", "run"), 1)
    with pytest.raises(DataError, match="has no 'sentence', which columns names for 'text'"):
        example_of(row, {"text": "sentence"})


ROWS = [{"text": "so good", "label": "positive"}, {"text": 'a "bad", bad film', "label": "negative"}]
LABELLED = tuple(Labelled(row["text"], row["label"]) for row in ROWS)


def write(path, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    tables = [["text", "label"], *([row["text"].replace('"', '""'), row["label"]] for row in rows)]
    separator = "\t" if ".tsv" in path.suffixes else ","
    table = "".join(separator.join(f'"{cell}"' for cell in row) + "\n" for row in tables)
    kind = next(one for one in path.suffixes if one != ".gz")
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    content = {".jsonl": lines, ".json": json.dumps(rows), ".csv": table, ".tsv": table}[kind].encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.JSONL", "d.jsonl.gz", "d.json.gz", "d.csv.gz"]
)
def test_every_file_type_holds_the_same(tmp_path, name):
    path = tmp_path / name
    if name == "d.JSONL":
        write(tmp_path / "d.jsonl").rename(path)
    else:
        write(path)
    assert read_examples(str(path)) == LABELLED


def test_a_list_of_objects_may_lie_in_an_object_and_one_a_line_under_the_wrong_name(tmp_path):
    (tmp_path / "inside.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_examples(str(tmp_path / "inside.json")) == LABELLED
    assert read_examples(str(tmp_path / "lines.json")) == LABELLED


def test_several_sources_and_patterns_are_read_in_order(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[1:])
    write(tmp_path / "a.jsonl", ROWS[:1])
    assert read_examples([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]) == LABELLED[::-1]
    assert read_examples(str(tmp_path / "*.jsonl")) == LABELLED
    assert len(read_examples([str(tmp_path / "*.jsonl"), "builtin:sentiment"], limit=3)) == 3


def test_empty_lines_do_not_count_but_keep_their_numbers(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n\n{"txt": "two"}\n')
    with pytest.raises(DataError, match=rf"{path}, line 3: has the keys txt"):
        read_examples(str(path))


BROKEN = {
    "cut.jsonl": (b'{"text": "one"}\n{"text": ', "line 2: not valid JSON"),
    "list.jsonl": (b"[1, 2]\n", "line 1: must be an object"),
    "cut.json": (b'[{"text": "one"},\n {"te', "line 2: not valid JSON"),
    "object.json": (b'{"text": "one"}', "must hold a list"),
    "latin.jsonl": ('{"text": "café"}'.encode("latin-1"), "cannot be read"),
    "short.csv": (b"text,label\nonly one\n", "line 2: does not have the 2 fields"),
    "long.csv": (b"text,label\na,b,c\n", "line 2: does not have the 2 fields"),
    "open.csv": (b'text,label\n"a,b\n', "not valid CSV"),
    "no.parquet": (b"PAR", "not a Parquet file"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "one"}\n' * 99)[:40], "cannot be read"),
    "not.jsonl.gz": (b'{"text": "one"}', "cannot be read"),
    "data.xlsx": (b"", "ends in .jsonl"),
    "empty.jsonl": (b"", "holds no row"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_damaged_is_named(tmp_path, name):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_examples(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "*.nothing"])
def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no (such )?file"):
        read_examples(source)


def test_kinds_are_not_mixed(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "label": "b"}\n')
    with pytest.raises(DataError, match=rf"{path}, line 2: is of the kind 'classes'.*'texts'"):
        read_examples(str(path))


def test_a_folder_of_datasets_is_read_with_its_labels_by_name(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    one = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "parts")
    assert read_examples(str(tmp_path / "one")) == (Labelled("x", "good"), Labelled("y", "bad"))
    assert len(read_examples(str(tmp_path / "parts"))) == 2
    assert read_examples(f"{tmp_path / 'parts'}:test") == (Labelled("y", "bad"),)
    with pytest.raises(DataError, match="has the splits train, test"):
        read_examples(f"{tmp_path / 'parts'}:dev")
    with pytest.raises(DataError, match="without splits"):
        read_examples(f"{tmp_path / 'one'}:test")
    with pytest.raises(DataError, match="save_to_disk"):
        read_examples(str(tmp_path))


def test_a_data_set_that_cannot_be_had_is_named():
    with pytest.raises(DataError, match="nobody/nothing:test: neither a file nor a folder"):
        read_examples("nobody/nothing:test")
    with pytest.raises(DataError, match="NAME:CONFIG:SPLIT"):
        read_examples("a:b:c:d")


@pytest.mark.parametrize("name", BUILTINS)
def test_built_in_data_are_the_same_every_time(name):
    examples = read_examples(f"builtin:{name}:50")
    assert examples == read_examples(f"builtin:{name}:60", limit=50)
    assert examples != read_examples(f"builtin:{name}:50:1")
    assert len(read_examples(f"builtin:{name}")) == 1000


def test_arithmetic_has_the_right_answers():
    for example in read_examples("builtin:arithmetic:20"):
        first, second = example.prompt.removesuffix("=").split("+")
        assert int(example.answer) == int(first) + int(second)


@pytest.mark.parametrize("source", ["builtin:nothing", "builtin:sums:x", "builtin:sums:1:2:3", "builtin:sums:-1"])
def test_built_in_data_that_there_are_not(source):
    with pytest.raises(DataError, match=source):
        list(read_rows(source))


def test_split_keeps_equal_examples_together_and_every_class_in_training():
    examples = [Labelled(f"text {number // 2}", "ab"[number % 4 // 2]) for number in range(40)] + [Labelled("x", "c")]
    training, held_out = split(examples, held_out=0.2, seed=3)
    assert sorted(map(repr, training + held_out)) == sorted(map(repr, examples))
    assert not set(training) & set(held_out)
    assert labels_of(training) == ("a", "b", "c")
    assert len(held_out) == 8
    assert (training, held_out) == split(examples, held_out=0.2, seed=3)
    assert training != split(examples, held_out=0.2, seed=4)[0]
    assert split(examples, held_out=0)[1] == ()


def test_split_refuses_what_is_impossible():
    with pytest.raises(DataError, match="fraction"):
        split([Text("a")], held_out=1)
    with pytest.raises(DataError, match="too few"):
        split([Text("a")], held_out=0.5)


def test_labels_are_sorted_as_numbers_if_they_are():
    assert labels_of([Labelled("", "10"), Labelled("", "9"), Labelled("", "-1")]) == ("-1", "9", "10")
    assert labels_of([Labelled("", "b"), Labelled("", "10"), Labelled("", "9")]) == ("10", "9", "b")


def test_files_are_read_without_torch(tmp_path):
    path = write(tmp_path / "d.jsonl")
    script = f"""
import sys
from lora_squeeze.data import read_examples
read_examples({str(path)!r})
print("torch" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"
