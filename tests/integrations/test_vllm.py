"""Sparse weight patches, applied to a dense state dict as vLLM does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from example_deltas import adapter
from models import gpt2, llama, mixture

from fggm_peft.deltas import SparseDelta, apply_deltas
from fggm_peft.integrations.vllm import sparse_patches

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
CASES = {
    "bfloat16": (lambda: llama(torch.bfloat16), {}),
    "transposed weights and embeddings": (gpt2, {"target_modules": ["c_attn", "wte"]}),
    "transposed experts": (lambda: mixture("GptOss"), {"target_parameters": ["experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_patched_base_is_the_merged_model(case, granularity):
    build, config = CASES[case]
    model = adapter(granularity, base=build(), **({"target_modules": ["q_proj", "down_proj"]} | config))
    delta = SparseDelta.read(model)
    delta.config.base_fingerprint = None  # the base gets other entries below
    base, served, merged = build(), build(), build()
    for model in (base, served, merged):
        for parameter in model.parameters():
            parameter.data.view(-1)[::5] = -0.0
    state = served.state_dict()
    for patch in sparse_patches(delta, base):
        assert patch.indices.dtype == torch.int32 and patch.values.dtype == state[patch.name].dtype
        assert patch.full_shape == state[patch.name].shape and 0 < len(patch.indices) < state[patch.name].numel()
        state[patch.name].view(-1).index_copy_(0, patch.indices.long(), patch.values)
    apply_deltas(merged, [delta])
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, state[name]) and torch.equal(tensor.signbit(), state[name].signbit()), name


def test_whole_tensors_have_no_sparse_patch():
    with pytest.raises(ValueError, match="whole tensors"):
        next(sparse_patches(adapter("row", modules_to_save=["model.norm"]), llama()))


def test_the_snippet_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SparseDelta.read(adapter("row")).save("adapter")
    names = {"base": llama()}
    exec(compile(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[-1], PAGE.name, "exec"), names)
    assert names["patches"]
