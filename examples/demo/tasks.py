"""Three small tasks and a general text, made from files that every Python installation contains.

Nothing is downloaded: docstrings and source lines come from the standard library, word problems are generated, and the
general text is prose from Python's language reference. The format is that of ``fggm sequence``: a folder with
``train.json`` and ``test.json`` for each task (TRACE's format), ``general.txt``, whose loss is measured, and
``reference.txt``, other paragraphs of the same kind, which a selection can use as a reference.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
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
GENERAL_SIZE, REFERENCE_SIZE = 32, 64  # paragraphs
SIDE_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class Example:
    """A prompt and its expected answer."""

    prompt: str
    answer: str


Split = tuple[list[Example], list[Example]]  # training and test


def write_tasks(folder: Path, train_size: int = 480, test_size: int = 48, seed: int = 0) -> None:
    """Write the three tasks, with disjoint training and test examples, and the two texts to ``folder``.

    The ``limit`` of a stream samples training examples with the seed of a run. All runs share the test examples.
    """
    for position, (name, make) in enumerate({"module": _module, "code": _code, "numeric": _numeric}.items()):
        write_examples(folder / name, *make(train_size, test_size, random.Random(f"{seed}-{position}")))
    paragraphs = sorted(set(_prose_paragraphs()))
    text = random.Random(f"{seed}-general").sample(paragraphs, min(GENERAL_SIZE, len(paragraphs)))
    (folder / "general.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    rest = sorted(set(paragraphs) - set(text))
    text = random.Random(f"{seed}-reference").sample(rest, min(REFERENCE_SIZE, len(rest)))
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


def _module(train_size: int, test_size: int, rng: random.Random) -> Split:
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


# --- code: what is the next line? ------------------------------------------------------------


def _code(train_size: int, test_size: int, rng: random.Random) -> Split:
    files = sorted(STANDARD_LIBRARY.glob("*.py"))
    rng.shuffle(files)
    # files are split as a whole, so that training contains no line of a test file
    test_files, train_files = files[: len(files) // 4], files[len(files) // 4 :]
    return _code_examples(train_files, train_size, rng), _code_examples(test_files, test_size, rng)


def _code_examples(files: list[Path], size: int, rng: random.Random) -> list[Example]:
    examples = []
    for path in files:
        source = path.read_text(encoding="utf-8", errors="ignore")
        lines = [line.rstrip() for line in source.splitlines() if line.strip()]
        windows = [lines[start : start + 4] for start in range(len(lines) - 3)]
        usable = [window for window in windows if _is_code(window)]
        for window in rng.sample(usable, min(6, len(usable))):
            examples.append(Example("\n".join(window[:3]) + "\n", window[3]))
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


def _numeric(train_size: int, test_size: int, rng: random.Random) -> Split:
    examples: dict[str, Example] = {}
    while len(examples) < train_size + test_size:
        example = _word_problem(rng)
        examples[example.prompt] = example
    problems = list(examples.values())
    return problems[test_size:], problems[:test_size]


def _word_problem(rng: random.Random) -> Example:
    sign = rng.choice((1, -1))
    large, small = rng.randint(10, 60), rng.randint(2, 9)
    question = rng.choice(STORIES[sign]).format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=large, b=small)
    return Example(f"Question: {question}\nAnswer:", f" {large + sign * small}")
