"""FSDP2 on two processes selects, trains, saves and resumes like one process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import fggm
from models import adapted, byte_tokenizer, fggm_layers, llama, quantized, text_model, token_batches
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from fggm_peft import FGGMTrainer, TopDensity, select_parameters

pytestmark = pytest.mark.distributed


def rank() -> int:
    return torch.distributed.get_rank()


def built(selected: bool = True, quantization: str | None = None, **config) -> nn.Module:
    base = llama() if quantization is None else quantized(llama(), quantization)
    model = adapted(base, **config)
    if selected:
        select_parameters(
            model, token_batches(), progress=False
        )  # both ranks use the same data, which doubles every score
    return model


def sharded(model: nn.Module, **options) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole_batch(seed: int = 0) -> dict[str, Tensor]:
    """Samples with equally many labels and no padding, so that the mean over ranks equals the mean over the batch."""
    ids = torch.randint(1, 50, (4, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def share(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.chunk(2)[rank()] for key, value in batch.items()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> trainable values, gathered from all ranks."""
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters())
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in named if p.requires_grad}


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert first.keys() == second.keys() and first
    for name, values in first.items():
        torch.testing.assert_close(values, second[name], rtol=0, atol=tolerance, msg=lambda text, n=name: n + text)


def steps(model: nn.Module, batches: list[dict]) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def gathered(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def train_and_save(folder: str, config: dict) -> None:
    model, alone = sharded(built(**config)), built(**config)
    batches = [whole_batch(seed) for seed in range(4)]
    with torch.no_grad():
        torch.testing.assert_close(model(**share(batches[0])).logits, alone(**share(batches[0])).logits)
    steps(model, [share(batch) for batch in batches])
    steps(alone, batches)
    assert_close(trained(model), trained(alone))
    state = gathered(model)
    if rank() == 0:
        model.save_pretrained(folder, state_dict=state)


CASES = {
    "rows": {},
    "columns": {"granularity": "column"},
    "elements": {"granularity": "element", "density": 0.1},
    "empty modules": {"threshold": TopDensity(0.02, scope="global")},
    "on a 4-bit base": {"quantization": "nf4"},
    "on a doubly quantized base": {"quantization": "nf4 double"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_trains_like_one_process_and_rank_zero_saves(case, processes, tmp_path):
    if "bit" in case or "quantized" in case:
        pytest.importorskip("bitsandbytes")
    processes(train_and_save, str(tmp_path), CASES[case])
    alone = built(**CASES[case])
    steps(alone, [whole_batch(seed) for seed in range(4)])
    base = llama() if "quantization" not in CASES[case] else quantized(llama(), CASES[case]["quantization"])
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_close(trained(loaded), trained(alone))


def select_sharded(folder: str, config: dict) -> dict[str, Tensor]:
    model = sharded(built(selected=False, **config), mp_policy=MixedPrecisionPolicy())
    batches = token_batches(sizes=(2, 2, 2))[
        rank() :: 2
    ]  # rank 1 has no second batch, but takes part in the collectives
    report = select_parameters(model, batches, num_samples=None, progress=False)
    assert report.samples == 6
    if rank() == 0:
        model.save_pretrained(folder)
    try:
        model.train()
        model(**share(whole_batch()))
    except RuntimeError as error:
        assert "Save it, load it" in str(error)
    else:
        raise AssertionError("training values that FSDP does not manage must raise an error")
    return {name: layer.fggm_indices["default"] for name, layer in fggm_layers(model, "default").items()}


@pytest.mark.parametrize("config", [{}, {"granularity": "element", "density": 0.1}], ids=["rows", "elements"])
def test_a_sharded_base_selects_the_support_of_a_whole_base_and_saves_zeros(config, processes, tmp_path):
    whole = built(selected=False, **config)
    select_parameters(whole, token_batches(sizes=(2, 2, 2)), num_samples=None, progress=False)
    for chosen in processes(select_sharded, str(tmp_path), config):
        for name, layer in fggm_layers(whole, "default").items():
            assert torch.equal(chosen[name], layer.fggm_indices["default"]), name
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert_close(trained(loaded), trained(whole), tolerance=0)


def adapt_sharded_base() -> None:
    base = llama()
    fully_shard(base, mesh=init_device_mesh("cpu", (2,)))
    adapted(base, criterion="random")


def test_adding_an_adapter_to_a_sharded_base_raises_an_error(processes):
    for failure in processes.outcomes(adapt_sharded_base):
        assert failure.type == "ValueError" and "is already sharded" in failure.message


def use_fsdp_on_cpus() -> None:
    """Make accelerate treat CPU processes as GPUs; accelerate 1.15 ignores FSDP on CPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def run_trainer(folder: str, fsdp: dict | None, options: dict, resume: bool = False) -> tuple[dict, list, bool]:
    arguments = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "report_to": []}
    if fsdp is not None:
        use_fsdp_on_cpus()
        settings = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **fsdp}
        arguments |= {"fsdp": True, "fsdp_config": settings, "ddp_backend": "gloo"}
    data = [{key: value[0] for key, value in whole_batch(seed).items()} for seed in range(16)]
    size = 4 if fsdp is None else 2
    trainer = FGGMTrainer(
        model=built(selected=False, **options),
        args=TrainingArguments(folder, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=size, **arguments),
        train_dataset=data,
    )
    assert fsdp is None or trainer.accelerator.is_fsdp2
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder + "/final")
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return trained(trainer.model), losses, trainer.selection_report is not None


TRAINERS = {
    "whole state": ({"state_dict_type": "FULL_STATE_DICT"}, {}),
    "checkpointed activations": (
        {"state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": True},
        {"granularity": "element", "density": 0.1},
    ),
    "empty modules": ({"state_dict_type": "FULL_STATE_DICT"}, CASES["empty modules"]),
}


@pytest.mark.parametrize("case", TRAINERS)
def test_the_trainer_selects_shards_trains_saves_and_resumes(case, processes, tmp_path):
    fsdp, options = TRAINERS[case]
    expected, losses, _ = run_trainer(str(tmp_path / "one"), None, options)
    folder = str(tmp_path / "two")
    (values, sharded_losses, selected), _ = processes(run_trainer, folder, fsdp, options)
    assert selected
    assert_close(values, expected, tolerance=1e-4)  # AdamW divides rounding errors by tiny gradients
    assert sharded_losses == pytest.approx(losses, rel=1e-4)
    loaded = PeftModel.from_pretrained(llama(), folder + "/final", is_trainable=True)
    assert_close(trained(loaded), values, tolerance=0)
    shutil.rmtree(Path(folder) / "checkpoint-4")
    (resumed, resumed_losses, selected), _ = processes(run_trainer, folder, fsdp, options, True)
    assert not selected
    assert_close(resumed, values, tolerance=0)
    assert resumed_losses == sharded_losses


def call_fggm(arguments: list[str]) -> None:
    from fggm_peft.cli.app import run_program

    use_fsdp_on_cpus()
    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", HF_HUB_OFFLINE="1"
    )
    try:
        run_program(arguments)
    except SystemExit as stop:
        assert not stop.code, stop.code
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]


def test_fggm_select_on_a_sharded_base_writes_the_adapter_of_a_whole_base(processes, tmp_path):
    base, data, adapter = tmp_path / "base", tmp_path / "data.json", tmp_path / "adapter"
    byte_tokenizer().save_pretrained(base)
    text_model().save_pretrained(base)
    data.write_text(json.dumps([{"prompt": f"{n} plus one is", "answer": f" {n + 1}"} for n in range(14)]))
    options = ["select", str(base), "--data", str(data), "--num-samples", "all", "--batch-size", "4"]
    processes(call_fggm, [*options, "--output", str(adapter)])
    whole = fggm(*options, "--output", str(tmp_path / "whole"))
    assert whole.code == 0, whole.err
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "whole"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    loaded = PeftModel.from_pretrained(text_model(), adapter, is_trainable=True)
    assert any(len(values) for values in trained(loaded).values())
    assert not any(values.any() for values in trained(loaded).values())


def test_unsupported_fsdp_settings_raise_an_error_with_the_remedy(processes, tmp_path):
    sharded_state = {"state_dict_type": "SHARDED_STATE_DICT"}
    processes(run_trainer, str(tmp_path), sharded_state, {})
    for failure in processes.outcomes(run_trainer, str(tmp_path), sharded_state, {}, True):
        assert failure.type == "ValueError" and "Use FULL_STATE_DICT" in failure.message
    for failure in processes.outcomes(run_trainer, str(tmp_path), {"cpu_ram_efficient_loading": True}, {}):
        assert failure.type == "ValueError" and "cpu_ram_efficient_loading" in failure.message
