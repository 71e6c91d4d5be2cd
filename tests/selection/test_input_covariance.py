"""The pass that reads input covariances: which positions count, for which layers, on which processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bert, gpt2, llama, quantized, t5
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification

from fggm_peft import FGGMConfig, InputCovariance, NonFiniteScoreError, ScoreFileError, input_covariance
from fggm_peft.tuner.files.input_covariance import load_input_covariance


def batch(samples: int = 3, length: int = 9, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 50, (samples, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def inputs_of(model: nn.Module, paths: list[str], batches: list[dict]) -> dict[str, torch.Tensor]:
    """The inputs of layers at positions that are no padding, ``[n, i]`` float64."""
    inputs: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    for entry in batches:
        real = entry["attention_mask"] != 0
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path, real=real: inputs[path].append(args[0][real].double())
            )
            for path in paths
        ]
        with torch.no_grad():
            model.eval()(**entry)
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(parts) for path, parts in inputs.items()}


def expected(model: nn.Module, paths: list[str], batches: list[dict]) -> dict[str, torch.Tensor]:
    dense = {path: x.mT @ x / len(x) for path, x in inputs_of(model, paths, batches).items()}
    means = sorted(float(matrix.diagonal().mean()) for matrix in dense.values())
    return {path: matrix / means[len(means) // 2] for path, matrix in dense.items()}


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_it_is_the_normalized_covariance_of_real_positions(make, padding):
    model, batches = make(), [batch(padding=padding), batch(2, seed=1)]
    result = input_covariance(model, batches, progress=False)
    assert "lm_head" not in result
    for path, matrix in expected(model, list(result.inputs), batches).items():
        torch.testing.assert_close(result[path].to(torch.float64).dense(), matrix, atol=0.02 * matrix.max(), rtol=0.02)


def test_layers_with_the_same_input_share_one_covariance():
    result = input_covariance(llama(), [batch()], progress=False)
    block = {path.rpartition(".")[2]: key for path, key in result.inputs.items() if ".layers.0." in path}
    assert block["q_proj"] == block["k_proj"] == block["v_proj"]
    assert block["gate_proj"] == block["up_proj"]
    assert len(result.covariances) == 2 * 4


@pytest.mark.parametrize("rank", [4, 128])
def test_padding_and_batches_do_not_matter(rank):
    whole = batch(4)
    parts = [{k: v[:1] for k, v in whole.items()}, {k: nn.functional.pad(v[1:], (3, 0)) for k, v in whole.items()}]
    a, b = (input_covariance(llama(), data, rank=rank, progress=False) for data in ([whole], parts))
    for path in a.inputs:
        torch.testing.assert_close(a[path].dense(), b[path].dense(), atol=1.0, rtol=0.05)


@pytest.mark.parametrize("name", ["adapted", "lora", "four-bit", "eight-bit"])
def test_adapters_and_quantized_bases_have_the_paths_of_the_plain_model(name):
    plain = input_covariance(llama(), [batch()], progress=False)
    if name == "adapted":
        model = get_peft_model(llama(), FGGMConfig(target_modules="all-linear", criterion="random"))
    elif name == "lora":
        model = get_peft_model(llama(), LoraConfig(target_modules="all-linear"))
    else:
        model = quantized(llama(), {"four-bit": "nf4", "eight-bit": "int8"}[name])
    assert set(input_covariance(model, [batch()], progress=False).inputs) == set(plain.inputs)


def test_it_leaves_the_model_unchanged():
    model = llama().train()
    state = torch.get_rng_state()
    input_covariance(model, [batch()], progress=False)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("make", [t5, lambda: bert(BertForSequenceClassification)])
def test_other_architectures(make):
    entry = batch()
    if make is not t5:
        entry["labels"] = torch.zeros(3, dtype=torch.long)
    result = input_covariance(make(), [entry], progress=False)
    assert result.positions == 3 * 9 and all(torch.isfinite(c.factor).all() for c in result.covariances.values())


def test_only_padding_is_zero():
    entry = batch(padding=9)
    with pytest.warns(UserWarning, match="only padding"):
        result = input_covariance(llama(), [entry], progress=False)
    assert all(not covariance.factor.any() and covariance.floor == 0 for covariance in result.covariances.values())


def test_a_sink_in_one_layer_does_not_change_the_scale_of_the_others():
    covariances = [input_covariance(llama(), [batch()], progress=False)]
    model = llama()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = 1e3
    covariances.append(input_covariance(model, [batch()], progress=False))
    path = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(*(c[path].to(torch.float32).dense() for c in covariances), rtol=0.3, atol=0.3)


def test_num_samples_limits_the_data():
    data = [batch(4, seed=seed) for seed in range(3)]
    one, two = (input_covariance(llama(), entries, 6, progress=False) for entries in (data, [*data[:2], batch(seed=9)]))
    assert one.positions == two.positions == 6 * 9


def test_nan_inputs_name_the_module():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteScoreError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        input_covariance(model, [batch()], progress=False)


def test_errors_name_the_module():
    with pytest.raises(ValueError, match=r"no module model\.nothing"):
        input_covariance(llama(), [batch()], modules=["model.nothing"], progress=False)
    with pytest.raises(ValueError, match=r"model\.embed_tokens is a Embedding"):
        input_covariance(llama(), [batch()], modules=["model.embed_tokens"], progress=False)
    with pytest.raises(ValueError, match="empty"):
        input_covariance(llama(), [], progress=False)


def test_sums_keep_their_size():
    sources = [input_covariance(llama(), [batch(seed=seed)], rank=4, progress=False) for seed in range(9)]
    total = sum(sources[1:], start=sources[0])
    assert total.nbytes == sources[0].nbytes
    assert total.positions == sum(source.positions for source in sources)


def test_a_saved_file_is_the_same(tmp_path):
    result = input_covariance(llama(), [batch()], rank=4, progress=False)
    loaded = load_input_covariance(result.save(tmp_path).parent)
    for path in result.inputs:
        assert torch.equal(result[path].factor, loaded[path].factor) and result[path].floor == loaded[path].floor
        assert torch.equal(result[path].diagonal(), loaded[path].diagonal())  # sums depend on the memory layout
    assert (loaded.inputs, loaded.rank, loaded.positions) == (result.inputs, result.rank, result.positions)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, header: header.update(format="other"),
        lambda tensors, header: header.update(fggm="{"),
        lambda tensors, header: header.update(fggm="{}"),
        lambda tensors, header: header.update(fggm=header["fggm"].replace('"rank": 4', '"rank": NaN')),
        lambda tensors, header: header.update(fggm=header["fggm"].replace('"rank": 4', '"rank": "4"')),
        lambda tensors, header: tensors.pop(next(iter(tensors))),
        lambda tensors, header: tensors.update({next(iter(tensors)): torch.full((64, 4), float("nan"))}),
        lambda tensors, header: tensors.update({next(iter(tensors)): torch.zeros(64)}),
        lambda tensors, header: tensors.update(another=torch.zeros(64, 4)),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    from safetensors import safe_open

    file = input_covariance(llama(), [batch()], rank=4, progress=False).save(tmp_path)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    damage(tensors, header)
    save_file(tensors, file, header)
    with pytest.raises(ScoreFileError):
        load_input_covariance(tmp_path)


def test_the_covariance_of_another_model_is_refused():
    small, large = (input_covariance(llama(hidden_size=size), [batch()], progress=False) for size in (32, 64))
    with pytest.raises(ScoreFileError, match="features"):
        small + large
    with pytest.raises(ScoreFileError, match="no module"):
        InputCovariance.zero({"a": 3})["b"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ScoreFileError, match="input covariance"):
        load_input_covariance(tmp_path / "a" / "b" / "missing")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    covariance = input_covariance(llama(layers=1), [batch()], rank=4, progress=False)
    return covariance.save(tmp_path_factory.mktemp("saved")).read_bytes()


@given(data=st.data())
@settings(max_examples=1000, deadline=None)
def test_a_mutated_file_loads_completely_or_raises_the_documented_error(data, saved, tmp_path_factory):
    """Header bytes decide about shapes, offsets and metadata; they are mutated more often than values."""
    content = bytearray(saved)
    header = 8 + int.from_bytes(saved[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        end = header if data.draw(st.booleans()) else len(content)
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    file.write_bytes(bytes(content))
    try:
        loaded = load_input_covariance(file)
    except ScoreFileError:
        return
    assert set(loaded.inputs.values()) == set(loaded.covariances)
    assert all(torch.isfinite(c.factor).all() and 0 <= c.floor < float("inf") for c in loaded.covariances.values())
