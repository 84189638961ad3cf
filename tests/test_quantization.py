"""A LoRA trained, squeezed on the way and measured on a base model that is held in 4 or 8 bits."""

import json

import pytest
from click.testing import CliRunner
from tiny import save_tiny_bert, save_tiny_llama

from lora_squeeze import open_adapter
from lora_squeeze.cli import main
from lora_squeeze.errors import ModelError
from lora_squeeze.models import QUANTIZATIONS, load_model
from lora_squeeze.settings import ModelSettings

pytest.importorskip("bitsandbytes")


def run(*command: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(one) for one in command])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Its sizes are multiples of the blocks that bitsandbytes quantises."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama", hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("bits", QUANTIZATIONS)
def test_a_lora_is_trained_on_a_quantised_base(llama, tmp_path, bits):
    (tmp_path / "run.toml").write_text(f"""
[model]
model = "{llama}"
lora_rank = 8
quantization = "{bits}"
[training]
max_steps = 40
batch_size = 8
lr = 0.01
[data]
source = "builtin:sums:200"
eval_fraction = 0.1
[in_squeeze]
schedule = "8@0, 4@50%"
""")
    said = run("train", tmp_path / "run.toml", "--out", tmp_path / "run", "--json")
    final = tmp_path / "run/final"
    metrics = json.loads(said[said.index("{") :])["metrics"]
    assert metrics["eval_loss"] < 3  # from about 5
    assert open_adapter(final).rank == 4

    losses = {}
    for name, options in {"quantised": ["--quantization", bits], "whole": []}.items():
        told = run("evaluate", final, "--ranks", 1, "--data", "builtin:sums:50", "--metric", "loss", "--json", *options)
        losses[name] = [one["metrics"]["loss"]["value"] for one in json.loads(told)[0]["adapters"]]
    assert losses["quantised"][0] == pytest.approx(losses["whole"][0], rel=0.1)
    assert losses["quantised"] != losses["whole"]
    assert losses["quantised"][1] > losses["quantised"][0]


@pytest.mark.parametrize("bits", QUANTIZATIONS)
def test_the_linear_layers_are_held_in_few_bits(llama, bits):
    kind = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]
    model = load_model(str(llama), quantization=bits, device="cpu")
    kinds = {name.rpartition(".")[2]: type(one).__name__ for name, one in model.named_modules()}
    assert kinds["q_proj"] == kinds["down_proj"] == kind
    assert kinds["lm_head"] == "Linear"


def test_a_new_head_is_not_quantised(tmp_path):
    save_tiny_bert(tmp_path / "bert")
    with pytest.raises(ModelError, match="a new head and quantization = '4bit' do not go together"):
        load_model(str(tmp_path / "bert"), task="sequence-classification", labels=("a", "b"), quantization="4bit")


def test_what_is_no_quantization_is_refused(tmp_path):
    assert ModelSettings().quantization == ""
    (tmp_path / "run.toml").write_text('[model]\nmodel = "x"\nquantization = "3bit"\n[data]\nsource = "builtin:sums"\n')
    assert "4bit" in run("train", tmp_path / "run.toml", code=1)
