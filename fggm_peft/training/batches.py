"""What trainers call a batch, as the Fisher pass takes it: model inputs with ``labels``, one sample a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..selection.likelihood import IGNORED

# what TRL's preference trainers put beside the inputs of the model
_NOT_INPUTS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class Prompts:
    """Lets a model answer prompts, for trainers whose data has no answers (GRPO, RLOO).

    The answers are drawn from the model, as the trainer will draw them: what is summed then is the true
    Fisher information at the task's prompts.

    Args:
        trainer: its model, ``processing_class``, and ``generation_config`` if it has one, write the answers.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.model, self.tokenizer = trainer, trainer.model, trainer.processing_class

    def answered(self, prompts: list[Any]) -> dict[str, Tensor]:
        """Prompts (text, or lists of messages) with a drawn answer each; labels only on the answers."""
        is_text = isinstance(prompts[0], str)
        encoded = self.tokenizer(
            prompts if is_text else [self._templated(prompt) for prompt in prompts],
            padding=True,
            padding_side="left",
            add_special_tokens=is_text,  # a template has written them itself
            return_tensors="pt",
        ).to(next(self.model.parameters()).device)
        config = getattr(self.trainer, "generation_config", None) or self.model.generation_config
        with _all_evaluating(self.model):
            sequences = self.model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                generation_config=config,
                max_new_tokens=config.max_new_tokens or 256,
                do_sample=True,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        width = encoded["input_ids"].shape[1]
        ends = config.eos_token_id if config.eos_token_id is not None else self.tokenizer.eos_token_id
        is_end = torch.isin(sequences[:, width:], torch.tensor(ends, device=sequences.device)).long()
        answer = (is_end.cumsum(1) - is_end) == 0  # up to the first end of sequence, which belongs to the answer
        labels = sequences.clone()
        labels[:, :width] = IGNORED
        labels[:, width:].masked_fill_(~answer, IGNORED)
        mask = torch.cat([encoded["attention_mask"], answer.long()], 1)
        return {"input_ids": sequences, "attention_mask": mask, "labels": labels}

    def _templated(self, messages: list[dict[str, str]]) -> str:
        extra = getattr(self.trainer, "chat_template_kwargs", None) or {}
        template = getattr(self.trainer, "chat_template", None)
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=template, **extra
        )


@contextmanager
def _all_evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode also for modules that checkpoint their gradients, which the Fisher pass leaves in training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def selection_batch(batch: Any, prompts: Prompts | None = None) -> Mapping[str, Any]:
    """A trainer's batch as model inputs with labels, each row one sample.

    Args:
        batch: what the trainer's collator made.
        prompts: answers batches that hold prompts only.

    Raises:
        ValueError: it holds prompts only, and ``prompts`` is None.
    """
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Mapping) and "prompt" in batch[0]:
        if prompts is None:
            raise ValueError(
                "the trainer's batches hold prompts without answers; FGGMTrainerMixin lets the model write them"
            )
        return prompts.answered([example["prompt"] for example in batch])
    if not isinstance(batch, Mapping):
        return batch  # select_parameters says what is wrong with it
    if "labels" not in batch and "completion_mask" in batch:
        inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
        inputs["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        return _paired(inputs)
    return _apart(batch)


def _paired(batch: dict[str, Any]) -> dict[str, Any]:
    """All chosen answers and then all rejected ones, as pairs: a limit on samples should take as many of both."""
    size = len(batch["input_ids"])
    if size % 2:
        return batch
    order = torch.arange(size).view(2, -1).T.flatten()
    return {
        key: value[order.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == size
        else value
        for key, value in batch.items()
    }


def _apart(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sequences that were packed into one row in rows of their own, so that a sample is one sequence.

    Packed rows tell where a sequence starts by a position of 0, which single tokens of padding have too.
    """
    positions, labels, ids = (batch.get(key) for key in ("position_ids", "labels", "input_ids"))
    if not all(isinstance(value, Tensor) and value.dim() == 2 for value in (positions, labels, ids)):
        return batch
    assert isinstance(positions, Tensor) and isinstance(labels, Tensor) and isinstance(ids, Tensor)
    mask = batch.get("attention_mask")
    real = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(ids, dtype=torch.bool)
    starts = (positions == 0) & real
    if bool((starts.sum(1) <= 1).all()):
        return batch
    sequence = torch.where(real, starts.flatten().cumsum(0).view_as(starts), 0)
    wheres = [sequence == number for number in range(1, int(sequence.max()) + 1)]
    wheres = [where for where in wheres if where.sum() > 1 or (labels[where] != IGNORED).any()]
    rows = pad_sequence([ids[where] for where in wheres], batch_first=True)
    lengths = torch.stack([where.sum() for where in wheres])
    return {
        "input_ids": rows,
        "attention_mask": (torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]).long(),
        "labels": pad_sequence([labels[where] for where in wheres], batch_first=True, padding_value=IGNORED),
    }
