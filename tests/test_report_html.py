"""The page as a file: what stands in it, that nothing in it can break out, that it needs nothing else."""

import hashlib
import json
import re
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from click.testing import CliRunner

from lora_squeeze import decompose, open_adapter
from lora_squeeze.analysis import analyze
from lora_squeeze.cli import main
from lora_squeeze.errors import RankError
from lora_squeeze.exploration import explore_analysis
from lora_squeeze.measurements import Curve, Evaluated
from lora_squeeze.records import Spectrum
from lora_squeeze.report.arrangement import arrange
from lora_squeeze.report.html import report_page, vendored
from lora_squeeze.verbs import explore_adapter
from tests.adapters import make_adapter, pair, write_raw

REPORT = files("lora_squeeze.report")
HOSTILE = "layers.0.</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


def record_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="record">(.*?)</script>', page, re.DOTALL)[1])


def spectra(layers: int, rank: int = 64) -> list[Spectrum]:
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return [
        Spectrum(
            f"model.layers.{i}.{module}",
            4096,
            4096 + 1024 * j,
            rank,
            tuple((torch.logspace(0, -1 - i / 16, rank) * torch.rand(rank).clamp(0.9)).tolist()),
        )
        for i in range(layers // 7)
        for j, module in enumerate(modules)
    ]


def test_a_curve_of_another_adapter_is_refused(tmp_path):
    adapter, other = make_adapter(tmp_path / "a", seed=1), make_adapter(tmp_path / "b", seed=2)
    curve = Curve("tiny", "data", 5, Evaluated("a", 8, open_adapter(adapter).parameters, {}), ())
    own = replace(curve, adapter_sha256=open_adapter(adapter).sha256())
    assert Curve.from_json(own.to_json()) == own
    found, of_other = (explore_adapter(decompose(open_adapter(one)), ["fixed=2"]) for one in (adapter, other))
    assert "quality" in record_of(report_page(found, curve=own))
    with pytest.raises(RankError, match=r"another adapter.*SHA-256"):
        report_page(of_other, curve=own)
    # An older curve has no hash, and an analysis none to compare it with.
    old = json.loads(own.to_json())
    del old["adapter_sha256"]
    assert "quality" in record_of(report_page(of_other, curve=Curve.from_json(json.dumps(old))))
    alone = explore_analysis(analyze(decompose(open_adapter(other)).spectra), ["fixed=2"])
    assert "quality" in record_of(report_page(alone, curve=own))


def test_vendored_libraries_are_those_that_were_looked_at():
    for name, found in vendored().items():
        content = (REPORT / "vendor" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == found["sha256"]
        assert found["version"] in content[:200].decode()
        for licence in found["license_files"]:
            assert "Copyright" in (REPORT / "vendor" / licence).read_text(encoding="utf-8")
    known = {
        "README.md",
        *vendored(),
        *(one for found in vendored().values() for one in found["license_files"]),
        "manifest.json",
    }
    assert {file.name for file in REPORT.joinpath("vendor").iterdir()} == known


def test_a_page_of_224_layers_is_small():
    page = report_page(explore_analysis(analyze(spectra(224), source="big")))
    assert len(page.encode()) < 2_000_000
    assert len(record_of(page)["layers"]) == 224


def test_the_same_input_gives_the_same_page():
    exploration = explore_analysis(analyze(spectra(14, 8), source="same"))
    assert report_page(exploration) == report_page(exploration)


def test_names_cannot_break_out(tmp_path):
    tensors = {**pair(HOSTILE, 8, 4, 8), **pair("layers.1.q_proj", 8, 4, 8)}
    folder = write_raw(tmp_path / "a", tensors, base_model_name_or_path="<script>alert(3)</script>")
    page = report_page(explore_adapter(decompose(open_adapter(folder))))
    assert "alert(1)</script>" not in page
    assert "<script>alert" not in page
    assert record_of(page)["layers"][0]["name"] == HOSTILE
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == len(re.findall("'sha256-", page))


def test_titles_are_escaped():
    page = report_page(explore_analysis(analyze(spectra(7, 4), source='x/<b title="y">&')))
    assert "<title>&lt;b title=&quot;y&quot;&gt;&amp;</title>" in page


def test_every_script_is_allowed_by_its_hash_and_nothing_else_is():
    page = report_page(explore_analysis(analyze(spectra(7, 4))))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("style-src")[0]
    assert "unsafe-eval" not in policy
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)


def test_a_rank_above_255_takes_two_bytes():
    wide = [Spectrum(f"layers.{i}.q", 512, 512, 300, tuple(0.99**k for k in range(300))) for i in range(2)]
    assert record_of(report_page(explore_analysis(analyze(wide))))["rank_bytes"] == 2
    assert record_of(report_page(explore_analysis(analyze(spectra(7)))))["rank_bytes"] == 1


# --- arrangement ------------------------------------------------------------------------------------------------


def test_layers_and_module_types_of_a_language_model():
    names = [f"model.layers.{i}.{m}" for i in (0, 1, 10, 2) for m in ("self_attn.q_proj", "mlp.up_proj")]
    found = arrange([*names, "lm_head"])
    assert found.columns == ("0", "1", "2", "10", "other")
    assert found.rows == ("self_attn.q_proj", "mlp.up_proj", "lm_head")
    assert found.places[:6] == ((0, 0), (0, 1), (1, 0), (1, 1), (3, 0), (3, 1))
    assert found.places[-1] == (4, 2)
    assert found.what == "model.layers"


def test_blocks_of_a_u_net_are_columns():
    blocks = [
        f"{side}_blocks.{i}.attentions.{j}.transformer_blocks.0"
        for side in ("down", "up")
        for i in (0, 1)
        for j in (0, 1)
    ]
    names = [f"{block}.{m}" for block in blocks for m in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")]
    found = arrange(names)
    assert found.columns == tuple(blocks)
    assert found.rows == ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    assert len(set(found.places)) == len(names)
    assert found.what == ""


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"],
        ["layers.0.experts.3.up#1", "layers.0.experts.3.up#2", "layers.1.experts.0.up#1"],
        ["lora_unet_down_blocks_0_attn_q", "lora_unet_down_blocks_1_attn_q", "lora_te_q"],
        ["0", "1"],
        [HOSTILE, "layers.1.x"],
    ],
)
def test_every_layer_has_a_place_of_its_own(names):
    found = arrange(names)
    assert len(set(found.places)) == len(names)
    assert all(0 <= column < len(found.columns) and 0 <= row < len(found.rows) for column, row in found.places)


# --- colours ----------------------------------------------------------------------------------------------------

TEXT = [  # (on what, what): WCAG 2.2 AA, 4.5 to 1
    *(
        ("paper", ink)
        for ink in ("ink", "soft", "accent", "good", "warn", "bad", "worst", "best", "weighted", "mean", "measured")
    ),
    *(("raised", ink) for ink in ("ink", "soft", "accent", "good", "warn", "bad")),
    ("accent", "on-accent"),
    ("good-back", "good"),
    ("warn-back", "warn"),
    ("warn-back", "ink"),
    ("bad-back", "bad"),
]
GRAPHICS = [("paper", "control"), ("raised", "control"), ("paper", "cut"), ("raised", "accent")]  # 3 to 1


def palettes() -> dict[str, dict[str, str]]:
    css = (REPORT / "page" / "page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    light, dark, printed = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks)
    return {"light": light, "dark": dark, "print": {**light, **printed}}


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["light", "dark", "print"])
def test_colours_can_be_told_apart(name):
    palette = palettes()[name]
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert {
        pair: round(contrast(*(palette[one] for one in pair)), 2)
        for pair in TEXT
        if contrast(*(palette[one] for one in pair)) < 4.5
    } == {}
    assert {
        pair: round(contrast(*(palette[one] for one in pair)), 2)
        for pair in GRAPHICS
        if contrast(*(palette[one] for one in pair)) < 3
    } == {}
    used = set(re.findall(r"var\(--([\w-]+)\)", "".join(f.read_text() for f in REPORT.joinpath("page").iterdir())))
    assert used - {"plot-background"} <= set(palettes()["light"])


# --- command ----------------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def test_report_writes_one_file(tmp_path):
    adapter = make_adapter(tmp_path / "my adapter", r=4)
    done = run(
        "report",
        adapter,
        "-o",
        tmp_path / "report.html",
        "--multiple-of",
        2,
        "--rank-for",
        "q_proj=3",
        "--policy",
        "energy=0.8",
    )
    assert done.exit_code == 0, done.output
    record = record_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert record["settings"][record["first"]]["spelling"] == "energy=0.8"
    assert record["command"] == {
        "before": f"lora-squeeze compress '{adapter}' 'my adapter-squeezed'",
        "after": " --multiple-of 2 --rank-for q_proj=3",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my adapter", "report.html"]


def test_an_analysis_is_enough(tmp_path):
    adapter = make_adapter(tmp_path / "a", r=4)
    (tmp_path / "analysis.json").write_text(run("analyze", adapter, "--json", "--retain", 0.9).output)
    done = run("report", tmp_path / "analysis.json", "-o", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    record = record_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert record["settings"][record["first"]]["spelling"] == "variance=0.9"
    assert record["verdicts"] == [[]]


@pytest.mark.parametrize(
    ("output", "why"),
    [("report.pdf", "must end in .html"), ("there.html", "already exists"), ("folder.html", "is a folder")],
)
def test_outputs_that_are_refused(tmp_path, output, why):
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    done = run("report", make_adapter(tmp_path / "a", r=2), "-o", tmp_path / output)
    assert done.exit_code == 1
    assert why in done.output
    assert (tmp_path / "there.html").read_text() == "mine"


def test_what_is_no_analysis_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"record": "Ranks"}')
    done = run("report", tmp_path / "x.json", "-o", tmp_path / "report.html")
    assert done.exit_code == 1
    assert "x.json: not a Analysis record" in done.output
    assert "give an adapter or what analyze --json printed" in done.output
