"""``fggm sequence`` on a small model: runs, resumes and reports."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command_line import fggm
from filelock import FileLock
from models import text_model
from peft import PeftModel
from streams import killed_at_the_fifth_step, settings, without_times, write_stream
from transformers import AutoModelForCausalLM

from fggm_peft.cli import processes
from fggm_peft.continual.methods import METHODS
from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream, runs_of
from fggm_peft.continual.runner import Runner, changed_answers
from fggm_peft.continual.settings import StreamError
from fggm_peft.tuner.merging.sidecar import sidecars_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("stream"))


def test_every_method_writes_its_matrix_measures_and_costs(folder, tmp_path):
    results = {result["label"]: result for result in run_stream(read_stream(settings(folder)), tmp_path)}
    assert set(results) == {"fggm", "sft", "frozen", "multitask", "lora-r2"}
    for label, result in results.items():
        rows = result["R"]
        assert len(rows) == (1 if label == "multitask" else 2)
        assert all(0 <= score <= 1 for score in rows[-1]) and len(rows[-1]) == 2
        assert result["op"] == pytest.approx(sum(rows[-1]) / 2)
    frozen = results["frozen"]
    assert frozen["R"] == [frozen["zero_shot"]] * 2 and frozen["bwt"] == 0 and frozen["general"] == 0
    assert frozen["cost"]["parameters"] == 0
    for label in ("fggm", "sft", "lora-r2"):
        result = results[label]
        assert result["bwt"] == pytest.approx(result["R"][1][0] - result["R"][0][0])
        assert result["fwt"] == pytest.approx(result["R"][0][1] - result["zero_shot"][1])
        assert result["general"] != 0 and result["cost"]["training_seconds"] > 0
    assert results["fggm"]["cost"]["selection_seconds"] > 0 == results["sft"]["cost"]["selection_seconds"]
    assert results["fggm"]["cost"]["bytes"] > 0 and results["fggm"]["cost"]["parameters"] > 0
    assert results["multitask"]["bwt"] is None
    delta = next(tmp_path.glob("runs/fggm/*/tasks/0-plus"))
    assert (delta / "adapter_model.safetensors").exists()


def test_a_stream_can_compare_two_settings_of_a_method(folder, tmp_path):
    methods = [
        "fggm",
        {"name": "fggm", "label": "few", "num_samples": 8},
    ]
    results = list(run_stream(read_stream(settings(folder, methods=methods)), tmp_path))
    assert [result["label"] for result in results] == ["fggm", "few"]
    samples = {}
    for result in results:
        assert len(result["R"]) == 2 and result["cost"]["selection_seconds"] > 0 and result["cost"]["parameters"]
        (task,) = tmp_path.glob(f"runs/{result['label']}/*/tasks/0-plus")
        samples[result["label"]] = json.loads((task / "adapter_config.json").read_text())["selection"]["samples"]
    assert samples == {"fggm": 16, "few": 8}


RESUMED = ["fggm", "sft", "ewc", "replay", {"name": "o_lora", "r": 2}]
RESUMED += [{"name": "fggm", "preset": "retain", "reference": ["history"]}]
RESUMED += [{"name": "sft", "harm_decay": 1.0, "reference": ["history"]}]


@pytest.mark.parametrize("method", RESUMED)
@pytest.mark.parametrize("checkpoint_steps", [None, 1])
def test_a_run_killed_in_its_second_task_resumes_to_identical_results(method, checkpoint_steps, folder, tmp_path):
    stream = read_stream(settings(folder, methods=[method]))
    (expected,) = run_stream(stream, tmp_path / "whole", checkpoint_steps=checkpoint_steps)
    with killed_at_the_fifth_step():
        list(run_stream(stream, tmp_path / "parts", checkpoint_steps=checkpoint_steps))
    with pytest.raises(StreamError, match="--resume"):
        list(run_stream(stream, tmp_path / "parts"))
    (result,) = run_stream(stream, tmp_path / "parts", resume=True, checkpoint_steps=checkpoint_steps)
    assert without_times(result) == without_times(expected)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_model_keeps_its_weights_and_the_run_resumes_exactly(quantization, folder, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    model = {"name": str(folder / "model"), "quantization": quantization, "dtype": "float32"}
    methods = [{"name": "fggm", "reference": ["history"], "criterion": "gain_per_harm"}, "frozen"]
    methods.append({"name": "lora", "mode": "carried", "r": 2})
    stream = read_stream(settings(folder, model=model, methods=methods))
    models, keep = {}, Runner._save_state
    monkeypatch.setattr(
        Runner, "_save_state", lambda *run: (models.update({run[0].run.method.name: run[1]}), keep(*run))
    )
    expected = list(run_stream(stream, tmp_path / "whole"))
    assert expected[0]["R"] != expected[1]["R"] == [expected[1]["zero_shot"]] * 2

    base, learned = stream.model.load(), models["fggm"]
    for path, layer in base.named_modules():
        if path.endswith("proj"):
            assert torch.equal(learned.get_submodule(path).weight, layer.weight)
    for task in sorted((tmp_path / "whole").glob("runs/fggm/*/tasks/*")):
        base = PeftModel.from_pretrained(base, task).merge_and_unload()
    sums, found = sidecars_of(base), sidecars_of(learned)
    assert sums.keys() == found.keys() and len(sums) == 14
    for path, deltas in sums.items():
        for (_, *expected_tensors), (_, *tensors) in zip(deltas, found[path], strict=True):
            assert all(map(torch.equal, expected_tensors, tensors))

    with killed_at_the_fifth_step():
        list(run_stream(stream, tmp_path / "parts"))
    results = list(run_stream(stream, tmp_path / "parts", resume=True))
    assert [without_times(result) for result in results] == [without_times(result) for result in expected]


def test_methods_that_change_the_weights_need_a_dense_model(folder, tmp_path):
    model = {"name": str(folder / "model"), "quantization": "4bit"}
    changing = ["sft", "lora", {"name": "fggm", "quantized_merge": "requantize"}]
    for method in [*changing, {"name": "fggm", "first_task_masked": False}]:
        with pytest.raises(StreamError, match="changes the weights of the model, which is quantized"):
            read_stream(settings(folder, model=model, methods=[method]))
    shutil.copytree(folder / "model", tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(StreamError, match="'sft' changes the weights of the model, which is quantized"):
        read_stream(settings(folder, model=str(tmp_path / "quantized")))


def test_finished_runs_are_read_from_disk_and_another_stream_is_rejected(folder, tmp_path):
    stream = read_stream(settings(folder, methods=["frozen"]))
    (first,) = run_stream(stream, tmp_path)
    more = read_stream(settings(folder, methods=["frozen"], seeds=[0, 1]))
    assert [run.seed for run in runs_of(more)] == [0, 1]
    again = list(run_stream(more, tmp_path, resume=True))
    assert again[0] == first and again[1]["seed"] == 1
    other = read_stream(settings(folder, methods=["frozen"], training={"max_steps": 4}))
    with pytest.raises(StreamError, match=r"another stream: training"):
        list(run_stream(other, tmp_path, resume=True))


def test_the_command_writes_both_reports_and_prints_the_summary(folder, tmp_path):
    file = tmp_path / "stream.json"
    file.write_text(json.dumps(settings(folder, methods=["fggm", "frozen"])))
    command = ["sequence", str(file), "--output", str(tmp_path / "out"), "--seeds", "0,1"]
    result = fggm(*command, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["label"] for entry in report["summary"]] == ["fggm", "frozen"]
    for entry in report["summary"]:
        scores = [run["op"] for run in report["runs"] if run["label"] == entry["label"]]
        assert entry["runs"] == entry["op"]["n"] == 2 and entry["op"]["mean"] == pytest.approx(sum(scores) / 2)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| fggm |" in page and "BWT_T = " in page
    refused = fggm(*command)
    assert refused.code == 1 and "--resume" in refused.err
    shutil.rmtree(tmp_path / "out")


# --- several processes, kills ----------------------------------------------------------------------


def test_runs_that_are_computed_together_have_the_results_of_one_process(folder, tmp_path, monkeypatch):
    file = tmp_path / "stream.json"
    file.write_text(json.dumps(settings(folder, methods=["fggm", "frozen"])))
    arguments = ["sequence", str(file), "--seeds", "0,1", "--json", "--output"]
    alone, together = fggm(*arguments, str(tmp_path / "a")), fggm(*arguments, str(tmp_path / "b"), "--processes", "3")
    assert alone.code == together.code == 0, together.err
    results = [[without_times(run) for run in json.loads(result.out)["runs"]] for result in (alone, together)]
    assert results[0] == results[1] and len(results[0]) == 4
    assert not list((tmp_path / "b").glob("*.log"))
    (run,) = (tmp_path / "b" / "runs" / "fggm").glob("*seed0*")
    (run / "run.json").unlink()
    (run / "state.pt.1234.partial").write_text("")  # of a process that was killed
    assert fggm(*arguments, str(tmp_path / "b"), "--resume").code == 0
    assert (run / "run.json").exists() and not list(run.glob("*.partial"))
    refused = fggm(*arguments, str(tmp_path / "b"), "--processes", "2")
    assert refused.code == 1 and "continue with --resume" in refused.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = fggm(*arguments, str(tmp_path / "c"), "--processes", "2")
    assert refused.code == 1 and "accelerate launch" in refused.err


def test_the_error_of_a_process_is_the_error_of_the_command(folder, tmp_path, monkeypatch):
    file = tmp_path / "stream.json"
    file.write_text(json.dumps(settings(folder, methods=["frozen"])))
    arguments = ["sequence", str(file), "--output", str(tmp_path / "out"), "--processes", "2"]
    monkeypatch.setattr(processes, "MAIN", "raise SystemExit('no memory')")
    result = fggm(*arguments)
    assert result.code == 1 and "status 1: no memory" in result.err and "1 of 1 runs are not finished" in result.err
    monkeypatch.setattr(processes, "MAIN", "import os; os.kill(os.getpid(), 9)")
    result = fggm(*arguments, "--resume")
    assert result.code == 1 and "ended by SIGKILL: no output" in result.err and "-0.log" in result.err


def test_the_processes_end_with_the_command_and_their_warnings_are_shown(folder, tmp_path, monkeypatch):
    file = tmp_path / "stream.json"
    file.write_text(json.dumps(settings(folder, methods=["frozen"], seeds=[0, 1])))
    arguments = ["sequence", str(file), "--output", str(tmp_path / "out"), "--processes", "2"]
    monkeypatch.setattr(processes, "MAIN", "import sys; print('fggm: warning: ', sys.argv[-1]); sys.exit()")
    result = fggm(*arguments, "--debug")
    assert result.err.count("fggm: warning:  --debug") == 1  # both processes have the same warning

    ids = tmp_path / "ids"
    wait = f"import os, time; open({str(ids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(600)"
    code = f"from fggm_peft.cli import main, processes; processes.MAIN = {wait!r}; main()"
    shutil.rmtree(tmp_path / "out")
    command = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    while not ids.exists() or len(ids.read_text().split()) < 2:
        assert command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 128 + signal.SIGTERM
    for process in map(int, ids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


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
def test_a_run_killed_at_random_moments_resumes_to_identical_results(seed, folder, tmp_path):
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
            time.sleep(0.01)  # do not kill the run during its imports
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


def test_two_processes_in_one_folder_share_the_work(folder, tmp_path):
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


def test_a_run_of_another_process_is_skipped(folder, tmp_path):
    stream = read_stream(settings(folder, methods=["frozen", "sft"]))
    taken = tmp_path / "runs" / runs_of(stream)[0].name
    taken.mkdir(parents=True)
    with FileLock(taken / ".lock"):
        assert [result["label"] for result in run_stream(stream, tmp_path)] == ["sft"]


# --- what a run leaves -----------------------------------------------------------------------------


def test_the_saved_deltas_together_give_the_final_model(folder, tmp_path, monkeypatch):
    states = []
    keep = Runner._save_state
    monkeypatch.setattr(Runner, "_save_state", lambda *run: (states.append(run[1].state_dict()), keep(*run)))
    list(run_stream(read_stream(settings(folder, methods=["fggm"])), tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for task in sorted(tmp_path.glob("runs/fggm/*/tasks/*")):
        model = PeftModel.from_pretrained(model, task).merge_and_unload()
    rebuilt = model.state_dict()
    assert all(torch.equal(rebuilt[name], value) for name, value in states[-1].items())
    ledger = json.loads(next(tmp_path.rglob("tasks.json")).read_text())
    assert [len(entry["digest"]) for entry in ledger[1:]] == [64, 64]
    assert len({entry["digest"] for entry in ledger[1:]}) == 2


def test_the_peak_memory_of_a_run_is_reported(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fggm_peft.continual.runner.peak_memory", lambda: 7)
    (result,) = run_stream(read_stream(settings(folder, methods=["fggm"])), tmp_path)
    assert result["cost"]["peak_memory"] == 7


def test_multitask_is_evaluated_on_all_tasks_at_the_end(folder, tmp_path):
    tasks = [{**settings(folder)["tasks"][0], "name": name} for name in ("a", "b", "c", "d")]
    (result,) = run_stream(read_stream(settings(folder, methods=["multitask"], tasks=tasks)), tmp_path)
    assert len(result["R"]) == 1 and all(score is not None for score in result["R"][0])


def test_bfloat16_uses_autocast_in_training_and_evaluation(folder, tmp_path, monkeypatch):
    seen = set()
    model_forward = type(text_model()).forward

    @functools.wraps(model_forward)  # the trainer looks at its signature
    def forward(self, *arguments, **options):
        seen.add((self.training, torch.is_autocast_enabled("cpu"), self.lm_head.weight.dtype))
        return model_forward(self, *arguments, **options)

    monkeypatch.setattr(type(text_model()), "forward", forward)
    training = {"max_steps": 2, "batch_size": 4, "bf16": True}
    list(run_stream(read_stream(settings(folder, methods=["sft"], training=training)), tmp_path))
    assert seen == {(True, True, torch.float32), (False, True, torch.float32)}


def test_methods_and_rates_can_be_selected_and_the_report_covers_the_whole_folder(folder, tmp_path):
    file = tmp_path / "stream.json"
    file.write_text(json.dumps(settings(folder, methods=["frozen", "sft", {"name": "sft", "label": "[b]"}])))

    def report(*options: str) -> dict:
        arguments = ["sequence", str(file), "--output", str(tmp_path / "out"), "--resume", "--json", *options]
        result = fggm(*arguments)
        assert result.code == 0, result.err
        return json.loads(result.out)

    assert [run["label"] for run in report("--methods", "sft")["runs"]] == ["sft"]
    runs = report("--methods", "frozen,[b]", "--learning-rates", "1e-3,2e-3")["runs"]
    assert [(run["label"], run["learning_rate"]) for run in runs] == [
        ("[b]", 0.001),
        ("[b]", 0.002),
        ("frozen", 0.001),
        ("frozen", 0.002),
        ("sft", 0.01),
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "[b]" in page and "</html>" in page
    with pytest.raises(StreamError, match=r"unknown label in --methods: 'stf'.*Did you mean 'sft'"):
        read_stream(file).with_methods(["stf"])


def test_the_method_in_the_docs_runs(folder, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (snippet,) = re.findall(r"```python\n(from fggm_peft import METHODS.*?)```", page, re.DOTALL)
    try:
        exec(compile(snippet, "extending.md", "exec", dont_inherit=True), {"__name__": "docs", "dataclass": dataclass})
        methods = [{"name": "embeddings", "head": True}]
        (result,) = run_stream(read_stream(settings(folder, methods=methods)), tmp_path)
        assert result["cost"]["parameters"] == 2 * text_model().lm_head.weight.numel()
        assert result["general"] != 0
    finally:
        METHODS._entries.pop("embeddings", None)


def test_a_full_disk_leaves_no_partial_state_and_the_run_can_resume(folder, tmp_path, monkeypatch):
    stream = read_stream(settings(folder, methods=["sft"]))
    (expected,) = run_stream(stream, tmp_path / "whole")
    save, calls = torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) == 2:
            Path(file).write_bytes(b"half")
            raise OSError("No space left on device")
        save(state, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            list(run_stream(stream, tmp_path / "parts"))
    assert not list(tmp_path.rglob("*.partial")) and list((tmp_path / "parts").rglob("state.pt"))
    (result,) = run_stream(stream, tmp_path / "parts", resume=True)
    assert without_times(result) == without_times(expected)


def test_the_size_of_what_a_method_keeps_is_measured(folder, tmp_path):
    methods = ["sft", {"name": "replay", "fraction": 0.5}]
    kept = [
        result["cost"]["kept_bytes"] for result in run_stream(read_stream(settings(folder, methods=methods)), tmp_path)
    ]
    assert kept[0] == 0 < kept[1] < 100_000


def test_answers_that_became_wrong_and_right_are_counted():
    entries = [
        {"task": "a", "right": {"a": "1100"}},
        {"task": "b", "right": {"a": "1110", "b": "01"}},
        {"task": "c", "right": {"a": "1011", "b": "11", "c": "0"}},
    ]
    assert changed_answers(entries) == {"a": {"lost": 1, "gained": 2}, "b": {"lost": 0, "gained": 1}}


def test_the_runs_of_a_folder_share_the_evaluation_of_the_base_model(folder, tmp_path, monkeypatch):
    counts, evaluate = [], Runner._evaluate
    monkeypatch.setattr(Runner, "_evaluate", lambda *args: counts.append(1) or evaluate(*args))
    results = list(run_stream(read_stream(settings(folder, methods=["frozen", "sft"])), tmp_path))
    assert len(counts) == 1 + 2 * 2  # tasks
    assert results[0]["zero_shot"] == results[1]["zero_shot"] == results[0]["R"][1]


def test_a_model_that_is_distributed_over_devices_has_the_same_results(folder, tmp_path):
    methods = ["fggm", "sft"]
    expected = list(run_stream(read_stream(settings(folder, methods=methods)), tmp_path / "one"))
    model = {"name": str(folder / "model"), "device_map": "auto"}
    results = list(run_stream(read_stream(settings(folder, model=model, methods=methods)), tmp_path / "auto"))
    assert [without_times(result) for result in results] == [without_times(result) for result in expected]
