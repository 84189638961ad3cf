"""The page in a real browser: it loads in silence, and what it shows is what the Python policies say."""

import json
import math
import re
import shutil
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from lora_squeeze import decompose, open_adapter
from lora_squeeze.campaign.overview import overview
from lora_squeeze.cli import main
from lora_squeeze.exploration import Exploration
from lora_squeeze.measurements import Curve, CurvePoint, Estimate, Evaluated
from lora_squeeze.policies import POLICIES
from lora_squeeze.records import Ranks
from lora_squeeze.report.html import report_page
from lora_squeeze.verbs import choose_ranks, explore_adapter, outcome
from tests.adapters import make_adapter, pair, write_raw
from tests.campaigns import make_campaign

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium was found on this machine")


@dataclass(frozen=True)
class Shown:
    page: "sync_api.Page"
    exploration: Exploration
    said: list[str]  # console messages, errors and requests: what there should not be

    def slide(self, slider: str, position: int) -> None:
        self.page.locator(slider).evaluate(
            "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})) }",
            position,
        )
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))")

    def rows(self) -> dict[str, tuple[str, list[float]]]:
        """Policy → the setting that is shown for it, and its numbers."""
        found = self.page.locator("#policies tbody tr").evaluate_all(
            "rows => rows.map(row => [row.dataset.policy, row.dataset.setting ?? '',"
            " [...row.querySelectorAll('data')].map(one => Number(one.value))])"
        )
        return {policy: (setting, numbers) for policy, setting, numbers in found}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def decomposition(tmp_path_factory):
    return decompose(open_adapter(make_adapter(tmp_path_factory.mktemp("source") / "adapter", r=16)))


@pytest.fixture(scope="module")
def report(decomposition, tmp_path_factory):
    exploration = explore_adapter(decomposition, ["params=0.25"])
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(report_page(exploration), encoding="utf-8")
    return exploration, file


def open_page(browser, report, **options):
    exploration, file = report
    page = browser.new_context(accept_downloads=True, **options).new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("data:", "blob:")) else None
    )
    page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    page.goto(file.as_uri())
    page.wait_for_selector("#spectrum svg", timeout=20_000)
    assert said == [file.as_uri()]
    said.clear()
    return Shown(page, exploration, said)


@pytest.fixture
def shown(browser, report):
    shown = open_page(browser, report)
    yield shown
    shown.page.context.close()
    assert shown.said == []


def test_all_figures_are_drawn(shown):
    for figure in ("strips", "heatmap", "spectrum", "variance", "frontier"):
        assert shown.page.locator(f"#{figure} svg").count() >= 1, figure
    assert shown.page.locator("#failure").is_hidden()
    assert shown.page.locator("#heatmap svg").last.locator("g[aria-label=cell] rect").count() == 6


def test_first_comes_what_was_asked_for(shown):
    assert shown.page.locator("#chosen-name").inner_text() == "params=0.25"
    assert list(shown.rows()) == list(POLICIES)


@pytest.mark.parametrize("mode", ["parameters", "bytes", "energy", "worst"])
def test_the_slider_shows_what_the_policies_say(shown, decomposition, mode):
    page = shown.page
    page.locator(f"#mode-{mode}").check()
    last = int(page.locator("#limit").get_attribute("max"))
    for position in sorted({0, last // 4, last // 2, last - 2, last}):
        shown.slide("#limit", position)
        limit = page.evaluate(
            "([mode, at]) => JSON.parse(document.getElementById('record').textContent).stops[mode][at]",
            [mode, position],
        )
        rows = shown.rows()
        for policy, (spelling, numbers) in rows.items():
            expected = best(shown.exploration, policy, mode, limit)
            assert spelling == expected, (policy, mode, limit)
            if not spelling:
                continue
            found = outcome(decomposition, choose_ranks(decomposition, spelling))
            assert numbers == [
                found.parameters,
                found.file_bytes,
                found.energy_kept,
                found.worst_layer,
                found.largest_rank,
                found.layers_left_out,
            ]
        assert sum(bool(spelling) for spelling, _ in rows.values()) >= 1


def best(exploration: Exploration, policy: str, mode: str, limit: float) -> str:
    """The spelling that should be shown: most energy within a budget, fewest parameters above a threshold."""
    of = {"parameters": "parameters", "bytes": "file_bytes", "energy": "energy_kept", "worst": "worst_layer"}[mode]
    settings = [one for one in exploration.settings if one.policy == policy]
    if mode in ("parameters", "bytes"):
        fitting = [one for one in settings if getattr(one.outcome, of) <= limit]
        order = lambda one: (-one.outcome.energy_kept, one.outcome.parameters)  # noqa: E731
    else:
        fitting = [one for one in settings if getattr(one.outcome, of) >= limit]
        order = lambda one: (one.outcome.parameters, -one.outcome.energy_kept)  # noqa: E731
    return min(fitting, key=order).spelling if fitting else ""


def test_params_and_size_are_shown_at_the_limit_itself(shown):
    record = json.loads(shown.page.locator("#record").text_content())
    total = record["parameters"]
    shown.slide("#limit", record["stops"]["parameters"].index(int(0.5 * total)))
    assert shown.rows()["params"][0] == "params=0.5"


@pytest.mark.parametrize("policy", ["energy", "params", "fixed", "knee", "size"])
def test_ranks_json_is_a_plan_that_compress_takes(shown, decomposition, tmp_path, policy):
    shown.page.locator(f"#policy-{policy}").check()
    spelling = shown.page.locator("#chosen-name").inner_text()
    with shown.page.expect_download() as downloading:
        shown.page.get_by_role("button", name="Download ranks.json").click()
    assert downloading.value.suggested_filename == "ranks.json"
    downloading.value.save_as(tmp_path / "ranks.json")
    plan = Ranks.from_json((tmp_path / "ranks.json").read_text(encoding="utf-8"))
    assert plan == Ranks(spelling, choose_ranks(decomposition, spelling).by_layer)
    source, out = decomposition.adapter.source, tmp_path / "out"
    done = CliRunner().invoke(main, ["compress", source, str(out), "--ranks", str(tmp_path / "ranks.json"), "--json"])
    assert done.exit_code == 0, done.output
    written, numbers = json.loads(done.output), shown.rows()[policy][1]
    assert [written["parameters_after"], written["bytes_after"]] == numbers[:2]
    assert "ranks.json holds the ranks of " + spelling in shown.page.locator("#said").inner_text()


def test_the_command_is_copied_and_does_what_is_shown(browser, report, decomposition, tmp_path):
    shown = open_page(browser, report, permissions=["clipboard-read", "clipboard-write"])
    shown.page.locator("#policy-energy").check()
    shown.page.get_by_role("button", name="Copy command").click()
    sync_api.expect(shown.page.locator("#said")).to_have_text("Copied.")
    command = shown.page.evaluate("navigator.clipboard.readText()")
    shown.page.context.close()
    source = decomposition.adapter.source
    assert command == f"lora-squeeze compress {source} adapter-squeezed --policy {shown_setting(command)}"
    done = CliRunner().invoke(
        main, ["compress", source, str(tmp_path / "out"), "--policy", shown_setting(command), "--json"]
    )
    expected = outcome(decomposition, choose_ranks(decomposition, shown_setting(command)))
    assert json.loads(done.output)["parameters_after"] == expected.parameters


def shown_setting(command: str) -> str:
    return re.search(r"--policy (\S+)$", command)[1]


def test_the_keyboard_is_enough(shown):
    page = shown.page
    page.locator("#limit").focus()
    before = page.locator("#limit-value").inner_text()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("text => document.getElementById('limit-value').textContent !== text", arg=before)
    # The page follows when it next draws, which may be later than the key: until then, wait.
    page.wait_for_function(
        "() => document.getElementById('limit').getAttribute('aria-valuetext')"
        " === document.getElementById('limit-value').textContent"
    )
    page.locator("#policy-params").focus()
    page.keyboard.press("ArrowDown")  # the next policy, and the focus stays on it though the rows are made again
    page.wait_for_function("document.activeElement.id === 'policy-size'")
    page.wait_for_function("document.getElementById('chosen-name').textContent.startsWith('size=')")
    page.locator("#heatmap").focus()
    seen = {page.locator("#spectrum-title").inner_text()}
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
        page.wait_for_timeout(50)
        seen.add(page.locator("#spectrum-title").inner_text())
    assert len(seen) >= 3
    assert "effective rank" in page.locator("#readout").inner_text()


def test_everything_that_can_be_used_has_a_name(shown):
    unnamed = shown.page.locator("button, input, select, [role=application]").evaluate_all(
        "all => all.filter(one => !(one.labels?.length || one.getAttribute('aria-labelledby')"
        " || one.textContent.trim())).map(one => one.outerHTML)"
    )
    assert unnamed == []
    assert (
        shown.page.locator(
            "svg[role=img]:not([aria-label]), svg:not([aria-label]):not(.plot-swatches svg)"
        ).evaluate_all(
            "all => all.filter(one => !one.closest('[class*=swatch]') && !one.querySelector('image')).length"
        )
        == 0
    )
    assert shown.page.locator("html").get_attribute("lang") == "en"


def test_a_module_is_looked_at_by_pointing(shown, decomposition):
    page = shown.page
    cells = page.locator("#heatmap svg").last.locator("g[aria-label=cell] rect")
    cells.first.scroll_into_view_if_needed()
    cells.first.hover()
    first = decomposition.spectra[0]
    page.wait_for_function(
        "name => document.getElementById('spectrum-title').textContent.endsWith(name)", arg=first.name
    )
    assert f"effective rank {first.effective_rank:.1f}" in page.locator("#readout").inner_text()
    assert page.locator("#spectrum svg g[aria-label=dot] circle").count() == 2 * len(first.singular_values)


def test_the_table_of_layers_has_the_ranks_of_the_setting(shown, decomposition):
    page = shown.page
    page.locator("#policy-energy").check()
    page.locator("#all-layers summary").click()
    page.wait_for_selector("#layer-table tbody tr")
    rows = page.locator("#layer-table tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    plan = choose_ranks(decomposition, page.locator("#chosen-name").inner_text())
    kept = {s.name: f"{s.retained_variance(plan.by_layer[s.name]):.2%}" for s in decomposition.spectra}
    assert {row[0]: int(row[5]) for row in rows} == plan.by_layer
    assert {row[0]: row[6] for row in rows} == kept


def test_servers_are_those_of_the_verdicts(shown):
    page = shown.page
    page.locator("#policy-energy").check()
    spelling = page.locator("#chosen-name").inner_text()
    setting = next(one for one in shown.exploration.settings if one.spelling == spelling)
    lines = page.locator("#servers li").all_inner_texts()
    assert [line.split()[0] for line in lines] == [verdict.runtime for verdict in setting.verdicts]
    for line, verdict in zip(lines, setting.verdicts, strict=True):
        assert ("does not load" in line) == (verdict.loads == "no")
        assert all(part in line for part in (*verdict.needs, *verdict.reasons))


def test_the_value_of_one_policy_has_its_own_slider(shown):
    page = shown.page
    page.locator("#policy-energy").check()
    mine = [one for one in shown.exploration.settings if one.policy == "energy"]
    for position in (0, len(mine) // 2, len(mine) - 1):
        shown.slide("#value", position)
        assert page.locator("#chosen-name").inner_text() == mine[position].spelling
        assert shown.rows()["energy"][1][0] == mine[position].outcome.parameters
        others = [numbers[0] for policy, (_, numbers) in shown.rows().items() if numbers and policy != "energy"]
        assert max(others, default=0) <= mine[position].outcome.parameters


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_any_screen(browser, report, width):
    shown = open_page(browser, report, viewport={"width": width, "height": 800}, color_scheme="dark")
    for measure in ("rank", "energy", "kept", "effective"):
        shown.page.locator("#metric").select_option(measure)
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 22, 28)"
    assert shown.said == []
    shown.page.context.close()


def test_it_can_be_printed(shown):
    assert shown.page.pdf(format="A4", print_background=True).startswith(b"%PDF")
    shown.page.emulate_media(media="print", color_scheme="dark")
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.page.locator("#copy").is_hidden()


def test_hostile_names_are_only_text(browser, tmp_path):
    name = "layers.0.</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    folder = write_raw(tmp_path / "a", {**pair(name, 8, 4, 8), **pair("layers.1.__proto__", 8, 4, 8)})
    decomposition = decompose(open_adapter(folder))
    file = tmp_path / "report.html"
    file.write_text(report_page(explore_adapter(decomposition, ["fixed=2"])), encoding="utf-8")
    shown = open_page(browser, (None, file))
    shown.page.locator("#layer").select_option(label=name)
    assert shown.page.locator("#spectrum-title").inner_text() == f"Spectrum of {name}"
    assert shown.page.locator("img").count() == 0
    with shown.page.expect_download() as downloading:
        shown.page.locator("#download").click()
    plan = Ranks.from_json(downloading.value.path().read_text(encoding="utf-8"))
    assert plan.by_layer == {name: 2, "layers.1.__proto__": 2}
    assert shown.said == []
    shown.page.context.close()


def test_without_the_adapter_there_are_no_bytes_and_no_servers(browser, tmp_path):
    adapter = make_adapter(tmp_path / "a", r=4)
    analysis = CliRunner().invoke(main, ["analyze", str(adapter), "--json"]).output
    (tmp_path / "analysis.json").write_text(analysis)
    done = CliRunner().invoke(main, ["report", str(tmp_path / "analysis.json"), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    shown = open_page(browser, (None, tmp_path / "r.html"))
    assert shown.page.locator("#mode-bytes").count() == 0
    assert "not known" in shown.page.locator("#servers").inner_text()
    shown.page.context.close()


def test_measured_quality_is_shown(browser, tmp_path):
    adapter = make_adapter(tmp_path / "a", r=8)
    (tmp_path / "curve.json").write_text(curve_of(adapter).to_json())
    made = ["report", str(adapter), "-o", str(tmp_path / "r.html"), "--curve", str(tmp_path / "curve.json")]
    assert CliRunner().invoke(main, made).exit_code == 0
    shown = open_page(browser, (None, tmp_path / "r.html"))
    assert shown.page.locator("#quality-title").inner_text() == "Measured quality: 500 examples of <b>trec</b>"
    assert shown.page.locator("#quality > figure").count() == 2
    rows = shown.page.locator("#quality-table tbody tr").all_inner_texts()
    assert [row.split() for row in rows] == [
        ["original", "100%", "0.84", "0.6"],
        ["params=0.5", "50.0%", "0.83", "within", "noise", "0.7", "worse"],
        ["params=0.25", "on", "data", "25.0%", "0.81", "worse", "–", "worse"],
    ]
    assert shown.said == []
    shown.page.context.close()
    other = make_adapter(tmp_path / "b", r=4)
    done = CliRunner().invoke(main, ["report", str(other), *made[2:3], str(tmp_path / "o.html"), *made[4:]])
    assert done.exit_code == 1
    assert "measured with another adapter" in done.output


def curve_of(adapter) -> Curve:
    found = decompose(open_adapter(adapter))

    def point(label: str, share: float, accuracy: Estimate, loss: Estimate) -> CurvePoint:
        kept = outcome(found, choose_ranks(found, f"params={share}"))
        return CurvePoint("params", label, kept, {"accuracy": accuracy, "loss": loss})

    noise = Estimate(0.83, 0.8, 0.86, -0.01, -0.03, 0.01, "within noise")
    worse = Estimate(0.81, 0.78, 0.84, -0.03, -0.05, -0.01, "worse")
    points = (
        point("", 0.5, noise, Estimate(0.7, 0.6, 0.8, 0.1, 0.05, 0.15, "worse")),
        point("on data", 0.25, worse, Estimate(math.nan, 0.6, 0.8, 0.1, 0.05, 0.15, "worse")),
    )
    own = {"accuracy": Estimate(0.84, 0.8, 0.88), "loss": Estimate(0.6, 0.5, 0.7)}
    return Curve("tiny", "<b>trec</b>", 500, Evaluated("a", 8, found.adapter.parameters, own), points)


def test_a_campaign_is_shown_with_the_adapter_of_a_run(browser, tmp_path):
    folder = make_campaign(tmp_path / "my campaign")
    done = CliRunner().invoke(main, ["report", str(folder), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    shown = open_page(browser, (None, tmp_path / "r.html"))
    page = shown.page
    assert page.title() == page.locator("h1").inner_text() == "my campaign"
    found = overview(folder)
    rows = [row.split() for row in page.locator("#campaign-means tbody tr").all_inner_texts()]
    mean = found.means["sft~lora_rank=8"]["eval_loss"]
    assert rows[0] == ["sft~lora_rank=8", "2", f"{mean.mean:.4g}", "±", f"{mean.error:.2g}", "1", "±", "0"]
    assert page.locator("#campaign-gains tbody tr").inner_text().split() == ["8", "+0.65", "±", "0.05"]
    assert page.locator("#campaign-runs tbody tr").count() == 4
    assert page.locator("#learning svg g[aria-label=line] path").count() == 2
    assert page.locator("#reached svg g[aria-label=dot] circle").count() == 2
    assert "sft~lora_rank=8_s1" in page.locator("#campaign-run").inner_text()
    assert (
        page.locator("#command")
        .inner_text()
        .startswith(f"lora-squeeze compress '{folder}/runs/sft~lora_rank=8_s1/final'")
    )
    assert shown.said == []
    page.context.close()


def test_a_campaign_of_which_nothing_has_finished_is_an_error(tmp_path):
    folder = make_campaign(tmp_path / "c", finished=False)
    done = CliRunner().invoke(main, ["report", str(folder), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 1
    assert "no run has finished yet" in done.output
