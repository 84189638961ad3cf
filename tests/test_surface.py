"""The package as seen from outside: what it exports, and what imports what."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import lora_squeeze
from lora_squeeze.cli import main
from lora_squeeze.version import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_squeeze"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}

# Imports point one way: every module may import only what stands before it.
ORDER = [
    "errors",
    "documents",
    "version",
    "extras",
    "sizes",
    "spelling",
    "student",
    "peft_names",
    "parallel",
    "scratch",
    "gram",
    "records",
    "likeness",
    "adapter",
    "measurements",
    "provenance",
    "limits",
    "budget",
    "policies",
    "analysis",
    "comparison",
    "summary",
    "exploration",
    "spectrum",
    "truncation",
    "formats.hashing",
    "formats.tensors",
    "formats.writing",
    "formats.beside",
    "formats.base_weights",
    "formats.dora",
    "formats.folder",
    "formats.pickled",
    "formats.peft_patterns",
    "formats.peft_config",
    "formats.peft_keys",
    "formats.peft_layout",
    "formats.peft_adalora",
    "formats.peft",
    "formats.pairs",
    "formats.kohya",
    "formats.diffusers",
    "formats.remote",
    "formats.unpacking",
    "formats.downloads",
    "formats.fetched",
    "formats.hub",
    "formats.tinker",
    "formats",
    "identity",
    "rewriting",
    "conversion",
    "merging",
    "serving",
    "moments",
    "whitening",
    "decomposition",
    "compression",
    "magnitudes",
    "verdicts",
    "pairing",
    "verbs",
    "verification",
    "data.images",
    "data.messages",
    "data.examples",
    "data.builtin",
    "data.sources",
    "data",
    "seeing",
    "precision",
    "models",
    "attaching",
    "encoding",
    "collating",
    "sections",
    "settings",
    "annealing",
    "annealing.schedule",
    "annealing.targets",
    "annealing.sharding",
    "annealing.live",
    "annealing.change",
    "annealing.eightbit",
    "annealing.transport",
    "annealing.replicas",
    "annealing.switch",
    "annealing.rates",
    "annealing.loading",
    "annealing.squeezer",
    "annealing.callback",
    "evaluation",
    "evaluation.rows",
    "evaluation.subject",
    "evaluation.scoring",
    "evaluation.bootstrap",
    "evaluation.measure",
    "evaluation.harness",
    "evaluation.keep",
    "evaluation.curve",
    "calibration",
    "squeezing",
    "dotted",
    "training",
    "training.settings",
    "training.record",
    "training.folder",
    "training.rewards",
    "training.advantages",
    "training.inputs",
    "training.grpo",
    "training.trainers",
    "training.callbacks",
    "training.tracking",
    "training.run",
    "training.job",
    "report.training",
    "worker",
    "executors",
    "campaign",
    "campaign.spec",
    "campaign.manifest",
    "campaign.autosqueeze",
    "report.wandb",
    "campaign.launch",
    "campaign.results",
    "campaign.squeezed",
    "campaign.overview",
    "report.campaign",
    "report.campaign_plots",
    "batch",
    "report",
    "report.table",
    "report.card",
    "upload",
    "report.batch",
    "report.quality",
    "report.curve_plot",
    "report.arrangement",
    "report.measured",
    "report.html",
    "report.plots",
    "report.terminal",
    "report.pairs",
    "",  # the façade
    "cli.options",
    "cli.explaining",
    "cli.output",
    "cli.files",
    "cli.plots",
    "cli.data_options",
    "cli.source",
    "cli.decomposing",
    "cli.analyze",
    "cli.plan",
    "cli.keep",
    "cli.compress",
    "cli.merge",
    "cli.calibrate",
    "cli.evaluate",
    "cli.curve",
    "cli.compare",
    "cli.check",
    "cli.convert",
    "cli.show",
    "cli.verify",
    "cli.report",
    "cli.train",
    "cli.campaign",
    "cli.batch",
    "cli.run",
    "cli",
    "__main__",
]
WITHOUT_TORCH = re.compile(
    "|".join(
        [  # one a line
            "",
            "errors",
            "version",
            "sizes",
            "documents",
            r"annealing\.targets",
            "extras",
            "exploration",
            "likeness",
            "data.*",
            "precision",
            "models",
            "attaching",
            "encoding",
            "records",
            "measurements",
            "adapter",
            "provenance",
            "limits",
            "budget",
            "policies",
            "analysis",
            "comparison",
            "sections",
            "settings",
            "dotted",
            "training",
            r"training\.settings",
            r"training\.rewards",
            "campaign",
            r"campaign\.spec",
            "annealing",
            r"annealing\.schedule",
            "summary",
            "report.*",
            "cli.*",
        ]
    )
)


def short(name: str) -> str:
    return name.removeprefix("lora_squeeze").removeprefix(".")


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions and for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{one.name}" for one in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
    return {short(name) for name in found if name in MODULES}


def test_every_module_has_its_place_in_the_order():
    assert sorted(map(short, MODULES)) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    below = ORDER[: ORDER.index(name)]
    path = MODULES[f"lora_squeeze.{name}".rstrip(".")]
    assert imports_of(path) <= set(below)


def test_modules_of_numbers_do_not_import_torch():
    names = [f"lora_squeeze.{name}".rstrip(".") for name in ORDER if WITHOUT_TORCH.fullmatch(name)]
    script = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{{name}} imports torch")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_exports_are_sorted_and_complete():
    assert lora_squeeze.__all__ == sorted(lora_squeeze.__all__)
    assert dir(lora_squeeze) == lora_squeeze.__all__
    assert len(set(lora_squeeze.__all__)) == len(lora_squeeze.__all__)


@pytest.mark.parametrize("name", lora_squeeze.__all__)
def test_every_export_can_be_imported_and_is_documented(name):
    value = getattr(lora_squeeze, name)
    if name == "__version__":
        assert value == __version__
        return
    assert inspect.getdoc(value)
    assert len(inspect.getdoc(value).splitlines()[0]) > 15
    assert value.__module__.startswith("lora_squeeze.")


def test_type_checkers_see_the_same_exports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    names = {one.name for node in checked.body for one in node.names}
    assert names | {"__version__"} == set(lora_squeeze.__all__)


def test_a_name_that_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="analyse"):
        lora_squeeze.analyse  # noqa: B018


@pytest.mark.parametrize("name", [name for name in ORDER if name])
def test_every_module_lists_what_it_offers(name):
    module = importlib.import_module(f"lora_squeeze.{name}")
    assert module.__doc__
    offered = getattr(module, "__all__", [])
    assert len(set(offered)) == len(offered)
    for one in offered:
        assert hasattr(module, one)
        assert not inspect.isfunction(getattr(module, one)) or inspect.getdoc(getattr(module, one))


def test_all_errors_are_lora_squeeze_errors_and_drawn_in_the_docstring():
    from lora_squeeze import errors

    kinds = {name for name in errors.__all__ if name != "reason_of"}
    for name in kinds:
        assert issubclass(getattr(errors, name), errors.LoraSqueezeError)
        assert name in errors.__doc__
    assert "pip install 'lora-squeeze[train]'" in str(errors.MissingExtra("peft", "train"))


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", __version__)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert 'path = "lora_squeeze/version.py"' in project
    elsewhere = [path for path in PACKAGE.rglob("*.py") if f'"{__version__}"' in path.read_text(encoding="utf-8")]
    assert elsewhere == [PACKAGE / "version.py"]


def test_the_console_script_is_the_command_line():
    (script,) = entry_points(group="console_scripts", name="lora-squeeze")
    assert script.load() is main


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_every_export_is_checked_as_a_user_s_type_checker_sees_it():
    tree = ast.parse((ROOT / "tests" / "public_types.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "lora_squeeze"]
    assert {one.name for node in imports for one in node.names} == set(lora_squeeze.__all__)
