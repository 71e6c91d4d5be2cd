"""FGGM, the method of this library: sparse adapters on the units with the highest Fisher information."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from ...training import FGGMTrainer
from ...tuner import FGGMConfig, require_reference
from ...tuner.files import HISTORY, TaskRecord, history_of, scores_from
from .method import METHODS, train_all_
from .peft_method import PeftMethod


@METHODS.register("fggm")
@dataclass
class FGGM(PeftMethod):
    """FGGM (arXiv 2601.18261): each task trains the units with the highest Fisher information on its data.

    The units are selected when ``train()`` begins; the sparse delta is saved and merged when the task ends. The scores
    of each task are saved in its folder. The method stores them for ``reference: history`` in later tasks, also when a
    run is resumed.

    Args:
        first_task_masked: False trains all weights in the first task, in which only the base model can be forgotten.
    """

    config_class = FGGMConfig
    first_task_masked: bool = True
    _history: list[TaskRecord] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        config: Any = self.make_config(0)
        require_reference(config.criterion, config.reference)  # a stream cannot pass reference data later

    def defaults(self, number):
        return {**super().defaults(number), "seed": self.task_seed(number), "save_scores": True}

    def is_masked(self, number: int) -> bool:
        """Whether only selected units train in task ``number``."""
        return self.first_task_masked or number > 0

    def begin_task(self, model, number, examples):
        self.restore_history_(model)
        return super().begin_task(model, number, examples) if self.is_masked(number) else train_all_(model)

    def trainer(self, **arguments: Any) -> Trainer:
        is_adapted = isinstance(arguments["model"], PeftModel)
        return FGGMTrainer(**arguments) if is_adapted else super().trainer(**arguments)

    def end_task(self, model, number, trainer, folder):
        self._history = history_of(model.get_base_model() if isinstance(model, PeftModel) else model)
        return super().end_task(model, number, trainer, folder) if self.is_masked(number) else model

    def restore_history_(self, model: nn.Module) -> None:
        """Set the records of earlier tasks on a base model, which a new process does not have."""
        setattr(model, HISTORY, list(self._history))

    def state_dict(self) -> dict[str, Tensor]:
        """The records of earlier tasks, by the number of the record."""
        state = {}
        for number, record in enumerate(self._history):
            state[f"{number}/samples/{json.dumps(record.granularity)}"] = torch.tensor(record.samples)
            state |= {f"{number}/scores/{name}": tensor for name, tensor in record.tensors().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        records: dict[int, dict[str, dict[str, Tensor]]] = {}
        for key, tensor in state.items():
            number, kind, name = key.split("/", 2)
            records.setdefault(int(number), {"scores": {}, "samples": {}})[kind][name] = tensor
        self._history = []
        for _, parts in sorted(records.items()):
            ((granularity, samples),) = parts["samples"].items()
            scores = scores_from(parts["scores"], "the state of a run")
            self._history.append(TaskRecord(json.loads(granularity), int(samples), "", scores))
