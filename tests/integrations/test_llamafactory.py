"""The plugin and trainer on a stand-in of LLaMA-Factory's interface; and in LLaMA-Factory, on machines that have it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from models import byte_tokenizer, fggm_layers, text_model, token_batches
from safetensors.torch import load_file

from fggm_peft.integrations import llamafactory

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
YAML = re.search(r"## LLaMA-Factory.*?```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


class BatchGenerator:
    """Yields the micro-batches of one optimizer step at a time, with LLaMA-Factory's weights of the loss."""

    def __iter__(self):
        for batch in token_batches():
            yield [{**batch, "loss_weights": (batch["labels"] >= 0).float(), "extra_info": "text"}]


class SFTTrainer:
    """The order of LLaMA-Factory 0.9.5's ``BaseTrainer``."""

    def __init__(self, model: Any):
        self.model, self.renderer = model, SimpleNamespace(processor=byte_tokenizer())
        self.train_batch_generator = BatchGenerator()
        self._shard_model()
        self._init_optimizer()

    def _shard_model(self): ...

    def _init_optimizer(self):
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

    def fit(self):
        for (batch,) in self.train_batch_generator:
            self.model(**{key: value for key, value in batch.items() if torch.is_tensor(value)}).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


class PeftPlugin:
    methods: dict[str, Any] = {}

    def __init__(self, name: str):
        self.name = name

    def register(self):
        return lambda function: self.methods.setdefault(self.name, function)


@pytest.fixture
def run_sft(monkeypatch):
    """Trains with a ``peft_config``, as ``main`` does through LLaMA-Factory's ``run_sft``."""
    trainers, plugins = ModuleType("llamafactory.v1.trainers"), ModuleType("llamafactory.v1.plugins.model_plugins.peft")
    sft = ModuleType("llamafactory.v1.trainers.sft_trainer")
    trainers.sft_trainer, plugins.PeftPlugin = sft, PeftPlugin
    names = ("llamafactory", "llamafactory.v1", "llamafactory.v1.plugins", "llamafactory.v1.plugins.model_plugins")
    for module in (trainers, sft, plugins, *map(ModuleType, names)):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(config: dict[str, Any]) -> SFTTrainer:
        ran, sft.SFTTrainer = [], SFTTrainer

        def run_sft():
            trainer = sft.SFTTrainer(PeftPlugin.methods[config["name"]](text_model(), config, True))
            trainer.fit()
            ran.append(trainer)

        sft.run_sft = run_sft
        llamafactory.main()
        return ran[0]

    return run


def test_the_yaml_file_of_the_page_selects_and_trains_and_continues(run_sft, tmp_path):
    model = run_sft(yaml.safe_load(YAML)["peft_config"]).model
    layers = fggm_layers(model, "default")
    assert layers and all(layer.fggm_values["default"].any() for layer in layers.values())
    model.save_pretrained(tmp_path)
    continued = run_sft({"name": "fggm", "adapter_name_or_path": str(tmp_path)}).model
    for name, layer in fggm_layers(continued, "default").items():
        assert torch.equal(layer.fggm_indices["default"], layers[name].fggm_indices["default"])
        assert not torch.equal(layer.fggm_values["default"], layers[name].fggm_values["default"])


def test_harm_decay_is_attached(run_sft, tmp_path):
    (tmp_path / "general.txt").write_text("Some general text.\n\nAnother paragraph.\n")
    options = {"harm_decay": 10.0, "reference": [str(tmp_path / "general.txt")]}
    trainer = run_sft(yaml.safe_load(YAML)["peft_config"] | options)
    assert trainer.optimizer.param_groups[0]["harm_decay_steps"] == len(token_batches())


def test_a_wrong_option_is_an_error():
    with pytest.raises(TypeError, match="densty"):
        llamafactory.adapted_model(text_model(), {"name": "fggm", "densty": 0.1}, True)


@pytest.mark.skipif(find_spec("llamafactory") is None, reason="LLaMA-Factory is not installed")
def test_llamafactory_itself_trains_the_yaml_file_of_the_page(tmp_path):
    text_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    roles = [("user", lambda n: f"{n} plus one is"), ("assistant", lambda n: str(n + 1))]
    rows = [
        {"messages": [{"role": role, "content": [{"type": "text", "value": text(n)}]} for role, text in roles]}
        for n in range(24)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"sums": {"path": "train.jsonl", "source": "local"}}))
    small = {"model": "base", "cutoff_len": 128, "max_steps": 4, "save_steps": 2, "bf16": False, "batching_workers": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(YAML) | small))
    command = [sys.executable, "-m", "fggm_peft.integrations.llamafactory", "config.yaml"]
    for options in ([], ["output_dir=resumed", "resume_from_checkpoint=run/checkpoint-2"]):
        result = subprocess.run(
            [*command, *options], cwd=tmp_path, text=True, capture_output=True, timeout=300, env=os.environ
        )
        assert result.returncode == 0, result.stderr[-3000:]
    whole, resumed = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(tensor.is_floating_point() and tensor.any() for tensor in whole.values())
