"""Optional dependencies: what is missing is named, with the command that installs it."""

import sys

import pytest

from lora_squeeze.errors import MissingExtra
from lora_squeeze.extras import require


def test_a_module_that_is_there_is_returned():
    assert require("json.decoder", "train").JSONDecoder


@pytest.mark.parametrize("name", ["no_such_module", "no_such_module.inside"])
def test_a_module_that_is_missing_names_its_extra(name):
    with pytest.raises(MissingExtra) as caught:
        require(name, "ray")
    assert str(caught.value) == "no_such_module is not installed; to use this: pip install 'lora-squeeze[ray]'"


def test_a_module_that_lacks_something_else_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "needs_another.py").write_text("import something_else_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_else"):
        require("needs_another", "train")


def test_a_module_that_is_blocked_counts_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"lora-squeeze\[train\]"):
        require("peft", "train")
