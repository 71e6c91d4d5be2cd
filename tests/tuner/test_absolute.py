"""Values stored as the new values of the base's entries: what is merged after loading is equal bit for bit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import adapted, llama, quantized, token_batches, train
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fggm_peft import AdapterFileError, FGGMConfig
from fggm_peft.core.absolute import absolute_values, delta_values
from fggm_peft.core.granularity import GRANULARITIES
from fggm_peft.deltas import read_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BATCHES = token_batches()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def hard_weight(dtype: torch.dtype) -> torch.Tensor:
    """Entries of every magnitude, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 5, (200, 100), generator=generator)
    weight = torch.randn(200, 100, generator=generator) * torch.exp2(exponents.float())
    weight[0], weight[1] = 0.0, -0.0
    return weight.to(dtype)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_delta_that_comes_back_merges_to_the_same_bits(granularity, dtype, size):
    kind, weight = GRANULARITIES[granularity], hard_weight(dtype)
    units = kind.units((200, 100))
    indices = torch.arange(0, units, 3)
    values = torch.randn(kind.values_shape((200, 100), len(indices))) * size
    flat = values.view(-1)
    old = kind.gather(weight, indices).float().reshape(-1)
    flat[::7], flat[1::7], flat[2::7] = 0.0, -old[1::7], -0.0  # nothing, all of it, nothing the other way
    flat[3::7] = -old[3::7] * (1 + 2**-18)  # the sum is tiny beside both
    new, digest = absolute_values(kind, weight, indices, values)
    assert new.dtype == dtype
    back = delta_values(kind, weight, indices, new, digest)
    assert back.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    once, twice = weight.clone(), weight.clone()
    kind.add_(once, indices, values)
    kind.add_(twice, indices, back)
    assert torch.equal(bits(once), bits(twice))


def test_another_base_is_refused_in_one_bit():
    kind, weight = GRANULARITIES["row"], hard_weight(torch.bfloat16)
    indices = torch.tensor([3, 8])
    new, digest = absolute_values(kind, weight, indices, torch.randn(2, 100))
    untouched = weight.clone()
    untouched[4] = 7
    delta_values(kind, untouched, indices, new, digest)
    weight[3, 5] = weight[3, 5] * (1 + 2**-7)
    with pytest.raises(ValueError, match="not those"):
        delta_values(kind, weight, indices, new, digest)
    with pytest.raises(ValueError, match="need a base in bfloat16"):
        delta_values(kind, weight.float(), indices, new, digest)


def saved(folder, granularity="row", dtype=torch.bfloat16, **config):
    model = adapted(llama(dtype), granularity, criterion="random", density=0.2, values="absolute", **config)
    train(model, BATCHES, steps=3, lr=1e-3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_merges_to_the_same_bits_from_the_file(granularity, dtype, low_cpu_mem_usage, tmp_path):
    model = saved(tmp_path, granularity, dtype)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(t.dtype == dtype for key, t in tensors.items() if key.endswith("fggm_values"))
    loaded = PeftModel.from_pretrained(llama(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for a, b in zip(model.merge_and_unload().parameters(), loaded.merge_and_unload().parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_without_autocast_of_adapters_the_delta_is_wide_all_the_same(tmp_path):
    model = saved(tmp_path, bias="none")
    loaded = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    for a, b in zip(model.merge_and_unload().parameters(), loaded.merge_and_unload().parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_is_refused_on_another_base_and_on_a_quantized_one(tmp_path):
    saved(tmp_path)
    other = llama(torch.bfloat16)
    other.model.layers[1].mlp.down_proj.weight.data *= 1.01
    with pytest.warns(UserWarning, match="another base"), pytest.raises(AdapterFileError, match="not those"):
        PeftModel.from_pretrained(other, tmp_path, check_base=False)
    with pytest.raises(AdapterFileError, match="need a base in bfloat16"):
        PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(AdapterFileError, match="quantized"):
        PeftModel.from_pretrained(quantized(llama(torch.bfloat16), "nf4"), tmp_path)


def test_it_cannot_be_saved_on_a_quantized_base(tmp_path):
    model = adapted(quantized(llama(), "nf4"), criterion="random", values="absolute")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+: values='absolute' cannot be saved: .*quantized"):
        model.save_pretrained(tmp_path)


def test_what_is_merged_meanwhile_does_not_count(tmp_path):
    model = saved(tmp_path / "one")
    expected = copy.deepcopy(model).merge_and_unload()
    model.merge_adapter()
    model.save_pretrained(tmp_path / "two")
    loaded = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path / "two").merge_and_unload()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), loaded.parameters(), strict=True))


def test_a_digest_that_is_missing_or_not_announced_is_an_error(tmp_path):
    saved(tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | {"values": "delta"}))
    with pytest.raises(AdapterFileError, match=r"base_digest.*unexpected"):
        PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path)
    config.write_text(whole)
    save_file({key: t for key, t in load_file(path).items() if "digest" not in key}, path)
    with pytest.raises(AdapterFileError, match=r"base_digest.*missing"):
        PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path)


def test_reading_it_needs_the_base(tmp_path):
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="model="):
        read_adapter(tmp_path)
    _, deltas = read_adapter(tmp_path, llama(torch.bfloat16))
    base, merged = llama(torch.bfloat16), model.merge_and_unload()
    for name, delta in deltas.items():
        weight = base.get_submodule(name).weight.data
        GRANULARITIES["row"].add_(weight, delta["indices"], delta["values"])
        assert torch.equal(weight, merged.get_submodule(name).weight)


def test_it_excludes_a_dtype_of_deltas():
    with pytest.raises(ValueError, match="delta_dtype='bfloat16' has no meaning"):
        FGGMConfig(values="absolute", delta_dtype="bfloat16")
