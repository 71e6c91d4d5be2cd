"""Text files as a reference, in a trainer, a sequence and the command line."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import fggm
from models import byte_tokenizer, text_model
from peft import get_peft_model
from safetensors.torch import load_file
from streams import settings, write_stream
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from fggm_peft import FGGMConfig, FGGMTrainer, select_parameters
from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream
from fggm_peft.training.data import DataError, Example, TokenizedExamples
from fggm_peft.training.texts import read_paragraphs, text_batches

CRITERION = {"criterion": "gain_per_harm", "granularity": "column", "density": 0.2, "num_samples": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_stream(tmp_path_factory.mktemp("stream"))
    (folder / "prose.txt").write_text("Of other things.\n \nAnd of some more, at length.\n\n\n  \n\n", encoding="utf-8")
    return folder


def supports(model) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if "fggm_indices" in name}


def test_a_text_file_is_read_by_paragraphs(folder, tmp_path):
    assert read_paragraphs(folder / "prose.txt") == [
        Example("", "Of other things."),
        Example("", "And of some more, at length."),
    ]
    (batch,) = text_batches(folder / "prose.txt", byte_tokenizer())
    assert batch["labels"].shape == batch["input_ids"].shape and (batch["labels"] != -100).sum(1).min() >= 15
    with pytest.raises(DataError, match=r"no\.txt: cannot be read as text"):
        read_paragraphs(tmp_path / "no.txt")
    (tmp_path / "blank.txt").write_text(" \n\n\n")
    with pytest.raises(DataError, match=r"blank\.txt is empty"):
        read_paragraphs(tmp_path / "blank.txt")


def test_a_trainer_reads_the_text_file_of_the_config(folder, tmp_path):
    tokenizer, text = byte_tokenizer(), folder / "prose.txt"
    examples = TokenizedExamples([Example(f"{n} and ", str(n + 1)) for n in range(8)], tokenizer, 32)
    found = []
    for reference in ([str(text)], None):
        torch.manual_seed(0)
        model = get_peft_model(text_model(), FGGMConfig(**CRITERION, task_type="CAUSAL_LM", reference=reference))
        trainer = FGGMTrainer(
            model=model,
            args=TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no"),
            train_dataset=examples,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        if reference is None:
            trainer.selection_reference = text_batches(text, tokenizer)
        trainer.train()
        assert trainer.selection_report.reference_samples == 2
        found.append(supports(trainer.model))
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_text_file_without_a_tokenizer_is_an_error(folder):
    model = get_peft_model(text_model(), FGGMConfig(**CRITERION, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"prose.txt' is a text.*text_batches\(file, tokenizer\)"):
        select_parameters(model, [], reference=folder / "prose.txt")


def test_a_method_of_a_sequence_reads_a_text_file_of_the_data_folder(folder, tmp_path):
    found = {}
    for label, reference in (("text", ["prose.txt", "history"]), ("history", ["history"])):
        method = {"name": "fggm", "label": label, **CRITERION, "reference": reference}
        stream = read_stream(settings(folder, methods=[method], data=str(folder)))
        list(run_stream(stream, tmp_path / label))
        files = sorted(tmp_path.glob(f"{label}/**/adapter_config.json"))
        found[label] = [json.loads(file.read_text()) for file in files]
    samples = {label: [config["selection"]["reference_samples"] for config in found[label]] for label in found}
    assert samples == {"text": [2, 2], "history": [0, 0]}


def test_the_command_line_reads_a_text_file(folder, tmp_path):
    arguments = ["--reference", str(folder / "prose.txt"), "--criterion", "gain_per_harm", "--granularity", "column"]
    command = ["select", str(folder / "model"), "--data", str(folder / "plus"), "--output", str(tmp_path / "out")]
    result = fggm(*command, *arguments, "--num-samples", "8", "--json")
    assert json.loads(result.out)["reference_samples"] == 2
    assert any(tensor.numel() for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values())
    result = fggm(*command, *arguments[2:], "--reference", "missing.txt", "--overwrite")
    assert result.code == 1 and "missing.txt: cannot be read as text" in result.err
