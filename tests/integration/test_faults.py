"""Failures during a long run: one clear error, no leftover state, and the next attempt succeeds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, adapted, fggm_layers, llama, token_batches
from peft import PeftModel
from torch import nn
from trainers import assert_same_delta, delta, examples, losses, make_trainer
from transformers import Trainer

from fggm_peft import NonFiniteScoreError, select_parameters
from fggm_peft.training import FGGMCallback, FGGMTrainer
from fggm_peft.training.checkpoints import last_complete_checkpoint

BATCHES = token_batches()
POISON = VOCABULARY
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SETUPS = pytest.mark.parametrize("kind", ["mixin", "callback", "by hand"])


def poisoned_model() -> nn.Module:
    """A model that returns NaN for one token, which occurs only in the bad sample."""
    base = llama(vocab=VOCABULARY + 1)
    base.model.embed_tokens.weight.data[POISON] = float("nan")
    return adapted(base)


def state(model: nn.Module) -> dict[str, object]:
    """All state that a failed selection could leave changed."""
    result: dict[str, object] = {"use_cache": model.config.use_cache, "random": torch.get_rng_state().tolist()}
    for name, module in model.named_modules():
        result[f"{name} hooks"] = sum(len(getattr(module, hooks)) for hooks in HOOKS)
        result[f"{name} training"] = module.training
    for name, parameter in model.named_parameters():
        result[f"{name} parameter"] = (parameter.requires_grad, parameter.grad, parameter.shape)
    for name, layer in fggm_layers(model, "default").items():
        result[f"{name} adapter"] = (layer.selected["default"], layer.scaling["default"], layer.merged)
    return result


class Rows(torch.utils.data.Dataset):
    """``examples()`` with one bad sample, whose function runs when the sample is read."""

    def __init__(self, read_bad_sample):
        self.rows, self.read_bad_sample = examples(), read_bad_sample

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.read_bad_sample(self.rows[index]) if index == 13 else self.rows[index]


def with_nan(row):
    return {**row, "input_ids": [POISON] * len(row["input_ids"])}


def unreadable(row):
    raise OSError("the disk with the data is gone")


def dies(row):
    time.sleep(0.5)  # let batches that were already sent arrive; losing them would raise a different error
    os._exit(1)


def interrupted(row):
    raise KeyboardInterrupt


def trainer_for(kind: str, model: nn.Module, data, folder: Path, **settings) -> Trainer:
    if kind == "callback":
        return make_trainer(model, folder, Trainer, train_dataset=data, callbacks=[FGGMCallback()], **settings)
    return make_trainer(model, folder, train_dataset=data, **settings)


def attempt(kind: str, trainer: Trainer) -> None:
    """Select on the trainer's data through the mixin, the callback or ``select_parameters``."""
    if kind == "by hand":
        select_parameters(trainer.model, trainer.get_train_dataloader(), progress=False)
    else:
        trainer.train()


def fails(kind: str, trainer: Trainer, error: type | tuple, message: str | None) -> BaseException:
    """Check that an attempt raises the error and does not change the model."""
    trainer.model.config.use_cache = True  # the trainer switched it off
    before = state(trainer.model)
    with pytest.raises(error, match=message) as info:
        attempt(kind, trainer)
    after = state(trainer.model)
    if kind != "by hand":  # the trainer itself changes the random state
        before.pop("random"), after.pop("random")
    assert after == before
    return info.value


FAULTS = {
    "a NaN in the data": (with_nan, NonFiniteScoreError, r"log-likelihood of batch \d is NaN"),
    "data that cannot be read": (unreadable, OSError, "^the disk with the data is gone$"),
    "a worker that dies": (
        dies,
        (RuntimeError, ConnectionError),
        r"DataLoader worker \(pid.*exited unexpectedly|reset by peer",
    ),
    "control-C": (interrupted, KeyboardInterrupt, None),
}


@SETUPS
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_failed_selection_raises_one_error_and_leaves_the_model_unchanged(kind, fault, tmp_path):
    read_bad_sample, error, message = FAULTS[fault]
    settings = {"dataloader_num_workers": 1} if read_bad_sample is dies else {}
    model = poisoned_model().train()
    fails(kind, trainer_for(kind, model, Rows(read_bad_sample), tmp_path, **settings), error, message)
    attempt(kind, trainer_for(kind, model, examples(), tmp_path))
    assert all(layer.selected["default"] for layer in fggm_layers(model, "default").values())


# Out of memory ----------------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
}


def limited_to_two_samples(model: nn.Module, error, while_selecting: bool = True) -> nn.Module:
    """Patch the model to run out of memory in the forward pass of batches of more than two samples."""
    norm = model.base_model.model.model.norm
    forward = norm.forward

    def limited(hidden):
        selecting = not any(layer.selected["default"] for layer in fggm_layers(model, "default").values())
        if len(hidden) > 2 and selecting == while_selecting:
            raise error()
        return forward(hidden)

    norm.forward = limited
    return model


@SETUPS
@pytest.mark.parametrize("device", list(OUT_OF_MEMORY))
def test_an_out_of_memory_error_keeps_its_type(kind, device, tmp_path):
    error = OUT_OF_MEMORY[device]
    model = limited_to_two_samples(adapted(llama()), error)
    raised = fails(kind, trainer_for(kind, model, examples(), tmp_path), type(error()), "memory")
    assert type(raised) is type(error())
    attempt(kind, trainer_for(kind, model, examples(), tmp_path, per_device_train_batch_size=2))
    assert all(layer.selected["default"] for layer in fggm_layers(model, "default").values())


@pytest.mark.parametrize("trainer_class", [FGGMTrainer, Trainer], ids=["mixin", "callback"])
@pytest.mark.parametrize("device", list(OUT_OF_MEMORY))
@pytest.mark.parametrize("while_selecting", [True, False], ids=["selecting", "training"])
def test_auto_find_batch_size_finds_a_size_that_fits(trainer_class, device, while_selecting, tmp_path):
    model = limited_to_two_samples(adapted(llama()), OUT_OF_MEMORY[device], while_selecting)
    callbacks = [FGGMCallback()] if trainer_class is Trainer else None
    trainer = make_trainer(model, tmp_path, trainer_class, callbacks=callbacks, auto_find_batch_size=True)
    trainer.train()
    assert trainer._train_batch_size == 2 and trainer.state.global_step == 4
    expected = adapted(llama())
    select_parameters(expected, [{k: torch.tensor([r[k] for r in examples()]) for k in examples()[0]}], progress=False)
    actual, expected = delta(model), delta(expected)
    for name in actual:
        if name.endswith("indices"):
            assert torch.equal(actual[name], expected[name]), name
        else:
            assert actual[name].count_nonzero()


# A run killed while saving ----------------------------------------------------------------------


def in_child(function, *arguments) -> int:
    """Run a function in a separate process; returns the exit code, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode is not None, "still running after 60 s"
    return child.exitcode


def saving_trainer(folder: Path, **settings) -> Trainer:
    """A trainer that saves after each of six steps; every run of it is identical."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, **settings}
    return make_trainer(adapted(llama()), folder, **options)


def train_and_be_killed(folder: Path, number: int, at: str) -> None:
    """Train, and die in the middle of writing the fourth checkpoint."""
    trainer = saving_trainer(folder)
    save, save_state = torch.save, trainer.state.__class__.save_to_json

    def die(*arguments, **options):
        if trainer.state.global_step == 4 and at in str(arguments[-1]):
            Path(arguments[-1]).write_bytes(b'{"best_metric": nul')
            os.kill(os.getpid(), number)
        (save_state if at == "trainer_state.json" else save)(*arguments, **options)

    if at == "trainer_state.json":
        trainer.state.__class__.save_to_json = die
    else:
        torch.save = die
    trainer.train()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("at", ["optimizer.pt", "trainer_state.json"])
def test_a_run_killed_while_saving_resumes_from_the_previous_checkpoint(number, at, tmp_path):
    assert in_child(train_and_be_killed, tmp_path, number, at) == -number
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    trainer = saving_trainer(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint-4 is incomplete"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.selection_report is None and trainer.state.global_step == 6
    uninterrupted = saving_trainer(tmp_path / "uninterrupted")
    uninterrupted.train()
    assert losses(trainer) == losses(uninterrupted)
    assert_same_delta(trainer.model, uninterrupted.model)


def test_resuming_without_a_complete_checkpoint_raises_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with (
        pytest.warns(UserWarning, match="checkpoint-1 is incomplete"),
        pytest.raises(ValueError, match=f"No valid checkpoint.*{tmp_path.name}"),
    ):
        saving_trainer(tmp_path).train(resume_from_checkpoint=True)


# A full disk ------------------------------------------------------------------------------------


def limit_files(size: int) -> None:
    """Make this process fail to write more than ``size`` bytes to a file, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def save_on_a_full_disk(model: nn.Module, folder: Path, size: int) -> None:
    limit_files(size)
    try:
        model.save_pretrained(folder)
    except Exception as error:
        os._exit(17 if "File too large" in str(error) else 18)


SIZES = pytest.mark.parametrize("size", [100, 3_000, 50_000], ids=["card", "card's end", "values"])


@SIZES
def test_saving_on_a_full_disk_raises_an_error_and_leaves_no_loadable_adapter(size, tmp_path):
    model = adapted(llama(), criterion="random", init_weights=False)
    assert in_child(save_on_a_full_disk, model, tmp_path / "new", size) == 17
    assert not list((tmp_path / "new").glob("*.safetensors*"))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(llama(), tmp_path / "new")
    model.save_pretrained(tmp_path / "new")  # the parent process has no size limit
    assert_same_delta(PeftModel.from_pretrained(llama(), tmp_path / "new"), model)


@SIZES
def test_overwriting_an_adapter_on_a_full_disk_keeps_the_old_adapter(size, tmp_path):
    old = adapted(llama(), criterion="random", init_weights=False, seed=1)
    old.save_pretrained(tmp_path)
    new = adapted(llama(), criterion="random", init_weights=False, seed=2)
    assert in_child(save_on_a_full_disk, new, tmp_path, size) == 17
    assert_same_delta(PeftModel.from_pretrained(llama(), tmp_path), old)
    new.save_pretrained(tmp_path)
    assert_same_delta(PeftModel.from_pretrained(llama(), tmp_path), new)


@pytest.mark.parametrize("size", [0, 7, 100, 5_000, -1])
def test_a_truncated_file_does_not_load(size, tmp_path):
    adapted(llama(), criterion="random", init_weights=False).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    base = llama()
    with pytest.raises(Exception, match=r"(?i)header|incomplete"):
        PeftModel.from_pretrained(base, tmp_path)


def train_until_the_disk_is_full(folder: Path) -> None:
    trainer = saving_trainer(folder)
    save = torch.save

    def fill(*arguments, **options):
        if trainer.state.global_step == 3:
            limit_files(100_000)  # too small for the optimizer's state
        save(*arguments, **options)

    torch.save = fill
    try:
        trainer.train()
    except OSError as error:
        os._exit(17 if "the disk is full" in str(error) else 18)


def test_a_checkpoint_that_does_not_fit_the_disk_is_removed_and_the_previous_one_resumes(tmp_path):
    assert in_child(train_until_the_disk_is_full, tmp_path) == 17
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    trainer = saving_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    uninterrupted = saving_trainer(tmp_path / "uninterrupted")
    uninterrupted.train()
    assert losses(trainer) == losses(uninterrupted)
    assert_same_delta(trainer.model, uninterrupted.model)


def test_a_checkpoint_partly_overwritten_by_another_run_is_not_valid(tmp_path, monkeypatch):
    saving_trainer(tmp_path, max_steps=1).train()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        saving_trainer(tmp_path, max_steps=1).train()
    assert (tmp_path / "checkpoint-1").exists()
    with pytest.raises(ValueError, match="No valid checkpoint"), pytest.warns(UserWarning, match="is incomplete"):
        last_complete_checkpoint(tmp_path)
