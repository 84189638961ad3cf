"""What starting the command line costs, counted in modules: torch is for tensors only."""

import json
import subprocess
import sys

import pytest
from adapters import make_adapter

from lora_squeeze.cli import main

HEAVY = {"torch", "numpy", "safetensors", "huggingface_hub", "transformers", "peft", "datasets", "rich.console"}

# Measured: 130 to 140, of which click brings half; each further hundred costs about 0.05 s.
FEW = 230

COUNT = """
import json, sys
from lora_squeeze.cli import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    sys.stdout.flush()
    print("MODULES", json.dumps(sorted(sys.modules)), file=sys.stderr)
    sys.exit(end.code)
"""


def modules_of(*arguments: object) -> tuple[set[str], int]:
    """What is imported when this command has run, and its exit code."""
    command = [sys.executable, "-c", COUNT, json.dumps([str(one) for one in arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next(line for line in done.stderr.splitlines() if line.startswith("MODULES "))
    return set(json.loads(line.removeprefix("MODULES "))), done.returncode


def test_help_imports_little():
    modules, code = modules_of("--help")
    assert code == 0
    assert modules & HEAVY == set()
    assert len(modules) < FEW


@pytest.mark.parametrize("name", main.commands)
def test_help_of_a_command_imports_little(name):
    modules, code = modules_of(name, "--help")
    assert code == 0
    assert modules & HEAVY == set()


def test_mistakes_are_told_without_torch(tmp_path):
    for arguments in (["compress"], ["compress", "a", "b", "--rank", "0"], ["analyse", "x"], ["run", tmp_path / "no"]):
        modules, code = modules_of(*arguments)
        assert code in (1, 2)
        assert "torch" not in modules


def test_a_settings_file_is_explained_without_torch(tmp_path):
    (tmp_path / "squeeze.toml").write_text('[squeeze]\nadapter_path = "x"\n')
    modules, code = modules_of("run", tmp_path / "squeeze.toml", "--explain")
    assert code == 0
    assert "torch" not in modules


def test_numbers_are_worked_with_without_torch():
    script = """
import sys
from lora_squeeze import Analysis, Ranks, Spectrum, analyze, variance
spectra = [Spectrum("a", 8, 8, 4, (3.0, 2.0, 1.0, 0.5)), Spectrum("b", 8, 8, 4, (3.0, 0.1, 0.1, 0.1))]
analysis = Analysis.from_json(analyze(spectra).to_json())
ranks = Ranks.from_json(variance(analysis.spectra, 0.9).to_json())
print(ranks.by_layer, sorted({"torch", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{'a': 2, 'b': 2} []"


def test_the_core_commands_need_no_extra(tmp_path):
    """With everything that is no core dependency out of reach."""
    block = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "peft", "datasets", "accelerate", "trl", "wandb", "ray",
                                      "matplotlib", "tinker", "lm_eval", "diffusers", "bitsandbytes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from lora_squeeze.cli import main
for line in sys.stdin:
    main(line.split(), standalone_mode=False)
"""
    make_adapter(tmp_path / "adapter")
    lines = "analyze adapter\ncompress adapter out --rank 2\nverify out adapter\nshow out\n"
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, input=lines, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out").exists()
