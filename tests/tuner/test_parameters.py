"""Experts, routers and ``nn.MultiheadAttention`` against the model with dense deltas, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from models import adapted, fisher_scores, logits, mixture, token_batches, train
from peft import PeftModel
from torch import nn

from fggm_peft import SparseDelta, apply_deltas, select_parameters
from fggm_peft.core.granularity import granularity_from
from fggm_peft.selection.likelihood import default_log_likelihood
from fggm_peft.tuner.target import find_targets

ROUTERS = {"Mixtral": "gate", "Qwen3Moe": "gate", "GptOss": "router", "Llama4": "router", "DeepseekV3": "gate"}
TRANSPOSED = {"GptOss", "Llama4"}


@pytest.fixture(params=ROUTERS)
def name(request) -> str:
    return request.param


def parameters(name: str) -> list[str]:
    return ["experts.gate_up_proj", "experts.down_proj", f"{ROUTERS[name]}.weight"]


def with_experts(name: str, granularity: str = "row", dtype=torch.float64, implementation="eager", **config):
    """A model whose experts and routers have random deltas."""
    settings = {"criterion": "random", "density": 0.3, "init_weights": False} | config
    return adapted(mixture(name, dtype, implementation), granularity, target_parameters=parameters(name), **settings)


def entry(tensors: dict, path: str, name: str):
    """The matrix ``[o, i]`` of a path, of a parameter or of its gradient."""
    if f"{path}.weight" in tensors:
        return tensors[f"{path}.weight"]
    stack, _, expert = path.rpartition(".")
    return tensors[stack][int(expert)].mT if name in TRANSPOSED else tensors[stack][int(expert)]


def dense(model: nn.Module, name: str) -> nn.Module:
    """The base model with the dense deltas added to its parameters, all trainable."""
    base = mixture(name, torch.float64)
    tensors = dict(base.named_parameters())
    with torch.no_grad():
        for path, target in find_targets(model, "default").items():
            matrix = entry(tensors, path, name)
            matrix += target.layer.unmatrix(target.layer.get_delta_weight("default")).view(matrix.shape)
    return base


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
def test_forward_and_gradients_are_those_of_dense_weights(name, granularity):
    model, batch = with_experts(name, granularity), token_batches()[0]
    reference = dense(model, name)
    model.train()
    reference.train()
    loss, expected = model(**batch).loss, reference(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    expected.backward()
    gradients = {key: parameter.grad for key, parameter in reference.named_parameters()}
    for path, target in find_targets(model, "default").items():
        chosen = target.granularity.gather(entry(gradients, path, name), target.indices)
        torch.testing.assert_close(target.values.grad.double(), chosen, rtol=1e-5, atol=1e-9, msg=path)


def naive_scores(model: nn.Module, name: str, batches, paths, granularity: str) -> dict[str, torch.Tensor]:
    likelihood, sums, count = default_log_likelihood(model, None), dict.fromkeys(paths, 0), 0
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    for batch in batches:
        for sample in range(len(batch["input_ids"])):
            one = {key: value[sample : sample + 1] for key, value in batch.items()}
            found = torch.autograd.grad(likelihood(model, one).sum(), list(parameters.values()), allow_unused=True)
            gradients = {
                key: torch.zeros_like(parameters[key]) if g is None else g
                for key, g in zip(parameters, found, strict=True)
            }
            for path in paths:
                square = entry(gradients, path, name).square()
                sums[path] = sums[path] + granularity_from(granularity).reduce(square)
            count += 1
    return {path: value / count for path, value in sums.items()}


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
def test_fisher_is_that_of_a_loop_over_samples(name, granularity):
    model = with_experts(name, granularity, criterion="fisher", init_weights=True)
    actual = fisher_scores(model, token_batches(padding="right"))
    reference = mixture(name, torch.float64).eval()
    expected = naive_scores(reference, name, token_batches(padding="right"), actual, granularity)
    for path, scores in expected.items():
        torch.testing.assert_close(actual[path].double(), scores, rtol=1e-4, atol=float(scores.max()) * 1e-5, msg=path)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_has_the_same_scores(implementation):
    scores = [
        fisher_scores(with_experts("Mixtral", "row", torch.float32, kind, criterion="fisher"), token_batches())
        for kind in ("eager", implementation)
    ]
    for path, expected in scores[0].items():
        torch.testing.assert_close(scores[1][path], expected, rtol=1e-3, atol=1e-6, msg=path)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_the_scores_of_experts(use_reentrant):
    plain = fisher_scores(with_experts("Mixtral", criterion="fisher"), token_batches())
    model = with_experts("Mixtral", criterion="fisher")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for path, scores in fisher_scores(model, token_batches()).items():
        torch.testing.assert_close(scores, plain[path], msg=path)


def test_an_expert_without_tokens_has_scores_of_zero_and_an_empty_support():
    model = with_experts("Mixtral", criterion="fisher", init_weights=True)
    with torch.no_grad():  # the router never chooses the last expert
        for layer in model.get_base_model().model.layers:
            layer.mlp.gate.base_layer.weight[3] = -layer.mlp.gate.base_layer.weight[:3].sum(0)
            layer.mlp.experts.base_layer.down_proj[3] = 0
            layer.mlp.experts.base_layer.gate_up_proj[3] = 0
    select_parameters(model, token_batches())
    targets = find_targets(model, "default")
    chosen = {path: len(target.indices) for path, target in targets.items() if path.endswith("_proj.3")}
    assert set(chosen.values()) == {0}
    assert all(len(target.indices) for path, target in targets.items() if path.endswith("_proj.1"))
    train(model, token_batches())


def test_thresholds_apply_to_each_expert_or_to_all_of_them():
    each = with_experts("Mixtral", density=0.25)
    assert {len(t.indices) for p, t in find_targets(each, "default").items() if "gate_up" in p} == {12}
    over_all = with_experts(
        "Mixtral",
        criterion="fisher",
        density=None,
        threshold={"policy": "top_density", "density": 0.25, "scope": "global"},
    )
    select_parameters(over_all, token_batches())
    assert len({len(t.indices) for p, t in find_targets(over_all, "default").items() if "gate_up" in p}) > 1


def test_training_saving_loading_and_merging_are_exact(name, granularity, tmp_path):
    model = with_experts(name, granularity, torch.float32, criterion="fisher", init_weights=True)
    batches = token_batches()
    select_parameters(model, batches)
    losses = train(model, batches[:1] * 4)
    assert losses[-1] < losses[0]
    trained = logits(model, batches[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixture(name), tmp_path)
    assert torch.equal(logits(loaded, batches[0]), trained)
    before = copy.deepcopy(loaded.state_dict())
    loaded.merge_adapter()
    assert torch.equal(logits(loaded, batches[0]), trained)
    loaded.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.state_dict().items())
    with loaded.disable_adapter():
        base = mixture(name)
        assert torch.equal(logits(loaded, batches[0]), logits(base, batches[0]))
    apply_deltas(base, [SparseDelta.read(tmp_path)])
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    for key, tensor in merged.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[key]), key
    assert torch.equal(logits(merged, batches[0]), trained)
