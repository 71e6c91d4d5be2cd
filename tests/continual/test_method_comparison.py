"""Experiments for PEFT's method comparison, and results in the format of its tools."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from models import byte_tokenizer, text_model
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fggm_peft import FGGMConfig
from fggm_peft.continual.measures import measures_of
from fggm_peft.continual.methods import METHODS
from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "method_comparison"
DECLARED = runpy.run_path(str(BENCHMARK / "experiments.py"))
EXPERIMENTS = DECLARED["EXPERIMENTS"]
RESULTS = runpy.run_path(str(BENCHMARK / "results.py"))
write_results = RESULTS["write_results"]

# what processing.py of PEFT's method_comparison reads of a MetaMathQA result, and the types that it casts to
READ = {
    ("run_info", "experiment_name"): "string",
    ("run_info", "train_config", "model_id"): "string",
    ("run_info", "train_config"): "string",
    ("run_info", "peft_config"): "string",
    ("run_info", "total_time"): float,
    ("run_info", "peft_branch"): "string",
    ("run_info", "created_at"): "string",
    ("train_info", "status"): "string",
    ("train_info", "accelerator_memory_reserved_avg"): int,
    ("train_info", "accelerator_memory_max"): int,
    ("train_info", "accelerator_memory_reserved_99th"): int,
    ("train_info", "train_time"): float,
    ("train_info", "file_size"): int,
    ("train_info", "num_trainable_params"): int,
    ("train_info", "metrics", -1, "test accuracy"): float,
    ("train_info", "metrics", -1, "train loss"): float,
    ("train_info", "metrics", -1, "train samples"): int,
    ("train_info", "metrics", -1, "train total tokens"): int,
    ("meta_info", "package_info"): "string",
    ("meta_info", "package_info", "peft-version"): "string",
    ("meta_info", "package_info", "transformers-version"): "string",
    ("meta_info", "package_info", "datasets-version"): "string",
    ("meta_info", "package_info", "torch-version"): "string",
    ("meta_info", "package_info", "bitsandbytes-version"): "string",
    ("meta_info", "system_info"): "string",
}
# the rest of what PEFT's own run.py writes
WRITTEN = [
    ("run_info", "error_msg"),
    ("train_info", "num_total_params"),
    ("meta_info", "model_info", "sha"),
    ("meta_info", "model_info", "created_at"),
    ("meta_info", "dataset_info"),
    ("meta_info", "pytorch_info"),
    *(("meta_info", "system_info", name) for name in ("system", "release", "machine", "processor", "accelerator")),
    *(
        ("run_info", "train_config", name)
        for name in (
            "dtype",
            "max_seq_length",
            "batch_size",
            "batch_size_eval",
            "max_steps",
            "eval_steps",
            "compile",
            "use_gc",
            "seed",
            "query_template",
            "grad_norm_clip",
            "optimizer_type",
            "optimizer_kwargs",
            "lr_scheduler",
            "use_amp",
            "autocast_adapter_dtype",
            "generation_kwargs",
            "attn_implementation",
            "init_kv_cache_prefix",
        )
    ),
]


def found(result: dict, path: tuple):
    for key in path:
        result = result[key]
    return result


# --- results -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    byte_tokenizer().save_pretrained(folder / "tiny-model")
    text_model().save_pretrained(folder / "tiny-model")
    for name, size in (("plus", 16), ("minus", 10)):
        (folder / name).mkdir()
        rows = [{"prompt": f"{n} {name} one is ", "answer": str(n + 1)} for n in range(10, 10 + size)]
        for split in ("train", "test"):
            (folder / name / f"{split}.json").write_text(json.dumps(rows[: 4 if split == "test" else size]))
    (folder / "general.txt").write_text("A text about nothing.\n\nAnd another one.\n")
    return folder


def stream_of(folder, **fields):
    settings = {
        "model": str(folder / "tiny-model"),
        "methods": ["fggm", "sft", "frozen", {"name": "replay", "fraction": 0.25}, {"name": "lora", "r": 2}],
        "tasks": [
            {"name": name, "path": str(folder / name), "metric": "edit_similarity", "max_answer_length": 4}
            for name in ("plus", "minus")
        ],
        "training": {"epochs": 1, "batch_size": 4, "learning_rate": 0.01},
        "general": {"text": str(folder / "general.txt")},
    }
    return read_stream({**settings, **fields})


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """Method -> (the result of its run, its file in PEFT's layout)."""
    stream, output = stream_of(folder), tmp_path_factory.mktemp("runs")
    runs = list(run_stream(stream, output))
    results = tmp_path_factory.mktemp("results")
    files = write_results(stream, output, results)
    assert sorted(files) == sorted(results.iterdir()) and len(files) == len(runs)
    assert files[0].name == "fggm--tiny-model-lr0.01-seed0-given.json"
    return {run["method"]: (run, json.loads(file.read_text())) for run, file in zip(runs, files, strict=True)}


def test_every_field_that_peft_reads_is_there_and_of_its_type(written):
    for _, result in written.values():
        assert set(result) == {"run_info", "train_info", "meta_info"}
        for path in (*READ, *WRITTEN):
            found(result, path)
    rows = [{path: found(result, path) for path in READ} for _, result in written.values()]
    frame = pd.DataFrame([{str(path): value for path, value in row.items()} for row in rows])
    frame = frame.astype({str(path): kind for path, kind in READ.items()})  # as PEFT casts them
    assert pd.to_datetime(frame[str(("run_info", "created_at"))]).notna().all()
    assert (frame[str(("train_info", "status"))] == "success").all()


def test_only_full_fine_tuning_has_no_peft_config(written):
    assert written["fggm"][1]["run_info"]["experiment_name"] == "fggm/tiny-model-lr0.01-seed0-given"
    config = written["fggm"][1]["run_info"]["peft_config"]
    assert config["peft_type"] == "FGGM" and config["base_model_name_or_path"].endswith("tiny-model")
    assert written["lora"][1]["run_info"]["peft_config"]["peft_type"] == "LORA"
    assert written["sft"][1]["run_info"]["peft_config"] is None
    assert written["replay"][1]["run_info"]["peft_config"] == {"peft_type": "REPLAY", "fraction": 0.25}


@pytest.mark.parametrize("method", ["fggm", "sft", "lora", "frozen"])
def test_accuracy_is_the_mean_at_the_end_and_forgetting_the_change_of_the_texts_loss(method, written):
    run, result = written[method]
    *between, last = result["train_info"]["metrics"]
    assert last["test accuracy"] == pytest.approx(sum(run["R"][-1]) / 2)
    assert last["forgetting"] == run["general_losses"][-1] - run["general_losses"][0]
    assert last["backward transfer"] == pytest.approx(run["R"][1][0] - run["R"][0][0])
    assert [entry["valid accuracy"] for entry in between] == pytest.approx([run["R"][0][0], sum(run["R"][1]) / 2])
    assert last["forgetting of tasks"] == pytest.approx(measures_of(run["R"], run["zero_shot"])["forgetting"])


def tokens(folder, name: str) -> list[int]:
    rows = json.loads((folder / name / "train.json").read_text())
    return [len(byte_tokenizer()(row["prompt"] + row["answer"])["input_ids"]) + 1 for row in rows]


def test_steps_samples_and_tokens_are_those_of_the_training(folder, written):
    last = {method: result["train_info"]["metrics"][-1] for method, (_, result) in written.items()}
    for method in ("fggm", "sft", "lora"):
        assert (last[method]["step"], last[method]["train samples"]) == (4 + 3, 16 + 10)
        assert last[method]["train total tokens"] == sum(tokens(folder, "plus") + tokens(folder, "minus"))
    assert (last["frozen"]["step"], last["frozen"]["train samples"]) == (0, 0)
    assert last["replay"]["train samples"] == 16 + 10 + 4  # and a quarter of the first task


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"epochs": 2}, [(8, 32), (14, 52)]),
        ({"max_steps": 6}, [(6, 24), (12, 44)]),  # one epoch and a half of 16, two of 10
        ({"epochs": 1.4}, [(6, 24), (11, 42)]),
        ({"max_steps": 2}, [(2, 8), (4, 16)]),
        ({"epochs": 1, "gradient_accumulation": 2}, [(2, 16), (4, 26)]),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(training, expected, folder, tmp_path, monkeypatch):
    stream = stream_of(folder, methods=["sft"], training={"batch_size": 4, "learning_rate": 0.01, **training})
    counted = []

    class Counting(METHODS["sft"]):
        def trainer(self, **arguments):
            trainer = super().trainer(**arguments)
            step = trainer.training_step

            def counting(model, inputs, *rest, **options):
                counted[-1]["samples"] += len(inputs["input_ids"])
                return step(model, inputs, *rest, **options)

            trainer.training_step = counting
            counted.append({"samples": 0, "trainer": trainer})
            return trainer

    monkeypatch.setitem(METHODS._entries, "sft", Counting)
    list(run_stream(stream, tmp_path / "runs"))
    [file] = write_results(stream, tmp_path / "runs", tmp_path / "results")
    *between, last = json.loads(file.read_text())["train_info"]["metrics"]
    assert [(entry["step"], entry["train samples"]) for entry in between] == expected
    assert last["step"] == sum(entry["trainer"].state.global_step for entry in counted)
    assert last["train samples"] == sum(entry["samples"] for entry in counted)


def test_parameters_and_file_sizes_are_counted(written):
    base = text_model().num_parameters()
    info = {method: result["train_info"] for method, (_, result) in written.items()}
    assert info["sft"]["num_total_params"] == info["sft"]["num_trainable_params"] == base
    assert info["lora"]["num_total_params"] == base + info["lora"]["num_trainable_params"]
    assert info["sft"]["file_size"] == 4 * base and info["frozen"]["file_size"] == 0
    assert info["fggm"]["file_size"] == written["fggm"][0]["cost"]["bytes"] > 0
    assert info["fggm"]["train_time"] == pytest.approx(
        written["fggm"][0]["cost"]["training_seconds"] + written["fggm"][0]["cost"]["selection_seconds"]
    )


class FakeAccelerator:
    """A stand-in for torch.cuda."""

    def get_device_name(self, index):
        return "FAKE"


def test_the_peak_memory_is_that_of_an_accelerator_or_0(monkeypatch):
    memory_of = RESULTS["_memory"]
    for device, peak in ((FakeAccelerator(), 7), (None, 0)):
        monkeypatch.setitem(memory_of.__globals__, "accelerator", lambda device=device: device)
        memory = memory_of({"peak_memory": 7})
        assert memory.pop("accelerator_memory_max") == peak and set(memory.values()) == {0}
        assert RESULTS["_system"]()["accelerator"] == ("none" if device is None else "FAKE")


# --- experiments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_peft_loads_the_experiments_as_they_are_declared(name, tmp_path):
    folder = BENCHMARK / "experiments" / "fggm" / name
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, FGGMConfig)
    assert config.to_dict() == EXPERIMENTS[name].adapter_config().to_dict()
    DECLARED["write_experiments"](tmp_path)
    training = Path("training_params.json")
    assert json.loads((folder / training).read_text()) == json.loads((tmp_path / name / training).read_text())


def test_every_experiment_folder_is_declared():
    assert {path.name for path in (BENCHMARK / "experiments" / "fggm").iterdir()} == set(EXPERIMENTS)


def test_the_budget_is_that_of_pefts_lora_experiment():
    from peft import LoraConfig

    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=28, head_dim=128, vocab_size=64, **sizes))
        model = get_peft_model(model, LoraConfig(r=32, task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == DECLARED["LORA_RANK_32"]


# what the wrapper meets in PEFT's folder: functions of these names, called in this order
STAND_IN = {
    "data.py": """
from datasets import Dataset

def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
    texts = [query_template.format(query=f"{n} plus one") + f" {n + 1}" for n in range(40)]
    rows = {"input_ids": [tokenizer(text)["input_ids"] for text in texts], "response": texts}
    return Dataset.from_dict(rows), None, None
""",
    "utils.py": """
import dataclasses, json, torch
from pathlib import Path
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

@dataclasses.dataclass
class TrainConfig:
    model_id: str
    seed: int = 0
    batch_size: int = 4
    query_template: str = "Question: {query} Answer:"

@dataclasses.dataclass
class TrainResult:
    train_time: float
    trainable: int
    moved: int

def get_train_config(path):
    return TrainConfig(json.loads(Path("model.json").read_text()))

def get_tokenizer(*, model_id, max_seq_length):
    return AutoTokenizer.from_pretrained(model_id)

def get_model(*, model_id, peft_config):
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_id), peft_config)

def get_optimizer_and_scheduler(model, *, optimizer_type, max_steps, lr_scheduler_arg, **optimizer_kwargs):
    return getattr(torch.optim, optimizer_type)(model.parameters(), **optimizer_kwargs), None

def log_results(*, experiment_name, train_result):
    Path("result.json").write_text(json.dumps(dataclasses.asdict(train_result) | {"name": experiment_name}))
""",
    "run.py": """
import argparse
from data import get_train_valid_test_datasets
from utils import TrainResult, get_model, get_optimizer_and_scheduler, get_tokenizer, get_train_config, log_results
from peft import PeftConfig

def main(path):
    config = PeftConfig.from_pretrained(path)
    train_config = get_train_config(path)
    tokenizer = get_tokenizer(model_id=train_config.model_id, max_seq_length=64)
    model = get_model(model_id=train_config.model_id, peft_config=config)
    optimizer, _ = get_optimizer_and_scheduler(
        model, optimizer_type="AdamW", max_steps=2, lr_scheduler_arg=None, lr=0.01
    )
    trainable, _ = model.get_nb_trainable_parameters()
    train, _, _ = get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template=train_config.query_template, print_fn=print_verbose
    )
    model.train()
    batch = tokenizer.pad({"input_ids": train[:4]["input_ids"]}, return_tensors="pt")
    before = [parameter.clone() for parameter in model.parameters()]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    moved = sum(int((a != b).sum()) for a, b in zip(before, model.parameters()))
    log_results(experiment_name=path, train_result=TrainResult(train_time=1000.0, trainable=trainable, moved=moved))

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("path_experiment")
    arguments = parser.parse_args()
    print_verbose = print if arguments.verbose else (lambda *_, **__: None)
    main(arguments.path_experiment)
""",
}


@pytest.fixture
def checkout(folder, tmp_path) -> Path:
    for name, text in STAND_IN.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "model.json").write_text(json.dumps(str(folder / "tiny-model")))
    shutil.copytree(BENCHMARK / "experiments", tmp_path / "experiments")
    return tmp_path


def run_wrapper(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARK / "run.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=300)


def test_the_wrapper_selects_before_the_script_makes_its_optimizer(checkout):
    outcome = run_wrapper(checkout, "-v", "experiments/fggm/llama-3.2-3B-rows-30")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    result = json.loads((checkout / "result.json").read_text())
    assert result["name"] == "experiments/fggm/llama-3.2-3B-rows-30"
    base = sum(
        module.weight.numel()
        for name, module in text_model().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert result["trainable"] == pytest.approx(0.3 * base, rel=0.05)
    assert 0.5 * result["trainable"] < result["moved"] <= result["trainable"]
    assert result["train_time"] > 1000  # contains the selection's seconds
    for name, text in STAND_IN.items():
        assert (checkout / name).read_text() == text


def test_the_wrapper_does_not_affect_other_methods(checkout):
    from peft import LoraConfig

    LoraConfig(r=2, task_type="CAUSAL_LM").save_pretrained(str(checkout / "experiments" / "lora" / "r2"))
    outcome = run_wrapper(checkout, "experiments/lora/r2")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    result = json.loads((checkout / "result.json").read_text())
    assert result["train_time"] == 1000 and result["trainable"] > 0


def test_the_wrapper_says_where_to_run_it(tmp_path):
    outcome = run_wrapper(tmp_path, "experiments/fggm/x")
    assert outcome.returncode == 1 and "run this in method_comparison/MetaMathQA" in outcome.stderr
