"""Harm decay of experts and routers, against dense float64 formulas, and in a trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from models import adapted, logits, mixture, quantized, token_batches
from peft import PeftModel
from reference import gain_under_decay
from torch import nn
from trainers import assert_same_delta, make_trainer

from fggm_peft import HarmDecay, attach_harm_decay, select_parameters
from fggm_peft.retention.drift import predicted_drift
from fggm_peft.selection.likelihood import default_log_likelihood
from fggm_peft.training import FGGMTrainer
from fggm_peft.tuner.files import retained_by
from fggm_peft.tuner.files.input_covariance import covariance_of
from fggm_peft.tuner.target import find_targets

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight", "router.weight"]
REFERENCE, TASK = token_batches(seed=1), token_batches(seed=2)


def with_decay(name: str, granularity: str, dtype=torch.float32, **config) -> nn.Module:
    settings = {"density": 0.3, "harm_decay": 1.0, "task_type": "CAUSAL_LM", "target_parameters": PARAMETERS}
    return adapted(mixture(name, dtype), granularity, **settings | {"num_samples": 8} | config)


def selected(name: str, granularity: str, **config) -> nn.Module:
    model = with_decay(name, granularity, **config)
    select_parameters(model, TASK, reference=[REFERENCE], progress=False)
    return model


def optimizer_of(model: nn.Module, **arguments) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **{"lr": 0.1, **arguments})


@pytest.mark.parametrize("granularity", ["row", "column"])
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_a_decay_is_the_dense_formula(name, granularity):
    model = selected(name, granularity)
    before, own = {}, covariance_of(model.peft_config["default"])
    for path, target in find_targets(model, "default").items():
        nn.init.normal_(target.values)
        before[path] = target.values.detach().double().clone()
    drift = predicted_drift(model)
    optimizer = optimizer_of(model)
    HarmDecay(own, strength=5.0, every=1).attach(model, optimizer)
    optimizer.step()
    for path, target in find_targets(model, "default").items():
        matrix = own[path].to(torch.float64).dense()
        matrix = matrix if granularity == "row" else matrix[target.indices.long()][:, target.indices.long()]
        expected = before[path] @ torch.linalg.inv(torch.eye(len(matrix)).double() + 0.5 * matrix)
        torch.testing.assert_close(target.values.detach().double(), expected, atol=1e-4, rtol=1e-3)
    assert predicted_drift(model)[""] < drift[""]


@pytest.mark.parametrize("granularity", ["row", "column"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_gain_under_decay_is_the_definition(name, granularity):
    model = selected(name, granularity, dtype=torch.float64, criterion="gain_under_decay", num_samples=None)
    own, targets, scores = covariance_of(model.peft_config["default"]), find_targets(model, "default"), {}
    base = mixture(name, torch.float64).eval()
    likelihood, parameters = default_log_likelihood(base, "CAUSAL_LM"), dict(base.named_parameters())
    for batch in TASK:
        for row in range(len(batch["input_ids"])):
            base.zero_grad()
            likelihood(base, {key: tensor[row : row + 1] for key, tensor in batch.items()}).sum().backward()
            for path, target in targets.items():
                stack, _, expert = path.rpartition(".")
                gradient = parameters[f"{path}.weight"] if f"{path}.weight" in parameters else parameters[stack]
                gradient = gradient.grad if gradient.dim() == 2 else gradient.grad[int(expert)]
                gradient = target.layer.matrix(gradient)
                score = gain_under_decay(gradient, own[path].to(torch.float64).dense(), granularity)
                scores[path] = scores.get(path, 0) + score
    for path, target in targets.items():
        best = scores[path].argsort(descending=True)[: len(target.indices)].sort().values
        assert len(best) and target.indices.tolist() == best.tolist(), path


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
def test_an_expert_that_the_reference_does_not_use_does_not_decay(granularity):
    model = with_decay("Mixtral", granularity, criterion="random", init_weights=False)
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:  # the last experts are never chosen
            layer.mlp.gate.base_layer.weight.copy_(torch.eye(4, 32) * 0)
            layer.mlp.gate.fggm_values["default"].zero_()
            layer.mlp.gate.register_forward_hook(lambda module, args, output: (*output[:2], output[2] * 0 + 1))
    select_parameters(model, TASK, reference=[REFERENCE], reset=True, progress=False)
    targets = find_targets(model, "default")
    for target in targets.values():
        nn.init.normal_(target.values)
    before = {path: target.values.detach().clone() for path, target in targets.items()}
    optimizer = optimizer_of(model)
    HarmDecay(covariance_of(model.peft_config["default"]), strength=5.0, every=1).attach(model, optimizer)
    optimizer.step()
    for path, target in targets.items():
        is_used = "experts" not in path or path.endswith(".1")
        assert len(target.indices) and torch.equal(target.values, before[path]) != is_used


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_training_with_decay_changes_the_outputs_on_the_reference_less(base):
    model = mixture("Qwen3Moe")
    model = quantized(model, "nf4") if base == "nf4" else model
    settings = {"density": 0.3, "harm_decay": 1000.0, "criterion": "gain_under_decay", "num_samples": 8}
    model = adapted(model, "column", target_modules=["q_proj"], target_parameters=PARAMETERS, **settings)
    select_parameters(model, TASK, reference=[REFERENCE], progress=False)
    changes, start = [], logits(model, REFERENCE[0])
    for net, decays in ((copy.deepcopy(model), True), (model, False)):
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        if decays:
            attach_harm_decay(net, optimizer)
        for step in range(8):
            net.train()(**TASK[step % 3]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        changes.append(float((logits(net, REFERENCE[0]) - start).norm()))
    assert 0 < changes[0] < 0.5 * changes[1]


def trainer(folder, **settings):
    model = with_decay("GptOss", "column", criterion="gain_under_decay")
    made = make_trainer(model, folder, FGGMTrainer, max_steps=6, save_steps=3, save_strategy="steps", **settings)
    made.selection_reference = [REFERENCE, "history"]
    return made


def test_a_trainer_decays_saves_loads_and_resumes_experts(tmp_path):
    whole = trainer(tmp_path)
    whole.train()
    assert whole.harm_decay is not None and "model.layers.0.mlp.experts.down_proj.3" in whole.harm_decay.covariance
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_delta(resumed.model, whole.model)
    tasks = [retained_by(run.model.get_base_model()) for run in (whole, resumed)]
    for path in tasks[0].inputs:
        assert torch.equal(tasks[0][path].factor, tasks[1][path].factor)
    whole.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(mixture("GptOss"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, TASK[0]), logits(whole.model, TASK[0]))
