"""The GPU check runs on a CPU with tiny shapes, and loses nothing if a part fails, hangs or is interrupted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from common import RESULTS
from gpu import page, parts, run, store


@pytest.mark.parametrize("name", [name for name in run.SHARES if name != "tests"])
def test_every_part_measures_without_a_failure_on_a_cpu(name, tmp_path, monkeypatch):
    monkeypatch.setattr("suite.timing.LEAST_ROUNDS", 1)
    results = store.Store(tmp_path / "cpu.json", name)
    parts.PARTS[name](results)
    part = store.read(results.path)["parts"][name]
    assert part["results"] and not part["failures"] and page.summary(name, part).endswith(" 0 failures")
    assert f"## {name}" in page.text({"machine": MACHINE, "parts": {name: part}})


def test_the_parts_and_their_shares_have_the_same_order():
    assert list(parts.PARTS) == list(run.SHARES) and sum(run.SHARES.values()) == 100


@pytest.mark.slow
def test_one_command_runs_all_parts_on_a_cpu(tmp_path):
    script = Path(run.__file__)
    subprocess.run([sys.executable, str(script), "--minutes", "60", "--output", str(tmp_path)], check=True)
    contents = store.read(tmp_path / "cpu.json")
    for name, part in contents["parts"].items():
        assert part["status"] == "finished" and page.summary(name, part).endswith(" 0 failures")
    assert (tmp_path / "cpu.md").read_text() == page.text(contents)


def test_the_page_in_the_repository_matches_its_results():
    pages = [path for path in (RESULTS / "gpu").glob("*.md") if path.name != "README.md"]
    assert pages and all(path.read_text() == page.text(store.read(path.with_suffix(".json"))) for path in pages)


# The store ----------------------------------------------------------------------------------------

MACHINE = {"date": "2026-01-01", "cpu": "a CPU", "cuda": None, "threads": 1, "clock": "wall time", "versions": {}}


def test_results_and_failures_are_written_at_once_and_measured_once(tmp_path):
    results, calls = store.Store(tmp_path / "x.json", "step"), []

    def fails():
        raise ValueError("a reason")

    for _ in range(2):
        results.measure("good", lambda: calls.append(1) or {"figure": 2.0})
        results.measure("bad", fails)
    part = store.read(results.path)["parts"]["step"]
    assert len(calls) == 1 and part["results"]["good"]["figure"] == 2.0 and "a reason" in part["failures"]["bad"]
    text = page.text({"machine": MACHINE, "parts": {"step": part}})
    assert "| step | interrupted | 0 | 1 | 1 |" in text and "ValueError: a reason" in text


def test_an_error_of_the_device_ends_the_process_of_the_part(tmp_path):
    results = store.Store(tmp_path / "x.json", "step")

    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError):
        results.measure("bad", fails)
    assert results.known() == {"bad"}


def test_the_result_of_every_test_is_recorded(tmp_path):
    results = store.Store(tmp_path / "x.json", "tests")
    recorder = parts.Recorder(results)
    for when, outcome in (("setup", "passed"), ("call", "passed"), ("call", "failed"), ("setup", "skipped")):
        flags = {"failed": outcome == "failed", "skipped": outcome == "skipped"}
        report = SimpleNamespace(nodeid=f"{when} {outcome}", when=when, outcome=outcome, duration=1.0, longrepr="why")
        recorder.pytest_runtest_logreport(SimpleNamespace(**vars(report), **flags))
    part = store.read(results.path)["parts"]["tests"]
    assert list(part["results"]) == ["call passed", "setup skipped"] and part["failures"] == {"call failed": "why"}


# Time limits and crashes --------------------------------------------------------------------------

STAND_IN = """
import json, sys, time
from pathlib import Path
part, file = sys.argv[2], Path(sys.argv[4])
contents = json.loads(file.read_text())
results = contents["parts"].setdefault(part, {"results": {}, "failures": {}})["results"]
number = len(results)
if part == "step" and number == 2:
    sys.exit("no progress")
results[f"measurement {number}"] = {"took": 1.0}
file.write_text(json.dumps(contents))
if part == "tests":
    time.sleep(600)
sys.exit("crashed" if part == "step" else 0)
"""


def test_a_part_that_hangs_or_crashes_keeps_its_results_and_the_next_part_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(run, "SCRIPT", tmp_path / "stand_in.py")
    monkeypatch.setattr(run, "STARTING", 0)
    file = tmp_path / "cpu.json"
    run.run(["tests", "step", "selection"], file, minutes=0.3)
    found = store.read(file)["parts"]
    assert found["tests"]["status"].startswith("stopped after") and list(found["tests"]["results"]) == ["measurement 0"]
    assert found["step"]["status"] == "failed" and "no progress" in found["step"]["error"]
    assert len(found["step"]["results"]) == 2  # it was started again while it made progress
    assert found["selection"]["status"] == "finished"
    assert "step: failed, 2 results, 0 failures" in capsys.readouterr().out


def test_without_time_a_part_is_not_started(tmp_path):
    run.run(["merge"], tmp_path / "cpu.json", minutes=0.0)
    assert store.read(tmp_path / "cpu.json")["parts"]["merge"]["status"] == "no time left"
