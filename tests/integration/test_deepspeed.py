"""DeepSpeed ZeRO on two CPU processes.

DeepSpeed is not a development dependency, because its installation compiles code. To run these tests, install it with
``DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`` and run
``pytest tests/integration/test_deepspeed.py -m slow``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from models import adapted, llama, token_batches
from peft import PeftModel
from torch import Tensor
from transformers import TrainingArguments

from fggm_peft import FGGMTrainer, HarmDecay, TopDensity, input_covariance

deepspeed = pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
os.environ.setdefault("DS_ACCELERATOR", "cpu")


TORCH_OPTIMIZER = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def samples() -> list[dict[str, Tensor]]:
    ids = torch.randint(1, 50, (16, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def run(folder: str, stage: int | None, config: dict, resume: bool = False) -> bool:
    arguments = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "report_to": []}
    arguments["adam_epsilon"] = 1e-6  # Adam divides a gradient of almost zero by its size, and so enlarges its rounding
    if stage is not None:
        arguments["ddp_backend"] = "gloo"
        arguments["deepspeed"] = {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            **TORCH_OPTIMIZER,
            **dict.fromkeys(
                ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
            ),
        }
    size = 4 if stage is None else 2
    settings = TrainingArguments(folder, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=size, **arguments)
    trainer = FGGMTrainer(model=adapted(llama(), **config), args=settings, train_dataset=samples())
    if config.get("harm_decay"):
        trainer.selection_reference = [token_batches(seed=1), "history"]
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder + "/final")
    return trainer.selection_report is not None


def weight_after_full_fine_tuning(stage: int | None, strength: float) -> Tensor:
    """A linear layer's weight, trained with DeepSpeed's engine in a loop of one's own; without it for ``None``."""
    model, (batch, *_) = llama(), token_batches(seed=1)
    decay = HarmDecay(input_covariance(model, [batch]), strength)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    weight = model.model.layers[0].mlp.up_proj.weight
    if stage is None:
        decay.attach(model, optimizer)
        for _ in range(4):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach()
    config = {
        "train_micro_batch_size_per_gpu": len(batch["input_ids"]),
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **TORCH_OPTIMIZER,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    decay.attach(engine.module, engine.optimizer)
    for _ in range(4):
        engine.backward(engine(**batch).loss)
        engine.step()
    return deepspeed.utils.safe_get_full_fp32_param(weight)


@pytest.mark.parametrize("stage", [2, 3])
def test_full_fine_tuning_decays_to_its_start(stage, processes):
    expected, free = (weight_after_full_fine_tuning(None, strength) for strength in (100.0, 0.0))
    assert (expected - free).abs().max() > 1e-2
    for found in processes(weight_after_full_fine_tuning, stage, 100.0):  # both processes have the same batch
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def values(folder: Path) -> dict[str, Tensor]:
    return PeftModel.from_pretrained(llama(), folder / "final").state_dict()


CONFIGS = {
    "rows": {},
    "empty modules": {"threshold": TopDensity(0.02, scope="global")},
    "harm decay": {"granularity": "column", "density": 0.3, "harm_decay": 30.0},  # once, after four steps
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_selects_trains_saves_and_resumes_like_one_process(stage, config, processes, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(str(one), None, config)
    expected = values(one)
    assert processes(run, str(two), stage, config)[0]
    trained = values(two)
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-5)
    shutil.rmtree(two / "checkpoint-4")
    assert not processes(run, str(two), stage, config, True)[0]
    resumed = values(two)
    for name, tensor in trained.items():
        assert torch.equal(resumed[name], tensor), name
