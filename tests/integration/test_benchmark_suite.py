"""The benchmark suite runs on a tiny model, writes its page, and detects regressions."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import regression
from common import RESULTS
from suite import cases, measurements, timing
from suite.__main__ import PAGE, run
from suite.bases import make_base
from suite.goals import GOALS, verdicts
from suite.measurements import MEASUREMENTS, measure
from suite.methods import ADAPTERS, CANNOT_UNMERGE, CONTIGUOUS, METHODS, methods_for, targeted_values, trainable
from suite.report import BEGIN, goals_table, missed_text, page_text, write_page

TINY = cases.Setting(hidden=64, layers=1, vocabulary=50, length=8, batch=2)
MACHINE = {
    "date": "2026-01-01",
    "cpu": "a CPU",
    "cuda": None,
    "threads": 2,
    "clock": "wall time",
    "versions": {},
}


def table(floor: str, noise: float = 1.0, setting: cases.Setting = TINY, **rows: dict[str, float]) -> dict:
    return {
        "floor": floor,
        "noise": noise,
        "setting": setting.as_figures(),
        "rows": {floor: {"ratio_min": 1.0}, **rows},
    }


def merging(rows: float, elements: float) -> dict:
    ratios = {"LoRA": 1.0, "FGGM rows": rows, "FGGM elements": elements}
    figures = {name: {"ratio_min": value} for name, value in ratios.items()}
    return {"merge and unmerge: a setting": {**table("LoRA"), "rows": figures}}


def verdict(results: dict, goal: str):
    return next(verdict for verdict in verdicts(results) if verdict.goal.what == goal)


# Measuring --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """Measure one round."""
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "frozen"])
def test_all_methods_have_about_equally_many_trainable_values_and_do_not_change_the_base(name):
    base = make_base(64, 1, 50, "float32")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    entries = targeted_values(base)
    model = METHODS[name](base, entries // 5)
    expected = entries if name.startswith("full") else entries // 5
    assert trainable(model) == pytest.approx(expected, rel=0.1)
    measurements.Step(model, measurements.batch_of(TINY))()
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_time_and_memory_of_a_step_are_measured_for_every_method():
    (result,) = measure(cases.Case("training step", TINY), 0).values()
    assert list(result["rows"]) == methods_for("float32", TINY.parameters) == list(METHODS)
    assert not result["failed"]
    for row in result["rows"].values():
        assert 0 < row["held_mib"] < row["peak_mib"] and row["seconds"] > 0 and row["ratio_min"] > 0
    assert result["rows"]["full"]["held_mib"] > result["rows"]["FGGM rows"]["held_mib"]


def test_a_method_that_fails_does_not_prevent_the_measurement_of_the_others(monkeypatch):
    monkeypatch.setitem(METHODS, "LoRA", lambda base, values: base.missing)
    (result,) = measure(cases.Case("decoding", TINY), 0).values()
    assert "FGGM rows" in result["rows"] and "LoRA" not in result["rows"]
    assert "AttributeError" in result["failed"]["LoRA"] and list(result["failed"]) == ["LoRA"]


def test_a_step_with_gradient_checkpointing_takes_less_memory():
    setting = cases.Setting(**{**vars(TINY), "length": 64, "layers": 4})
    peaks = []
    for checkpointing in (False, True):
        case = cases.Case("training step", replace(setting, checkpointing=checkpointing))
        ((key, result),) = measure(case, 0).items()
        assert not result["failed"] and key.endswith("checkpointing") == checkpointing
        peaks.append(result["rows"]["FGGM rows"]["peak_mib"])
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_step_on_a_quantized_base_is_measured_for_the_methods_that_support_it(base):
    pytest.importorskip("bitsandbytes")
    setting = cases.Setting(**{**vars(TINY), "base": base})
    (result,) = measure(cases.Case("training step", setting), 0).values()
    assert {"LoRA", "FGGM rows", "FGGM elements"} <= set(result["rows"]) and "full" not in result["rows"]


def test_decoding_is_measured_with_unmerged_adapters():
    (result,) = measure(cases.Case("decoding", TINY), 0).values()
    assert list(result["rows"]) == ["frozen", *ADAPTERS]


def test_the_selection_pass_is_measured_against_its_peers():
    (result,) = measure(cases.Case("selection pass", cases.Setting(**{**vars(TINY), "peers": True})), 0).values()
    assert {"frozen", "rows, exact", "elements, exact", "naive one-sample loop"} <= set(result["rows"])
    assert sum(bool(verdict.ratios) for verdict in verdicts({"selection pass: tiny": result})) >= 4


def test_the_cost_of_harm_decay_is_measured():
    tables = {key.partition(": ")[0]: table for key, table in measure(cases.Case("harm decay", TINY), 0).items()}
    assert set(tables) == {"step with harm decay", "statistics of harm decay", "selection under decay"}
    assert 0 < tables["statistics of harm decay"]["rows"]["statistics"]["share_of_base"] < 1
    assert {"rows, Fisher", "columns, gain under decay"} < set(tables["selection under decay"]["rows"])


def test_every_operation_on_an_adapter_is_measured_separately():
    tables = {key.partition(": ")[0]: table for key, table in measure(cases.Case("adapter", TINY), 0).items()}
    assert set(tables) == {"save", "load", "merge", "merge and unmerge", "switch", "file"}
    for name, each in tables.items():
        bound = {CONTIGUOUS} if name in ("merge", "merge and unmerge", "switch") else set()
        assert set(each["rows"]) == set(ADAPTERS) - set(CANNOT_UNMERGE) | bound
    assert tables["file"]["rows"]["FGGM elements"]["over_bound"] >= 1


def test_results_are_written_after_every_case(tmp_path, monkeypatch):
    output, seen = tmp_path / "suite.json", []

    def fake(case, seconds):
        seen.append(json.loads(output.read_text())["results"] if output.exists() else {})
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {f"merge: {case.setting.text()}": merging(0.1, 0.1)["merge and unmerge: a setting"]}

    monkeypatch.setattr("suite.__main__.measure", fake)
    with pytest.raises(KeyboardInterrupt):
        run([cases.Case("adapter", TINY)] * 2, 0, output)
    assert list(json.loads(output.read_text())["results"]) == [f"merge: {TINY.text()}"]


def test_an_import_is_timed_in_a_separate_process():
    assert 0 < measurements.import_seconds("fractions") < 60
    assert "antigravity" not in sys.modules


def test_the_cases_cover_all_measurements_without_duplicates():
    for listed in (cases.quick(), cases.full()):
        assert {case.measurement for case in listed} == set(MEASUREMENTS)
        assert len({case.key for case in listed}) == len(listed)


def test_a_setting_counts_the_parameters_of_its_model():
    for setting in (TINY, cases.SMALL):
        base = make_base(setting.hidden, setting.layers, setting.vocabulary, "float32")
        counted = sum(parameter.numel() for parameter in base.parameters() if parameter.dim() > 1)
        assert setting.parameters == counted


# The page ---------------------------------------------------------------------------------------


def test_the_page_shows_met_goals_and_missed_goals_with_their_reason():
    results = merging(rows=0.2, elements=0.2)
    missed, met = verdict(results, "merge and unmerge, rows"), verdict(results, "merge and unmerge, elements")
    assert not missed.met and met.met
    assert goals_table([missed]).endswith("| ≤ 0.1× | 0.20 | **missed** |")
    assert goals_table([met]).endswith("| ≤ 0.25× | 0.20 | met |")
    text = missed_text([missed, met])
    assert "missed in 1 of 1 cases, at worst 0.20 (a setting)" in text and missed.goal.reason in text
    assert met.goal.what not in text


def test_the_worst_case_decides_about_a_goal_and_the_range_is_shown():
    results = merging(0.05, 0.1) | {"merge and unmerge: other": merging(0.3, 0.1)["merge and unmerge: a setting"]}
    missed = verdict(results, "merge and unmerge, rows")
    assert not missed.met and "0.05 – 0.30 | **missed**" in goals_table([missed])
    assert "missed in 1 of 2 cases" in missed_text([missed])


def test_a_goal_without_measurements_is_neither_met_nor_missed():
    unmeasured = verdicts({})
    assert len(unmeasured) == len(GOALS) and not any(verdict.met for verdict in unmeasured)
    assert goals_table(unmeasured).count("not measured") == len(GOALS) and missed_text(unmeasured) == "None."


def test_a_goal_applies_only_to_its_settings():
    rows = {"frozen": {"ratio_min": 1.0}, "rows, exact": {"ratio_min": 3.0}}
    short, long = (cases.Setting(hidden=64, layers=1, length=length) for length in (16, 512))
    for setting, count in ((short, 1), (long, 0)):
        results = {"selection pass: x": {**table("frozen", setting=setting), "rows": rows}}
        assert len(verdict(results, "selection pass, rows, exact, T ≤ 0.3 × hidden").ratios) == count


def test_results_and_chart_are_written_between_the_markers_of_the_page(tmp_path):
    step = table("frozen", **{"FGGM rows": {"ratio_min": 1.2, "peak_mib_ratio": 1.1}, "LoRA": {"ratio_min": 1.5}})
    page = tmp_path / "benchmarks.md"
    page.write_text(f"head\n{BEGIN}\nold\n<!-- end -->\ntail\n")
    contents = {"machine": MACHINE, "results": {f"training step: {TINY.text()}": step}}
    for _ in range(2):
        write_page(contents, page)
    text = page.read_text()
    assert text.startswith("head\n") and text.endswith("\ntail\n") and "old" not in text and text.count(BEGIN) == 1
    assert "| 1.20 / 1.10 | 1.50 |" in text and (tmp_path / "benchmarks.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no mark"):
        page.write_text("nothing")
        write_page(contents, page)


def test_the_page_in_the_docs_matches_the_stored_results():
    contents = json.loads((RESULTS / "suite.json").read_text())
    assert page_text(contents, "benchmarks.png") in PAGE.read_text()


# The check --------------------------------------------------------------------------------------

BEFORE = {"training step: a": table("frozen", 1.02, LoRA={"ratio_min": 1.5, "peak_mib_ratio": 1.2})}


def after(**figures: float) -> dict:
    results = deepcopy(BEFORE)
    results["training step: a"]["rows"]["LoRA"] |= figures
    return results


def test_equal_figures_are_no_regression():
    assert regression.compare(BEFORE, BEFORE) == (0, ["2 ratios compared, 0 worse"])


def test_a_time_is_a_regression_beyond_the_tolerance_and_the_noise_of_both_runs():
    assert regression.compare(BEFORE, after(ratio_min=1.5 * 1.08))[0] == 0
    status, lines = regression.compare(BEFORE, after(ratio_min=1.5 * 1.10))
    assert status == 1 and lines[0].startswith("worse: training step: a: LoRA, ratio_min: 1.500 -> 1.650 (+10.0%")
    assert regression.compare(BEFORE, after(ratio_min=0.5))[0] == 0


def test_memory_is_a_regression_beyond_its_own_tolerance_regardless_of_noise():
    assert regression.compare(BEFORE, after(peak_mib_ratio=1.2 * 1.01))[0] == 0
    assert regression.compare(BEFORE, after(peak_mib_ratio=1.2 * 1.03))[0] == 1


def test_absolute_seconds_are_not_compared():
    slow = after()
    for row in slow["training step: a"]["rows"].values():
        row["seconds"] = 1000.0
    assert regression.compare(BEFORE, slow)[0] == 0


def test_missing_and_new_figures_are_listed_and_no_common_figures_is_an_error():
    other = after()
    other["training step: a"]["rows"]["SHiRA"] = {"ratio_min": 2.0}
    assert "new: training step: a: SHiRA" in regression.compare(BEFORE, other)[1]
    assert "not measured any more: training step: a: SHiRA" in regression.compare(other, BEFORE)[1]
    assert regression.compare(BEFORE, {})[0] == 2


def test_the_exit_code_of_the_check_reports_a_regression(tmp_path, monkeypatch, capsys):
    for name, results in (("old", BEFORE), ("new", after(ratio_min=3.0))):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": MACHINE, "results": results}))
    monkeypatch.setattr(sys, "argv", ["regression.py", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert regression.main() == 1
    assert "1 worse" in capsys.readouterr().out
