"""Options of several commands. Most are read from the fields of a dataclass, so a new field needs no code here."""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig

from ..training.base_model import BaseModel
from ..training.data import DataSource, TokenizedExamples, load_examples
from ..training.rows import read_fields
from ..tuner import FGGMConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELP_LENGTH = 240  # of a longer help text, the first sentence is shown
SCALARS = {int, float, str, bool}
JSON_TYPES = {int, float, bool, dict, list}


# --- options from fields -------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldOptions:
    """One option for each field of a dataclass, with the field's name, type, default and help.

    Args:
        source: a dataclass with help texts in ``metadata["help"]``.
        title: heading in ``--help``.
        skip: fields without an option, in addition to those with ``init=False``.
        shown: fields that ``--help`` lists; None lists all.
        defaults: replace those of ``source`` in the help.
        aliases: field -> a short name.
    """

    source: type
    title: str
    skip: Collection[str] = ()
    shown: Collection[str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> list[Field]:
        return [field for field in fields(self.source) if field.init and field.name not in self.skip]

    def add_to(self, parser: ArgumentParser) -> Any:
        """Add the options; returns their group. An option that is not given leaves no attribute."""
        group, hints = parser.add_argument_group(self.title), get_type_hints(self.source)
        for entry in self.fields:
            names = [option_name(name) for name in (self.aliases.get(entry.name), entry.name) if name]
            text = SUPPRESS if self.shown is not None and entry.name not in self.shown else self._help(entry)
            group.add_argument(*names, dest=entry.name, default=SUPPRESS, help=text, **_reading(hints[entry.name]))
        return group

    def given(self, args: Namespace) -> dict[str, Any]:
        """The fields that were given as options."""
        hints, given = get_type_hints(self.source), vars(args)
        names = [entry.name for entry in self.fields if entry.name in given]
        return {name: _list_or_text(given[name], hints[name]) for name in names}

    def _help(self, entry: Field) -> str:
        text = " ".join(entry.metadata.get("help", "").split())
        if len(text) > HELP_LENGTH:
            text = re.split(r"(?<=[.!?]) (?=[A-Z`'])", text)[0]
        default = self.defaults.get(entry.name, entry.default)
        if not isinstance(default, bool) and default not in (None, MISSING, ""):
            text = f"{text.rstrip('.')} (default: {getattr(default, 'value', default)})."
        return text.replace("%%", "%").replace("%", "%%")


def option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def read_value(annotation: Any, text: str) -> Any:
    """Convert the text of an option to its field's type. Numbers and JSON come before text."""
    types, words, is_optional = _members(annotation)
    if text in words or types <= {str}:
        return text
    if is_optional and text in ("none", "all") and str not in types:
        return None
    for read in (int, float, json.loads):
        try:
            value = read(text)
        except ValueError:
            continue
        if type(value) in types:
            return value
    if str in types:
        return text
    names = sorted("a JSON object" if kind is dict else kind.__name__ for kind in types & JSON_TYPES)
    raise ArgumentTypeError(f"{text!r} is not {' or '.join([*words, *names])}")


def _members(annotation: Any) -> tuple[set[Any], list[str], bool]:
    """The types and the literal words that a field accepts, and whether it accepts None."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    types = {get_origin(member) or member for member in members} - {Literal, NoneType}
    if types.isdisjoint(SCALARS | JSON_TYPES) and not words:
        types |= {str, dict}  # a class that is built from its name or a dict, such as a granularity
    return types, [word for word in words if isinstance(word, str)], NoneType in members


def _reading(annotation: Any) -> dict[str, Any]:
    """Arguments of ``add_argument`` for a field of this type."""
    types, words, _ = _members(annotation)
    if types == {bool}:
        return {"action": BooleanOptionalAction}
    if list in types and types <= {list, str}:
        return {"action": "append"}
    if words and not types:
        return {"choices": words}
    return {"type": partial(read_value, annotation)}


def _list_or_text(value: Any, annotation: Any) -> Any:
    """The texts of a repeated option for "a list or a text": a text if it is one regex or "all-linear"."""
    if not isinstance(value, list) or str not in _members(annotation)[0]:
        return value
    if len(value) == 1 and (value[0] == "all-linear" or re.search(r"[*+?|()\[\]{}^$\\]", value[0])):
        return value[0]
    return [name for text in value for name in text.split(",")]


def positive(text: str) -> int:
    """The type of an option that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not an integer > 0")
    return int(text)


# --- base model and data -------------------------------------------------------------------------

BASE = FieldOptions(BaseModel, "base model", skip={"name"})
DATA = FieldOptions(DataSource, "data", skip={"name", "split"})


def add_base(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of a causal language model.")
    BASE.add_to(parser)


def base_model(args: Namespace) -> BaseModel:
    return BaseModel(args.model, **BASE.given(args))


def add_data(parser: ArgumentParser, split: str = "train", required: bool = True) -> None:
    parser.add_argument("--data", "-d", required=required, help="The task: a file, a folder or a Hub id.")
    group = DATA.add_to(parser)
    group.add_argument("--split", default=split, help="Split of a folder or a Hub dataset (default: %(default)s).")
    text = "Tokens of an example. A longer one loses the left part of its prompt (default: %(default)s)."
    group.add_argument("--max-length", type=positive, default=1024, help=text)
    group.add_argument("--limit", type=positive, help="Use at most this many rows, drawn at random.")


def add_batch_size(parser: ArgumentParser) -> None:
    text = "Examples per forward pass, on each device (default: %(default)s)."
    parser.add_argument("--batch-size", type=positive, default=8, help=text)


def read_task(
    args: Namespace,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> TokenizedExamples:
    """The examples of the data under ``name``; ``split`` replaces ``--split``, and ``limit`` is a second limit."""
    source = DataSource(name, split=split or args.split, **DATA.given(args))
    limits = [number for number in (args.limit, limit) if number is not None]
    examples = load_examples(source, tokenizer, min(limits, default=None), seed)
    return TokenizedExamples(examples, tokenizer, args.max_length)


# --- selection -----------------------------------------------------------------------------------

# PEFT's own fields describe a finished adapter; check_base is for loading and init_weights for tests
NOT_OPTIONS = {field.name for field in fields(PeftConfig)} | {"check_base", "init_weights"}
SELECTION = FieldOptions(FGGMConfig, "selection", skip=NOT_OPTIONS)


def add_selection(parser: ArgumentParser) -> None:
    text = "JSON or YAML file with fields of FGGMConfig, or an adapter_config.json. Options override it."
    SELECTION.add_to(parser).add_argument("--config", type=Path, help=text)


def selection_settings(args: Namespace) -> dict[str, Any]:
    """The fields of FGGMConfig that the file or the options give."""
    settings = {} if args.config is None else _read_config(args.config)
    given = SELECTION.given(args)
    exclusive = {"density", "threshold", "budget"}
    if exclusive & given.keys():  # an option replaces the file's choice
        for name in exclusive:
            settings.pop(name, None)
    return settings | given


def selection_config(args: Namespace) -> FGGMConfig:
    """The config that the file and the options describe."""
    from ..tuner.settings.selection import require_reference

    config = FGGMConfig(**{"task_type": "CAUSAL_LM", **selection_settings(args)})
    remedy = "Add --reference TEXT.txt, --reference self (text that the model writes itself) or saved statistics"
    require_reference(config, config.reference, remedy)
    return config


def _read_config(path: Path) -> dict[str, Any]:
    """Fields of FGGMConfig from a file, without those that describe a finished adapter."""
    try:
        settings = read_fields(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"the config {path}: {error}") from error
    if settings.get("peft_type", "FGGM") != "FGGM":
        raise ValueError(f"{path} configures a {settings['peft_type']} adapter, not FGGM")
    settable = {entry.name for entry in SELECTION.fields}
    if unknown := sorted(settings.keys() - {field.name for field in fields(FGGMConfig)}):
        raise ValueError(f"FGGMConfig has no field {unknown[0]!r} (in {path}); it has {', '.join(sorted(settable))}")
    return {name: value for name, value in settings.items() if name in settable | {"task_type"}}
