"""FGGM, the method of this library: sparse adapters on the units with the highest Fisher information."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer

from ...training import FGGMTrainer
from ...tuner import FGGMConfig, InputCovariance, require_reference
from ...tuner.files import HISTORY, TaskRecord, history_of, retained_by, set_retained
from .method import METHODS, RETAINED, require_texts
from .peft_method import PeftMethod


@METHODS.register("fggm")
@dataclass
class FGGM(PeftMethod):
    """FGGM (arXiv 2601.18261): each task trains the units with the highest Fisher information on its data.

    The units are selected when ``train()`` begins; the sparse delta is saved and merged when the task ends. The scores
    of each task are saved in its folder. ``memory`` contains them, and the input covariance of all tasks together, for
    ``reference: history`` in later tasks.

    Args:
        first_task_masked: False trains all weights in the first task, in which only the base model can be forgotten.
    """

    config_class = FGGMConfig
    harm_decay: float = field(default=0.0, init=False, repr=False)  # a field of the config
    reference: list[str] = field(default_factory=list, init=False, repr=False)
    first_task_masked: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.make_config()
        require_reference(config, config.reference)  # a stream cannot pass reference data later
        require_texts(config.reference or [])

    def defaults(self):
        return {**super().defaults(), "seed": self.task_seed, "save_scores": True, "quantized_merge": "keep"}

    @property
    def recommended_learning_rate(self):
        return self.make_config().recommended_learning_rate

    @property
    def supports_quantized(self):
        return self.first_task_masked and self.make_config().quantized_merge == "keep"

    @property
    def is_masked(self) -> bool:
        """Whether only selected units train in the current task."""
        return self.first_task_masked or self.number > 0

    def begin_task(self, model, examples):
        self.restore_history_(model)
        return super().begin_task(model, examples) if self.is_masked else model.requires_grad_(True)

    def trainer(self, **arguments: Any) -> Trainer:
        return FGGMTrainer(**arguments) if self.is_masked else super().trainer(**arguments)

    def end_task(self, model, trainer, folder):
        self.keep_history(model.get_base_model() if isinstance(model, PeftModel) else model)
        return super().end_task(model, trainer, folder) if self.is_masked else model

    def restore_history_(self, model: nn.Module) -> None:
        """Set the records of earlier tasks on a base model, which a new process does not have."""
        setattr(model, HISTORY, [TaskRecord(**fields) for fields in self.memory.get("history", [])])
        if (retained := self.memory.get(RETAINED)) is not None:
            set_retained(model, InputCovariance.from_dict(retained))

    def keep_history(self, model: nn.Module) -> None:
        """Remember the records on a base model."""
        self.memory["history"] = [vars(record) for record in history_of(model)]
        if (retained := retained_by(model)) is not None:
            self.memory[RETAINED] = retained.to_dict()
