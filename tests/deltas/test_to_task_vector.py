"""Deltas as dense changes of the base's weights."""

from __future__ import annotations

import pytest
import torch
from example_deltas import adapter
from models import gpt2, llama, mixture
from safetensors.torch import load_file

from fggm_peft.deltas import SparseDelta, apply_deltas, export_task_vector

CASES = {
    "llama": (llama, {}),
    "transposed weights and embeddings": (gpt2, {"target_modules": ["c_attn", "wte"]}),
    "experts": (lambda: mixture("Mixtral"), {"target_parameters": ["experts.down_proj", "gate.weight"]}),
    "transposed experts": (lambda: mixture("GptOss"), {"target_parameters": ["experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_base_plus_the_vector_is_the_merged_model(case, granularity, tmp_path):
    build, config = CASES[case]
    model = adapter(granularity, base=build(), **({"target_modules": ["q_proj", "down_proj"]} | config))
    changed = export_task_vector(model, tmp_path, base=build())
    vector, state = load_file(tmp_path / "task_vector.safetensors"), build().state_dict()
    for name, change in vector.items():
        assert change.dtype == torch.float32 and change.count_nonzero() == changed[name]
        state[name] += change
    merged = build()
    apply_deltas(merged, [SparseDelta.read(model)])
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged.state_dict().items())


def test_whole_tensors_are_no_differences(tmp_path):
    with pytest.raises(ValueError, match="whole tensors"):
        export_task_vector(adapter("row", modules_to_save=["model.norm"]), tmp_path)
