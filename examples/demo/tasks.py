"""Three small tasks and a general text, made from files that every Python installation contains.

Nothing is downloaded: docstrings come from the standard library, numbers and dates are generated, and the general text
is prose from Python's language reference. The format is that of ``fggm sequence``: a folder with
``train.json`` and ``test.json`` for each task (TRACE's format), ``general.txt``, whose loss is measured, and
``reference.txt``, other paragraphs of the same kind, which a selection can use as a reference.
"""

from __future__ import annotations

import ast
import datetime
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics

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
PARAGRAPHS = 32  # of general.txt
SIDE_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class Example:
    """A prompt and its expected answer."""

    prompt: str
    answer: str


Split = tuple[list[Example], list[Example]]  # training and test
Make = Callable[[int, int, random.Random], Split]


def write_tasks(
    folder: Path,
    train_size: int = 480,
    test_size: int = 48,
    seed: int = 0,
    reference_size: int = PARAGRAPHS,
    tasks: Mapping[str, Make] | None = None,
) -> None:
    """Write tasks, by default those of the demo, and the two texts to ``folder``; no example is in both splits.

    The ``limit`` of a stream samples training examples with the seed of a run. All runs share the test examples.
    """
    for position, (name, make) in enumerate((tasks or TASKS).items()):
        write_examples(folder / name, *make(train_size, test_size, random.Random(f"{seed}-{position}")))
    paragraphs = sorted(set(_prose_paragraphs()))
    text = random.Random(f"{seed}-general").sample(paragraphs, min(PARAGRAPHS, len(paragraphs)))
    (folder / "general.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    rest = sorted(set(paragraphs) - set(text))
    text = random.Random(f"{seed}-reference").sample(rest, min(reference_size, len(rest)))
    (folder / "reference.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def write_examples(folder: Path, train: Sequence[Example], test: Sequence[Example]) -> None:
    """Write ``train.json`` and ``test.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in (("train", train), ("test", test)):
        rows = json.dumps([asdict(example) for example in examples], indent=1)
        (folder / f"{split}.json").write_text(rows, encoding="utf-8")


def _prose_paragraphs() -> Iterator[str]:
    for _, topic in sorted(topics.topics.items()):
        for block in re.split(r"\n\s*\n", topic):
            is_prose = not block.startswith((" ", "*", "|", "+", "-")) and "::" not in block
            text = " ".join(block.split())
            letters = sum(character.isalpha() or character == " " for character in text)
            if is_prose and 160 <= len(text) <= 320 and letters >= 0.9 * len(text):
                yield text


# --- module: which module does this docstring come from? -------------------------------------


def module(train_size: int, test_size: int, rng: random.Random) -> Split:
    docstrings = {module: _module_docstrings(module) for module in MODULES}
    docstrings = {module: texts for module, texts in docstrings.items() if len(texts) >= 20}
    for texts in docstrings.values():
        rng.shuffle(texts)
    # round robin over the modules, so that training and test examples are balanced
    rounds = max(map(len, docstrings.values()))
    examples = [
        Example(f"Docstring: {texts[turn]}\nModule:", f" {module}")
        for turn in range(rounds)
        for module, texts in docstrings.items()
        if turn < len(texts)
    ]
    if len(examples) < train_size + test_size:
        raise RuntimeError(
            f"the standard library in {STANDARD_LIBRARY} has only {len(examples)} usable docstrings, the demo requires "
            f"{train_size + test_size}; use a Python installation with .py sources"
        )
    test, train = examples[:test_size], examples[test_size : test_size + train_size]
    rng.shuffle(train)
    return train, test


def _module_docstrings(module: str) -> list[str]:
    """First paragraphs of the docstrings of a module, without those that contain its name."""
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


# --- number: a number -> its German word ------------------------------------------------------

ONES = """
null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn
achtzehn neunzehn
"""
TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"


def _number(train_size: int, test_size: int, rng: random.Random) -> Split:
    numbers = rng.sample(range(1, 1000), train_size + test_size)
    examples = [Example(f"German for {number}:", f" {german(number)}") for number in numbers]
    return examples[test_size:], examples[:test_size]


def german(number: int) -> str:
    """The word for a number from 0 to 999."""
    words, (hundreds, rest) = ONES.split(), divmod(number, 100)
    if hundreds:
        prefix = ("ein" if hundreds == 1 else words[hundreds]) + "hundert"
        return prefix + (german(rest) if rest else "")
    if rest < 20:
        return words[rest]
    tens, ones = divmod(rest, 10)
    unit = "ein" if ones == 1 else words[ones]
    return (f"{unit}und" if ones else "") + TENS.split()[tens - 2]


# --- date: an ISO date -> the French date ----------------------------------------------------

MONTHS = "janvier février mars avril mai juin juillet août septembre octobre novembre décembre"


def _date(train_size: int, test_size: int, rng: random.Random) -> Split:
    start = datetime.date(1950, 1, 1)
    days = [start + datetime.timedelta(days=days) for days in rng.sample(range(36500), train_size + test_size)]
    examples = [Example(f"French for {day}:", f" {french(day)}") for day in days]
    return examples[test_size:], examples[:test_size]


def french(day: datetime.date) -> str:
    """A long date, such as 1er mars 2003."""
    return f"{day.day}{'er' if day.day == 1 else ''} {MONTHS.split()[day.month - 1]} {day.year}"


TASKS: dict[str, Make] = {"module": module, "number": _number, "date": _date}
