"""Harm decay of sequence methods: what decays, towards what, and what is kept between tasks."""

from __future__ import annotations

import pytest
import torch
from learning import Recorder, assert_same_bits, begin, learn
from models import llama, token_batches
from streams import settings, without_times, write_stream
from trainers import arguments, examples

from fggm_peft import InputCovariance, input_covariance
from fggm_peft.continual.methods import make_method
from fggm_peft.continual.methods.method import RETAINED
from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream, runs_of
from fggm_peft.continual.runner import Runner
from fggm_peft.selection import linear_layers


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """A file of the input covariance of some data."""
    return str(input_covariance(llama(), token_batches(seed=1), progress=False).save(tmp_path_factory.mktemp("data")))


def test_full_fine_tuning_decays_towards_its_start_as_in_a_plain_loop(statistics, tmp_path):
    method = make_method("sft", harm_decay=100.0, reference=[statistics])
    model, twin = begin(method, llama(), 0, examples()), llama().double()
    recorder = Recorder(model)
    args = arguments(tmp_path, max_steps=6, lr_scheduler_type="linear", max_grad_norm=0.0)
    trainer = method.trainer(model=model, args=args, train_dataset=examples())
    trainer.train()
    start = {name: parameter.detach().clone() for name, parameter in twin.named_parameters()}
    covariance = trainer.covariance.to(torch.float64)
    trained = [twin.get_parameter(f"{name}.weight") for name in linear_layers(twin)]
    optimizer, sigma = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), 0.0
    for step, batch in enumerate(recorder.batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 6)
        twin(**batch).loss.backward()
        optimizer.step()
        twin.zero_grad()
        sigma += 100.0 * optimizer.param_groups[0]["lr"]
        if step % 4 == 3:
            for name in linear_layers(twin):
                dense, weight = covariance[name].dense(), twin.get_parameter(f"{name}.weight")
                inverse = torch.linalg.inv(torch.eye(len(dense)).double() + sigma * dense)
                weight.data = start[f"{name}.weight"] + (weight.data - start[f"{name}.weight"]) @ inverse
            sigma = 0.0
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).double(), parameter.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("sft", {}), ("lora", {"r": 8}), ("shira", {"r": 8}), ("migu", {})])
def test_harm_decay_reduces_the_harm_and_changes_nothing_else(name, options, statistics, tmp_path):
    start, covariance, harm, batches = llama(), input_covariance(llama(), token_batches(seed=1)), [], []
    for decay in ({}, {"harm_decay": 200.0, "reference": statistics}):
        method = make_method(name, **options, **decay)
        base = llama()
        recorder = Recorder(base)
        model, trainer = learn(method, base, 0, tmp_path, max_steps=8)
        batches.append(torch.cat([batch["input_ids"] for batch in recorder.batches]))
        harm.append(0.0)
        for path in linear_layers(start):
            change = (model.get_submodule(path).weight - start.get_submodule(path).weight).detach()
            harm[-1] += float((change @ covariance[path].to(torch.float32).dense() * change).sum())
        assert not trainer.optimizer.optimizer._optimizer_step_post_hooks
    assert harm[1] < 0.6 * harm[0]
    assert torch.equal(*batches)


def test_the_history_is_the_sum_over_the_tasks(statistics, tmp_path):
    """Each task retains the reference and the tasks before it, each read on the model that has learned it."""
    method, model = make_method("sft", harm_decay=1.0, reference=[statistics, "history"]), llama()
    expected = []
    for number in range(3):
        data = examples(seed=number)
        batches = [{key: torch.tensor([row[key] for row in data]) for key in ("input_ids", "attention_mask")}]
        model, trainer = learn(method, model, number, tmp_path, data=data)
        reference = InputCovariance.from_dict(method.memory[RETAINED])
        expected.append(input_covariance(model, batches, progress=False))
        for path in linear_layers(model):
            total = sum(each[path].to(torch.float32).dense() for each in expected)
            torch.testing.assert_close(reference[path].to(torch.float32).dense(), total, rtol=0.05, atol=0.5)
    assert trainer.covariance.positions == 2 * 24 * 10 + token_count(token_batches(seed=1))


def token_count(batches):
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


@pytest.mark.parametrize(("name", "options"), [("sft", {}), ("lora", {"r": 2})])
def test_a_task_that_is_resumed_from_a_checkpoint_decays_the_same(name, options, statistics, tmp_path):
    results = []
    for interrupted in (False, True):
        method, folder = (
            make_method(name, harm_decay=1.0, reference=[statistics], **options),
            tmp_path / str(interrupted),
        )
        settings = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "lr_scheduler_type": "linear"}
        for run in range(2 if interrupted else 1):
            model = begin(method, method.prepare(llama(), 0), 0, examples())
            args = arguments(folder, **settings)
            trainer = method.trainer(model=model, args=args, train_dataset=examples())
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if run else None)
        results.append(method.end_task(model, trainer, None).state_dict())
    assert_same_bits(*results)


class Killed(BaseException):
    """Not an Exception, so that no handler catches it and cleans up (like SIGKILL)."""


@pytest.mark.parametrize(
    "method",
    [
        {"name": "sft", "harm_decay": 1.0, "reference": ["general.txt", "history"]},
        {"name": "lora", "r": 2, "harm_decay": 1.0, "reference": "general.txt"},
        {"name": "corda", "r": 2, "reference": ["general.txt"]},
    ],
)
def test_a_stream_reads_texts_and_resumes_exactly(method, tmp_path, monkeypatch):
    folder = write_stream(tmp_path / "data")
    stream = read_stream(settings(folder, methods=[method], data=str(folder)))
    (whole,) = run_stream(stream, tmp_path / "whole")
    (run,) = runs_of(stream)
    save = Runner._save_state

    def save_and_die(self, *arguments):
        save(self, *arguments)
        raise Killed

    monkeypatch.setattr(Runner, "_save_state", save_and_die)
    with pytest.raises(Killed):
        list(run_stream(stream, tmp_path / "killed"))
    monkeypatch.undo()
    (resumed,) = run_stream(stream, tmp_path / "killed", resume=True)
    assert without_times(resumed) == without_times(whole)
    assert not (tmp_path / "killed" / "runs" / run.name / "state.pt").exists()
