"""Trains on one or several processes, and can be killed and resumed at any moment with identical results.

    python examples/long_run.py --model MODEL --data train.json --output run
    torchrun --nproc-per-node 2 examples/long_run.py --model MODEL --data train.json --output run

After a crash, start it again with ``--resume``. It resumes from the newest complete checkpoint, and the losses and the
delta are bit for bit those of an uninterrupted run. Each of several processes scores its own share of the data. The
scores are summed, so all processes train the same support.

``--data`` is a JSON file with a list of {"prompt": ..., "completion": ...}.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fggm_peft import FGGMConfig
from fggm_peft.training import FGGMTrainerMixin


class Trainer(FGGMTrainerMixin, SFTTrainer):
    """Selects on its own data when ``train()`` begins, unless it resumes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--data", required=True, help="JSON list of {prompt, completion}")
    parser.add_argument("--output", required=True, type=Path, help="folder for the adapter and the checkpoints")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4, help="per process")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument("--resume", action="store_true", help="resume from the newest complete checkpoint")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model),
        peft_config=FGGMConfig(density=arguments.density, task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(arguments.output / "checkpoints"),
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            max_steps=arguments.steps,
            logging_steps=1,
            save_steps=arguments.save_every,
            save_total_limit=2,
            use_cpu=arguments.cpu,
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model(str(arguments.output))
    trainer.state.save_to_json(str(arguments.output / "trainer_state.json"))
    if PartialState().is_main_process:
        resumed = "resumed" if trainer.selection_report is None else "selected"
        print(f"{trainer.state.global_step} steps, {resumed}; the adapter is in {arguments.output}")


if __name__ == "__main__":
    main()
    gc.collect()  # if the trainer's DDP is freed after its process group, torch may hang
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
