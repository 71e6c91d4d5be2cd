"""``fggm sequence`` on a small model: runs, resumes and reports."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from models import byte_tokenizer, text_model
from typer.testing import CliRunner

from fggm_peft.cli import app
from fggm_peft.continual.gate import Gate
from fggm_peft.continual.methods import FGGM
from fggm_peft.continual.plan import duration, plan_of
from fggm_peft.continual.run import run_stream, runs_of
from fggm_peft.continual.runner import Runner, learned
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


# --- several processes, kills ----------------------------------------------------------------------


def command(stream, output, *options: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from fggm_peft.cli import main; main()",
        "sequence",
        str(stream),
        "--output",
        str(output),
        *options,
    ]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_at_random_moments_ends_in_the_same_numbers(seed, folder, tmp_path):
    file = tmp_path / "stream.json"
    training = {"max_steps": 40, "batch_size": 4, "learning_rate": 0.01}
    file.write_text(json.dumps(settings(folder, methods=["fggm"], training=training, seeds=[seed])))
    (expected,) = run_stream(read_stream(file), tmp_path / "whole")
    rng, kills, code = random.Random(seed), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        process = subprocess.Popen(
            command(file, tmp_path / "parts", "--resume", "--checkpoint-steps", "5"),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        begun = tmp_path / "parts" / "runs"
        while kills < 3 and process.poll() is None and not begun.exists():
            time.sleep(0.01)  # the first imports are no moment of the run
        try:
            process.wait(rng.uniform(0.2, 3.0) if kills < 3 else 240)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        code = process.wait()
    assert code == 0, process.stderr.read().decode()[-3000:]
    assert kills > 0
    found = json.loads((tmp_path / "parts" / "report.json").read_text())["runs"]
    assert [without_times(run) for run in found] == [without_times(expected)]


def test_two_processes_in_one_folder_share_the_runs(folder, tmp_path):
    file = tmp_path / "stream.json"
    training = {"max_steps": 30, "batch_size": 4, "learning_rate": 0.01}
    file.write_text(json.dumps(settings(folder, methods=["fggm", "sft"], training=training, seeds=[0, 1, 2])))
    list(run_stream(read_stream(settings(folder, methods=["fggm", "sft"], training=training)), tmp_path / "both"))
    processes = [
        subprocess.Popen(
            command(file, tmp_path / "both", "--resume"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert sorted((run["label"], run["seed"]) for run in report["runs"]) == [
        (label, seed) for label in ("fggm", "sft") for seed in range(3)
    ]


def test_a_run_that_another_process_is_at_is_left_to_it(folder, tmp_path):
    from filelock import FileLock

    stream = read_stream(settings(folder, methods=["frozen", "sft"]))
    taken = tmp_path / "runs" / runs_of(stream)[0].name
    taken.mkdir(parents=True)
    with FileLock(taken / ".lock"):
        assert [result["label"] for result in run_stream(stream, tmp_path)] == ["sft"]


# --- plan ------------------------------------------------------------------------------------------


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


# --- gates -----------------------------------------------------------------------------------------


def falling(monkeypatch, falls) -> None:
    """Scores by a rule instead of a model: 1 for a task, but what ``falls(task, tried)`` says for the first one."""
    trained: list[str] = []
    train = Runner._trained

    def noted(self, model, method, number, lesson, attempt):
        trained.append(lesson[0])
        return train(self, model, method, number, lesson, attempt)

    def score(self, model, position):
        name, learned_last = self.tasks[position].name, trained[-1] if trained else None
        return falls(learned_last, trained.count(learned_last)) if name == self.tasks[0].name and learned_last else 1.0

    monkeypatch.setattr(Runner, "_trained", noted)
    monkeypatch.setattr(Runner, "_score", score)


def gated(folder, action: str, **fields):
    return read_stream(settings(folder, gate={"keep": {"plus": 0.9}, "action": action}, **fields))


def test_a_broken_gate_stops_the_run_with_the_task_that_broke_it(folder, tmp_path, monkeypatch):
    falling(monkeypatch, lambda last, times: 0.5 if last == "minus" else 1.0)
    three = [*settings(folder)["tasks"], {**settings(folder)["tasks"][1], "name": "again"}]
    stream = gated(folder, "stop", methods=["sft"], tasks=three)
    (result,) = run_stream(stream, tmp_path)
    assert result["tasks"] == ["plus", "minus"] and result["R"] == [[1.0, 1.0], [0.5, 1.0]]
    assert result["bwt"] == -0.5
    assert result["gate"] == [
        {"task": "minus", "density_scale": 1.0, "earlier": "plus", "score": 0.5, "needed": 0.9, "action": "stopped"}
    ]


@pytest.mark.parametrize("method", ["sft", "fggm", "ewc", {"name": "lora", "r": 2, "mode": "carried"}])
def test_a_task_that_is_rolled_back_leaves_the_model_and_the_method_to_the_bit(method, folder, tmp_path, monkeypatch):
    falling(monkeypatch, lambda last, times: 0.5 if last == "minus" else 1.0)
    states = {}
    keep = Runner._keep

    def remembered(self, model, method, ledger):
        state = {**model.state_dict(), **method.state_dict()}
        states[ledger[-1]["task"]] = {name: value.clone() for name, value in state.items()}
        keep(self, model, method, ledger)

    monkeypatch.setattr(Runner, "_keep", remembered)
    (result,) = run_stream(gated(folder, "rollback", methods=[method]), tmp_path)
    assert states["plus"].keys() == states["minus"].keys()
    assert all(torch.equal(states["minus"][name], value) for name, value in states["plus"].items())
    assert [event["action"] for event in result["gate"]] == ["taken out"] and len(result["R"]) == 2
    ledger = json.loads(next(tmp_path.rglob("ledger.json")).read_text())
    assert ledger[2]["parameters"] == ledger[2]["bytes"] == 0 and ledger[2]["seconds"] > 0


def test_a_broken_gate_shrinks_the_density_until_it_holds(folder, tmp_path, monkeypatch):
    falling(monkeypatch, lambda last, times: 1.0 if last != "minus" or times == 3 else 0.5)
    stream = gated(folder, "shrink", methods=[{"name": "fggm", "density": 0.4}])
    (result,) = run_stream(stream, tmp_path)
    assert [(event["density_scale"], event["action"]) for event in result["gate"]] == [
        (1.0, "kept at a lower density"),
        (0.5, "kept at a lower density"),
    ]
    densities = [
        json.loads((task / "adapter_config.json").read_text())["density"]
        for task in sorted(tmp_path.glob("runs/fggm/*/tasks/*"))
    ]
    assert densities == pytest.approx([0.4, 0.1])


def test_a_task_that_no_density_helps_is_taken_out(folder, tmp_path, monkeypatch):
    falling(monkeypatch, lambda last, times: 0.5 if last == "minus" else 1.0)
    gate = {"keep": {"*": 0.9}, "action": "shrink", "shrinks": 2}
    (result,) = run_stream(read_stream(settings(folder, gate=gate, methods=["fggm"])), tmp_path)
    assert [(event["density_scale"], event["action"]) for event in result["gate"]] == [
        (scale, "taken out") for scale in (1.0, 0.5, 0.25)
    ]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"keep": {}}, "gate: keep is empty"),
        ({"keep": {"plus": 1.5}}, r"gate: keep has plus: 1.5; a share is a number in \(0, 1\]"),
        ({"keep": {"plus": 0.9}, "action": "shrin"}, "gate: unknown action 'shrin'.*Did you mean 'shrink'"),
        ({"keep": {"pluss": 0.9}}, "gate: unknown task 'pluss'.*Did you mean 'plus'"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(gate, message, folder):
    with pytest.raises(StreamError, match=message):
        read_stream(settings(folder, gate=gate))


def test_only_methods_with_a_density_can_shrink_it(folder, tmp_path):
    for method in ("sft", {"name": "fggm", "threshold": {"policy": "ScoreMass", "fraction": 0.5}}):
        with pytest.raises(StreamError, match=r"gate: action 'shrink' needs a density"):
            list(run_stream(gated(folder, "shrink", methods=[method]), tmp_path))
    assert FGGM(config={"density": 0.2}).density == 0.2


def test_a_gate_looks_at_earlier_tasks_only():
    gate = Gate({"a": 0.9, "*": 0.5})
    ledger = [{"task": None, "scores": {"a": 0.0}}, {"task": "a", "scores": {"a": 0.8, "b": 0.0}}]
    assert learned(ledger) == {"a": 0.8}
    assert gate.broken(learned(ledger), {"a": 0.72, "b": 0.0}) == []
    assert gate.broken({"a": 0.8, "b": 1.0}, {"a": 0.71, "b": 0.4}) == [
        {"earlier": "a", "score": 0.71, "needed": pytest.approx(0.72)},
        {"earlier": "b", "score": 0.4, "needed": 0.5},
    ]


def test_a_gate_of_the_command_line(folder, tmp_path):
    file = tmp_path / "stream.json"
    file.write_text(json.dumps(settings(folder, methods=["sft"])))
    arguments = ["sequence", str(file), "--output", str(tmp_path / "out"), "--gate-action", "rollback", "--json"]
    result = CliRunner().invoke(app.build(), [*arguments, "--gate", "plus=1", "--gate", "minus=0.5"])
    assert result.exit_code == 0, result.output
    refused = CliRunner().invoke(app.build(), [*arguments, "--gate", "plus"])
    assert refused.exit_code == 1 and "--gate 'plus' is not a task and a share" in refused.stderr


# --- what a run leaves -----------------------------------------------------------------------------


def test_the_deltas_on_disk_one_on_another_are_the_model_at_the_end(folder, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    states = []
    keep = Runner._keep
    monkeypatch.setattr(Runner, "_keep", lambda *run: (states.append(run[1].state_dict()), keep(*run)))
    list(run_stream(read_stream(settings(folder, methods=["fggm"])), tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for task in sorted(tmp_path.glob("runs/fggm/*/tasks/*")):
        model = PeftModel.from_pretrained(model, task).merge_and_unload()
    rebuilt = model.state_dict()
    assert all(torch.equal(rebuilt[name], value) for name, value in states[-1].items())
    ledger = json.loads(next(tmp_path.rglob("ledger.json")).read_text())
    assert [len(entry["digest"]) for entry in ledger[1:]] == [64, 64]
    assert len({entry["digest"] for entry in ledger[1:]}) == 2


def test_peak_memory_is_told_for_each_phase(folder, tmp_path):
    results = {
        run["label"]: run for run in run_stream(read_stream(settings(folder, methods=["fggm", "sft"])), tmp_path)
    }
    memory = results["fggm"]["cost"]["peak_memory"]
    assert memory.keys() == {"selection", "training", "evaluation"} and all(peak > 10**7 for peak in memory.values())
    assert results["sft"]["cost"]["peak_memory"]["selection"] is None


def test_texts_that_were_cut_are_counted(folder, tmp_path):
    tasks = [{**task, "max_prompt_length": 5} for task in settings(folder)["tasks"]]
    (result,) = run_stream(read_stream(settings(folder, methods=["frozen"], tasks=tasks)), tmp_path)
    assert result["cut"] == {name: {"prompts": 4, "answers": 0} for name in ("plus", "minus")}


def test_multitask_is_asked_everything_at_the_end(folder, tmp_path):
    tasks = [{**settings(folder)["tasks"][0], "name": name} for name in ("a", "b", "c", "d")]
    (result,) = run_stream(read_stream(settings(folder, methods=["multitask"], tasks=tasks)), tmp_path)
    assert len(result["R"]) == 1 and all(score is not None for score in result["R"][0])


def test_bfloat16_is_autocast_in_training_and_evaluation(folder, tmp_path, monkeypatch):
    seen = set()
    model_forward = type(text_model()).forward

    def forward(self, *arguments, **options):
        seen.add((self.training, torch.is_autocast_enabled("cpu"), self.lm_head.weight.dtype))
        return model_forward(self, *arguments, **options)

    monkeypatch.setattr(type(text_model()), "forward", forward)
    training = {"max_steps": 2, "batch_size": 4, "bf16": True}
    list(run_stream(read_stream(settings(folder, methods=["sft"], training=training)), tmp_path))
    assert seen == {(True, True, torch.float32), (False, True, torch.float32)}
