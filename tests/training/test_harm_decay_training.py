"""Harm decay inside trainers: attached before the first step, resumed exactly, gone afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import llama, token_batches
from peft import get_peft_model
from trainers import assert_same_delta, make_trainer
from transformers import Trainer

from fggm_peft import FGGMConfig, input_covariance
from fggm_peft.training import FGGMCallback, FGGMTrainer
from fggm_peft.tuner.files import retained_by

REFERENCE = token_batches(seed=1)


def model(**config):
    settings = {"granularity": "column", "density": 0.3, "harm_decay": 1.0, "task_type": "CAUSAL_LM", "num_samples": 8}
    return get_peft_model(llama(), FGGMConfig(**{**settings, **config}))


def trainer(folder, kind: str, reference=REFERENCE, **settings):
    if kind == "callback":
        return make_trainer(model(), folder, Trainer, callbacks=[FGGMCallback(reference=reference)], **settings)
    made = make_trainer(model(), folder, FGGMTrainer, **settings)
    made.selection_reference = reference
    return made


@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_trainers_apply_and_remove_it(tmp_path, kind):
    with_decay = trainer(tmp_path, kind)
    with_decay.train()
    without = make_trainer(model(harm_decay=0.0), tmp_path, FGGMTrainer)
    without.train()
    with pytest.raises(AssertionError):
        assert_same_delta(with_decay.model, without.model)
    optimizer = with_decay.optimizer.optimizer
    assert not optimizer._optimizer_step_post_hooks
    assert not any("harm_decay" in key for group in optimizer.param_groups for key in group)


@pytest.mark.parametrize("kind", ["mixin", "callback"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_resumes_bit_exactly(tmp_path, kind, accumulation):
    saving = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "gradient_accumulation_steps": accumulation}
    whole = trainer(tmp_path, kind, **saving)
    whole.train()
    assert (tmp_path / "checkpoint-3" / "fggm_retention.safetensors").exists()
    resumed = trainer(tmp_path, kind, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_delta(resumed.model, whole.model)


@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_a_resumed_task_is_retained_by_later_tasks(tmp_path, kind):
    saving = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    retained = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        run = trainer(tmp_path, kind, [REFERENCE, "history"], **saving)
        run.train(resume_from_checkpoint=resume)
        retained.append(retained_by(run.model.get_base_model()))
    whole, resumed = retained
    for path in whole.inputs:
        assert torch.equal(whole[path].factor, resumed[path].factor) and whole[path].floor == resumed[path].floor


@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_a_task_is_read_again_by_the_model_that_has_learned_it(tmp_path, kind):
    run = trainer(tmp_path, kind, [REFERENCE, "history"], max_steps=4)
    run.train()
    batches = [run.data_collator([run.train_dataset[n]]) for n in range(len(run.train_dataset))]
    retained = retained_by(run.model.get_base_model())
    with run.model.disable_adapter():
        before = input_covariance(run.model, batches, progress=False)
    after = input_covariance(run.model, batches, progress=False)
    path = "model.layers.1.mlp.down_proj"
    gaps = [
        float((retained[path].to(torch.float32).dense() - c[path].to(torch.float32).dense()).norm())
        for c in (before, after)
    ]
    assert gaps[1] < 0.1 * gaps[0]
    run.model.merge_and_unload()


def test_continuing_without_statistics_is_an_error_before_training(tmp_path):
    first = trainer(tmp_path, "mixin")
    first.train()
    first.model.save_pretrained(tmp_path / "delta")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(llama(), tmp_path / "delta", is_trainable=True)
    with pytest.raises(ValueError, match="harm_decay needs the statistics"):
        make_trainer(loaded, tmp_path, FGGMTrainer).train()


def test_other_stages_of_deepspeed_are_an_error_before_training(tmp_path):
    rejected = trainer(tmp_path, "mixin")
    rejected.is_deepspeed_enabled = True
    plugin = SimpleNamespace(zero_stage=1)
    rejected.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match="harm_decay does not support DeepSpeed's ZeRO stage 1"):
        rejected.create_optimizer()


@pytest.mark.parametrize(("given", "steps"), [(0, 3), (0.1, 3), (0.5, 5), (4, 4)])
def test_the_preset_warms_up_over_at_least_30_percent_of_the_steps(tmp_path, given, steps):
    made = make_trainer(model(preset="retain"), tmp_path, FGGMTrainer, warmup_steps=given, lr_scheduler_type="linear")
    made.selection_reference = REFERENCE
    made.create_optimizer_and_scheduler(10)
    factor = made.lr_scheduler.lr_lambdas[0]
    assert [factor(step) for step in range(steps + 1)] == [step / steps for step in range(steps)] + [1]
    plain = make_trainer(model(), tmp_path, FGGMTrainer, warmup_steps=given, lr_scheduler_type="linear")
    plain.selection_reference = REFERENCE
    plain.create_optimizer_and_scheduler(10)
    assert plain.args.warmup_steps == given


def test_a_schedule_without_warmup_is_a_warning_with_the_preset(tmp_path, recwarn):
    for preset, count in ((None, 0), ("retain", 1)):
        made = make_trainer(model(preset=preset), tmp_path, FGGMTrainer, lr_scheduler_type="constant")
        made.selection_reference = REFERENCE
        made.create_optimizer_and_scheduler(10)
        assert sum("'constant' has no warm-up" in str(warning.message) for warning in recwarn) == count
