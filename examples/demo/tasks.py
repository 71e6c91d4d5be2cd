"""Three small tasks and a general text, made from files that every Python installation carries.

Nothing is downloaded: docstrings and source lines come from the standard library, word problems
are generated, and the general text is the prose of Python's own language reference.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Literal

MODULES = [
    "asyncio",
    "decimal",
    "email",
    "http",
    "logging",
    "multiprocessing",
    "tkinter",
    "turtle",
    "unittest",
    "xml",
]
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
SIDE_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that should follow it; the loss is taken on the answer only."""

    prompt: str
    answer: str
    ends: bool = True
    """Whether the end token belongs to the answer."""


@dataclass(frozen=True)
class Task:
    """One task of the sequence."""

    name: str
    description: str
    metric: Literal["exact match", "token accuracy"]
    train: list[Example]
    test: list[Example]


def make_tasks(train_size: int, test_size: int, seed: int) -> list[Task]:
    """The sequence module, code, numeric, each with disjoint training and test examples."""
    makers = (_module_task, _code_task, _numeric_task)
    return [maker(train_size, test_size, random.Random(f"{seed}-{position}")) for position, maker in enumerate(makers)]


def make_general_text(size: int, seed: int) -> list[Example]:
    """Paragraphs of prose that no task trains on: what the model knew, and should still know."""
    paragraphs = sorted(set(_prose_paragraphs()))
    chosen = random.Random(f"{seed}-general").sample(paragraphs, min(size, len(paragraphs)))
    return [Example(prompt="", answer=text, ends=False) for text in chosen]


def _prose_paragraphs() -> Iterator[str]:
    for _, topic in sorted(topics.topics.items()):
        for block in re.split(r"\n\s*\n", topic):
            is_prose = not block.startswith((" ", "*", "|", "+", "-")) and "::" not in block
            text = " ".join(block.split())
            letters = sum(character.isalpha() or character == " " for character in text)
            if is_prose and 160 <= len(text) <= 320 and letters >= 0.9 * len(text):
                yield text


# --- module: which module does this docstring come from? -------------------------------------


def _module_task(train_size: int, test_size: int, rng: random.Random) -> Task:
    found = {module: _module_docstrings(module) for module in MODULES}
    found = {module: texts for module, texts in found.items() if len(texts) >= 20}
    for texts in found.values():
        rng.shuffle(texts)
    # Round robin over the modules, so that training and test are both balanced.
    rounds = max(map(len, found.values()))
    examples = [
        Example(f"Docstring: {texts[turn]}\nModule:", f" {module}")
        for turn in range(rounds)
        for module, texts in found.items()
        if turn < len(texts)
    ]
    if len(examples) < train_size + test_size:
        raise RuntimeError(
            f"the standard library in {STANDARD_LIBRARY} has only {len(examples)} usable "
            "docstrings; this demo needs its .py sources"
        )
    test, train = examples[:test_size], examples[test_size : test_size + train_size]
    rng.shuffle(train)
    description = f"name the standard-library module (of {len(found)}) a docstring comes from"
    return Task("module", description, "exact match", train, test)


def _module_docstrings(module: str) -> list[str]:
    """First paragraphs of the docstrings of one module, without those that name it."""
    texts = set()
    for path in _sources(module):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if 30 <= len(text) <= 160 and module not in text.lower():
                texts.add(text)
    return sorted(texts)


def _sources(module: str) -> list[Path]:
    single_file = STANDARD_LIBRARY / f"{module}.py"
    if single_file.exists():
        return [single_file, *STANDARD_LIBRARY.glob(f"_py{module}.py")]
    package = STANDARD_LIBRARY / module
    return sorted(path for path in package.rglob("*.py") if SIDE_FOLDERS.isdisjoint(path.relative_to(package).parts))


# --- code: what is the next line? ------------------------------------------------------------


def _code_task(train_size: int, test_size: int, rng: random.Random) -> Task:
    files = sorted(STANDARD_LIBRARY.glob("*.py"))
    rng.shuffle(files)
    # Whole files go to one side or the other: no line of a test file is seen in training.
    test_files, train_files = files[: len(files) // 4], files[len(files) // 4 :]
    description = "write the next line of a standard-library file"
    train = _code_examples(train_files, train_size, rng)
    test = _code_examples(test_files, test_size, rng)
    return Task("code", description, "token accuracy", train, test)


def _code_examples(files: list[Path], size: int, rng: random.Random) -> list[Example]:
    examples = []
    for path in files:
        source = path.read_text(encoding="utf-8", errors="ignore")
        lines = [line.rstrip() for line in source.splitlines() if line.strip()]
        windows = [lines[start : start + 4] for start in range(len(lines) - 3)]
        usable = [window for window in windows if _is_code(window)]
        for window in rng.sample(usable, min(4, len(usable))):
            examples.append(Example("\n".join(window[:3]) + "\n", window[3] + "\n", ends=False))
    rng.shuffle(examples)
    return examples[:size]


def _is_code(window: list[str]) -> bool:
    plain = all(len(line) <= 64 and not line.lstrip().startswith("#") for line in window)
    statement = re.search(r"[=(\[:]|return|import", window[3])
    return plain and statement is not None and len(window[3].strip()) >= 12


# --- numeric: one-step word problems ---------------------------------------------------------

NAMES = ["Ada", "Ben", "Chloe", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas"]
THINGS = ["apples", "books", "coins", "stamps", "pencils", "marbles", "shells", "cards"]
STORIES = {
    1: (
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        "{name} finds {a} {things} on Monday and {b} on Tuesday. How many {things} in all?",
        "There are {a} {things} on one table and {b} on another. How many are there together?",
    ),
    -1: (
        "{name} has {a} {things} and gives {b} away. How many {things} are left?",
        "A box holds {a} {things}. {name} takes out {b}. How many stay in the box?",
        "{name} had {a} {things} and lost {b} of them. How many {things} does {name} still have?",
    ),
}


def _numeric_task(train_size: int, test_size: int, rng: random.Random) -> Task:
    examples: dict[str, Example] = {}
    while len(examples) < train_size + test_size:
        example = _word_problem(rng)
        examples[example.prompt] = example
    problems = list(examples.values())
    description = "solve a one-step word problem (add or subtract)"
    return Task("numeric", description, "exact match", problems[test_size:], problems[:test_size])


def _word_problem(rng: random.Random) -> Example:
    sign = rng.choice((1, -1))
    large, small = rng.randint(10, 60), rng.randint(2, 9)
    question = rng.choice(STORIES[sign]).format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=large, b=small)
    return Example(f"Question: {question}\nAnswer:", f" {large + sign * small}")
