"""Adapter files: reading, saving, sizes, and one type of error for every kind of damage."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections import OrderedDict

import pytest
import torch
from models import adapted, fggm_layers, llama, logits, token_batches, train
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from fggm_peft import AdapterFileError, FGGMConfig
from fggm_peft.deltas import SparseDelta, save_adapter, verify
from fggm_peft.tuner.files.tensors import MAX_HEADER_BYTES

BATCHES = token_batches()
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def trained(granularity: str = "row", **config):
    model = adapted(llama(), granularity, **{"criterion": "random", "density": 0.2, **config})
    train(model, BATCHES, steps=2)
    return model


def tiny(folder, granularity="element", **config):
    """An adapter of one small layer."""
    model = trained(granularity, target_modules=["k_proj"], layers_to_transform=0, density=0.05, **config)
    model.save_pretrained(folder)
    return model


# Reading -----------------------------------------------------------------------------------------


def test_reading_restores_the_trained_deltas(granularity, tmp_path):
    model = trained(granularity)
    model.save_pretrained(tmp_path)
    delta = SparseDelta.read(tmp_path)
    assert str(delta.config.granularity) == granularity
    layers = fggm_layers(model, "default")
    assert delta.modules.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(delta.modules[name].indices, layer.fggm_indices["default"])
        assert delta.modules[name].indices.dtype == torch.int32
        assert torch.equal(delta.modules[name].values, layer.fggm_values["default"])


@pytest.mark.parametrize("name", ["fggm_head", "my_fggm_indices", "my_fggm_values", "fggm_"])
def test_modules_trained_whole_may_have_the_prefix_of_fggm_in_their_name(name, granularity, tmp_path):
    base = nn.Sequential(OrderedDict([("first", nn.Linear(4, 4)), (name, nn.Linear(4, 2))]))
    config = {"criterion": "random", "init_weights": False, "granularity": granularity}
    model = get_peft_model(copy.deepcopy(base), FGGMConfig(target_modules=["first"], modules_to_save=[name], **config))
    nn.init.normal_(model.base_model.model[1].modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    assert list(SparseDelta.read(tmp_path).modules) == ["first"]
    assert verify(tmp_path)["other_keys"] == [f"base_model.model.{name}.{part}" for part in ("bias", "weight")]
    x = torch.randn(3, 4)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))
    for source in (model, tmp_path):
        delta = SparseDelta.read(source)
        assert list(delta.modules) == ["first"] and len(delta.others) == 2


def test_tensors_of_other_modules_are_reported_and_unknown_tensors_are_rejected(tmp_path):
    trained(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    assert verify(tmp_path)["other_keys"] == ["base_model.model.lm_head.weight"]
    save_file({**load_file(tmp_path / FILE), "something": torch.zeros(3)}, tmp_path / FILE)
    with pytest.raises(AdapterFileError, match="unknown key something"):
        SparseDelta.read(tmp_path)
    with pytest.raises(AdapterFileError, match="something: unknown key"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_other_methods_missing_files_and_pickles_raise_clear_errors(tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="is a LORA adapter"):
        SparseDelta.read(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json is not JSON"):
        SparseDelta.read(tmp_path)
    tiny(tmp_path)
    torch.save(load_file(tmp_path / FILE), tmp_path / "adapter_model.bin")
    (tmp_path / FILE).unlink()
    with pytest.raises(AdapterFileError, match="only read from safetensors files"):
        SparseDelta.read(tmp_path)
    with pytest.raises(AdapterFileError, match=r"there is no folder .*nowhere"):
        SparseDelta.read(tmp_path / "nowhere")


def test_a_newer_format_raises_an_error_that_says_to_upgrade(tmp_path):
    tiny(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"fggm_format": 99, "made_with": {"fggm_peft": "9.9"}}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"a_field_of_the_future": 1}))
    with (
        pytest.warns(UserWarning, match="a_field_of_the_future"),
        pytest.raises(AdapterFileError, match=r"file format 99.*'fggm_peft': '9\.9'.*upgrade"),
    ):
        PeftModel.from_pretrained(llama(), tmp_path)


# Dtypes and size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_deltas_are_rounded_on_disk_and_float32_in_memory(granularity, dtype, low_cpu_mem_usage, tmp_path):
    model = trained(granularity, delta_dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    stored = {key: t for key, t in load_file(tmp_path / FILE).items() if key.endswith("fggm_values")}
    for name, layer in fggm_layers(loaded, "default").items():
        trained_values = fggm_layers(model, "default")[name].fggm_values["default"]
        rounded = trained_values.to(getattr(torch, dtype))
        assert torch.equal(stored[f"base_model.model.{name}.fggm_values"], rounded)
        assert layer.fggm_values["default"].dtype == torch.float32
        assert torch.equal(layer.fggm_values["default"], rounded.float())
    assert verify(tmp_path)["dtypes"] == [dtype]


def test_the_file_contains_only_values_rows_and_a_header(tmp_path):
    """With 4 bytes per row and a header, 9,175,040 bfloat16 values take 17.6 MiB."""
    size = {"hidden_size": 512, "intermediate_size": 1024}
    model = adapted(llama(torch.bfloat16, **size), criterion="random", density=0.3, delta_dtype="bfloat16")
    layers = fggm_layers(model, "default").values()
    for layer in layers:
        layer.fggm_values["default"].data.normal_()
    model.save_pretrained(tmp_path)
    values = sum(layer.fggm_values["default"].numel() for layer in layers)
    rows = sum(len(layer.fggm_indices["default"]) for layer in layers)
    header = 8 + int.from_bytes((tmp_path / FILE).read_bytes()[:8], "little")
    assert (tmp_path / FILE).stat().st_size == 2 * values + 4 * rows + header
    assert header < 250 * 2 * len(layers)
    assert (tmp_path / FILE).stat().st_size / values * 9_175_040 <= 18.5 * 2**20


@pytest.mark.parametrize("density", [0.01, 0.05, 0.3])
def test_a_file_of_elements_is_at_most_a_tenth_above_its_entropy(density, tmp_path):
    size = {"hidden_size": 512, "intermediate_size": 1024}
    model = adapted(llama(torch.bfloat16, **size), "element", criterion="random", density=density)
    model.peft_config["default"].delta_dtype = "bfloat16"
    for layer in fggm_layers(model, "default").values():
        layer.fggm_values["default"].data.normal_()
    model.save_pretrained(tmp_path)
    result = verify(tmp_path)
    assert result["bound_bytes"] < result["bytes"] <= 1.1 * result["bound_bytes"]


# Saving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_not_saved_and_the_error_names_the_module(value, tmp_path):
    model = trained()
    fggm_layers(model, "default")["model.layers.1.mlp.up_proj"].fggm_values["default"].data[0, 0] = value
    with pytest.raises(AdapterFileError, match=r"^model\.layers\.1\.mlp\.up_proj: a number of its values is NaN"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_delta_too_large_for_float16_is_not_saved_as_float16(tmp_path):
    model = trained(delta_dtype="float16")
    fggm_layers(model, "default")["model.layers.1.mlp.up_proj"].fggm_values["default"].data[0, 0] = 1e6
    with pytest.raises(AdapterFileError, match="infinite as float16"):
        model.save_pretrained(tmp_path)


def test_an_interrupted_save_keeps_the_old_files(tmp_path, monkeypatch):
    trained().save_pretrained(tmp_path / "delta")
    (tmp_path / "delta" / "README.md").write_text("Written by hand.")
    (tmp_path / "delta" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "delta").iterdir()}
    model = trained("column")

    def die(*arguments, **options):
        (tmp_path / "reached").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("fggm_peft.tuner.config.FGGMConfig.save_pretrained", die)  # the tensors are already written
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tmp_path / "delta")
    assert (tmp_path / "reached").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "delta").iterdir()} == before
    monkeypatch.undo()
    save_adapter(model, tmp_path / "delta")
    assert SparseDelta.read(tmp_path / "delta").granularity.name == "column"
    assert "Written by hand." in (tmp_path / "delta" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "reached"]


def test_the_config_contains_what_is_needed_to_reproduce_the_delta(tmp_path):
    trained(density_pattern={"layers.1.mlp.up_proj": 0.5}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["fggm_format"] == 1 and config["criterion"] == "random" and config["density"] == 0.2
    assert [config["support_sizes"][f"model.layers.{n}.mlp.up_proj"] for n in (0, 1)] == [19, 48]
    assert {"fggm_peft", "torch", "transformers"} == config["made_with"].keys() and config["peft_version"]
    assert len(config["base_fingerprint"]) == 14


# Damaged files -----------------------------------------------------------------------------------


def mutated(data: bytes, generator: random.Random) -> bytes:
    """The file with one random fault: a bit, bytes, the length or a number in its header."""
    kind = generator.randrange(6)
    length = struct.unpack("<Q", data[:8])[0]
    if kind == 0:
        return data[: generator.randrange(len(data))]
    if kind == 1:
        return data + bytes(generator.randrange(1, 64))
    if kind == 2:
        return struct.pack("<Q", generator.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])) + data[8:]
    if kind == 3:  # a byte of the header
        place = 8 + generator.randrange(length)
        return data[:place] + bytes([generator.randrange(256)]) + data[place + 1 :]
    if kind == 4:  # the description of a tensor
        header = json.loads(data[8 : 8 + length])
        key = generator.choice([key for key in header if key != "__metadata__"])
        what = generator.randrange(4)
        if what == 0:
            header[key]["shape"] = [generator.choice([0, 1, 7, 2**40, 2**62]) for _ in range(generator.randrange(4))]
        elif what == 1:
            header[key]["dtype"] = generator.choice(["F32", "BF16", "F16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X"])
        elif what == 2:
            header[key]["data_offsets"] = [generator.randrange(200), generator.randrange(2**33)]
        else:
            header[generator.choice([key + "x", "a.fggm_values", key.replace("fggm_", "fggm_not_"), ""])] = header.pop(
                key
            )
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    place = 8 + length + generator.randrange(len(data) - 8 - length)
    return data[:place] + bytes([data[place] ^ 1 << generator.randrange(8)]) + data[place + 1 :]


def assert_valid(delta, base) -> None:
    """Check that a mutated file that can be read is a valid sparse delta."""
    for name, module in delta.modules.items():
        o, i = base.get_submodule(name).weight.shape
        indices = module.indices.long()
        k = module.values.shape[delta.granularity.unit_dim]
        assert len(indices) == k and torch.isfinite(module.values).all()
        assert not len(indices) or (indices.min() >= 0 and indices.max() < o * i and (indices.diff() > 0).all())


def fuzz(folder, count: int, seed: int, **config) -> int:
    tiny(folder, **config)
    data, base = (folder / FILE).read_bytes(), llama()
    model = PeftModel.from_pretrained(base, folder)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = random.Random(seed)
    rejected = 0
    for _ in range(count):
        (folder / FILE).write_bytes(mutated(data, generator))
        try:
            delta = SparseDelta.read(folder)
        except AdapterFileError as error:
            rejected += 1
            assert str(folder) in str(error)
            with pytest.raises(AdapterFileError):  # loading fails too, before it changes the model
                FGGMConfig.from_pretrained(folder)
                set_peft_model_state_dict(model, load_file(folder / FILE))
            now = model.state_dict()
            assert now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)
        else:
            assert_valid(delta, llama())
    return rejected


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_every_kind_of_damage_raises_the_same_type_of_error(granularity, tmp_path):
    assert fuzz(tmp_path, 150, 1, granularity=granularity) > 75


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_thousands_of_damaged_files_raise_the_same_type_of_error(seed, tmp_path):
    assert fuzz(tmp_path, 1000, seed, granularity=["element", "row", "column"][seed % 3]) > 500


@pytest.mark.parametrize("text", ["", "[]", "5", '{"peft_type": 3}', '{"peft_type": "FGGM", "base_fingerprint": 5}'])
def test_a_damaged_config_raises_an_error_that_names_the_file(text, tmp_path):
    tiny(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json|is a 3 adapter"):
        SparseDelta.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_fingerprint", {"model.layers.0.self_attn.k_proj": "no sketch"}),
        ("base_fingerprint", [1]),
        ("made_with", "me"),
        ("fggm_format", "1"),
        ("delta_dtype", "int8"),
        ("granularity", 5),
        ("density", "much"),
        ("threshold", {"policy": "none"}),
        ("target_modules", 7),
        ("selection", 3),
    ],
)
def test_an_invalid_config_field_raises_an_error_that_names_the_file(name, value, tmp_path):
    tiny(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {name: value}))
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        SparseDelta.read(tmp_path)


def test_a_header_that_is_too_large_is_rejected_before_it_is_read(tmp_path):
    tiny(tmp_path)
    with (tmp_path / FILE).open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        stream.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(AdapterFileError, match="header"):
        SparseDelta.read(tmp_path)


def test_non_finite_values_are_rejected(granularity, tmp_path):
    tiny(tmp_path, granularity)
    tensors = load_file(tmp_path / FILE)
    key = next(key for key in tensors if key.endswith("values"))
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / FILE)
    for load in (lambda: SparseDelta.read(tmp_path), lambda: PeftModel.from_pretrained(llama(), tmp_path)):
        with pytest.raises(AdapterFileError, match=r"fggm_values.*NaN"):
            load()


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_a_damaged_file_leaves_no_adapter(extra, tmp_path):
    trained(target_modules=["q_proj"], **extra).save_pretrained(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / FILE)
    del tensors[next(key for key in tensors if key.endswith("fggm_values"))]
    save_file(tensors, tmp_path / "bad" / FILE)
    base = llama()
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(base, tmp_path / "bad")
    assert [name for name, _ in base.named_modules()] == modules and not hasattr(base, "peft_config")
    model = PeftModel.from_pretrained(base, tmp_path / "good", "first")
    before, names = logits(model, BATCHES[0]), set(model.state_dict())
    with pytest.raises(AdapterFileError):
        model.load_adapter(tmp_path / "bad", "second")
    assert list(model.peft_config) == ["first"] == model.active_adapters and set(model.state_dict()) == names
    assert torch.equal(logits(model, BATCHES[0]), before)
    model.load_adapter(tmp_path / "good", "second")
    with pytest.raises(AdapterFileError):  # an adapter that exists keeps its values
        model.load_adapter(tmp_path / "bad", "second")
    model.set_adapter("second")
    assert torch.equal(logits(model, BATCHES[0]), before)


def test_a_module_without_an_adapter_in_the_model_is_rejected(tmp_path):
    tiny(tmp_path)
    state = load_file(tmp_path / FILE)
    model = trained("element", target_modules=["q_proj"])
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    with pytest.raises(AdapterFileError, match=r"k_proj\.fggm_\w+: unknown key: the model has no such layer"):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(model).items())
