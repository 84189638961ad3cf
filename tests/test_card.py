"""Model cards: what is stated, and that everything else stays."""

from dataclasses import replace

import pytest
import yaml

from lora_squeeze import Compression, Spectrum
from lora_squeeze.errors import OutputError
from lora_squeeze.records import SqueezedLayer
from lora_squeeze.report.card import BEGIN, END, model_card

CONFIG = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}


def compression(source: str = "my-adapter", ranks: tuple[int, ...] = (2, 2)) -> Compression:
    spectra = [Spectrum(f"model.{i}.q_proj", 10, 6, 4, (2.0, 1.0, 0.5, 0.1)) for i in range(len(ranks))]
    layers = tuple(
        SqueezedLayer(s, rank, 0.1 * (i + 1)) for i, (s, rank) in enumerate(zip(spectra, ranks, strict=True))
    )
    return Compression(source, "out", "fixed=2", layers, 10_000, 5_000, 128, 64)


def card(existing: str = "", **options) -> str:
    made = options.pop("compression", compression())
    return model_card(made, **{"repo": "me/small", "config": CONFIG, "existing": existing, **options})


def metadata(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_a_new_card():
    text = card()
    assert metadata(text) == {"base_model": "org/base", "library_name": "peft", "tags": ["lora", "lora-squeeze"]}
    assert "\n# small\n" in text
    for row in (
        "| Source | `my-adapter` |",
        "| Policy | `fixed=2` |",
        "| Rank | 4 → 2 |",
        "| Parameters | 128 → 64 (50.0%) |",
        "| Weights | 10.0 kB → 5.0 kB (50.0%) |",
        "| Retained variance | 97.50% |",
        "| Relative error | 1.58e-01 over all layers |",
        "| Worst layer | 2.00e-01 in `model.1.q_proj` |",
    ):
        assert row in text
    assert 'base = AutoModelForCausalLM.from_pretrained("org/base")' in text
    assert 'model = PeftModel.from_pretrained(base, "me/small")' in text


def test_the_lines_that_load_it_are_python():
    for options in ({}, {"revision": "v2"}, {"config": {}, "weight_name": "a.safetensors"}, {"config": {"r": 4}}):
        text = card(**options)
        compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
        assert ('revision="v2"' in text) == ("revision" in options)
        assert ("load_lora_weights" in text) == (options.get("config") == {})


def test_ranks_that_differ_and_layers_that_are_left_out():
    assert "| Rank | 4 → 1–3 (mean 2.0), 1 of 3 layers left out |" in card(compression=compression(ranks=(1, 0, 3)))


EXISTING = """---
license: apache-2.0
base_model: org/base
pipeline_tag: text-generation
tags:
- sft
- lora
model-index:
- name: x
  results: []
language: [de, 日本語]
---

# My adapter

Trained on *poems* & `code`.

---

A line.
"""


def test_what_an_existing_card_says_is_kept():
    text = card(EXISTING, own=True)
    before, after = yaml.safe_load(EXISTING.split("---\n")[1]), metadata(text)
    assert {**after, "tags": 0, "library_name": 0} == {**before, "tags": 0, "library_name": 0}
    assert after["tags"] == ["sft", "lora", "lora-squeeze"]
    assert EXISTING.split("---\n", 2)[2].strip() in text
    assert "日本語" in text


def test_measured_results_of_another_adapter_are_left_out():
    assert "model-index" in metadata(card(EXISTING, own=True))
    assert "model-index" not in metadata(card(EXISTING))


def test_our_section_is_replaced_where_it_stands():
    first = card(EXISTING)
    edited = first.replace(END, END + "\n\nAfterwards, by hand.")
    second = card(edited, compression=compression(ranks=(1, 1)))
    assert second.count(BEGIN) == second.count(END) == 1
    assert "4 → 1" in second
    assert "4 → 2" not in second
    assert second.index(END) < second.index("Afterwards, by hand.")
    assert card(second, compression=compression(ranks=(1, 1))) == second


@pytest.mark.parametrize(
    "existing", ["# No metadata\n\ntext\n", "", "---\n---\n# Empty\n", "---\r\nlicense: mit\r\n---\r\n# A\r\n"]
)
def test_cards_of_all_kinds(existing):
    text = card(existing)
    assert metadata(text)["library_name"] == "peft"
    assert ("license" in existing) == (metadata(text).get("license") == "mit")
    assert text.count(BEGIN) == 1


@pytest.mark.parametrize("existing", ["---\na: [1\n---\n", "---\n- a\n- b\n---\ntext"])
def test_metadata_that_are_none_are_not_overwritten(existing):
    with pytest.raises(OutputError, match=r"README\.md: the metadata at its beginning are no"):
        card(existing)


@pytest.mark.parametrize("tags", ["tags: mine\n", "tags: [mine]\n", "tags:\n"])
def test_tags_of_all_kinds(tags):
    assert metadata(card(f"---\n{tags}---\n"))["tags"][-2:] == ["lora", "lora-squeeze"]


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/somebody/secret/adapter", "| Source | `adapter` |"),
        ("tinker://run/weights/final", "| Source | `tinker://run/weights/final` |"),
        (
            f"hf://u/r@{'a' * 40}/sub",
            f"| Source | [u/r/sub](https://huggingface.co/u/r/tree/{'a' * 40}/sub), commit `{'a' * 12}` |",
        ),
    ],
)
def test_the_source(source, shown):
    text = card(compression=compression(source))
    assert shown in text
    assert "somebody" not in text


@pytest.mark.parametrize("base", ["/data/models/base", "./base", "", None])
def test_a_base_model_on_some_disk_is_not_named(base):
    text = card(config={"base_model_name_or_path": base})
    assert "base_model" not in metadata(text)
    assert "/data" not in text


def test_what_a_plan_calls_itself_stays_in_its_cell():
    made = replace(compression(), policy="by `hand` | or\nnot")
    (line,) = [line for line in card(compression=made).splitlines() if line.startswith("| Policy")]
    assert line == r"| Policy | `` by `hand` \| or not `` |"
