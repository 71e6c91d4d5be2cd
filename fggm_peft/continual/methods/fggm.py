"""Fisher-guided gradient masking by sparse adapters: the library's own method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from ...training import FGGMTrainer
from ...tuner import FGGMConfig
from ...tuner.files.task_scores import HISTORY, TaskRecord, history_of, scores_from
from ...tuner.settings.selection import require_protection, require_reference
from ...tuner.support import unwrapped
from .method import METHODS, train_all_
from .peft_method import PeftMethod


@METHODS.register("fggm")
@dataclass
class FGGM(PeftMethod):
    """FGGM (arXiv 2601.18261): each task trains the units with the highest Fisher information on its data.

    The units are chosen when ``train()`` begins; the sparse delta is saved and merged when the task ends.

    The scores of each task go into its folder, and what the method remembers of it (scores and supports) serves
    ``reference: history`` and ``protect_earlier`` in later tasks, also when a run is resumed.

    Args:
        first_task_masked: False trains all weights plainly on the first task, which has nothing to forget but the base.
        protect_earlier: how strongly units that earlier tasks chose are kept from later ones, in [0, 1]; 1 forbids
            them. It is the config's ``protection`` with ``protect: [history]``.
    """

    config_class = FGGMConfig
    first_task_masked: bool = True
    protect_earlier: float = 0.0
    _history: list[TaskRecord] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        require_protection(self.protect_earlier)
        super().__post_init__()
        if self.protect_earlier and "protect" in self.config:
            raise ValueError("give protect_earlier or protect: protect_earlier is protect: [history]")
        config: Any = self.make_config(0)
        require_reference(config.criterion, config.reference)  # it cannot come later

    def defaults(self, number):
        found = {**super().defaults(number), "seed": self.task_seed(number), "save_scores": True}
        if self.protect_earlier and number:
            found |= {"protect": ["history"], "protection": self.protect_earlier}
        return found

    def is_masked(self, number: int) -> bool:
        """Whether only chosen units train in task ``number``."""
        return self.first_task_masked or number > 0

    def begin_task(self, model, number, examples):
        self.recall(model)
        return super().begin_task(model, number, examples) if self.is_masked(number) else train_all_(model)

    def trainer(self, **arguments: Any) -> Trainer:
        is_adapted = isinstance(arguments["model"], PeftModel)
        return FGGMTrainer(**arguments) if is_adapted else super().trainer(**arguments)

    def end_task(self, model, number, trainer, folder):
        self._history = history_of(unwrapped(model))
        return super().end_task(model, number, trainer, folder) if self.is_masked(number) else model

    def recall(self, model: nn.Module) -> None:
        """Let a base model know what was selected on it in earlier tasks, also in another process."""
        setattr(model, HISTORY, list(self._history))

    def state_dict(self) -> dict[str, Tensor]:
        """The records of earlier tasks, by the number of the record."""
        state = {}
        for number, record in enumerate(self._history):
            state[f"{number}/samples/{record.granularity}"] = torch.tensor(record.samples)
            state |= {f"{number}/scores/{name}": tensor for name, tensor in record.tensors().items()}
            state |= {f"{number}/support/{name}": indices for name, indices in record.supports.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        records: dict[int, dict[str, dict[str, Tensor]]] = {}
        for key, tensor in state.items():
            number, kind, name = key.split("/", 2)
            records.setdefault(int(number), {"scores": {}, "support": {}, "samples": {}})[kind][name] = tensor
        self._history = []
        for _, parts in sorted(records.items()):
            ((granularity, samples),) = parts["samples"].items()
            scores = scores_from(parts["scores"], "the state of a run")
            self._history.append(TaskRecord(granularity, int(samples), "", scores, parts["support"]))
