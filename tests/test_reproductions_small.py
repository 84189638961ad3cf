"""reproductions/small: every experiment with a tiny model and a few rows, and the page and figures that follow."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_bert

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import in_squeeze_runs as runs  # noqa: E402
from benchmarks.in_squeeze import read_results  # noqa: E402
from benchmarks.in_squeeze_runs import SOURCE, TARGETS, Run, best_rate  # noqa: E402
from reproductions.small import __main__ as command  # noqa: E402
from reproductions.small import experiments, findings, page, resumed, tasks  # noqa: E402
from reproductions.small.adapters import TREC, Places, keep_runs  # noqa: E402
from reproductions.small.claims import correlated, verdict  # noqa: E402
from reproductions.small.experiments import BELOW, SIZES, measurement, planned, sized  # noqa: E402
from reproductions.small.figures import FIGURES  # noqa: E402
from reproductions.small.findings import Mean  # noqa: E402
from reproductions.small.measuring import GRADIENTS, OUTPUTS, Measurement, measure, read_measurements  # noqa: E402
from reproductions.small.tasks import Example, Task  # noqa: E402
from reproductions.small.wording import points  # noqa: E402

SEEDS = (0, 1)
WORDS = {"animal": ("cat", "dog", "cow"), "plant": ("oak", "elm", "rose")}
ROWS = [Example(label, f"{number} {word}s") for label, words in WORDS.items() for word in words for number in range(12)]
PAGE = f"# Title\n\n{resumed.BEGIN}\nold\n{resumed.END}\nend\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """All that `make bench-in-squeeze` and `make reproduce-small` do, with a tiny model and few steps."""
    folder = tmp_path_factory.mktemp("small")
    found = Places(str(save_tiny_bert(folder / "model")), folder / "in-squeeze", folder / "own", folder / "results")
    before = dict(tasks.TASKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "SEEDS", SEEDS)
        for name, value in {"STEPS": 6, "CONTINUED": 2, "BATCH": 8, "SEEDS": SEEDS}.items():
            patch.setattr(runs, name, value)
        for name in list(tasks.TASKS):
            patch.setitem(tasks.TASKS, name, Task(name, lambda: ROWS, most=None))
        for name in ("movies", "subjects"):
            patch.delitem(tasks.TASKS, name)
        for cached in (tasks.texts_of, tasks._unique):
            cached.cache_clear()
        patch.setattr(runs, "questions", lambda: tasks.questions_of(TREC, found.model))
        train_in_squeeze(found)
        keep_runs(found)
        command.work(found, minutes=60)
        yield found
    tasks.TASKS.clear()
    tasks.TASKS.update(before)  # in their order, which is that of the page
    for cached in (tasks.texts_of, tasks._unique):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The command takes one; later tests get back what there was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train_in_squeeze(places: Places) -> None:
    """What is trained at one rank; In-Squeeze itself is none of this page's experiments, so its scores are made up."""
    places.in_squeeze.mkdir()
    path = places.in_squeeze / "runs.jsonl"
    with path.open("a", encoding="utf-8") as file:
        while wanted := [one for one in runs.planned(read_results(path)) if one.kind in ("direct", "source")]:
            done = read_results(path)
            if not (pending := [one for one in wanted if one.key not in done]):
                break
            result = runs.carried_out(pending[0], done, places.in_squeeze / "adapters")
            file.write(json.dumps({"run": asdict(pending[0]), "result": result}) + "\n")
            file.flush()
        for seed in SEEDS:
            run = Run("in-squeeze", 1, best_rate(read_results(path), SOURCE), seed, f"minimum={runs.LEAST}")
            file.write(json.dumps({"run": asdict(run), "result": {"test": 0.5}}) + "\n")


def test_everything_that_is_planned_is_measured_once(places: Places) -> None:
    done, before = read_measurements(places.measurements), places.measurements.read_bytes()
    assert set(planned(places.runs())) == set(done)
    assert len(before.splitlines()) == len(done)
    command.work(places, minutes=60)
    assert places.measurements.read_bytes() == before


def test_measurements_agree_with_the_in_squeeze_benchmark(places: Places) -> None:
    results, done = places.runs(), read_measurements(places.measurements)
    for seed in SEEDS:
        run = results[Run("source", SOURCE, best_rate(results, SOURCE), seed).key]
        assert done[measurement(results, seed, "")]["accuracy"] == pytest.approx(run["test"])
        for rank in TARGETS:
            there = run["branches"][f"post {rank}"]["test"]
            assert done[measurement(results, seed, f"fixed={rank}")]["accuracy"] == pytest.approx(there)


def test_an_interrupted_measurement_goes_on_alike(places: Places, tmp_path: Path) -> None:
    """Whatever has been measured before, moments are those of the adapter as it was trained."""
    results, done = places.runs(), read_measurements(places.measurements)
    one = measurement(results, 0, "fixed=2", moments=GRADIENTS)
    alone = replace(places, results=tmp_path)
    assert list(measure(one.trained, [one], alone)) == [one]
    found = read_measurements(alone.measurements)[one]
    assert found["losses"] == pytest.approx(done[one]["losses"], abs=2e-5)
    assert found != done[replace(one, moments=OUTPUTS)] != done[replace(one, moments="")]


def test_budgets_are_kept_and_policies_are_those_asked_for(places: Places) -> None:
    results, done = places.runs(), read_measurements(places.measurements)
    whole = done[measurement(results, 0, "")]["parameters"]
    for size in SIZES:
        for policy in experiments.POLICIES:
            found = done[measurement(results, 0, sized(policy, size))]
            assert 0.8 * size * whole < found["parameters"] <= size * whole
            assert found["plan"].startswith(f"{policy}=")


def test_routes_give_the_same_answers(places: Places) -> None:
    results, done = places.runs(), read_measurements(places.measurements)
    for route in ("randomized", "qr"):
        found = findings.routes(results, done, route)
        assert set(found) == set(BELOW)
        assert all(one.differing == 0 and one.largest < 1e-3 for one in found.values())


def test_the_command_writes_page_and_figures(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import packaged

    monkeypatch.setattr(packaged, "minilm", lambda: places.model)
    monkeypatch.setattr(command, "PAGE", tmp_path / "README.md")
    folders = ["--in-squeeze", str(places.in_squeeze), "--out", str(places.own), "--results", str(places.results)]
    monkeypatch.setattr(sys, "argv", ["", *folders])
    command.PAGE.write_text(PAGE, encoding="utf-8")
    command.main()
    text = command.PAGE.read_text(encoding="utf-8")
    assert text.startswith("# Title\n")
    assert text.endswith("\nend\n")
    assert "\nold\n" not in text
    assert "Not measured yet" not in text
    assert text.count("\n## ") == 9
    assert {path.stem for path in tmp_path.glob("*.png")} == set(FIGURES)
    assert all(f"({name}.png)" in text for name in FIGURES)
    results, done = places.runs(), read_measurements(places.measurements)
    values = [
        done[measurement(results, seed, "fixed=8")]["accuracy"]
        - results[Run("direct", 8, best_rate(results, 8), seed).key]["test"]
        for seed in SEEDS
    ]
    line = next(line for line in text.splitlines() if line.startswith("| 8 | "))
    assert line.split(" | ")[5].startswith(f"{100 * sum(values) / 2:+.1f} ± ")
    command.main()
    assert command.PAGE.read_text(encoding="utf-8") == text


def test_of_missing_measurements_the_page_says_so(places: Places) -> None:
    results, done = places.runs(), read_measurements(places.measurements)
    some = {one: result for one, result in done.items() if one.seed == 0 and not one.moments and one.task == TREC}
    text = page.written(PAGE, results, some)
    assert f"{sum(one.seed == 1 for one in done)} of seed 1" in text
    assert "## Calibration" not in text
    assert "(1 seed)" in text
    assert page.written(PAGE, results, {}).count("\n## ") == 3  # claims and setting, and what the benchmark knows


def test_without_the_benchmark_the_command_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import packaged

    monkeypatch.setattr(packaged, "minilm", lambda: "model")
    monkeypatch.setattr(sys, "argv", ["", "--in-squeeze", str(tmp_path), "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="make bench-in-squeeze"):
        command.main()


def test_runs_that_were_made_anew_are_not_mixed_with_the_old(places: Places, tmp_path: Path) -> None:
    mine, path = replace(places, in_squeeze=tmp_path), tmp_path / "runs.jsonl"
    kept = places.kept_runs.read_text(encoding="utf-8")
    first = json.loads(kept.splitlines()[0])
    cost = {"run": asdict(Run("cost", 64, 0.001)), "result": {"peak_mib": 1.0}}
    path.write_text(f"{json.dumps(first)}\n{json.dumps(cost)}\n", encoding="utf-8")
    keep_runs(mine)
    assert places.kept_runs.read_text(encoding="utf-8") == kept
    first["result"]["test"] += 0.01
    path.write_text(json.dumps(first), encoding="utf-8")
    with pytest.raises(ValueError, match="trained anew"):
        keep_runs(mine)
    assert places.kept_runs.read_text(encoding="utf-8") == kept


def test_gains_are_judged_where_direct_training_has_a_rate_of_its_own() -> None:
    up, noise = Mean((0.1, 0.1001)), Mean((0.1, -0.1))
    assert set(findings.tuned({(64, 8): noise, (64, 2): up, (64, 1): noise})) == {(64, 8), (64, 1)}


def test_fewer_seeds_than_planned_are_named() -> None:
    assert points(Mean((0.01,))) == "+1.0 (1 seed)"
    assert points(Mean((0.01, 0.02))) == "+1.5 ± 0.5 (2 seeds)"
    assert points(Mean((0.01, 0.02, 0.03))) == "+2.0 ± 0.6"


@pytest.mark.parametrize(
    ("values", "sign"),
    [((0.02, 0.021, 0.019), 1), ((-0.02, -0.021, -0.019), -1), ((0.02, 0.05, -0.01), 0), ((0.9,), 0)],
)
def test_what_noise_could_explain_is_no_difference(values: tuple[float, ...], sign: int) -> None:
    assert Mean(values).sign == sign


def test_verdicts_need_every_comparison() -> None:
    up, down, noise, alone = Mean((0.1, 0.1001)), Mean((-0.1, -0.1001)), Mean((0.1, -0.1)), Mean((0.1,))
    assert verdict([up, up]) == "confirmed"
    assert verdict([up, noise]) == "in part"
    assert verdict([up, down]) == "not confirmed"
    assert verdict([noise]) == "within noise"
    assert verdict([alone]) == "one seed"
    assert verdict([down], better=-1) == "confirmed"


@pytest.mark.parametrize(
    ("found", "said"), [(-0.9, "confirmed"), (-0.5, "within noise"), (0.7, "within noise"), (0.9, "not confirmed")]
)
def test_a_correlation_over_six_tasks_needs_to_be_strong(found: float, said: str) -> None:
    assert correlated(found) == said


def test_rank_correlation_lets_ties_share_their_places() -> None:
    assert findings.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert findings.rank_correlation([1, 1, 2], [3, 3, 1]) == pytest.approx(-1)


def test_a_measurement_survives_its_line() -> None:
    one = Measurement("trec-6", 64, 0.001, 2, "params@0.25", moments=OUTPUTS)
    assert Measurement(**json.loads(json.dumps(asdict(one)))) == one
