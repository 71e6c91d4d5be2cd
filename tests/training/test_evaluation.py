"""Training with evaluations on a 4-bit base, on a CPU for which bitsandbytes repacks weights in eval mode.

Repacked weights can be neither dequantized nor trained (see tuner/hosts/bitsandbytes.py). These tests pretend that the
processor has the kernel that needs repacking, so that they detect a missing guard on every machine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import adapted, byte_tokenizer, fggm_layers, llama, logits, quantized, text_model, token_batches, train
from peft import get_peft_model
from torch import nn
from trainers import assert_same_delta, delta, evaluation_losses, examples, losses, make_trainer
from transformers import TrainerCallback

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.training import FGGMTrainerMixin

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = pytest.mark.parametrize("kind", ["nf4", "nf4 double"])


@pytest.fixture(autouse=True)
def repacking(monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


def base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return quantized(llama(dtype, intermediate_size=128), kind)  # repacking fails for widths such as 96


def is_repacked(layer: nn.Module) -> bool:
    return getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def dense_loss(model: nn.Module, rows: list[dict]) -> float:
    """The loss of a dense model with the dequantized weights plus the delta."""
    dense = llama(intermediate_size=128).eval()
    for name, layer in fggm_layers(model, "default").items():
        weight = bitsandbytes.functional.dequantize_4bit(
            layer.base_layer.weight.data, layer.base_layer.weight.quant_state
        )
        dense.get_submodule(name).weight.data.copy_(weight + layer.get_delta_weight("default"))
    with torch.no_grad():
        return dense(**{key: torch.tensor([row[key] for row in rows]) for key in rows[0]}).loss.item()


def test_without_the_guard_bitsandbytes_would_repack():
    """Otherwise the tests below would pass without the guard."""
    model = base("nf4")
    logits(model, token_batches()[0])
    assert is_repacked(model.model.layers[0].mlp.up_proj)


class Generates(TrainerCallback):
    """Generates a few tokens at every evaluation."""

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        prompt = torch.tensor([row["input_ids"][:4] for row in examples(2)])
        model.eval()
        model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)


@KINDS
def test_evaluation_and_generation_between_steps_do_not_change_training(kind, tmp_path):
    held_out = examples(8, seed=1)
    plain = make_trainer(adapted(base(kind)), tmp_path / "plain")
    plain.train()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": held_out, "callbacks": [Generates()]}
    trainer = make_trainer(adapted(base(kind)), tmp_path / "evaluated", **settings)
    trainer.evaluate()
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert_same_delta(trainer.model, plain.model)
    assert all(tensor.count_nonzero() for name, tensor in delta(trainer.model).items() if name.endswith("values"))
    assert len(evaluation_losses(trainer)) == 4
    assert not any(is_repacked(layer.base_layer) for layer in fggm_layers(trainer.model, "default").values())


@KINDS
def test_the_evaluation_loss_agrees_with_the_dense_model(kind, tmp_path):
    held_out = examples(8, seed=1)
    trainer = make_trainer(adapted(base(kind)), tmp_path, eval_dataset=held_out)
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(dense_loss(trainer.model, held_out), rel=1e-5)
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(dense_loss(trainer.model, held_out), rel=1e-5)
    assert abs(after - before) > 1e-3


@KINDS
def test_a_base_evaluated_before_adding_the_adapter_trains_on_nearly_the_same_weights(kind, tmp_path):
    held_out = examples(8, seed=1)
    evaluated = base(kind)
    logits(evaluated, token_batches()[0])
    assert is_repacked(evaluated.model.layers[0].mlp.up_proj)
    with pytest.warns(UserWarning, match="had repacked 14 4-bit layers"):
        model = adapted(evaluated)
    trainer = make_trainer(model, tmp_path, eval_dataset=held_out, max_steps=8)
    fresh = make_trainer(adapted(base(kind)), tmp_path, eval_dataset=held_out)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(fresh.evaluate()["eval_loss"], rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(dense_loss(model, held_out), rel=1e-5)
    trainer.train()
    assert all(tensor.count_nonzero() for name, tensor in delta(model).items() if name.endswith("values"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(dense_loss(model, held_out), rel=1e-5)


def test_the_guard_works_for_a_second_task_after_a_merge():
    batches = token_batches(padding="right")
    model = adapted(base("nf4"), quantized_merge="requantize")
    select_parameters(model, batches, progress=False)
    train(model, batches)
    merged = model.merge_and_unload()
    expected = logits(merged, batches[0])
    assert not is_repacked(merged.model.layers[0].mlp.up_proj)
    second = adapted(merged)
    torch.testing.assert_close(logits(second, batches[0]), expected)
    select_parameters(second, batches, progress=False)
    second_losses = train(second, batches[:1], steps=4)
    assert second_losses[-1] < second_losses[0]


# TRL --------------------------------------------------------------------------------------------


def sft_trainer(folder: Path, trainer_class: type, **settings):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = quantized(text_model(intermediate_size=128), "nf4 double")
    model.is_loaded_in_4bit = True  # TRL reads this attribute
    rows = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(24)]
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
    }
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False}
    return trainer_class(
        model=get_peft_model(model, FGGMConfig(task_type="CAUSAL_LM")),
        args=trl.SFTConfig(output_dir=str(folder), **{**options, **quiet, "save_strategy": "no", **settings}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for name, tensor in delta(model).items() if name.endswith("values")}


def test_values_on_a_quantized_base_stay_float32_in_trl_and_resume_bit_exactly(tmp_path):
    trl = pytest.importorskip("trl")

    class SFTTrainer(FGGMTrainerMixin, trl.SFTTrainer):
        pass

    assert dtypes(sft_trainer(tmp_path, trl.SFTTrainer).model) == {torch.bfloat16}  # the mixin reverts this
    whole = sft_trainer(tmp_path / "whole", SFTTrainer)
    assert dtypes(whole.model) == {torch.float32}
    whole.train()
    assert dtypes(whole.model) == {torch.float32}
    saving = {"save_strategy": "steps", "save_steps": 2}
    sft_trainer(tmp_path / "halves", SFTTrainer, max_steps=2, **saving).train()
    resumed = sft_trainer(tmp_path / "halves", SFTTrainer, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.selection_report is None and dtypes(resumed.model) == {torch.float32}
    assert losses(resumed) == losses(whole)
    assert_same_delta(resumed.model, whole.model)
    rounded = {name: tensor.to(torch.bfloat16).to(tensor.dtype) for name, tensor in delta(whole.model).items()}
    assert any(not torch.equal(rounded[name], tensor) for name, tensor in delta(resumed.model).items())
