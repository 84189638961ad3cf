"""What PEFT calls its files and keys stands in one place of the package."""

import ast
from pathlib import Path

import lora_squeeze
from lora_squeeze import peft_names

PACKAGE = Path(lora_squeeze.__file__).parent
NAMES = {getattr(peft_names, name) for name in peft_names.__all__}


def _literals(file):
    """The texts of a module that are no docstrings."""
    tree = ast.parse(file.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [node.value for node in texts if id(node) not in said]


def test_no_other_module_spells_them():
    modules = [file for file in PACKAGE.rglob("*.py") if file.name != "peft_names.py"]
    found = {file.name: text for file in modules for text in _literals(file) if any(name in text for name in NAMES)}
    assert found == {}
