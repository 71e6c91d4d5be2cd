"""Replacing a loaded adapter by another task's adapter, eager and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import fggm_layers, llama, logits, token_batches
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from fggm_peft import FGGMConfig

BATCH = token_batches()[0]


def saved(folder: Path, base=llama, **config) -> Path:
    """Save an adapter with random support and values; returns its folder."""
    options = {"criterion": "random", "init_weights": False, "density": 0.2} | config
    get_peft_model(base(), FGGMConfig(**options)).save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path, granularity):
    """Three tasks of one granularity: two of equal size and a smaller one."""
    return [
        saved(tmp_path / str(seed), granularity=granularity, seed=seed, density=density)
        for seed, density in enumerate((0.2, 0.2, 0.1))
    ]


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(llama(), folder)


def tensors_of(model) -> list[torch.Tensor]:
    layers = fggm_layers(model, "default").values()
    return [t for layer in layers for t in (layer.fggm_values["default"], layer.fggm_indices["default"])]


def test_a_swapped_adapter_computes_like_a_loaded_one_in_the_same_tensors(folders):
    model = loaded(folders[0])
    before = [(tensor, tensor.data_ptr()) for tensor in tensors_of(model)]
    hotswap_adapter(model, folders[1], "default", torch_device="cpu")
    assert all(
        tensor is new and tensor.data_ptr() == new.data_ptr()
        for (tensor, _), new in zip(before, tensors_of(model), strict=True)
    )
    assert all(tensor.data_ptr() == place for tensor, place in before)
    assert torch.equal(logits(model, BATCH), logits(loaded(folders[1]), BATCH))
    assert model.peft_config["default"].seed == 1 and model.peft_config["default"].inference_mode
    hotswap_adapter(model, folders[2], "default")  # of another size
    assert torch.equal(logits(model, BATCH), logits(loaded(folders[2]), BATCH))


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_a_swap_of_equal_sizes_does_not_recompile_a_model(tmp_path, granularity):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))

    config = {"granularity": granularity, "target_modules": ["0", "2"], "base": base}
    paths = [saved(tmp_path / str(seed), seed=seed, **config) for seed in range(3)]
    model = PeftModel.from_pretrained(base(), paths[0])
    torch._dynamo.reset()
    compilations = []
    backend = lambda graph, inputs: compilations.append(1) or graph.forward  # noqa: E731
    compiled, x = torch.compile(model.eval(), fullgraph=True, backend=backend), torch.randn(40, 16)
    with torch.inference_mode():
        for path in [*paths, paths[0]]:
            hotswap_adapter(compiled, path, "default")
            torch.testing.assert_close(compiled(x), PeftModel.from_pretrained(base(), path)(x))
    assert len(compilations) == 1


def test_missing_modules_get_no_delta_and_additional_modules_are_rejected(tmp_path):
    both = saved(tmp_path / "both", target_modules=["q_proj", "up_proj"])
    one = saved(tmp_path / "one", target_modules=["up_proj"], seed=1)
    model = loaded(both)
    hotswap_adapter(model, one, "default")
    torch.testing.assert_close(logits(model, BATCH), logits(loaded(one), BATCH))
    hotswap_adapter(model, both, "default")
    torch.testing.assert_close(logits(model, BATCH), logits(loaded(both), BATCH))
    with pytest.raises(RuntimeError, match=r"unexpected keys found: model\.layers\.0\.self_attn\.q_proj"):
        hotswap_adapter(loaded(one), both, "default")


def test_modules_to_save_are_swapped_too(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))

    config = {"target_modules": ["0"], "modules_to_save": ["1"], "base": base}
    first = saved(tmp_path / "first", **config)
    options = {key: value for key, value in config.items() if key != "base"} | {"density": 0.1, "seed": 1}
    other = get_peft_model(base(), FGGMConfig(criterion="random", init_weights=False, **options))
    nn.init.normal_(other.base_model.model[1].modules_to_save["default"].weight)
    other.save_pretrained(tmp_path / "other")
    x = torch.randn(5, 6)
    model = PeftModel.from_pretrained(base(), first)
    model.base_model.model[0].set_scale("default", 3.0)
    hotswap_adapter(model, tmp_path / "other", "default")
    torch.testing.assert_close(model(x), other(x))


def test_unsupported_swaps_raise_an_error(tmp_path):
    row, column = saved(tmp_path / "row"), saved(tmp_path / "column", granularity="column")
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    model = loaded(row)
    with pytest.raises(ValueError, match=r"for granularity, row != column"):
        hotswap_adapter(model, column, "default")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: FGGM and LORA"):
        hotswap_adapter(model, tmp_path / "lora", "default")
    with pytest.raises(ValueError, match="no FGGM adapter 'task'"):
        hotswap_adapter(model, row, "task")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged; call unmerge_adapter\(\)"):
        hotswap_adapter(model, row, "default")
