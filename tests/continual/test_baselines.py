"""Baselines of the literature against their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learning import assert_same_bits
from models import byte_tokenizer, text_model
from peft import PeftModel
from trainers import arguments
from transformers import DataCollatorForSeq2Seq

from fggm_peft.continual.methods import make_method
from fggm_peft.continual.methods.method import linear_layers
from fggm_peft.training.data import Example, TokenizedExamples

GENERAL = "\n\n".join(f"Sentence {n} of some general text, number {n * n}." for n in range(40))


@pytest.fixture(scope="module")
def general(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("data") / "general.txt"
    file.write_text(GENERAL)
    return str(file)


def learn_text(method, model, number: int, folder: Path, **settings):
    """Train one task of texts as the runner does."""
    method.number = number
    data = TokenizedExamples([Example(f"{n} and one is ", str(n + 1)) for n in range(10, 34)], byte_tokenizer(), 64)
    model = method.begin_task(model, data)
    trainer = method.trainer(
        model=model,
        args=arguments(folder / "trainer", **settings),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(byte_tokenizer()),
    )
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
