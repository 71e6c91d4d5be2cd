"""FGGM the QLoRA way: a frozen 4-bit base, transformers' Trainer, a delta of a few megabytes on disk.

    python examples/qlora_style.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.json --output delta

``--data`` is a JSON file with a list of {"prompt": ..., "answer": ...}. The loss is taken on the answer only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from fggm_peft import FGGMConfig, select_parameters


def tokenize(tokenizer, examples: list[dict[str, str]], max_length: int) -> list[dict[str, list[int]]]:
    """Prompt and answer as one sequence; the prompt's labels are -100."""
    result = []
    for example in examples:
        prompt = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
        answer = tokenizer(example["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        prompt = prompt[-max(1, max_length - len(answer)) :]
        labels = [-100] * len(prompt) + answer
        result.append({"input_ids": prompt + answer, "attention_mask": [1] * len(labels), "labels": labels})
    return result


def load_base(name: str, four_bit: bool) -> torch.nn.Module:
    if not four_bit:
        return AutoModelForCausalLM.from_pretrained(name)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--data", required=True, type=Path, help="JSON list of {prompt, answer}")
    parser.add_argument("--output", required=True, type=Path, help="where the adapter goes")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dense", action="store_true", help="do not quantize the base")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = tokenize(tokenizer, json.loads(arguments.data.read_text()), arguments.max_length)
    collator = DataCollatorForSeq2Seq(tokenizer)

    model = load_base(arguments.model, four_bit=not arguments.dense)
    model = get_peft_model(model, FGGMConfig(density=arguments.density, task_type="CAUSAL_LM"))
    data = DataLoader(examples, batch_size=arguments.batch_size, shuffle=True, collate_fn=collator)
    report = select_parameters(model, data)
    print(f"{report.parameters:,} values may move; split-half agreement {report.agreement:.2f} "
          f"from {report.samples} samples")  # fmt: skip

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output / "checkpoints"),
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            num_train_epochs=arguments.epochs,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=examples,
        data_collator=collator,
    )
    trainer.train()
    model.save_pretrained(arguments.output)
    size = (arguments.output / "adapter_model.safetensors").stat().st_size
    print(f"saved to {arguments.output}, {size / 2**20:.1f} MiB")

    # anybody with the same base loads it like any other PEFT adapter, once fggm_peft is imported
    loaded = PeftModel.from_pretrained(load_base(arguments.model, four_bit=not arguments.dense), arguments.output)
    print(f"loaded again: {loaded.get_nb_trainable_parameters()[1]:,} parameters in all")


if __name__ == "__main__":
    main()
