"""SDFT: the model learns from its own answers, corrected by itself with the demonstration in the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from .method import METHODS, Method


@METHODS.register("sdft")
@dataclass
class SDFT(Method):
    """Self-distillation fine-tuning (arXiv 2601.19897), by the experimental trainer of TRL.

    The model answers each prompt itself. The loss is the divergence of its answer's tokens from a teacher: a moving
    average of the model, to which the prompt with the correct answer is shown before the prompt. All weights train. The
    order of the data differs from that of other methods. A task that is resumed from a checkpoint restarts its teacher.
    It requires ``trl``.

    Args:
        rate: of the moving average, for each step.
    """

    rate: float = 0.05
    harm_decay: float = field(default=0.0, init=False, repr=False)  # TRL's trainer has no place for it
    reference: list[str] = field(default_factory=list, init=False, repr=False)

    def trainer(self, **arguments):
        from datasets import Dataset
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        args, model, data = (arguments[name] for name in ("args", "model", "train_dataset"))
        tokenizer = arguments["data_collator"].tokenizer
        settings = {each.name: getattr(args, each.name) for each in fields(TrainingArguments) if each.init}
        config: Any = SDFTConfig(
            **settings,
            num_generations=1,
            max_prompt_length=None,
            max_completion_length=max(sum(label >= 0 for label in row["labels"]) for row in data),
            teacher_model_kind="ema",
            teacher_update_rate=self.rate,
            teacher_prompt_template=f"{{prompt}}{{privileged_context}}{tokenizer.eos_token}\n{{prompt}}",
        )
        trainer = SDFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": each.prompt, "privileged_context": each.answer} for each in data.examples]
            ),
            processing_class=tokenizer,
        )
        teacher: Any = trainer.teacher_model
        teacher.load_state_dict(model.state_dict())  # TRL has loaded the base model, without the earlier tasks
        return trainer
