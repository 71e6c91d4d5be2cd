"""Trains like QLoRA: a frozen 4-bit base, TRL's SFTTrainer, and a delta of a few megabytes.

    python examples/qlora_style.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.json --output delta

``--data`` is a JSON file with a list of {"prompt": ..., "completion": ...}. The loss is on the completion only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from fggm_peft import FGGMConfig
from fggm_peft.training import FGGMTrainerMixin


class Trainer(FGGMTrainerMixin, SFTTrainer):
    """Selects on its own data when ``train()`` begins."""


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
    parser.add_argument("--data", required=True, help="JSON list of {prompt, completion}")
    parser.add_argument("--output", required=True, type=Path, help="folder for the adapter")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dense", action="store_true", help="do not quantize the base")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Trainer(
        model=load_base(arguments.model, four_bit=not arguments.dense),
        peft_config=FGGMConfig(density=arguments.density, task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(arguments.output / "checkpoints"),
            per_device_train_batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            learning_rate=arguments.learning_rate,
            num_train_epochs=arguments.epochs,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            logging_steps=5,
            save_strategy="no",
            bf16=is_torch_bf16_gpu_available(),
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    report = trainer.selection_report
    print(f"{report.parameters:,} trainable values; regret {report.regret:.1%} "
          f"from {report.samples} samples")  # fmt: skip
    trainer.save_model(str(arguments.output))
    size = (arguments.output / "adapter_model.safetensors").stat().st_size
    print(f"saved to {arguments.output}, {size / 2**20:.1f} MiB")

    # anyone with the same base can load it like any other PEFT adapter, after importing fggm_peft
    loaded = PeftModel.from_pretrained(load_base(arguments.model, four_bit=not arguments.dense), arguments.output)
    print(f"loaded again: {loaded.get_nb_trainable_parameters()[1]:,} parameters in total")


if __name__ == "__main__":
    main()
