"""What ``fggm sequence`` says before it starts."""

from __future__ import annotations

import json

import pytest
import torch
from streams import settings, write_stream
from typer.testing import CliRunner

from fggm_peft.cli import app
from fggm_peft.continual.plan import duration, plan_of
from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("stream"))


def test_the_plan_counts_what_is_not_finished(folder, tmp_path):
    stream = read_stream(settings(folder, methods=["sft", "frozen", "multitask", "replay"], seeds=[0, 1]))
    plan = plan_of(stream, tmp_path)
    # three steps for each of two tasks, or once for both together
    assert (plan.runs, plan.pending, plan.steps) == (8, 8, 2 * (6 + 0 + 3 + 6)) and plan.seconds > 0
    list(run_stream(read_stream(settings(folder, methods=["sft", "frozen"])), tmp_path))
    assert plan_of(stream, tmp_path).pending == 6
    finished = read_stream(settings(folder, methods=["frozen"]))
    assert plan_of(finished, tmp_path).to_dict() == {"runs": 1, "pending": 0, "steps": 0, "seconds": 0.0}


def test_the_plan_counts_the_steps_that_are_taken(folder, tmp_path):
    training = {"epochs": 1.5, "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 0.01}
    stream = read_stream(settings(folder, methods=["sft"], training=training))
    steps = []
    optimizer_step = torch.optim.AdamW.step

    def counted(self, *arguments, **options):
        steps.append(None)
        return optimizer_step(self, *arguments, **options)

    planned = plan_of(stream, tmp_path).steps
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", counted)
        list(run_stream(stream, tmp_path))
    assert len(steps) == planned == 6


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (61, "61 s"), (100, "2 min"), (5399, "90 min"), (7900, "2 h 12 min")]
)
def test_durations_are_rounded_as_far_as_an_estimate_is_worth(seconds, text):
    assert duration(seconds) in (text, text.replace("90 min", "1 h 30 min"))


def test_the_command_only_plans_when_it_is_asked_to(folder, tmp_path):
    file = tmp_path / "stream.json"
    file.write_text(json.dumps(settings(folder, methods=["sft"])))
    arguments = ["sequence", str(file), "--output", str(tmp_path / "out"), "--plan", "--json"]
    result = CliRunner().invoke(app.build(), arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 6
    assert not (tmp_path / "out").exists()
