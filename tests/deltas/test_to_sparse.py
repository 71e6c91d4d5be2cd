"""Exact conversion of deltas to adapters of PEFT's SHiRA and Super-Tuning."""

from __future__ import annotations

import pytest
import torch
from example_deltas import adapter, dense
from models import BERT_HEADS, bert, gpt2, llama, logits
from peft import PeftModel
from plain_peft import BATCH, by_plain_peft
from safetensors.torch import load_file

from fggm_peft.deltas import SparseDelta, export_shira, export_supertuning

EXPORTS = {"supertuning": export_supertuning, "shira": export_shira}
DENSITIES = {"q_proj": 0.05, "v_proj": 0.4, "down_proj": 0.1}


@pytest.fixture(params=EXPORTS)
def method(request):
    return request.param


def test_logits_are_equal_with_plain_peft(method, granularity, tmp_path):
    model = adapter(granularity, density_pattern=DENSITIES, modules_to_save=["model.norm"])
    model.base_model.model.model.norm.modules_to_save["default"].weight.data.fill_(0.7)
    model.save_pretrained(tmp_path / "delta")
    EXPORTS[method](tmp_path / "delta", tmp_path / "exported", base=llama())
    result, expected = by_plain_peft(llama(), tmp_path / "exported", tmp_path), logits(model, BATCH)
    for way, actual in result.items():
        assert (actual - expected).abs().max() < 1e-5, way


def test_modules_are_padded_with_zeros(method, granularity, tmp_path):
    model = adapter(granularity, density_pattern=DENSITIES)
    counts = EXPORTS[method](model, tmp_path)
    delta = SparseDelta.read(model)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).base_model.model
    for path, matrix in dense(delta).items():
        layer = loaded.get_submodule(path)
        assert torch.equal(layer.get_delta_weight("default").to_dense().double(), matrix)
    for key, values in load_file(tmp_path / "adapter_model.safetensors").items():
        if key.endswith(("values", "weight")):
            path = key.removeprefix("base_model.model.").rpartition(".")[0]
            assert len(values) == counts[path] >= delta.modules[path].values.numel()


def test_a_density_of_one_fills_a_weight(tmp_path):
    model = adapter("element", density=1.0, target_modules=["down_proj"])
    assert set(export_supertuning(model, tmp_path).values()) == {64 * 96}
    with pytest.raises(ValueError, match="Export to supertuning instead"):  # a multiple of 64 + 96 is larger
        export_shira(model, tmp_path)


def test_what_the_formats_cannot_contain_is_an_error(method, tmp_path):
    export = EXPORTS[method]
    for base, name in ((gpt2(), "c_attn"), (bert(BERT_HEADS["token"]), "word_embeddings")):
        with pytest.raises(ValueError, match=r"supports only nn\.Linear"):
            export(adapter("row", base=base, target_modules=[name]), tmp_path)
    with pytest.raises(ValueError, match="bias='all'"):
        export(adapter("row", base=llama(attention_bias=True), bias="all"), tmp_path)
    assert not list(tmp_path.iterdir())
