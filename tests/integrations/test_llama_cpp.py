"""The LoRA export and the merged model as llama.cpp reads them; its converters run if LLAMA_CPP names its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_deltas import adapter, dense
from models import llama
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fggm_peft.deltas import SparseDelta, apply_deltas, export_lora

gguf = pytest.importorskip("gguf")
LLAMA_CPP = os.environ.get("LLAMA_CPP")
TARGETS = {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "density_pattern": {"v_proj": 0.05}}
HEADS = {"q_proj": 4, "k_proj": 2}
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def gguf_name(path: str) -> str:
    return NAMES.get_name(f"{path}.weight", try_suffixes=(".weight",))


def as_in_gguf(path: str, weight: Tensor) -> Tensor:
    """llama.cpp rotates neighboring rows of q and k, not halves, so its converter permutes the rows of each head."""
    heads = HEADS.get(path.rpartition(".")[2])
    return weight if heads is None else weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def test_the_export_has_the_names_and_shapes_that_the_converter_reads(granularity, tmp_path):
    model = adapter(granularity, **TARGETS)
    export_lora(model, tmp_path, equal_ranks=True)
    deltas = dense(SparseDelta.read(model))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weights = dict(llama().named_parameters())
    assert len(tensors) == 2 * len(deltas)
    for path, delta in deltas.items():
        a, b = (tensors.pop(f"base_model.model.{path}.lora_{part}.weight") for part in "AB")
        assert (b.shape[0], a.shape[1]) == weights[f"{path}.weight"].shape == delta.shape
        assert a.shape[0] == b.shape[1] and a.dtype == b.dtype == torch.float32
        assert gguf_name(path).startswith("blk.")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == a.shape[0]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the type that llama.cpp accepts without a list of known ones."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizer_models.BPE({t: n for n, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def converted(script: str, folder: Path, *options: str) -> gguf.GGUFReader:
    """What a converter of llama.cpp writes for a folder, in float32."""
    output = folder.with_suffix(".gguf")
    command = [sys.executable, str(Path(LLAMA_CPP) / script), str(folder), "--outfile", str(output), *options]
    result = subprocess.run(command, env=os.environ | ENVIRONMENT, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return gguf.GGUFReader(output)


def contents(reader: gguf.GGUFReader) -> dict[str, Tensor]:
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


@pytest.mark.skipif(LLAMA_CPP is None, reason="LLAMA_CPP names no folder of llama.cpp")
def test_the_converters_of_llama_cpp_write_the_delta_exactly(granularity, tmp_path):
    base = llama(vocab=259, max_position_embeddings=64)
    for folder in ("base", "merged"):
        byte_fallback_tokenizer().save_pretrained(tmp_path / folder)
    base.save_pretrained(tmp_path / "base")
    delta = SparseDelta.read(adapter(granularity, base=base, **TARGETS))
    merged = llama(vocab=259, max_position_embeddings=64)
    apply_deltas(merged, [delta])
    merged.save_pretrained(tmp_path / "merged")
    export_lora(delta, tmp_path / "lora", base=merged, equal_ranks=True)
    lora = converted("convert_lora_to_gguf.py", tmp_path / "lora", "--base", str(tmp_path / "base"))
    alpha, factors = lora.fields["adapter.lora.alpha"].contents(), contents(lora)
    hf = "convert_hf_to_gguf.py"
    before, after = (contents(converted(hf, tmp_path / name, "--outtype", "f32")) for name in ("base", "merged"))
    for path, values in dense(delta).items():
        name, values = gguf_name(path), as_in_gguf(path, values.float())
        a, b = factors.pop(f"{name}.lora_a"), factors.pop(f"{name}.lora_b")
        assert torch.equal(alpha / b.shape[1] * (b @ a), values)
        assert torch.equal(before.pop(name) + values, after.pop(name))
    assert not factors and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
