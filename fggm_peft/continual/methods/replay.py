"""Full fine-tuning with some of the earlier tasks' data mixed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import Trainer

from .fine_tuning import FineTuning
from .method import METHODS, Examples

INDICES = "indices"


@METHODS.register("replay")
@dataclass
class Replay(FineTuning):
    """Experience replay: a share of each task's examples is kept and mixed into the data of every later task.

    Args:
        fraction: of a task's examples, in (0, 1]; at least one is kept.

    ``state_dict`` holds for each task which examples are kept (``<task>.indices``) and their tokens, so that a
    resumed run needs no earlier task's data.
    """

    fraction: float = 0.1
    _memory: dict[int, list[dict[str, list[int]]]] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _number: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction!r}")

    def begin_task(self, model, number, examples: Examples):
        self._number = number
        generator = torch.Generator().manual_seed(self.task_seed(number))
        share = max(1, round(self.fraction * len(examples)))
        drawn = torch.randperm(len(examples), generator=generator)[:share]
        self._kept[number] = drawn.sort().values
        self._memory[number] = [
            {key: list(values) for key, values in examples[index].items()} for index in self._kept[number].tolist()
        ]
        return super().begin_task(model, number, examples)

    def replayed(self) -> list[dict[str, list[int]]]:
        """The examples of earlier tasks that are mixed into the current one's."""
        return [example for task in sorted(self._memory) if task < self._number for example in self._memory[task]]

    def trainer(self, **arguments: Any) -> Trainer:
        if earlier := self.replayed():
            arguments["train_dataset"] = ConcatDataset([arguments["train_dataset"], earlier])  # type: ignore[list-item]
        return super().trainer(**arguments)

    def state_dict(self) -> dict[str, Tensor]:
        state = {}
        for task, examples in self._memory.items():
            state[f"{task}.{INDICES}"] = self._kept[task]
            for key in examples[0]:
                state[f"{task}.{key}.values"] = torch.tensor([value for e in examples for value in e[key]])
                state[f"{task}.{key}.lengths"] = torch.tensor([len(e[key]) for e in examples])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._kept = {int(key.split(".")[0]): kept for key, kept in state.items() if key.endswith(f".{INDICES}")}
        self._memory = {task: [{} for _ in kept] for task, kept in self._kept.items()}
        for name, lengths in state.items():
            if not name.endswith(".lengths"):
                continue
            task, key, _ = name.split(".")
            rows = state[f"{task}.{key}.values"].split(lengths.tolist())
            for example, values in zip(self._memory[int(task)], rows, strict=True):
                example[key] = values.tolist()
