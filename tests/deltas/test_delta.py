"""``SparseDelta``: reading from folders and models, validation, and saving as PEFT's three files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from example_deltas import ALL, adapter, dense, saved_adapter
from models import gpt2, llama, logits, token_batches
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fggm_peft import AdapterFileError, BaseMismatchError, deltas
from fggm_peft.deltas import SparseDelta, apply_deltas, compose

BATCH = token_batches()[0]


@pytest.mark.parametrize("granularity", ALL)
def test_reading_a_model_and_its_folders_gives_the_same_delta(granularity, tmp_path):
    model = adapter(granularity)
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "fggm_values")}
    expected = {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}
    model.save_pretrained(tmp_path / "peft")
    of_model = SparseDelta.read(model)
    of_folder = SparseDelta.read(tmp_path / "peft")
    own = SparseDelta.read(of_model.save(tmp_path / "own"))  # this file contains the shapes
    for delta in (of_model, of_folder, own):
        result = dense(delta)
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[name], expected[name]) for name in expected)
        assert delta.parameters == sum(p.numel() for n, p in model.named_parameters() if "fggm_values" in n)
    assert 0.15 < own.density < 0.25


@pytest.mark.parametrize("granularity", ALL)
def test_peft_loads_a_saved_delta(granularity, tmp_path):
    model = adapter(granularity)
    folder = SparseDelta.read(model).save(tmp_path / "delta")
    assert {file.name for file in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder), BATCH), logits(model, BATCH))


def test_the_representation_is_one_line():
    a, b = (SparseDelta.read(adapter("row", seed)) for seed in (0, 1))
    text = repr(a)
    assert text == str(a) and text.startswith("SparseDelta(") and "\n" not in text
    assert f"{a.parameters:,} values in rows of 6 weights" in text and "made by compose: weights 1, -1" in repr(a - b)


def test_operators_are_weighted_sums():
    a, b = (SparseDelta.read(adapter("row", seed)) for seed in (0, 1))
    for result, weights in ((a + b, [1, 1]), (a - b, [1, -1]), (0.5 * a + b * -2, [0.5, -2])):
        expected = dense(compose([a, b], weights))
        found = dense(result)
        assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)
    for wrong in (lambda: a + 1, lambda: a * b, lambda: a - "b"):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()


def test_the_shape_of_a_transposed_weight_is_its_matrix_shape(tmp_path):
    model = adapter("row", base=gpt2(), target_modules=["c_fc"])
    assert {module.shape for module in SparseDelta.read(model).modules.values()} == {(128, 32)}


def test_modules_to_save_are_included(tmp_path):
    model = adapter("row", modules_to_save=["model.norm"])
    model.base_model.model.model.norm.modules_to_save["default"].weight.data.fill_(0.5)
    model.save_pretrained(tmp_path / "peft")
    delta = SparseDelta.read(tmp_path / "peft")
    assert list(delta.others) == ["base_model.model.model.norm.weight"]
    again = PeftModel.from_pretrained(llama(), delta.save(tmp_path / "own"))
    assert torch.equal(logits(again, BATCH), logits(model, BATCH))


def damaged(folder, **changed):
    tensors = load_file(folder / "adapter_model.safetensors")
    for part, change in changed.items():
        key = next(key for key in tensors if key.endswith(part))
        tensors[key] = change(tensors[key])
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": lambda t: t + 1000}, "do not fit"),
        ({"indices": lambda t: t.flip(0)}, "not sorted"),
        ({"indices": lambda t: t.float()}, "int32, int64 or uint8"),
        ({"values": lambda t: t[:-1]}, "13 indices for 12 values"),
    ],
)
def test_a_damaged_file_raises_an_error_that_names_the_tensor(changes, message, tmp_path):
    folder = saved_adapter(tmp_path / "delta")
    damaged(folder, **changes)
    with pytest.raises(AdapterFileError, match=message):
        SparseDelta.read(folder)


def test_other_objects_and_folders_are_rejected(tmp_path):
    with pytest.raises(AdapterFileError, match="has no adapter_config"):
        SparseDelta.read(tmp_path)
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA adapter, not FGGM"):
        SparseDelta.read(tmp_path / "lora")
    with pytest.raises(TypeError, match="not a int"):
        SparseDelta.read(3)
    with pytest.raises(ValueError, match="no FGGM adapter named 'other'"):
        SparseDelta.read(adapter(), adapter_name="other")
    folder = saved_adapter(tmp_path / "delta")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None, "base_fingerprint": None})
    )
    with pytest.raises(AdapterFileError, match=r"base_fingerprint .* has no shape of"):
        SparseDelta.read(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterFileError, match="is damaged"):
        SparseDelta.read(folder)


def test_importing_fggm_peft_does_not_load_the_modules_of_deltas():
    script = "import fggm_peft, sys; print(sorted(name for name in sys.modules if name.startswith('fggm_peft.deltas')))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['fggm_peft.deltas']"
    assert all(callable(getattr(deltas, name)) for name in deltas.__all__)


def test_another_base_is_rejected(tmp_path):
    folder = saved_adapter(tmp_path / "delta")
    for base in (llama(hidden_size=32), gpt2()):
        with pytest.raises(BaseMismatchError, match="made for another base"):
            apply_deltas(base, [folder])
