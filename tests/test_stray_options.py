"""Options and addresses that would mean nothing: they are refused instead of doing nothing."""

from pathlib import Path

import pytest
from adapters import make_adapter
from click.testing import CliRunner, Result

from lora_squeeze.cli import main


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", 4, "--metric", "accuracy"], "--metric belongs to --keep"),
        (["--rank", 4, "--metric", "loss"], "--metric belongs to --keep"),
        (["--rank", 4, "--labels", "a,b", "--model-device", "cpu"], "--labels and --model-device belong to --keep"),
        (["--rank", 4, "--data", "x.jsonl", "--limit", 0], "belong to --keep"),
        (["--rank", 4, "--by", "worst"], "--by worst is for --policy variance"),
        (["--policy", "energy=0.9", "--by", "worst"], "--by worst is for --policy variance"),
        (["--ranks", "plan.json", "--by", "worst"], "--by worst is for --policy variance"),
    ],
)
def test_options_of_something_else_are_refused(adapter, tmp_path, options, message):
    result = invoke("compress", adapter, tmp_path / "out", *options)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "out").exists()


def test_by_is_for_variance_and_the_default(adapter, tmp_path):
    assert invoke("plan", adapter, "--policy", "energy=0.9", "--by", "worst").exit_code == 2
    for number, options in enumerate(([], ["--retain", 0.9], ["--policy", "energy=0.9", "--policy", "variance=0.9"])):
        result = invoke("compress", adapter, tmp_path / str(number), "--by", "worst", *options)
        assert result.exit_code == 0, result.output


def test_an_address_of_elsewhere_is_named_as_it_was_given():
    result = invoke("show", "https://example.com/a/b")
    assert (result.exit_code, "https://example.com/a/b: no adapters are fetched from there" in result.output) == (
        1,
        True,
    )
