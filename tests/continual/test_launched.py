"""Two launched processes compute the runs of a stream together, like one process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import ACCELERATE, output_of, start
from streams import killed_at_the_fifth_step, settings, without_times, write_stream

from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream
from fggm_peft.continual.settings import StreamError

pytestmark = pytest.mark.distributed

FGGM = {"name": "fggm", "criterion": "gain_per_harm", "reference": ["history"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("stream"))


def run(folder: Path, output: Path, method="fggm", resume: bool = False, batch_size: int = 4) -> dict:
    training = {"max_steps": 3, "batch_size": batch_size, "learning_rate": 0.01}
    (result,) = run_stream(read_stream(settings(folder, methods=[method], training=training)), output, resume)
    return without_times(result)


def files(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["frozen", "sft", FGGM], ids=lambda m: m if isinstance(m, str) else m["name"])
def test_two_processes_write_the_results_of_one(method, folder, tmp_path, processes):
    alone = run(folder, tmp_path / "one", method)
    first, second = processes(run, folder, tmp_path / "two", method)
    assert first == second and files(tmp_path / "two") == files(tmp_path / "one")
    if method == "frozen":
        assert first == alone
    assert first.keys() == alone.keys() and first["cost"]["parameters"] == alone["cost"]["parameters"]
    assert first["general_losses"] == pytest.approx(alone["general_losses"], abs=1e-3)


def run_in_parts(folder: Path, output: Path) -> dict:
    with killed_at_the_fifth_step():
        run(folder, output, FGGM)
    return run(folder, output, FGGM, resume=True)


def test_a_run_that_was_killed_on_both_processes_resumes_to_identical_results(folder, tmp_path, processes):
    assert processes(run, folder, tmp_path / "whole", FGGM) == processes(run_in_parts, folder, tmp_path / "parts")


def test_a_batch_that_the_processes_cannot_share_is_an_error(folder, tmp_path, processes):
    for failure in processes.outcomes(run, folder, tmp_path, "sft", False, 3):
        assert failure.type == StreamError.__name__
        assert failure.message == "training.batch_size: 3 is not divisible by 2 processes"


def test_the_command_runs_under_accelerate_launch(folder, tmp_path):
    (tmp_path / "stream.json").write_text(json.dumps(settings(folder, methods=["fggm"])))
    (tmp_path / "run.py").write_text("from fggm_peft.cli import main\n\nmain()\n")
    command = ["run.py", "sequence", "stream.json", "--output", "out", "--json"]
    output = output_of(start(*ACCELERATE, *command, cwd=tmp_path, stderr=subprocess.PIPE))
    assert json.loads(output) == json.loads((tmp_path / "out" / "report.json").read_text())
