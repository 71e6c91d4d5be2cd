"""The best checkpoint of a training run is loaded into the adapters that were trained."""

from __future__ import annotations

import pytest
import torch
from models import llama
from peft import get_peft_model
from trainers import evaluation_losses, examples, make_trainer

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.tuner.target import find_targets

CASES = {
    "one adapter with a name": {"task": {}},
    "a second adapter": {"default": None, "other": {}},
    "a second adapter of another granularity": {"default": None, "other": {"granularity": "column"}},
    "the adapter in the root folder": {"default": {}, "other": None},
    "two active adapters": {"default": {}, "other": {"granularity": "element"}},
}
"""Adapter -> settings; None for an adapter that is selected and inactive."""


def model_with(adapters: dict[str, dict | None]):
    model = None
    for name, settings in adapters.items():
        config = FGGMConfig(target_modules="all-linear", density=0.3, num_samples=8, **(settings or {}))
        if model is None:
            model = get_peft_model(llama(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        if settings is None:
            batches = [{key: value[None] for key, value in batch.items()} for batch in tensors()]
            select_parameters(model, batches, adapter_name=name, progress=False)
    model.base_model.set_adapter([name for name, settings in adapters.items() if settings is not None])
    return model


def tensors():
    return [{key: torch.tensor(value) for key, value in row.items()} for row in examples(8)]


@pytest.mark.parametrize("adapters", CASES.values(), ids=list(CASES))
def test_the_best_checkpoint_of_each_active_adapter_is_loaded(adapters, tmp_path):
    model = model_with(adapters)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    trainer = make_trainer(
        model,
        tmp_path,
        train_dataset=examples(4),
        eval_dataset=examples(8, seed=1),
        learning_rate=5e-2,
        load_best_model_at_end=True,
        save_total_limit=1,
        **settings,
    )
    trainer.train()
    losses = evaluation_losses(trainer)
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    for name, adapter in adapters.items():
        values = [target.values for target in find_targets(model, name).values()]
        assert any(tensor.any() for tensor in values) == (adapter is not None)


def test_a_process_that_does_not_write_creates_and_removes_no_folder(tmp_path, monkeypatch):
    """With FSDP every process is asked to save. Another one must not remove the folder that rank 0 has just created."""
    model = get_peft_model(llama(), FGGMConfig(target_modules=["q_proj"], criterion="random"))
    trainer = make_trainer(model, tmp_path)
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *args, **kwargs: pytest.fail("a folder was created"))
    trainer.save_model(str(tmp_path / "checkpoint"))
    trainer._save(str(tmp_path / "checkpoint"))
    assert not (tmp_path / "checkpoint").exists()
