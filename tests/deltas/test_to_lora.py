"""Exact conversion of sparse deltas to LoRA adapters that load without this library."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import LAYER_EXAMPLES
from example_deltas import adapter
from models import bert, gpt2, llama, logits
from peft import PeftModel
from plain_peft import BATCH, by_plain_peft
from safetensors.torch import load_file
from torch import nn
from transformers import BertForSequenceClassification

from fggm_peft.deltas import SparseDelta, export_lora
from fggm_peft.deltas.to_lora import required_rank


def test_logits_are_equal_with_plain_peft(granularity, tmp_path):
    model = adapter(granularity, density=0.3)
    export_lora(model, tmp_path / "lora")
    result = by_plain_peft(llama(), tmp_path / "lora", tmp_path)
    expected = logits(model, BATCH)
    for way, actual in result.items():
        assert (actual - expected).abs().max() < 1e-5, way


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (gpt2, ["c_attn", "c_fc", "wte"]),
        (lambda: bert(BertForSequenceClassification, num_labels=3), ["query", "word_embeddings"]),
    ],
)
def test_transposed_layers_and_embeddings_are_exact(granularity, build, targets, tmp_path):
    model = adapter(granularity, base=build(), target_modules=targets)
    model.save_pretrained(tmp_path / "delta")
    export_lora(tmp_path / "delta", tmp_path / "lora", base=build())
    loaded = PeftModel.from_pretrained(build(), tmp_path / "lora")
    assert (logits(loaded, BATCH) - logits(model, BATCH)).abs().max() < 1e-5


def test_every_layer_type_is_exact_or_rejected(granularity, example, adapt, tmp_path):
    layer = example.layer()
    model = adapt(layer, granularity=granularity)
    x = example.x()
    expected = model(x)
    conv = layer if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else None
    if conv is not None and (conv.groups > 1 or set(conv.dilation) != {1}):
        with pytest.raises(ValueError, match=r"convolution with (groups|dilation)="):
            export_lora(model, tmp_path / "lora")
        return
    export_lora(model, tmp_path / "lora")
    base = nn.Sequential()
    base.add_module("layer", model.base_model.model.layer.base_layer)
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert (loaded(x) - expected).abs().max() < 1e-4 * float(expected.abs().max())


def test_the_examples_contain_supported_and_unsupported_layers():
    grouped = [name for name, e in LAYER_EXAMPLES.items() if getattr(e.layer(), "groups", 1) > 1]
    assert grouped and len(grouped) < len(LAYER_EXAMPLES)


def test_modules_to_save_are_exported(tmp_path):
    base = llama(attention_bias=True)
    model = adapter("row", base=base, target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm"])
    model.base_model.model.model.norm.modules_to_save["default"].weight.data.fill_(0.7)
    expected = logits(model, BATCH)
    export_lora(model, tmp_path / "lora")
    result = by_plain_peft(llama(attention_bias=True), tmp_path / "lora", tmp_path)
    assert (result["adapted"] - expected).abs().max() < 1e-5


def test_each_module_has_the_rank_that_it_requires_and_a_scale_of_1(tmp_path):
    model = adapter("row", density_pattern={"q_proj": 1 / 64, "v_proj": 9 / 32, "down_proj": 0.5}, density=0.2)
    ranks = export_lora(model, tmp_path / "lora")
    assert {path.rpartition(".")[2]: rank for path, rank in ranks.items()} == {
        "q_proj": 1,
        "v_proj": 9,
        "down_proj": 32,
    }
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 32 and config["rank_pattern"] == config["alpha_pattern"]
    assert config["peft_type"] == "LORA"
    for path, layer in PeftModel.from_pretrained(llama(), tmp_path / "lora").get_base_model().named_modules():
        if hasattr(layer, "lora_A") and layer.lora_A:
            assert layer.scaling["default"] == 1.0 and layer.r["default"] == ranks[path]
    assert "exact" in (tmp_path / "lora" / "README.md").read_text()


def test_equal_ranks_are_exact_by_the_formula_of_llama_cpp(granularity, tmp_path):
    """llama.cpp adds ``alpha / rank * B A``, with the rank of each module's own tensors and one alpha."""
    model = adapter(granularity, density_pattern={"q_proj": 0.1, "down_proj": 0.5}, density=0.2)
    ranks = export_lora(model, tmp_path / "lora", equal_ranks=True)
    assert len(ranks) > 2 and len(set(ranks.values())) == 1
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for path, delta in SparseDelta.read(model).modules.items():
        a, b = (tensors[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
        dense = torch.zeros(delta.shape, dtype=torch.float64)
        delta.granularity.add_(dense, delta.indices, delta.values.double())
        torch.testing.assert_close(config["lora_alpha"] / b.shape[1] * b @ a, dense)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert (logits(loaded, BATCH) - logits(model, BATCH)).abs().max() < 1e-5


def test_a_rank_above_the_maximum_of_the_server_is_a_warning(granularity, tmp_path):
    model = adapter(granularity, density=0.3)
    required = max(required_rank(module) for module in SparseDelta.read(model).modules.values())
    most = required - 1
    with pytest.warns(UserWarning, match=rf"above {most}, .*max_units={most}.*convert_to_lora\(model, rank={most}\)"):
        export_lora(model, tmp_path / "lora", max_rank=most)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max(export_lora(model, tmp_path / "lora", max_rank=required).values()) == required
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert (logits(loaded, BATCH) - logits(model, BATCH)).abs().max() < 1e-5


def test_elements_in_few_rows_need_a_low_rank():
    delta = SparseDelta.read(adapter("element", density=0.2))
    module = next(iter(delta.modules.values()))
    few = torch.tensor([3, 5, 70, 90], dtype=torch.int32)  # rows 0 and 1
    assert required_rank(replace(module, indices=few, values=torch.ones(4))) == 2


def test_unsupported_exports_are_rejected(tmp_path):
    model = adapter("row")
    zero = adapter("row", std=0.0)
    with pytest.raises(ValueError, match="zero everywhere"):
        export_lora(zero, tmp_path / "lora")
    broken = adapter("row")
    next(p for n, p in broken.named_parameters() if "fggm_values" in n).data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        export_lora(broken, tmp_path / "lora")
    nameless = SparseDelta.read(model)
    nameless.config.base_model_name_or_path = None
    with pytest.raises(ValueError, match="base="):
        export_lora(nameless, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
