"""Drift that the statistics predict, and drift on data."""

from __future__ import annotations

import math

import pytest
import torch
from models import adapted, llama, quantized, token_batches
from peft import PeftModel
from torch import nn

from fggm_peft import input_covariance, select_parameters
from fggm_peft.retention import kl_divergence, predicted_drift, scale_to_budget_
from fggm_peft.tuner.target import find_targets

REFERENCE, TASK = token_batches(seed=1), token_batches(seed=2)


def moved(granularity: str, base: nn.Module | None = None, size: float = 0.02) -> nn.Module:
    model = adapted(llama() if base is None else base, granularity, density=0.2, harm_decay=1.0)
    select_parameters(model, TASK, reference=[REFERENCE], progress=False)
    with torch.no_grad():
        for target in find_targets(model, "default").values():
            target.values.normal_(std=size)
    return model


def measured(model: nn.Module, path: str) -> tuple[float, float]:
    """``E |V x|^2`` and ``E |W x|^2`` of one layer on the reference, with the inputs of the base."""
    target = find_targets(model, "default")[path]
    weight = target.layer.weight_copy().double()
    delta = target.granularity.delta_rows(
        torch.arange(target.shape[0]), target.indices, target.values.detach(), target.shape
    )
    inputs = []
    hook = target.layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad(), model.disable_adapter():
        for batch in REFERENCE:
            model.eval()(**batch)
            inputs[-1] = inputs[-1][batch["attention_mask"] != 0]
    hook.remove()
    x = torch.cat(inputs).double()
    return tuple(float((x @ matrix.mT).square().sum(1).mean()) for matrix in (delta.double(), weight))


@pytest.mark.parametrize("granularity", ["row", "column"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_prediction_is_the_measured_change_of_outputs(granularity, base):
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    model = moved(granularity, quantized(llama(**sizes), "nf4") if base == "nf4" else None)
    drift = predicted_drift(model)
    for path in find_targets(model, "default"):
        change, output = measured(model, path)
        assert drift[path] == pytest.approx(change / output, rel=0.05), path
    assert min(drift.values()) < drift[""] < max(drift.values())


def test_a_budget_scales_the_values_once():
    model = moved("column")
    before = predicted_drift(model)[""]
    factor = scale_to_budget_(model, before / 4)
    assert factor == pytest.approx(0.5) and predicted_drift(model)[""] == pytest.approx(before / 4, rel=1e-4)
    assert scale_to_budget_(model, before) == 1.0


def test_the_divergence_is_that_of_the_definition():
    model = moved("row", size=0.1)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in TASK:
            adapted_logits = model.eval()(**batch).logits.double().log_softmax(-1)
            with model.disable_adapter():
                base = model(**batch).logits.double().log_softmax(-1)
            for row, labels in enumerate(batch["labels"]):
                for position in range(1, len(labels)):
                    if labels[position] != -100:
                        p, q = base[row, position - 1], adapted_logits[row, position - 1]
                        total += float((p.exp() * (p - q)).sum())
                        count += 1
    assert kl_divergence(model, TASK) == pytest.approx(total / count, rel=1e-4)
    assert kl_divergence(model, TASK, base=llama()) == kl_divergence(model, TASK)
    assert kl_divergence(moved("row", size=0.0), TASK) == pytest.approx(0, abs=1e-6)


def test_errors_say_what_is_missing(tmp_path):
    model = moved("column")
    with pytest.raises(ValueError, match="harm_budget"):
        scale_to_budget_(model, math.nan)
    with pytest.raises(ValueError, match="no token"):
        kl_divergence(model, [{**TASK[0], "labels": torch.full_like(TASK[0]["labels"], -100)}])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(ValueError, match="has no statistics"):
        predicted_drift(loaded)
    assert predicted_drift(loaded, input_covariance(llama(), REFERENCE, progress=False)) == pytest.approx(
        predicted_drift(model), rel=1e-3
    )
