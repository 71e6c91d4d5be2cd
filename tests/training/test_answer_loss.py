"""Training computes the logits of answers only; loss and gradients are those of all logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import text_model
from peft import PromptTuningConfig, get_peft_model
from trainers import MixinTrainer, losses, make_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from fggm_peft import FGGMConfig, FGGMTrainer
from fggm_peft.selection.likelihood import IGNORED
from fggm_peft.training.answer_loss import answers_only

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "output_router_logits": True},
    "gemma2": {},
    "mistral": {},
    "bloom": {"n_layer": 1, "n_head": 4},
}


def model_of(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    return (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        .double()
        .eval()
    )


def batch_of(labeled: list[list[bool]]) -> dict[str, torch.Tensor]:
    """Rows of tokens in which the marked ones are the answer; the last row is padded on the right."""
    mask = torch.tensor(labeled)
    ids = torch.randint(1, 40, mask.shape, generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(ids)
    attention[-1, -1] = 0
    labels = ids.masked_fill(~mask | (attention == 0), IGNORED)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def loss_and_gradients(model, batch, **inputs):
    model.zero_grad()
    output = model(**batch, **inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inputs", [{}, {"num_items_in_batch": 7}], ids=["mean", "share of several batches"])
def test_loss_and_gradients_are_those_of_all_logits(family, inputs):
    model = model_of(family)
    batch = batch_of([[False] * 5 + [True] * 2, [False] * 3 + [True] * 4, [False] * 4 + [True, False, True]])
    fewer = answers_only(model, batch)
    expected, gradients = loss_and_gradients(model, batch, **inputs)
    found, same = loss_and_gradients(model, fewer, **inputs)
    assert found.logits.shape[1] == 5 and expected.logits.shape[1] == 7
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    assert same.keys() == gradients.keys()
    for name in same:
        torch.testing.assert_close(same[name], gradients[name], rtol=1e-5, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6).flatmap(lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length))))
def test_any_pattern_of_answers_has_the_same_loss(labeled):
    batch = batch_of([*labeled, [True] * (len(labeled[0]) if labeled else 4)])
    model = model_of("llama")
    with torch.no_grad():
        fewer, expected = model(**answers_only(model, batch)).loss, model(**batch).loss
    torch.testing.assert_close(fewer, expected, rtol=1e-6, atol=0, equal_nan=True)  # the model's loss is float32


def test_a_batch_without_prompts_or_answers_does_not_change():
    model, everything = model_of("llama"), batch_of([[True] * 4, [True] * 4])
    everything["labels"][1, 3] = 5
    nothing = {**everything, "labels": torch.full((2, 4), IGNORED)}
    for batch in (everything, nothing):
        assert answers_only(model, batch).keys() == batch.keys()


@pytest.mark.parametrize(
    "reason", ["virtual tokens", "forward of another library", "positions chosen by the caller", "several devices"]
)
def test_models_that_would_misread_positions_get_the_batch_as_it_is(reason):
    model, batch = model_of("llama"), batch_of([[False, False, True], [False, False, True]])
    assert "logits_to_keep" in answers_only(model, batch)
    if reason == "virtual tokens":
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    elif reason == "forward of another library":

        def forward(input_ids=None, labels=None, logits_to_keep=0, **inputs):
            raise AssertionError

        model.forward = forward
    elif reason == "several devices":
        model.hf_device_map = {"model": 0, "lm_head": 1}
    else:
        batch["logits_to_keep"] = 2
    assert answers_only(model, batch)["labels"] is batch["labels"]


SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "n_layer": 1, "n_head": 4, "d_inner": 16}
SMALL |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 16, "encoder_ffn_dim": 16}
VISION = {
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
}


@pytest.mark.parametrize("family", ["bart", "xlnet", "git"])
def test_models_with_a_loss_of_their_own_get_the_batch_as_it_is(family):
    config = AutoConfig.for_model(family, **SIZES | SMALL | (VISION if family == "git" else {}))
    model, batch = AutoModelForCausalLM.from_config(config), batch_of([[False, False, True], [False, False, True]])
    assert answers_only(model, batch)["labels"] is batch["labels"]


ROWS = [{"input_ids": [5, 6, 7, 8 + n], "labels": [IGNORED, IGNORED, IGNORED, 8 + n]} for n in range(8)]


def test_the_trainer_learns_the_same_and_evaluates_all_logits(tmp_path):
    trained, widths = {}, {}
    for kind in (MixinTrainer, FGGMTrainer):
        torch.manual_seed(0)
        model, widths[kind] = get_peft_model(text_model(), FGGMConfig(density=0.2, task_type="CAUSAL_LM")), []
        trainer = make_trainer(model, tmp_path, kind, train_dataset=ROWS, max_steps=6, per_device_train_batch_size=4)
        trainer.train()
        trained[kind] = losses(trainer)
        head = model.get_base_model().get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output, kind=kind: widths[kind].append(output.shape[1]))
        trainer.training_step(model, next(iter(trainer.get_train_dataloader())))
        trainer.predict(ROWS)
    assert len(trained[MixinTrainer]) == 6 and trained[FGGMTrainer] == pytest.approx(trained[MixinTrainer], rel=1e-5)
    assert widths == {MixinTrainer: [4, 4], FGGMTrainer: [2, 4]}
