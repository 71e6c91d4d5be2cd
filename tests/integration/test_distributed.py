"""Two processes select and train like one process."""

from __future__ import annotations

import os
import shutil
import sys
from unittest import mock

import pytest
import torch
from models import VOCABULARY, adapted, fggm_layers, llama, token_batches
from processes import Failure
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainingArguments

from fggm_peft import ParameterBudget, ScoreMass, TopDensity, select_parameters
from fggm_peft.selection import reference
from fggm_peft.training.checkpoints import last_complete_checkpoint

pytestmark = pytest.mark.distributed


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def share(batches: list) -> list:
    """The batches of this rank: every second one, or all in a single process."""
    return batches[rank() :: 2] if torch.distributed.is_initialized() else batches


def supports(model) -> dict[str, Tensor]:
    return {name: layer.fggm_indices["default"] for name, layer in fggm_layers(model, "default").items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, indices in first.items():
        assert torch.equal(indices, second[name]), name


# the ranks have different numbers of batches, and the last batch is smaller
SIZES = (3, 3, 3, 3, 2)


def select(config: dict, arguments: dict, sizes=SIZES, length: int = 9) -> tuple[dict[str, Tensor], dict]:
    model = adapted(llama(), **config)
    batches = share(token_batches(sizes=sizes, length=length))
    if "reference" in arguments:
        arguments = {**arguments, "reference": [share(arguments["reference"]), "self"]}
    with mock.patch.multiple(reference, WRITTEN_TEXTS=20, WRITTEN_LENGTH=6):
        report = select_parameters(model, batches, progress=False, **arguments).to_dict()
    report.pop("seconds")
    return supports(model), report


CASES = {
    "rows": ({"granularity": "row"}, {"num_samples": None}),
    "columns": ({"granularity": "column", "threshold": ScoreMass(0.7)}, {"num_samples": None}),
    "elements": ({"granularity": "element", "density": 0.05}, {"num_samples": None}),
    "global scope": ({"threshold": ParameterBudget(3000)}, {"num_samples": None}),
    "in groups": ({"threshold": ScoreMass(0.5), "score_memory": 2000}, {"num_samples": None}),
    "a number of samples": ({"threshold": TopDensity(0.4)}, {"num_samples": 7}),
    "a reference": (
        {"granularity": "column", "criterion": "gain_per_harm"},
        {"num_samples": 18, "reference": token_batches(sizes=(4, 3, 2), seed=3)},
    ),
    "forward passes": (
        {"granularity": "column", "criterion": "input_ratio"},
        {"num_samples": None, "reference": token_batches(sizes=(4, 3, 2), seed=3)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_select_the_support_of_one_process(case, processes):
    expected, report = select(*CASES[case])
    for chosen, others_report in processes(select, *CASES[case]):
        assert_same(chosen, expected)
        assert others_report["samples"] == report["samples"]
        assert others_report["reference_samples"] == report["reference_samples"]
        assert others_report["regret"] == pytest.approx(report["regret"], abs=1e-6)
        assert others_report["parameters"] == report["parameters"]


def test_two_processes_find_the_same_automatic_number_of_samples(processes):
    arguments = ({"density": 0.5}, {"num_samples": "auto"}, (8,) * 16, 24)
    expected, report = select(*arguments)
    for chosen, others_report in processes(select, *arguments):
        assert_same(chosen, expected)
        assert others_report["samples"] == report["samples"] >= 32


def select_from_shuffled() -> dict[str, Tensor]:
    model = adapted(llama())
    select_parameters(model, token_batches(seed=rank(), padding=("left", "right")[rank()]), None, progress=False)
    return supports(model)


def test_ranks_with_different_data_select_the_same_support(processes):
    assert_same(*processes(select_from_shuffled))


def select_with_difference(what: str) -> None:
    config = {"density": 0.3 + 0.1 * rank()} if what == "config" else {}
    if what == "modules":
        config = {"exclude_modules": ["q_proj"]} if rank() else {}
    model = adapted(llama(), **config)
    if what == "versions":
        sys.modules["fggm_peft.selection.select"].__version__ = f"0.{rank()}"
    select_parameters(model, token_batches(), progress=False)


DIFFERENCES = {
    "config": "the config's density is 0.3 on rank 0 and 0.4 on rank 1",
    "modules": "the config's exclude_modules is null on rank 0",
    "versions": 'the version of fggm_peft is "0.0" on rank 0 and "0.1" on rank 1',
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_with_different_settings_raise_an_error_on_every_rank(what, processes):
    for failure in processes.outcomes(select_with_difference, what):
        assert failure.type == "RuntimeError"
        assert f"the ranks differ in their setting: {DIFFERENCES[what]}" in failure.message
    if what == "versions":
        processes.stop()  # the version stays changed in these processes


def select_with_a_bad_batch(problem: str) -> str:
    batches = share(token_batches(sizes=(2, 2, 2, 2)))
    model = adapted(llama())
    if rank() == 1 and problem == "labels":
        del batches[1]["labels"]
    if rank() == 1 and problem == "weights":
        with torch.no_grad():
            model.get_base_model().lm_head.weight[5] = float("nan")
    try:
        select_parameters(model, batches, progress=False)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    assert not any(layer.fggm_values["default"].numel() for layer in fggm_layers(model, "default").values())
    assert not any(module._forward_hooks for module in model.modules())
    if problem == "labels":  # the processes are still in step
        select_parameters(model, share(token_batches(sizes=(2, 2))), progress=False)
    return message


@pytest.mark.parametrize("problem, error", [("labels", "ValueError"), ("weights", "NonFiniteScoreError")])
def test_an_error_on_one_rank_raises_an_error_that_names_the_rank_on_all(problem, error, processes):
    first, second = processes(select_with_a_bad_batch, problem)
    assert second.startswith(error)
    assert first.startswith(f"RuntimeError: the selection pass failed on rank 1: {error}")


class Samples(Dataset):
    """22 sequences of equal length, so that two ranks have different last batches."""

    def __init__(self, number: int = 22):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, VOCABULARY, (number, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainer(folder: str, **arguments):
    from fggm_peft.training import FGGMTrainer

    ranks = 2 if torch.distributed.is_initialized() else 1
    options = {
        "per_device_train_batch_size": 4 // ranks,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    model = adapted(llama(), density=0.3)
    return FGGMTrainer(model=model, args=TrainingArguments(folder, **{**options, **arguments}), train_dataset=Samples())


Tensors = dict[str, Tensor]


def train(folder: str, arguments: dict, resume: bool = False) -> tuple[Tensors, Tensors, list]:
    run = trainer(folder, **arguments)
    run.train(resume_from_checkpoint=resume)
    values = {name: layer.fggm_values["default"].detach() for name, layer in fggm_layers(run.model, "default").items()}
    return supports(run.model), values, [(log["step"], log["loss"]) for log in run.state.log_history if "loss" in log]


# only full batches of one epoch: two processes pad the last batch differently
@pytest.mark.parametrize("accumulation, steps", [(1, 4), (2, 2)])
def test_training_on_two_processes_equals_training_on_one_with_the_whole_batch(
    accumulation, steps, processes, tmp_path
):
    arguments = {"gradient_accumulation_steps": accumulation, "max_steps": steps}
    expected_supports, expected_values, expected_losses = train(str(tmp_path), arguments)
    (first_supports, first, losses), (second_supports, second, _) = processes(train, str(tmp_path), arguments)
    assert_same(first_supports, expected_supports)
    assert_same(second_supports, expected_supports)
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected_losses], rel=1e-4)
    for name, values in expected_values.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], values, rtol=2e-3, atol=2e-5)


def test_two_processes_resume_bit_exactly(processes, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    _, expected, losses = processes(train, str(tmp_path), options)[0]
    shutil.rmtree(tmp_path / "checkpoint-6")
    with_resume = processes(train, str(tmp_path), options, True)
    for _, values, _ in with_resume:
        assert_same(values, expected)
    assert with_resume[0][2] == losses


def train_in_ddp() -> list[Tensor]:
    model = adapted(llama(), threshold=TopDensity(0.02, scope="global"))
    select_parameters(model, token_batches(), progress=False)
    assert any(not len(indices) for indices in supports(model).values())
    model = torch.nn.parallel.DistributedDataParallel(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in token_batches(seed=rank()):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def test_ddp_does_not_wait_for_modules_with_empty_support(processes):
    first, second = processes(train_in_ddp)
    assert first and all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


class FailingStream(IterableDataset):
    def __iter__(self):
        for number, sample in enumerate(Samples()):
            if number == 13:
                raise OSError("the stream broke")
            yield sample


def train_on_a_failing_stream(folder: str) -> None:
    run = trainer(folder)
    run.train_dataset = FailingStream()
    run.train()


def test_a_failing_stream_raises_an_error_on_every_rank_without_a_deadlock(processes, tmp_path):
    for failure in processes.outcomes(train_on_a_failing_stream, str(tmp_path)):
        assert "the stream broke" in failure.message


def train_until_rank_one_dies_while_saving(folder: str) -> None:
    run = trainer(folder, save_strategy="steps", save_steps=3)
    save = torch.save

    def die_at_the_second_checkpoint(value, file, *arguments, **options):
        if "checkpoint-6" in str(file) and "rng_state_1" in str(file):
            os._exit(1)
        save(value, file, *arguments, **options)

    torch.save = die_at_the_second_checkpoint
    run.train()


def test_a_checkpoint_that_one_rank_did_not_finish_is_skipped(processes, tmp_path):
    first, second = processes.outcomes(train_until_rank_one_dies_while_saving, str(tmp_path))
    assert isinstance(first, Failure) and second.type == "EOFError"
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-3"
