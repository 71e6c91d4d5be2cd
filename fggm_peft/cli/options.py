"""Options that several commands share: the base model, the data, and the settings of a selection."""

from __future__ import annotations

import difflib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from peft import PeftConfig

from ..training import BaseModel, DataSource, TokenizedExamples, load_examples
from ..tuner import FGGMConfig
from .generated import given_options, options_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of an FGGM adapter.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files in the output folder.")]
Data = Annotated[str, typer.Option("--data", "-d", help="The task: a file, a folder or a Hub id.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per forward pass, on each device.")]


@options_of(BaseModel, skip={"name"})
class BaseOptions:
    """Base model."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")]

    def base(self) -> BaseModel:
        return BaseModel(self.model, **given_options(self, BaseModel))


@options_of(DataSource, skip={"name", "split"})
class DataOptions:
    """Data."""

    split: Annotated[
        Optional[str], typer.Option(help="Split of a folder or a Hub dataset (default: train; test for fggm eval).")
    ] = None
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of an example. A longer one loses the left part of its prompt.")
    ] = 1024
    limit: Annotated[Optional[int], typer.Option(min=1, help="Use at most this many rows, drawn at random.")] = None

    def examples(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        split: str | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> TokenizedExamples:
        """The examples of the data under ``name``.

        Args:
            split: replaces ``--split``.
            limit: a further limit on the number of rows.
        """
        source = DataSource(name, **{**given_options(self, DataSource), "split": split or self.split or "train"})
        limits = [number for number in (self.limit, limit) if number is not None]
        examples = load_examples(source, tokenizer, min(limits, default=None), seed)
        return TokenizedExamples(examples, tokenizer, self.max_length)


# PEFT's own fields describe a finished adapter; check_base is for loading and init_weights for tests
NOT_OPTIONS = {field.name for field in fields(PeftConfig)} | {"check_base", "init_weights"}


@options_of(FGGMConfig, skip=NOT_OPTIONS)
class SelectionOptions:
    """Selection."""

    config: Annotated[
        Optional[Path],
        typer.Option(
            help="JSON or YAML file with fields of FGGMConfig, or an adapter_config.json. Options override it."
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The fields that were given as options."""
        return given_options(self, FGGMConfig)

    def settings(self) -> dict[str, Any]:
        """The fields that the file or the options give.

        Raises:
            ValueError: the file cannot be read, or it has an unknown field.
        """
        settings = {} if self.config is None else _read_config(self.config)
        given = self.given()
        exclusive = {"density", "threshold", "budget"}
        if exclusive & given.keys():  # an option replaces the file's choice and the settings that belong to it
            for name in exclusive | {"budget_floor"}:
                settings.pop(name, None)
        return settings | given

    def fggm_config(self) -> FGGMConfig:
        """The config that the file and the options describe.

        Raises:
            ValueError: the file cannot be read, a field is unknown, or a value is out of its range.
        """
        from ..tuner.settings.selection import require_reference

        config = FGGMConfig(**{"task_type": "CAUSAL_LM", **self.settings()})
        require_reference(config.criterion, config.reference)
        return config


def _read_config(path: Path) -> dict[str, Any]:
    """Fields of FGGMConfig from a file, without those that describe a finished adapter."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        # YAML 1.1 reads JSON's 1e-5 as a text
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the config {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"the config {path} must be an object with fields of FGGMConfig")
    if settings.get("peft_type", "FGGM") != "FGGM":
        raise ValueError(f"{path} configures a {settings['peft_type']} adapter, not FGGM")
    names = {field.name for field in fields(FGGMConfig)}
    settable = {field.name for field in fields(FGGMConfig) if field.init} - NOT_OPTIONS
    if unknown := sorted(settings.keys() - names):
        nearest = difflib.get_close_matches(unknown[0], settable, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(sorted(settable))}"
        raise ValueError(f"FGGMConfig has no field {unknown[0]!r} (in {path}); {hint}")
    return {name: value for name, value in settings.items() if name in settable | {"task_type"}}
