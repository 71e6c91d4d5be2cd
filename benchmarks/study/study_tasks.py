"""The tasks of the study that are made from Python packages and the standard library; nothing is downloaded.

Each function returns all its examples in a random order of its generator, or balanced over the answers. The packages
are imported where they are used, because each stream needs only some of them.
"""

from __future__ import annotations

import ast
import datetime
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import files
from pathlib import Path
from random import Random

from tasks import SIDE_FOLDERS, STANDARD_LIBRARY, Example, Split


def balanced(texts: Mapping[str, Sequence[str]], prompt: str, rng: Random) -> list[Example]:
    """Answer -> texts, as examples that take turns, so that the first ones have equally many of each answer."""
    shuffled = {answer: rng.sample(list(own), len(own)) for answer, own in texts.items()}
    rounds = max(map(len, shuffled.values()))
    return [
        Example(prompt.format(own[turn]), f" {answer}")
        for turn in range(rounds)
        for answer, own in shuffled.items()
        if turn < len(own)
    ]


# --- code: the next line, and numeric: one-step word problems ---------------------------------


def code(train_size: int, test_size: int, rng: Random) -> Split:
    """Three lines of a file of the standard library -> the next line."""
    files = sorted(STANDARD_LIBRARY.glob("*.py"))
    rng.shuffle(files)
    # files are split as a whole, so that training contains no line of a test file
    test_files, train_files = files[: len(files) // 4], files[len(files) // 4 :]
    return _code_examples(train_files, train_size, rng), _code_examples(test_files, test_size, rng)


def _code_examples(files: list[Path], size: int, rng: Random) -> list[Example]:
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


def numeric(train_size: int, test_size: int, rng: Random) -> Split:
    """A word problem -> the number."""
    examples: dict[str, Example] = {}
    while len(examples) < train_size + test_size:
        example = _word_problem(rng)
        examples[example.prompt] = example
    problems = list(examples.values())
    return problems[test_size:], problems[:test_size]


def _word_problem(rng: Random) -> Example:
    sign = rng.choice((1, -1))
    large, small = rng.randint(10, 60), rng.randint(2, 9)
    question = rng.choice(STORIES[sign]).format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=large, b=small)
    return Example(f"Question: {question}\nAnswer:", f" {large + sign * small}")


# --- generation ------------------------------------------------------------------------------

NOUNS = """
actress analysis baby baker bee box boy brush bus butterfly calf child city class cook country crisis dancer dog donkey
elf farmer fish foot fox goose grandchild guest half hero house judge knife lady leaf life loaf man monkey mouse
neighbor nurse ox person pilot policeman potato puppy sheep shelf spy student teacher thief tomato tooth wife witch wolf
woman
"""
VERBS = """
brings buys carries catches chases counts crosses does drops fetches finds fixes follows has hides is kisses loses makes
misses needs paints passes pushes reaches sees sells tries washes watches
"""
ADJECTIVES = "big brown clever cold funny green happy heavy hungry lazy little new nice old quiet red slow tired"


def plural(rng: Random) -> list[Example]:
    """A sentence in the singular -> in the plural."""
    import inflect

    english = inflect.engine()
    nouns, verbs, adjectives = NOUNS.split(), VERBS.split(), ADJECTIVES.split()

    def phrase(noun: str, adjective: str) -> tuple[str, str]:
        many = english.plural_noun(noun)
        return (english.a(f"{adjective} {noun}"), f"{adjective} {many}") if adjective else (english.a(noun), many)

    examples = {}
    while len(examples) < 1200:
        words = [rng.choice(adjectives), ""]
        rng.shuffle(words)
        (subject, subjects), (thing, things) = (phrase(rng.choice(nouns), word) for word in words)
        verb = rng.choice(verbs)
        prompt = f"One: {subject} {verb} {thing}\nMany:"
        examples[prompt] = Example(prompt, f" {subjects} {english.plural_verb(verb)} {things}")
    return list(examples.values())


def name(rng: Random) -> list[Example]:
    """A docstring of the standard library -> the name of its function."""
    examples: dict[str, Example] = {}
    for tree in _standard_library():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not 4 <= len(node.name) <= 24:
                continue
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if 24 <= len(text) <= 120 and not node.name.startswith("_") and f"{node.name}(" not in text:
                examples.setdefault(text, Example(f"Purpose: {text}\nFunction:", f" {node.name}"))
    return _shuffled(examples, rng)


def translation(rng: Random) -> list[Example]:
    """The English name of a country, language, currency or script in CLDR -> its French name."""
    from babel import Locale

    source, target = Locale("en"), Locale("fr")
    examples: dict[str, Example] = {}
    for kind in ("territories", "languages", "currencies", "scripts"):
        translations = getattr(target, kind)
        for key, english in sorted(getattr(source, kind).items()):
            answer = translations.get(key, english)
            if answer.lower() != english.lower() and len(answer) <= 34 and english.isascii():
                examples.setdefault(english, Example(f"English: {english}\nFrench:", f" {answer}"))
    return _shuffled(examples, rng)


# --- eight tasks of many kinds ---------------------------------------------------------------

LANGUAGES = {
    "de": "German",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "hu": "Hungarian",
    "it": "Italian",
    "pl": "Polish",
    "tr": "Turkish",
}
COUNTRIES = {
    "CZ": "Czechia",
    "FR": "France",
    "GB": "Britain",
    "IT": "Italy",
    "PH": "Philippines",
    "SI": "Slovenia",
    "TR": "Turkey",
    "UG": "Uganda",
}
PREFIXES = "exa peta tera giga mega kilo hecto deca deci centi milli micro nano pico femto atto"
QUANTITIES = ("charge", "energy", "force", "frequency", "length", "power", "pressure", "resistance", "volume")


def language(rng: Random) -> list[Example]:
    """The name of a country or language in CLDR -> the language of the name."""
    from babel import Locale

    names: dict[str, set[str]] = {}
    for code, answer in LANGUAGES.items():
        locale = Locale(code)
        names[answer] = {*locale.territories.values(), *locale.languages.values()}
    unique = {
        answer: sorted(n for n in own if 5 <= len(n) <= 28 and not any(n in names[a] for a in names if a != answer))
        for answer, own in names.items()
    }
    return balanced(unique, "Name: {}\nLanguage:", rng)


def number(rng: Random, code: str, language: str, most: int) -> list[Example]:
    """A number -> its words in a language."""
    from num2words import num2words

    words = {n: num2words(n, lang=code) for n in range(1, most)}
    return _shuffled({n: Example(f"{language} for {n}:", f" {text}") for n, text in words.items()}, rng)


def error(rng: Random) -> list[Example]:
    """The message of an error that the standard library raises -> its class, of those with 25 to 270 messages."""
    messages: dict[str, set[str]] = {}
    for tree in _standard_library():
        for node in ast.walk(tree):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(id=kind), args=[argument, *_])):
                    text = " ".join(_literal(argument).split())
                    if 8 <= len(text) <= 100 and kind not in text:
                        messages.setdefault(kind, set()).add(text)
    examples = {
        text: Example(f"Message: {text}\nError:", f" {kind}")
        for kind, texts in sorted(messages.items())
        if len(texts) >= 25 and kind[0].isupper()
        for text in rng.sample(sorted(texts), min(270, len(texts)))
    }
    return _shuffled(examples, rng)


def date(rng: Random, code: str, language: str) -> list[Example]:
    """An ISO date -> the long date in a language."""
    from babel.dates import format_date

    days = [datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36500)) for _ in range(1500)]
    return _shuffled(
        {day: Example(f"{language} for {day}:", f" {format_date(day, 'long', code)}") for day in days}, rng
    )


def region(rng: Random) -> list[Example]:
    """The name of a region in ISO 3166-2 -> its country."""
    import pycountry

    names = {
        country: sorted({region.name for region in pycountry.subdivisions.get(country_code=code) or ()})
        for code, country in COUNTRIES.items()
    }
    return balanced({c: [n for n in own if len(n) <= 40] for c, own in names.items()}, "Region: {}\nCountry:", rng)


def unit(rng: Random) -> list[Example]:
    """A unit with an SI prefix -> the quantity that it measures."""
    import pint

    registry = pint.UnitRegistry()
    names = {
        quantity.replace("_", " "): [
            prefix + unit.replace("_", " ")
            for unit in sorted(map(str, registry.get_compatible_units(f"[{quantity}]")))
            if re.fullmatch("[a-z]+(_[a-z]+)?", unit)
            for prefix in PREFIXES.split()
        ]
        for quantity in QUANTITIES
    }
    return balanced(names, "Unit: {}\nQuantity:", rng)


def clock(rng: Random) -> list[Example]:
    """A time in digits -> in words."""
    from num2words import num2words

    examples: dict[str, Example] = {}
    for hour in range(24):
        for minute in range(60):
            past, following = (num2words(h % 12 or 12) for h in (hour, hour + 1))
            words = {
                0: f"{past} o'clock",
                15: f"quarter past {past}",
                30: f"half past {past}",
                45: f"quarter to {following}",
            }
            spelled = f"{num2words(minute)} past {past}" if minute < 30 else f"{num2words(60 - minute)} to {following}"
            part = "at night" if hour < 6 else "in the morning" if hour < 12 else "in the afternoon"
            part = "in the evening" if hour >= 18 else part
            text = f"{hour:02}:{minute:02}"
            examples[text] = Example(f"Time {text}:", f" {words.get(minute, spelled)} {part}")
    return _shuffled(examples, rng)


# --- tuning ----------------------------------------------------------------------------------

SCRIPTS = ("ARABIC", "CHEROKEE", "CYRILLIC", "ETHIOPIC", "GEORGIAN", "GREEK", "HANGUL", "LATIN", "VAI", "YI")


def script(rng: Random) -> list[Example]:
    """Two letters -> their script in Unicode."""
    letters: dict[str, list[str]] = {script: [] for script in SCRIPTS}
    for character in map(chr, range(0x80, 0xD7A4)):
        script = unicodedata.name(character, "").split(" ")[0]
        if script in letters and unicodedata.category(character).startswith("L"):
            letters[script].append(character)
    pairs = {
        script.capitalize(): sorted({"".join(rng.sample(own, 2)) for _ in range(120)})
        for script, own in letters.items()
    }
    return balanced(pairs, "Letters: {}\nScript:", rng)


# --- general text ----------------------------------------------------------------------------


def novel_paragraphs() -> list[str]:
    """Paragraphs of "In the Year 2889" by Jules and Michel Verne (1889), which reasoning-gym contains."""
    path = next(file for file in files("reasoning-gym") or () if file.name == "in_the_year_2889.txt")
    text = path.locate().read_text(encoding="utf-8")  # type: ignore[attr-defined]
    body = text.split("*** START OF")[1].split("*** END OF")[0]
    paragraphs = (" ".join(block.split()).replace("_", "") for block in re.split(r"\n\s*\n", body))
    return [text for text in paragraphs if 160 <= len(text) <= 800 and "Redactor" not in text]


def _standard_library() -> Iterator[ast.Module]:
    for path in sorted(STANDARD_LIBRARY.rglob("*.py")):
        if SIDE_FOLDERS.isdisjoint(path.relative_to(STANDARD_LIBRARY).parts):
            try:
                yield ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
            except SyntaxError:  # templates of lib2to3
                continue


def _literal(node: ast.expr) -> str:
    """The text of a message, with "{}" for what is filled in; empty if it is no literal."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        case ast.BinOp(left=left, op=ast.Mod()):
            return _literal(left)
    return ""


def _shuffled(examples: Mapping[object, Example], rng: Random) -> list[Example]:
    return rng.sample(list(examples.values()), len(examples))
