"""``fggm sequence`` on a small model: runs, resumes and reports."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from models import byte_tokenizer, text_model
from typer.testing import CliRunner

from fggm_peft.cli import app
from fggm_peft.continual.run import run_stream, runs_of
from fggm_peft.continual.stream import StreamError, read_stream

METHODS = ["fggm", "sft", "frozen", "multitask", {"name": "lora", "label": "lora-r2", "r": 2}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two tasks in TRACE's format, and general text."""
    folder = tmp_path_factory.mktemp("stream")
    byte_tokenizer().save_pretrained(folder / "model")
    text_model().save_pretrained(folder / "model")
    for name, answer in (("plus", lambda n: str(n + 1)), ("minus", lambda n: str(n - 1))):
        (folder / name).mkdir()
        rows = [{"prompt": f"{n} {name} one is ", "answer": answer(n)} for n in range(10, 26)]
        for split in ("train", "eval", "test"):
            (folder / name / f"{split}.json").write_text(json.dumps(rows[: 4 if split == "test" else 16]))
    (folder / "general.txt").write_text("A text about nothing.\n\nAnd another one.\n")
    return folder


def settings(folder, **fields):
    defaults = {
        "model": str(folder / "model"),
        "methods": METHODS,
        "tasks": [
            {"name": name, "path": str(folder / name), "metric": "edit_similarity", "max_answer_length": 4}
            for name in ("plus", "minus")
        ],
        "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01},
        "general": {"text": str(folder / "general.txt")},
    }
    return {**defaults, **fields}


def without_times(result: dict) -> dict:
    measured = ("selection_seconds", "training_seconds", "evaluation_seconds", "peak_memory")
    costs = {name: value for name, value in result["cost"].items() if name not in measured}
    return {**result, "cost": costs}


def test_every_method_leaves_its_matrix_measures_and_costs(folder, tmp_path):
    results = {result["label"]: result for result in run_stream(read_stream(settings(folder)), tmp_path)}
    assert set(results) == {"fggm", "sft", "frozen", "multitask", "lora-r2"}
    for label, result in results.items():
        rows = result["R"]
        assert len(rows) == (1 if label == "multitask" else 2)
        assert all(0 <= score <= 1 for score in rows[-1]) and len(rows[-1]) == 2
        assert result["op"] == pytest.approx(sum(rows[-1]) / 2)
    frozen = results["frozen"]
    assert frozen["R"] == [frozen["zero_shot"]] * 2 and frozen["bwt"] == 0 and frozen["general"]["change"] == 0
    assert frozen["cost"]["parameters"] == 0
    for label in ("fggm", "sft", "lora-r2"):
        result = results[label]
        assert result["bwt"] == pytest.approx(result["R"][1][0] - result["R"][0][0])
        assert result["fwt"] == pytest.approx(result["R"][0][1] - result["zero_shot"][1])
        assert result["general"]["change"] != 0 and result["cost"]["training_seconds"] > 0
    assert results["fggm"]["cost"]["selection_seconds"] > 0 == results["sft"]["cost"]["selection_seconds"]
    assert results["fggm"]["cost"]["bytes"] > 0 and results["fggm"]["cost"]["parameters"] > 0
    assert results["multitask"]["bwt"] is None
    delta = next(tmp_path.glob("runs/fggm/*/tasks/0-plus"))
    assert (delta / "adapter_model.safetensors").exists()


class Killed(BaseException):
    """Not an Exception, as SIGKILL is not: nothing may catch it and tidy up."""


@pytest.mark.parametrize("method", ["fggm", "sft", "ewc", "replay", {"name": "o_lora", "r": 2}])
@pytest.mark.parametrize("checkpoint_steps", [None, 1])
def test_a_run_that_is_killed_within_its_second_task_ends_in_the_same_numbers(
    method, checkpoint_steps, folder, tmp_path, monkeypatch
):
    stream = read_stream(settings(folder, methods=[method]))
    (expected,) = run_stream(stream, tmp_path / "whole", checkpoint_steps=checkpoint_steps)

    optimizer_step, steps = torch.optim.AdamW.step, []

    def die_at_the_fifth(self, *arguments, **options):
        steps.append(None)
        if len(steps) == 5:
            raise Killed
        return optimizer_step(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", die_at_the_fifth)
        with pytest.raises(Killed):
            list(run_stream(stream, tmp_path / "parts", checkpoint_steps=checkpoint_steps))
    with pytest.raises(StreamError, match="--resume"):
        list(run_stream(stream, tmp_path / "parts"))
    (result,) = run_stream(stream, tmp_path / "parts", resume=True, checkpoint_steps=checkpoint_steps)
    assert without_times(result) == without_times(expected)


def test_finished_runs_are_read_and_another_stream_is_refused(folder, tmp_path):
    stream = read_stream(settings(folder, methods=["frozen"]))
    (first,) = run_stream(stream, tmp_path)
    more = read_stream(settings(folder, methods=["frozen"], seeds=[0, 1]))
    assert [run.seed for run in runs_of(more)] == [0, 1]
    again = list(run_stream(more, tmp_path, resume=True))
    assert again[0] == first and again[1]["seed"] == 1
    other = read_stream(settings(folder, methods=["frozen"], training={"max_steps": 4}))
    with pytest.raises(StreamError, match=r"another stream: training"):
        list(run_stream(other, tmp_path, resume=True))


def test_an_unknown_option_of_a_method_is_known_before_the_first_step(folder, tmp_path):
    stream = read_stream(settings(folder, methods=[{"name": "replay", "label": "r", "share": 0.5}]))
    with pytest.raises(StreamError, match=r"methods: r: .*no option 'share'; known are fraction"):
        list(run_stream(stream, tmp_path))
    assert not tmp_path.joinpath("stream.json").exists()


def test_the_command_writes_both_reports_and_prints_the_summary(folder, tmp_path):
    file = tmp_path / "stream.json"
    file.write_text(json.dumps(settings(folder, methods=["fggm", "frozen"])))
    command = ["sequence", str(file), "--output", str(tmp_path / "out"), "--seeds", "0,1"]
    result = CliRunner().invoke(app.build(), [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["label"] for entry in report["summary"]] == ["fggm", "frozen"]
    for entry in report["summary"]:
        scores = [run["op"] for run in report["runs"] if run["label"] == entry["label"]]
        assert entry["runs"] == entry["op"]["n"] == 2 and entry["op"]["mean"] == pytest.approx(sum(scores) / 2)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| fggm |" in page and "BWT_T = " in page
    refused = CliRunner().invoke(app.build(), command)
    assert refused.exit_code == 1 and "--resume" in refused.stderr
    shutil.rmtree(tmp_path / "out")
