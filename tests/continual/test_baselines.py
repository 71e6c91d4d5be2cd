"""Baselines of the literature against their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learning import Recorder, assert_same_bits, begin, learn
from models import byte_tokenizer, llama, text_model, token_batches
from peft import PeftModel
from torch.utils.data import DataLoader
from trainers import arguments, examples
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM

from fggm_peft import input_covariance
from fggm_peft.continual.methods import make_method
from fggm_peft.core.harm_decay import RIDGE
from fggm_peft.selection import linear_layers
from fggm_peft.training.data import Example, TokenizedExamples

PATHS = list(linear_layers(llama()))
GENERAL = "\n\n".join(f"Sentence {n} of some general text, number {n * n}." for n in range(40))


@pytest.fixture(scope="module")
def general(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("data") / "general.txt"
    file.write_text(GENERAL)
    return str(file)


def trainer_on_text(method, model, number: int, folder: Path, **settings):
    """The trainer of a task of texts."""
    method.number = number
    data = TokenizedExamples([Example(f"{n} and one is ", str(n + 1)) for n in range(10, 34)], byte_tokenizer(), 64)
    return method.trainer(
        model=method.begin_task(model, data),
        args=arguments(folder / "trainer", **settings),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(byte_tokenizer()),
    )


def learn_text(method, model, number: int, folder: Path, **settings):
    """Train one task of texts as the runner does."""
    trainer = trainer_on_text(method, model, number, folder, **settings)
    started = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    trainer.train()
    return method.end_task(model, trainer, folder / str(number)), started


def test_corda_starts_in_the_smallest_directions_of_the_weight_on_the_reference(general, tmp_path):
    base, method = text_model(), make_method("corda", r=4, reference=[general])
    _, started = learn_text(method, text_model(), 0, tmp_path, learning_rate=0.0)
    ids = [byte_tokenizer()(text, return_tensors="pt")["input_ids"] for text in GENERAL.split("\n\n")]
    inputs: dict[str, list[torch.Tensor]] = {}
    for path in linear_layers(base):
        base.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: inputs.setdefault(path, []).append(args[0].detach()[0].double())
        )
    for each in ids:
        each = torch.cat([each, torch.tensor([[1]])], 1) if each[0, -1] != 1 else each
        base(input_ids=each)
    for path in linear_layers(base):
        weight = base.get_submodule(path).weight.detach().double()
        covariance = sum((x / x.max().abs()).mT @ (x / x.max().abs()) for x in inputs[path]) / len(ids)
        covariance += 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
        u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
        expected = (u[:, -4:] * s[-4:]) @ vh[-4:] @ torch.linalg.inv(covariance)
        prefix = f"base_model.model.{path}"
        product = 2 * started[f"{prefix}.lora_B.default.weight"] @ started[f"{prefix}.lora_A.default.weight"]
        assert (product - expected).norm() < 0.02 * expected.norm(), path
        torch.testing.assert_close(started[f"{prefix}.base_layer.weight"] + product, weight.float())


def test_the_delta_that_corda_saves_fits_the_unchanged_weights_and_a_run_is_reproducible(general, tmp_path):
    states = []
    for run in ("first", "second"):
        method = make_method("corda", r=4, reference=[general])
        model, _ = learn_text(method, text_model(), 0, tmp_path / run)
        states.append(model.state_dict())
        loaded = PeftModel.from_pretrained(text_model(), tmp_path / run / "0").merge_and_unload()
        for (key, a), b in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
        model, _ = learn_text(method, model, 1, tmp_path / run)
        assert [name for name, _ in model.named_modules()] == [name for name, _ in text_model().named_modules()]
    assert_same_bits(*states)


def test_corda_needs_a_text():
    for reference in ([], ["history"]):
        with pytest.raises(ValueError, match=r"Set reference|must be text files"):
            make_method("corda", reference=reference)


# MoFO and HFT ------------------------------------------------------------------------------------


def test_mofo_changes_the_entries_with_the_largest_momentum(tmp_path):
    method, twin = make_method("mofo", fraction=0.1), llama().double()
    model = begin(method, llama().double(), 0, examples())
    recorder = Recorder(model)
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "linear", "optim": "adamw_torch"}
    method.trainer(model=model, args=arguments(tmp_path, **settings), train_dataset=examples()).train()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in twin.named_parameters()}
    for step, batch in enumerate(recorder.batches, start=1):
        rate = 1e-2 * (1 - (step - 1) / 4)
        twin.zero_grad()
        twin(**batch).loss.backward()
        for name, parameter in twin.named_parameters():
            m, v = moments[name]
            m.copy_(0.9 * m + 0.1 * parameter.grad)
            v.copy_(0.999 * v + 0.001 * parameter.grad**2)
            update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            if parameter.dim() > 1:
                update *= m.abs() >= m.abs().flatten().sort(descending=True).values[int(0.1 * m.numel()) - 1]
            parameter.data.mul_(1 - rate * (0 if "norm" in name else 0.1)).sub_(rate * update)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter.detach(), rtol=1e-6, atol=1e-9)


def test_mofo_decays_after_its_filter(tmp_path):
    """Otherwise the filter would restore what harm decay has removed."""
    harm, covariance = [], input_covariance(llama(), token_batches(seed=1), progress=False)
    file = str(covariance.save(tmp_path))
    for decay in ({}, {"harm_decay": 200.0, "reference": [file]}):
        model, _ = learn(make_method("mofo", **decay), llama(), 0, tmp_path, max_steps=8)
        changes = {path: model.get_submodule(path).weight - llama().get_submodule(path).weight for path in PATHS}
        harm.append(sum((d @ covariance[p].to(torch.float32).dense() * d).sum().item() for p, d in changes.items()))
    assert harm[1] < 0.6 * harm[0]


def test_hft_freezes_another_half_of_each_block_in_each_task():
    method, frozen = make_method("hft"), []
    for number in (0, 1):
        model = begin(method, llama(layers=4), number, examples())
        frozen.append({name for name, parameter in model.named_parameters() if not parameter.requires_grad})
        feed_forward = []
        for block in range(4):
            own = [name for name in frozen[-1] if f"layers.{block}." in name]
            assert sum("self_attn" in name for name in own) == 2 and sum("norm" in name for name in own) == 1
            feed_forward.append(sum("mlp" in name for name in own))
        assert sorted(feed_forward) == [1, 1, 2, 2]
        assert not {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} & frozen[-1]
    assert frozen[0] != frozen[1]


# SDFT and LoRA in quiet directions ---------------------------------------------------------------


def test_sdft_starts_its_teacher_from_the_model_after_the_earlier_tasks(tmp_path):
    pytest.importorskip("trl.experimental.sdft")
    text_model().save_pretrained(tmp_path / "base")
    states = []
    for run in ("first", "second"):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.nn.init.constant_(model.model.norm.weight, 1.5)  # an earlier task
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        method = make_method("sdft")
        trainer = trainer_on_text(method, model, 1, tmp_path / run, max_steps=3)
        assert_same_bits(trainer.teacher_model.state_dict(), before)
        trainer.train()
        states.append(model.state_dict())
        assert any(not torch.equal(tensor, before[key]) for key, tensor in states[-1].items())
    assert_same_bits(*states)


@pytest.mark.parametrize("decay", [{}, {"harm_decay": 1.0}])
def test_a_quiet_lora_starts_in_what_the_task_uses_more_than_the_reference(decay, general, tmp_path):
    method = make_method("lora", r=4, init="quiet", reference=[general], **decay)
    trainer = trainer_on_text(method, text_model(), 0, tmp_path)
    task = input_covariance(text_model(), DataLoader(trainer.train_dataset, 8, collate_fn=trainer.data_collator))
    for path in PATHS:
        a = trainer.model.get_submodule(f"base_model.model.{path}").lora_A["default"].weight.detach().double()
        retained, own = (each[path].to(torch.float64).dense() for each in (trainer.covariance, task))
        mapped = torch.linalg.inv(RIDGE * torch.eye(len(own)) + retained)
        vectors = torch.linalg.eigh(mapped @ own @ mapped).eigenvectors[:, -4:]
        torch.testing.assert_close(a @ a.mT, torch.eye(4).double() / 3, atol=1e-5, rtol=0)
        assert (a * 3**0.5 @ vectors).square().sum() > 0.95 * 4  # the same subspace
