"""The examples run as scripts, on a small model in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A small Llama and a byte-level tokenizer, saved as any Hub model is."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    model = llama(vocab=len(vocabulary), max_position_embeddings=1024)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    return folder


def run(script: str, *arguments: object) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("base", ["4-bit", "dense"])
def test_the_qlora_style_script_selects_trains_saves_and_loads(base, model_folder, tmp_path):
    data = [{"prompt": f"{n} plus one is ", "answer": str(n + 1)} for n in range(48)]
    (tmp_path / "train.json").write_text(json.dumps(data))
    arguments = ["--model", model_folder, "--data", tmp_path / "train.json", "--output", tmp_path / "delta"]
    output = run("qlora_style.py", *arguments, *(["--dense"] if base == "dense" else []))
    assert "values may move; split-half agreement" in output and "loaded again" in output
    config = json.loads((tmp_path / "delta" / "adapter_config.json").read_text())
    assert config["peft_type"] == "FGGM" and config["selection"]["samples"] == 48


def test_the_demo_runs_to_its_end_and_leaves_what_it_promises(model_folder, tmp_path):
    output = run("demo/run.py", "--quick", "--model", model_folder, "--output", tmp_path)
    assert "Reading" in output and "Checked" in output
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text())
    deltas = sorted((tmp_path / "deltas").iterdir())
    assert len(deltas) == 3
    assert all((delta / "adapter_model.safetensors").exists() for delta in deltas)
