"""Harm decay on two processes gives what one process gives: DDP, FSDP2 and the statistics."""

from __future__ import annotations

import pytest
import torch
from models import adapted, fggm_layers, llama, mixture, token_batches
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fggm_peft import attach_harm_decay, input_covariance, select_parameters

pytestmark = pytest.mark.distributed
REFERENCE = token_batches(sizes=(2, 2), seed=5)


def rank() -> int:
    return torch.distributed.get_rank()


def built(granularity: str) -> nn.Module:
    model = adapted(llama(), granularity, density=0.2, harm_decay=1.0)
    # every process reads the same data, so that the mean is that of one process
    select_parameters(model, token_batches(), reference=[REFERENCE], progress=False)
    return model


def batch(seed: int, length: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (4, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def train(model: nn.Module, batches: list[dict]) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    attach_harm_decay(getattr(model, "module", model), optimizer)
    for entry in batches:
        model(**entry).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, Tensor]:
    found = {name: layer.fggm_values["default"] for name, layer in fggm_layers(model, "default").items()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in found.items()}


def trained(kind: str, granularity: str) -> dict[str, Tensor]:
    model, batches = built(granularity), [batch(seed) for seed in range(8)]
    if kind == "one":
        train(model, batches)
        return values(model)
    shares = [{key: value.chunk(2)[rank()] for key, value in entry.items()} for entry in batches]
    if kind == "ddp":
        train(nn.parallel.DistributedDataParallel(model), shares)
        return values(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, shares)
    return values(model)


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_decay_like_one(kind, granularity, processes):
    expected = trained("one", granularity)
    for result in processes(trained, kind, granularity):
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.any()
            torch.testing.assert_close(result[name], tensor, atol=1e-4, rtol=1e-3)


def read(experts: bool, rank_reads: bool) -> dict[str, Tensor]:
    data, settings = token_batches(sizes=(2, 1, 2), seed=3), {"target_parameters": ["experts.gate_up_proj"]}
    model = adapted(mixture("Mixtral"), "row", criterion="random", **settings) if experts else llama()
    result = input_covariance(model, data[rank() :: 2] if rank_reads else data, progress=False)
    return {path: result[path].to(torch.float32).dense() for path in result.inputs}


@pytest.mark.parametrize("experts", [False, True])
def test_two_processes_read_the_covariance_of_all_data(experts, processes):
    expected = read(experts, False)
    assert any("experts" in path for path in expected) == experts
    for result in processes(read, experts, True):
        for path, matrix in expected.items():
            torch.testing.assert_close(result[path], matrix, atol=0.02 * float(matrix.max()), rtol=0.02)
