"""The table that shows the results of a stream while they arrive."""

from __future__ import annotations

import io
import json
import sys

from rich.console import Console
from streams import settings, write_stream

from fggm_peft.continual.live import LiveTable
from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream, runs_of


def text_of(table: LiveTable) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table.table())
    return console.file.getvalue()


def entry(task, scores, loss, seconds=60.0):
    return {
        "task": task,
        "scores": scores,
        "general_loss": loss,
        "training_seconds": seconds,
        "evaluation_seconds": 0.0,
    }


def test_cells_have_the_score_after_learning_and_the_score_now(tmp_path):
    stream = read_stream(settings(write_stream(tmp_path), methods=["sft", "multitask"]))
    first, second = runs_of(stream)
    output = tmp_path / "runs"
    shown = LiveTable([first, second], output)
    assert "4 tasks left" in text_of(shown) and "→" not in text_of(shown)
    base = {"task": None, "scores": {"plus": 0.0, "minus": 0.0}, "general_loss": 2.0, "evaluation_seconds": 1.0}
    tasks = output / "runs" / first.name / "tasks.json"
    tasks.parent.mkdir(parents=True)
    tasks.write_text(json.dumps([base, entry("plus", {"plus": 0.75, "minus": 0.5}, 2.25)]))
    text = text_of(shown)
    assert "0.75" in text and "0.50" not in text and "+0.25" in text and "3 tasks left, about 3 min" in text
    learned = [
        base,
        entry("plus", {"plus": 0.75, "minus": 0.5}, 2.25),
        entry("minus", {"plus": 0.25, "minus": 1.0}, 1.5),
    ]
    tasks.write_text(json.dumps(learned))
    other = output / "runs" / second.name / "tasks.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps([base, entry("all", {"plus": 0.6, "minus": 0.7}, 2.0)]))
    text = text_of(shown)
    assert all(cell in text for cell in ("0.75 → 0.25", "1.00", "\u22120.50", "0.60", "0.70", "+0.00", "0 tasks left"))


def test_rows_name_what_distinguishes_the_runs(tmp_path):
    fields = settings(write_stream(tmp_path), methods=["sft"], learning_rates=[1e-3, 1e-2], seeds=[0, 1])
    text = text_of(LiveTable(runs_of(read_stream(fields)), tmp_path))
    assert all(f"sft, rate {rate}, seed {seed}" in text for rate in ("0.001", "0.01") for seed in (0, 1))


def test_a_terminal_shows_the_table_and_a_file_does_not(tmp_path, monkeypatch):
    stream = read_stream(settings(write_stream(tmp_path), methods=["frozen"]))
    for is_terminal in (False, True):
        stderr = io.StringIO()
        stderr.isatty = lambda is_terminal=is_terminal: is_terminal
        monkeypatch.setattr(sys, "stderr", stderr)
        assert len(list(run_stream(stream, tmp_path / f"runs-{is_terminal}"))) == 1
        assert ("general text" in stderr.getvalue()) == is_terminal
