"""The main workflow on a CUDA device: select, train, merge, unmerge, save and load, on dense and quantized bases."""

from __future__ import annotations

import copy

import pytest
import torch
from models import adapted, fggm_layers, llama, logits, quantized, token_batches, train
from peft import PeftModel
from torch import nn

from fggm_peft import select_parameters
from fggm_peft.core import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
BASES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float16, "nf4": torch.bfloat16}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.1, "nf4": 0.1}


def base(kind: str) -> nn.Module:
    model = llama(BASES[kind])
    return (quantized(model, kind, DEVICE) if kind in ("int8", "nf4") else model.to(DEVICE)).eval()


def batches(device: str = DEVICE) -> list[dict]:
    some = token_batches(sizes=(5, 4, 5), padding="right")
    return [{key: tensor.to(device) for key, tensor in batch.items()} for batch in some]


@pytest.mark.parametrize("triton", ["0", "1", "always"])
@pytest.mark.parametrize("kind", BASES)
def test_select_train_merge_unmerge_save_and_load(kind, triton, granularity, tmp_path):
    if kind in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    before = kernels.use_triton(triton)
    try:
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
    finally:
        kernels.use_triton(before)


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
    losses = []
    for device in ("cpu", DEVICE):
        model = adapted(llama().to(device), granularity, criterion="random", init_weights=False)
        losses.append(train(model, batches(device), steps=5))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_repeated_runs_are_bit_identical(granularity):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = llama(torch.bfloat16, attn_implementation="eager").to(
            DEVICE
        )  # flash attention's backward is not deterministic
        model = adapted(model, granularity, criterion="random", init_weights=False)
        train(model, batches(), steps=5)
        results.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
