"""Experience replay: full fine-tuning with some of the earlier tasks' data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import ConcatDataset

from .method import METHODS, Method


@METHODS.register("replay")
@dataclass
class Replay(Method):
    """Experience replay: a share of each task's examples is mixed into the data of every later task.

    ``memory`` contains the tokens of these examples by task, so a resumed run does not need the data of earlier tasks.

    Args:
        fraction: of a task's examples, in (0, 1]; at least one example.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction!r}")

    def begin_task(self, model, examples):
        generator = torch.Generator().manual_seed(self.task_seed)
        count = max(1, round(self.fraction * len(examples)))
        indices = torch.randperm(len(examples), generator=generator)[:count].sort().values.tolist()
        self.memory[self.number] = [{key: list(ids) for key, ids in examples[index].items()} for index in indices]
        return super().begin_task(model, examples)

    def trainer(self, **arguments):
        earlier: Any = [example for task in range(self.number) for example in self.memory[task]]
        if earlier:
            arguments["train_dataset"] = ConcatDataset([arguments["train_dataset"], earlier])
        return super().trainer(**arguments)
