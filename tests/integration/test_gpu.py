"""The library on a CUDA device: the main workflow on dense and quantized bases, and agreement with a CPU and float64.

``FGGM_TEST_DEVICE=cpu`` runs the same tests on a CPU, so that no time on a device is lost to an error in a test.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict

import pytest
import torch
from models import adapted, fggm_layers, llama, logits, quantized, token_batches, train
from peft import PeftModel
from reference import TOLERANCE as TOLERANCE_OF
from reference import relative_error
from torch import nn

from fggm_peft import HarmDecay, input_covariance, select_parameters

DEVICE = os.environ.get("FGGM_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BASES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float16, "nf4": torch.bfloat16}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.1, "nf4": 0.1}


def base(kind: str) -> nn.Module:
    model = llama(BASES[kind])
    return (quantized(model, kind, DEVICE) if kind in ("int8", "nf4") else model.to(DEVICE)).eval()


def trainable(granularity: str, device: str = DEVICE, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    """A model with a random support and random values, which are the same on every device."""
    return adapted(llama(dtype, **config), granularity, criterion="random", init_weights=False).to(device)


def gradients(model: nn.Module, batch: dict) -> list[torch.Tensor]:
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [g.cpu() for g in torch.autograd.grad(model.train()(**batch).loss, values)]


def batches(device: str = DEVICE) -> list[dict]:
    some = token_batches(sizes=(5, 4, 5), padding="right")
    return [{key: tensor.to(device) for key, tensor in batch.items()} for batch in some]


@pytest.mark.parametrize("kind", BASES)
def test_select_train_merge_unmerge_save_and_load(kind, granularity, tmp_path):
    if kind in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    model = adapted(base(kind), granularity, quantized_merge="keep")
    start = logits(model, batches()[0])
    report = select_parameters(model, batches(), progress=False)
    assert report.samples == 14
    losses = train(model, batches()[:1], steps=8)
    assert losses[-1] < losses[0]
    trained = logits(model, batches()[0])
    assert not torch.equal(trained, start)
    close = {"rtol": TOLERANCE[kind], "atol": TOLERANCE[kind]}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, batches()[0]), trained, **close)
    model.unmerge_adapter()
    assert torch.equal(logits(model, batches()[0]), trained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path)
    assert torch.equal(logits(loaded, batches()[0]), trained)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged, batches()[0]), trained, **close)


def test_the_support_equals_the_one_selected_on_a_cpu(granularity):
    supports = []
    for device in ("cpu", DEVICE):
        model = adapted(llama().to(device), granularity)
        select_parameters(model, batches(device), progress=False)
        chosen = [layer.delta("default").indices.cpu() for layer in fggm_layers(model, "default").values()]
        supports.append([set(indices.tolist()) for indices in chosen])
    for one, other in zip(*supports, strict=True):
        assert len(one & other) >= 0.98 * len(one)  # nearly equal scores may be ranked differently


def test_training_on_a_gpu_gives_the_losses_of_a_cpu(granularity):
    losses = [train(trainable(granularity, device), batches(device), steps=5) for device in ("cpu", DEVICE)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@each_dtype
def test_a_layer_agrees_with_float64(dtype, granularity):
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(layer=nn.Linear(64, 96, dtype=dtype)))
    model = adapted(base, granularity, target_modules=["layer"], criterion="random", init_weights=False, density=0.3)
    exact, x, g = copy.deepcopy(model).double(), torch.randn(33, 64, dtype=dtype), torch.randn(33, 96, dtype=dtype)
    results = []
    for each, device, wide in ((model, DEVICE, dtype), (exact, "cpu", torch.float64)):
        each, inputs = each.to(device), x.to(device, wide, copy=True).requires_grad_()
        y = each(inputs)
        y.backward(g.to(device, wide))
        values = next(parameter for parameter in each.parameters() if parameter.requires_grad)
        results.append([tensor.detach().cpu() for tensor in (y, inputs.grad, values.grad)])
    assert all(relative_error(one, exact) < TOLERANCE_OF[dtype] for one, exact in zip(*results, strict=True))


@each_dtype
def test_merged_weights_are_bit_identical_to_those_of_a_cpu(dtype, granularity):
    weights = []
    for device in ("cpu", DEVICE):
        model = trainable(granularity, device, dtype)
        model.merge_adapter()
        weights.append([layer.get_base_layer().weight.cpu() for layer in fggm_layers(model, "default").values()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_gradient_checkpointing_changes_neither_gradients_nor_the_support(granularity):
    results = []
    for checkpointing in (False, True):
        model, selected = trainable(granularity), adapted(llama().to(DEVICE), granularity)
        if checkpointing:
            model.gradient_checkpointing_enable()
            selected.gradient_checkpointing_enable()
        select_parameters(selected, batches(), progress=False)
        support = [layer.delta("default").indices for layer in fggm_layers(selected, "default").values()]
        results.append((gradients(model, batches()[0]), support))
    (plain, support), (checkpointed, same) = results
    torch.testing.assert_close(checkpointed, plain)
    assert all(torch.equal(one, other) for one, other in zip(support, same, strict=True))


@torch._dynamo.config.patch(recompile_limit=64)
def test_a_compiled_model_trains_like_the_model(granularity):
    expected = train(trainable(granularity), batches()[:1], steps=3)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"  # inductor needs a C++ compiler on a CPU
    torch._dynamo.reset()
    compiled = torch.compile(trainable(granularity), backend=backend)
    assert train(compiled, batches()[:1], steps=3) == pytest.approx(expected, rel=1e-3)


def test_generation_with_a_static_cache(granularity):
    """On a CUDA device transformers compiles the model for a static cache, and records CUDA graphs."""
    model = trainable(granularity).eval()
    prompt = {"input_ids": batches()[0]["input_ids"][:, :4], "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**prompt)
    assert torch.equal(model.generate(**prompt, cache_implementation="static"), expected)


def test_harm_decay_gives_the_values_of_a_cpu(granularity):
    results = []
    for device in ("cpu", DEVICE):
        model = trainable(granularity, device)
        values = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(values, lr=0.1)
        HarmDecay(input_covariance(model, batches(device), progress=False), every=1).attach(model, optimizer)
        model.train()(**batches(device)[0]).loss.backward()
        optimizer.step()
        results.append([value.detach().cpu() for value in values])
    assert all(relative_error(other, one) < 1e-2 for one, other in zip(*results, strict=True))


def test_repeated_runs_are_bit_identical(granularity):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        # flash attention's backward is not deterministic
        model = trainable(granularity, dtype=torch.bfloat16, attn_implementation="eager")
        train(model, batches(), steps=5)
        results.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
