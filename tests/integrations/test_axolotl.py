"""The plugin, called in the order in which axolotl calls it; and in axolotl, on machines that have it."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from models import byte_tokenizer, fggm_layers, text_model
from peft import PeftModel
from pydantic import ValidationError
from trainers import arguments, examples, losses
from transformers import AutoModelForCausalLM, Trainer

from fggm_peft.training import FGGMTrainerMixin

ROOT = Path(__file__).parents[2]
YAML = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "integrations.md").read_text(), re.DOTALL)[1]


class DictDefault(dict):
    """axolotl's config: missing keys are None."""

    def __getattr__(self, name: str) -> Any:
        value = self.get(name)
        return DictDefault(value) if isinstance(value, dict) else value

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    """The methods of axolotl 0.21's base class that the plugin overrides."""

    def register(self, cfg): ...
    def get_input_args(self): ...
    def get_adapter_capabilities(self): ...
    def load_adapter(self, model, cfg, inference=False, config_only=False): ...
    def post_trainer_create(self, cfg, trainer): ...


@pytest.fixture
def plugin(monkeypatch):
    """The plugin on a stand-in of axolotl's base class."""
    base = ModuleType("axolotl.integrations.base")
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, BasePlugin
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "fggm_peft.integrations.axolotl", raising=False)
    module, _, name = yaml.safe_load(YAML)["plugins"][0].rpartition(".")
    yield getattr(importlib.import_module(module), name)()
    sys.modules.pop(module)


def config(folder: Path, **changes) -> DictDefault:
    text_model().save_pretrained(folder / "base")
    cfg = yaml.safe_load(YAML) | {"base_model": str(folder / "base"), **changes}
    return DictDefault(cfg)


def parsed(plugin, cfg: DictDefault) -> DictDefault:
    """What axolotl does with its YAML file."""
    plugin.register(cfg)
    module, _, name = plugin.get_input_args().rpartition(".")
    block = getattr(importlib.import_module(module), name)(**cfg)
    return DictDefault(cfg | block.model_dump(exclude_none=True))


def load_base(cfg: DictDefault) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(cfg.base_model, **(cfg.overrides_of_model_kwargs or {}))


def trained(plugin, cfg: DictDefault, folder: Path) -> Trainer:
    model, _ = plugin.load_adapter(load_base(cfg), cfg)
    trainer = Trainer(model=model, args=arguments(folder), train_dataset=examples())
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("quantization", [None, "load_in_4bit", "load_in_8bit"])
def test_the_yaml_file_of_the_page_selects_and_trains(plugin, tmp_path, quantization):
    changes = {} if quantization is None else {quantization: True}
    cfg = parsed(plugin, config(tmp_path, **changes))
    trainer = trained(plugin, cfg, tmp_path / "run")
    assert isinstance(trainer, FGGMTrainerMixin)
    assert trainer.selection_report.density == pytest.approx(0.1, abs=0.02)
    assert losses(trainer)[-1] < losses(trainer)[0]
    layers = fggm_layers(trainer.model, "default").values()
    assert {layer.quantization_backend is None for layer in layers} == {quantization is None}
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded, _ = plugin.load_adapter(load_base(cfg), DictDefault(cfg | {"lora_model_dir": str(tmp_path / "adapter")}))
    for new, old in zip(fggm_layers(loaded, "default").values(), layers, strict=True):
        assert torch.equal(new.fggm_values["default"], old.fggm_values["default"])
        assert new.fggm_values["default"].requires_grad


def test_a_wrong_option_is_an_error_when_the_yaml_file_is_read(plugin, tmp_path):
    for block, message in (({"densty": 0.1}, "densty"), ({"density": 2.0}, "density")):
        with pytest.raises(ValidationError, match=message):
            parsed(plugin, config(tmp_path, fggm=block))


def test_other_adapters_are_not_changed(plugin, tmp_path):
    cfg = parsed(plugin, config(tmp_path, adapter="qlora", load_in_4bit=True))
    trainer = Trainer(model=text_model(), args=arguments(tmp_path))
    plugin.post_trainer_create(cfg, trainer)
    assert plugin.load_adapter(trainer.model, cfg) is None
    assert cfg.overrides_of_model_kwargs is None and type(trainer) is Trainer
    assert plugin.get_adapter_capabilities() == [AdapterCapabilities("fggm")]


def test_preference_trainers_get_the_config_only(plugin, tmp_path):
    model, adapter_config = plugin.load_adapter(text_model(), parsed(plugin, config(tmp_path)), config_only=True)
    assert model is None and adapter_config.density == 0.1


@pytest.mark.parametrize("changes", [{}, {"load_in_4bit": True}, {"sample_packing": True}], ids=str)
def test_axolotl_itself_trains_the_yaml_file_of_the_page(changes, tmp_path, monkeypatch):
    pytest.importorskip("axolotl.train")
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("base")
    rows = [{"instruction": f"{n} plus one is", "output": str(n + 1)} for n in range(24)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"sequence_len": 512, "max_steps": 3, "val_set_size": 0, "logging_steps": 1, "special_tokens": {}}
    cfg = config(tmp_path, **small, use_cpu=True, bf16=False, save_strategy="no", **changes)
    Path("config.yaml").write_text(yaml.safe_dump(dict(cfg)))
    cfg = load_cfg("config.yaml")
    model, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    assert isinstance(model, PeftModel) and trainer.selection_report.samples == 24
    assert trainer.args.sample_packing == ("sample_packing" in changes)
    backends = {layer.quantization_backend is None for layer in fggm_layers(model, "default").values()}
    assert backends == {"load_in_4bit" not in changes}
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
