"""The fingerprint of a base model: it matches in every dtype and quantization, and differs for other models."""

from __future__ import annotations

import hashlib
import json
import time

import pytest
import torch
from models import QUANTIZATIONS, adapted, fggm_layers, gpt2, llama, quantized, token_batches, train
from peft import PeftModel, get_peft_model
from torch import nn

from fggm_peft import BaseMismatchError, FGGMConfig
from fggm_peft.core.fingerprint import (
    LEAST_SAMPLES,
    WeightSketch,
    exact_difference,
    sample_places,
    samples_per_weight,
    sketch_weight,
)
from fggm_peft.tuner.files.base_check import base_difference, fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCHES = token_batches()


def layers(model: nn.Module) -> dict:
    return fggm_layers(adapted(model), "default")


def saved(folder, base=None, **config):
    """Train and save an adapter with a data-free criterion; returns the model."""
    model = adapted(llama() if base is None else base, criterion="random", density=0.2, **config)
    train(model, BATCHES, steps=2)
    model.save_pretrained(folder)
    return model


def changed(model: nn.Module, by: float, share: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * parameter.detach().float().std() * by
        chosen = torch.rand(parameter.shape, generator=generator) < share
        parameter.data += (noise * chosen).to(parameter.dtype)
    return model


# The sketch of one weight ------------------------------------------------------------------------


def test_sampled_positions_are_the_documented_hashes():
    digest = hashlib.sha256(b"layers.0.up/3").digest()
    assert sample_places("layers.0.up", (7, 11), 5)[3] == int.from_bytes(digest[:8], "big") % 77
    weight = torch.randn(7, 11)
    sketch = sketch_weight("layers.0.up", weight, 5)
    assert torch.equal(sketch.samples, weight.flatten()[sample_places("layers.0.up", (7, 11), 5)])
    assert torch.equal(sketch_weight("layers.0.up", weight.T.contiguous().T, 5).samples, sketch.samples)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_sketch_survives_conversion_to_text(dtype, quantized):
    sketch = sketch_weight("a", torch.randn(3, 5).to(dtype), 9, quantized)
    read = WeightSketch.from_text(sketch.to_text())
    assert read.shape == (3, 5) and read.quantized == quantized and torch.equal(read.samples, sketch.samples)
    assert WeightSketch.from_text(WeightSketch((3, 5)).to_text()) == WeightSketch((3, 5))


@pytest.mark.parametrize(
    "text", ["", "3", "3x", "3x4 int8 AAAA", "3x4 float32 AAA", "3x4 float32 AAAA", "3x4 float32 ", 5, "3x4\nx"]
)
def test_invalid_text_of_a_sketch_raises_an_error(text):
    with pytest.raises(ValueError, match="not the sketch"):
        WeightSketch.from_text(text)


@pytest.mark.parametrize("here", DTYPES)
@pytest.mark.parametrize("kept", DTYPES)
def test_a_sketch_matches_in_another_dtype_but_not_after_a_small_change(kept, here):
    weight = torch.randn(64, 64) * 0.05
    sketch = sketch_weight("a", weight.to(kept), 256)
    assert exact_difference(sketch, sketch_weight("a", weight.to(here), 256)) == 0.0
    other = weight + 1e-2 * 0.05 * torch.randn(64, 64)
    assert exact_difference(sketch, sketch_weight("a", other.to(here), 256)) > 1e-4


def test_small_models_have_as_many_samples_as_large_models():
    assert samples_per_weight(210) == 16 and samples_per_weight(2) * 2 == LEAST_SAMPLES


def test_a_weight_without_entries_has_no_samples():
    assert sketch_weight("a", torch.zeros(0, 4), 8).samples is None


# Models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", DTYPES)
@pytest.mark.parametrize("kept", DTYPES)
def test_a_base_matches_in_every_dtype(kept, here):
    assert base_difference(layers(llama(here)), fingerprint(layers(llama(kept)))) is None


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_base_matches_the_dense_base_and_vice_versa(kind, build):
    dense = fingerprint(layers(build()))
    assert base_difference(layers(quantized(build(), kind)), dense) is None
    kept = fingerprint(layers(quantized(build(), kind)))
    assert base_difference(layers(build()), kept) is None
    for other in QUANTIZATIONS:
        assert base_difference(layers(quantized(build(), other)), kept) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("by", "share"), [(1e-3, 1.0), (1e-3, 0.05), (1e-2, 0.02)])
def test_a_lightly_fine_tuned_base_is_rejected(by, share, dtype):
    kept = fingerprint(layers(llama()))
    assert "differs by" in base_difference(layers(changed(llama(), by, share).to(dtype)), kept)


@pytest.mark.parametrize(("kind", "by"), [("int8", 0.2), ("nf4", 0.5), ("fp4", 0.5)])
def test_another_quantized_base_is_rejected(kind, by):
    kept = fingerprint(layers(llama()))
    result = base_difference(layers(quantized(changed(llama(), by), kind)), kept)
    assert "quantization explains" in result and "model.layers." in result


def test_a_fingerprint_of_a_hundred_million_parameters_takes_well_under_a_second():
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(25)))
    model = layers(get_peft_model(model, FGGMConfig(target_modules=r"\d+")).base_model.model)
    start = time.perf_counter()
    kept = fingerprint(model)
    assert base_difference(model, kept) is None
    assert time.perf_counter() - start < 0.5
    assert len(json.dumps(kept)) < 10_000


# Adapters ----------------------------------------------------------------------------------------


def test_loading_on_another_base_raises_an_error_that_names_the_module_and_the_base(tmp_path):
    saved(tmp_path)
    with pytest.raises(BaseMismatchError, match=r"model\.layers\.0\.\S+ differs by .* check_base=False"):
        PeftModel.from_pretrained(changed(llama(), 1e-2), tmp_path)
    with pytest.raises(BaseMismatchError, match=r"is \[32, 96\] here, \[64, 96\] in the adapter"):
        PeftModel.from_pretrained(llama(hidden_size=32), tmp_path)


def test_check_base_false_only_warns_and_is_not_saved(tmp_path):
    saved(tmp_path)
    with pytest.warns(UserWarning, match="another base"):
        model = PeftModel.from_pretrained(changed(llama(), 1e-2), tmp_path, check_base=False)
    assert model.peft_config["default"].check_base is False
    model.save_pretrained(tmp_path / "again")
    assert "check_base" not in json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert FGGMConfig.from_pretrained(tmp_path / "again").check_base
    # the saved adapter has the fingerprint of its new base
    PeftModel.from_pretrained(changed(llama(), 1e-2), tmp_path / "again")
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(llama(), tmp_path / "again")


def test_a_second_adapter_is_checked_too_and_the_check_can_be_disabled(tmp_path):
    saved(tmp_path)
    model = adapted(changed(llama(), 1e-2))
    with pytest.raises(BaseMismatchError):
        model.load_adapter(tmp_path, "second")
    model.add_adapter("third", FGGMConfig.from_pretrained(tmp_path, check_base=False))
    with pytest.warns(UserWarning, match="another base"):
        model.load_adapter(tmp_path, "third")
    assert fggm_layers(model, "third")["model.layers.0.mlp.up_proj"].fggm_values["third"].any()


def test_active_and_merged_adapters_do_not_change_the_fingerprint(granularity, tmp_path):
    saved(tmp_path / "one")
    model = saved(tmp_path / "two", granularity=granularity)
    model.merge_adapter()
    model.load_adapter(tmp_path / "one", "one")
    model.merge_adapter(["one"])
    layers_here = fggm_layers(model, "one")
    assert base_difference(layers_here, fingerprint(layers(llama()))) is None
    model.save_pretrained(tmp_path / "merged", selected_adapters=["one"])
    PeftModel.from_pretrained(llama(), tmp_path / "merged" / "one")


def test_the_base_of_a_task_in_a_sequence_includes_the_earlier_merged_tasks(tmp_path):
    base = saved(tmp_path / "one").merge_and_unload()
    saved(tmp_path / "two", base).unload()
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(llama(), tmp_path / "two")
    model = PeftModel.from_pretrained(llama(), tmp_path / "one").merge_and_unload()
    PeftModel.from_pretrained(model, tmp_path / "two")


def test_an_adapter_saved_from_a_quantized_base_keeps_its_dense_fingerprint(tmp_path):
    saved(tmp_path / "dense")
    model = PeftModel.from_pretrained(quantized(llama(), "nf4"), tmp_path / "dense", is_trainable=True)
    model.save_pretrained(tmp_path / "again")
    one, two = (FGGMConfig.from_pretrained(tmp_path / name).base_fingerprint for name in ("dense", "again"))
    assert one == two and "quantized" not in str(two)


def test_tied_embeddings_count_as_one_weight(tmp_path):
    def build():
        return llama(tie_word_embeddings=True)

    saved(tmp_path, build(), target_modules=["embed_tokens", "lm_head", "q_proj"])
    PeftModel.from_pretrained(build(), tmp_path)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(changed(build(), 1e-2), tmp_path)


def test_missing_weights_are_not_checked_and_this_is_logged(tmp_path, caplog):
    saved(tmp_path)
    with torch.device("meta"):
        base = llama()
    PeftModel.from_pretrained(base, tmp_path, torch_device="cpu", low_cpu_mem_usage=True)
    assert "the base was not checked" in caplog.text


def test_a_base_on_the_meta_device_has_a_fingerprint_of_shapes():
    with torch.device("meta"):
        model = adapted(llama())
    assert set(model.peft_config["default"].base_fingerprint.values()) == {"64x64", "32x64", "96x64", "64x96"}


def test_a_config_reused_for_another_base_gets_the_fingerprint_of_that_base(tmp_path):
    saved(tmp_path)
    base = changed(llama(), 1e-2)
    model = get_peft_model(base, FGGMConfig.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path / "other")
    PeftModel.from_pretrained(changed(llama(), 1e-2), tmp_path / "other")
