"""The example scripts run on a small saved model."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launching import TORCHRUN, end, output_of, start
from models import byte_tokenizer, text_model
from safetensors.torch import load_file

from fggm_peft.continual.reading import read_stream

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A small Llama and a byte-level tokenizer, saved like a Hub model."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    text_model().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """48 sums, as prompts and completions."""
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(48)]))
    return file


def run(script: str, *arguments: object) -> str:
    return output_of(start(EXAMPLES / script, *arguments, stderr=subprocess.PIPE))


@pytest.mark.parametrize("base", ["4-bit", "dense"])
def test_the_qlora_style_script_selects_trains_saves_and_loads(base, model_folder, data, tmp_path):
    arguments = ["--model", model_folder, "--data", data, "--output", tmp_path / "delta"]
    output = run("qlora_style.py", *arguments, *(["--dense"] if base == "dense" else []))
    assert "trainable values; regret" in output and "loaded again" in output
    config = json.loads((tmp_path / "delta" / "adapter_config.json").read_text())
    assert config["peft_type"] == "FGGM" and config["selection"]["samples"] == 48
    values = load_file(tmp_path / "delta" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in values.items() if "values" in name} == {torch.float32}


def test_deltas_are_shared_exported_and_rolled_back(tmp_path):
    output = run("share_delta.py", "--output", tmp_path / "shared")
    assert "exact LoRA of rank" in output and "loaded elsewhere" in output
    assert "removed counting-down" in output
    assert "bit for bit the model without it: True" in output
    assert json.loads((tmp_path / "shared" / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


STEPS, SAVE_EVERY = 60, 10


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], id="one process"),
        pytest.param(TORCHRUN, marks=pytest.mark.distributed, id="two processes"),
    ],
)
def test_a_killed_run_resumes_bit_exactly(launcher, model_folder, data, tmp_path):
    script = [EXAMPLES / "long_run.py", "--cpu", "--steps", STEPS, "--save-every", SAVE_EVERY]
    command = [*launcher, *script, "--model", model_folder, "--data", data, "--output"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert " steps, selected;" in output_of(start(*command, whole))

    with (tmp_path / "log").open("w") as log:
        process = start(*command, parts, stdout=log)
        while not (parts / "checkpoints" / f"checkpoint-{2 * SAVE_EVERY}").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.002)
    end(process)
    assert not (parts / "adapter_config.json").exists()
    assert not (parts / "checkpoints" / f"checkpoint-{STEPS}").exists()

    assert "resumed" in output_of(start(*command, parts, "--resume"))
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (whole, parts)]
    losses = [[log["loss"] for log in state["log_history"] if "loss" in log] for state in states]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (whole, parts)]
    assert configs[0]["selection"] and configs[0]["selection"] == configs[1]["selection"]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_demo_runs_and_writes_its_report_and_deltas(model_folder, tmp_path):
    run("demo/prepare.py", tmp_path / "data", "--no-model")
    options = ["--data", tmp_path / "data", "--model", model_folder, "--output", tmp_path / "runs", "--processes", 2]
    options += re.search(r"--methods \S+", (EXAMPLES.parent / "Makefile").read_text())[0].split()
    output_of(start("-c", "from fggm_peft.cli import main; main()", "sequence", "demo", *options), seconds=600)
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert [(run["label"], run["learning_rate"]) for run in report["runs"]] == [("retain", 1.6e-3), ("sft", 1e-4)]
    assert (tmp_path / "runs" / "report.md").exists()
    stream = read_stream("demo", data=tmp_path / "data", model=model_folder)
    assert [method.label for method in stream.methods] == ["sft", "retain", "lora"]  # make demo ARGS="--methods lora"
    deltas = sorted((tmp_path / "runs" / "runs" / "retain" / "lr0.0016-seed0-given" / "tasks").iterdir())
    assert [delta.name for delta in deltas] == ["0-module", "1-number", "2-date"]
    assert all((delta / "adapter_model.safetensors").exists() for delta in deltas)
