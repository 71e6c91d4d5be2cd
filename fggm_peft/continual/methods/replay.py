"""Experience replay: full fine-tuning with some of the earlier tasks' data."""

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


@METHODS.register("replay")
@dataclass
class Replay(FineTuning):
    """Experience replay: a share of each task's examples is mixed into the data of every later task.

    ``state_dict`` contains the indices of these examples in each task (``<task>.indices``) and their tokens, so that
    a resumed run does not need the data of earlier tasks.

    Args:
        fraction: of a task's examples, in (0, 1]; at least one example.
    """

    fraction: float = 0.1
    _examples: dict[int, list[dict[str, list[int]]]] = field(default_factory=dict, init=False, repr=False)
    _indices: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _number: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction!r}")

    def begin_task(self, model, number, examples: Examples):
        self._number = number
        generator = torch.Generator().manual_seed(self.task_seed(number))
        count = max(1, round(self.fraction * len(examples)))
        self._indices[number] = torch.randperm(len(examples), generator=generator)[:count].sort().values
        self._examples[number] = [
            {key: list(values) for key, values in examples[index].items()} for index in self._indices[number].tolist()
        ]
        return super().begin_task(model, number, examples)

    def replayed(self) -> list[dict[str, list[int]]]:
        """The examples of earlier tasks that are mixed into the current task's data."""
        return [example for task in sorted(self._examples) if task < self._number for example in self._examples[task]]

    def trainer(self, **arguments: Any) -> Trainer:
        if earlier := self.replayed():
            arguments["train_dataset"] = ConcatDataset([arguments["train_dataset"], earlier])  # type: ignore[list-item]
        return super().trainer(**arguments)

    def state_dict(self) -> dict[str, Tensor]:
        state = {}
        for task, examples in self._examples.items():
            state[f"{task}.indices"] = self._indices[task]
            for key in examples[0]:
                state[f"{task}.{key}.values"] = torch.tensor([value for e in examples for value in e[key]])
                state[f"{task}.{key}.lengths"] = torch.tensor([len(e[key]) for e in examples])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._indices = {int(key.split(".")[0]): value for key, value in state.items() if key.endswith(".indices")}
        self._examples = {task: [{} for _ in indices] for task, indices in self._indices.items()}
        for name, lengths in state.items():
            if name.endswith(".lengths"):
                task, key, _ = name.split(".")
                rows = state[f"{task}.{key}.values"].split(lengths.tolist())
                for example, values in zip(self._examples[int(task)], rows, strict=True):
                    example[key] = values.tolist()
