"""The default log-likelihood of the Fisher pass, against the model's own loss."""

from __future__ import annotations

import copy

import pytest
import torch
from models import adapted, gpt2, llama, token_batches
from torch import nn

from fggm_peft.selection.likelihood import default_log_likelihood

PROMPTED, EVERYWHERE = token_batches(padding="right")[0], token_batches()[1]
EVERYWHERE = {"input_ids": EVERYWHERE["input_ids"], "labels": EVERYWHERE["input_ids"].clone()}
NO_ANSWER = PROMPTED | {"labels": torch.full_like(PROMPTED["labels"], -100)}


def own_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """The model's own log-likelihood of each sample, summed over its answer."""
    result = []
    for sample in range(len(batch["labels"])):
        one = {key: value[sample : sample + 1] for key, value in batch.items()}
        count = one["labels"][:, 1:].ne(-100).sum()
        result.append(-model(**one).loss * count if count else torch.zeros(()))
    return torch.stack(result)


ONE_TOKEN = {"input_ids": torch.tensor([[3], [4]]), "labels": torch.tensor([[3], [4]])}
BATCHES = {"prompted": PROMPTED, "everywhere": EVERYWHERE, "no answer": NO_ANSWER, "one token": ONE_TOKEN}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=list(BATCHES))
@pytest.mark.parametrize("build", [llama, gpt2])
def test_likelihood_and_gradients_agree_with_the_models_own_loss(build, batch):
    model = build().eval()
    actual, expected = default_log_likelihood(model, None)(model, batch), own_loss(model, batch)
    torch.testing.assert_close(actual, expected)
    if expected.requires_grad:
        parameters = list(model.parameters())
        gradients = (torch.autograd.grad(loss.sum(), parameters, allow_unused=True) for loss in (actual, expected))
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "targets, positions",
    [(["q_proj"], PROMPTED["labels"][:, 1:].ne(-100).any(0).sum()), (["lm_head"], PROMPTED["labels"].shape[1])],
    ids=["head not a target", "head a target"],
)
def test_the_head_computes_only_positions_of_the_answer_unless_it_is_a_target(targets, positions):
    model = adapted(llama(), target_modules=targets).eval()
    seen = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    default_log_likelihood(model, "CAUSAL_LM")(model, PROMPTED)
    assert seen == [positions]


def test_models_without_logits_to_keep_compute_all_logits():
    model = llama().eval()
    likelihood = default_log_likelihood(model, None)
    expected = likelihood(model, PROMPTED)
    old = copy.copy(model)
    old.forward = lambda input_ids, attention_mask: model(input_ids, attention_mask)
    torch.testing.assert_close(likelihood(old, PROMPTED), expected)
    torch.testing.assert_close(likelihood(model, PROMPTED | {"logits_to_keep": 0}), expected)
