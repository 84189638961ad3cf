"""What `lora-squeeze --help` shows: every command, whole, in the order in which commands are needed."""

import re

from click.testing import CliRunner

from lora_squeeze.cli import main


def test_every_command_has_a_line_of_its_own_that_is_not_cut_off():
    text = CliRunner().invoke(main, ["--help"]).output
    listed = re.findall(r"^  ([a-z]+) +(\S.*)$", text.partition("Look at an adapter:")[2], re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted(main.commands)
    assert [line for _, line in listed if not line.endswith(".") or line.endswith("...")] == []
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert listed[0][0] == "show"
