"""A small task sequence that several test modules share: a model, two tasks and general text in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from models import byte_tokenizer, text_model
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from fggm_peft.continual.methods import Method

METHODS = ["fggm", "sft", "frozen", "multitask", {"name": "lora", "label": "lora-r2", "r": 2}]
MEASURED = ("selection_seconds", "training_seconds", "evaluation_seconds", "peak_memory")


def write_stream(folder: Path) -> Path:
    """Write a model, two tasks in TRACE's format, and general text."""
    byte_tokenizer().save_pretrained(folder / "model")
    text_model().save_pretrained(folder / "model")
    for name, answer in (("plus", lambda n: str(n + 1)), ("minus", lambda n: str(n - 1))):
        (folder / name).mkdir()
        rows = [{"prompt": f"{n} {name} one is ", "answer": answer(n)} for n in range(10, 26)]
        for split in ("train", "eval", "test"):
            (folder / name / f"{split}.json").write_text(json.dumps(rows[: 4 if split == "test" else 16]))
    (folder / "general.txt").write_text("A text about nothing.\n\nAnd another one.\n")
    return folder


def settings(folder, **fields):
    defaults = {
        "model": str(folder / "model"),
        "methods": METHODS,
        "tasks": [
            {"name": name, "path": str(folder / name), "metric": "edit_similarity", "max_answer_length": 4}
            for name in ("plus", "minus")
        ],
        "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01},
        "general": {"text": str(folder / "general.txt")},
    }
    return {**defaults, **fields}


def without_times(result: dict) -> dict:
    """The result without times and memory, which differ between runs."""
    return {**result, "cost": {name: value for name, value in result["cost"].items() if name not in MEASURED}}


class Killed(BaseException):
    """Not an Exception, so that no handler catches it and cleans up (like SIGKILL)."""


@contextmanager
def killed_at_the_fifth_step() -> Iterator[None]:
    """Kill a run in its second task."""
    step, steps = torch.optim.AdamW.step, []

    def die_at_the_fifth(self, *arguments, **options):
        steps.append(None)
        if len(steps) == 5:
            raise Killed
        return step(self, *arguments, **options)

    die_at_the_fifth.hooked = True  # otherwise torch would run the hooks of a step twice
    with mock.patch.object(torch.optim.AdamW, "step", die_at_the_fifth), pytest.raises(Killed):
        yield


def state(model: nn.Module, method: Method) -> dict[str, Tensor]:
    """Copies of the tensors of the model and of the method's memory by name."""
    leaves, _ = tree_flatten_with_path(method.memory)
    own = {f"method{keystr(path)}": torch.as_tensor(leaf) for path, leaf in leaves if not isinstance(leaf, str)}
    return {name: tensor.detach().clone() for name, tensor in {**model.state_dict(), **own}.items()}
