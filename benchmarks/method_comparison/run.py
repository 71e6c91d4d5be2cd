"""PEFT's method comparison with FGGM adapters: their parameters are selected, then PEFT's own ``run.py`` trains.

Run it in ``method_comparison/MetaMathQA`` of a checkout of PEFT, with the command line of the ``run.py`` there::

    python .../benchmarks/method_comparison/run.py -v experiments/fggm/llama-3.2-3B-rows-30

It wraps four functions of the script's modules and changes no file. The selection runs when the script constructs the
optimizer, on MetaMathQA's training data with the script's prompts. Its time is added to the training time that the
script reports. Experiments of other methods are not affected.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Subset

from fggm_peft import FGGMConfig, select_parameters

NEEDED = ("run.py", "utils.py", "data.py")
IGNORED = -100


class SelectionBeforeTraining:
    """Selects an FGGM adapter's parameters when the script asks for its optimizer.

    Args:
        utils, data: modules of PEFT's benchmark; functions of ``utils`` are replaced by wrappers.
    """

    def __init__(self, utils: Any, data: Any):
        self.data = data
        self.values: dict[str, Any] = {}
        self.seconds = 0.0
        utils.get_train_config = self._remembering("train_config", utils.get_train_config)
        utils.get_tokenizer = self._remembering("tokenizer", utils.get_tokenizer)
        utils.get_optimizer_and_scheduler = self._selecting_first(utils.get_optimizer_and_scheduler)
        utils.log_results = self._with_selection_time(utils.log_results)

    def _remembering(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.values[name] = function(*arguments, **options)
            return self.values[name]

        return wrapped

    def _selecting_first(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
            self._select(getattr(model, "_orig_mod", model))  # the module in torch.compile's wrapper
            return function(model, *arguments, **options)

        return wrapped

    def _with_selection_time(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*, train_result: Any, **options: Any) -> Any:
            total = train_result.train_time + self.seconds
            return function(train_result=dataclasses.replace(train_result, train_time=total), **options)

        return wrapped

    def _select(self, model: torch.nn.Module) -> None:
        configs = getattr(model, "peft_config", {})
        if not any(isinstance(config, FGGMConfig) for config in configs.values()):
            return
        report = select_parameters(model, self._batches())
        self.seconds = report.seconds
        print(report, file=sys.stderr)

    def _batches(self) -> DataLoader:
        """The training data in a random order of the experiment's seed, the same in every pass."""
        train_config = self.values["train_config"]
        training, *_ = self.data.get_train_valid_test_datasets(
            tokenizer=self.values["tokenizer"],
            query_template=train_config.query_template,
            print_fn=lambda *_, **__: None,
        )
        generator = torch.Generator().manual_seed(train_config.seed)
        order = torch.randperm(len(training), generator=generator).tolist()
        return DataLoader(Subset(training, order), batch_size=train_config.batch_size, collate_fn=self._batch)

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Question, answer and end token have a loss, as in the script's training."""
        end = self.values["tokenizer"].eos_token_id
        ids = [torch.tensor([*row["input_ids"], end]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=end),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(ids, batch_first=True, padding_value=IGNORED),
        }


def main() -> None:
    """Run PEFT's ``run.py`` in this folder.

    Raises:
        SystemExit: the folder has no such script.
    """
    folder = Path.cwd()
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        sys.exit(f"no {missing[0]} in {folder}; run this in method_comparison/MetaMathQA of a checkout of PEFT")
    sys.path[0] = str(folder)  # replaces the folder of this file, which has another run.py
    SelectionBeforeTraining(importlib.import_module("utils"), importlib.import_module("data"))
    runpy.run_path(str(folder / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()
