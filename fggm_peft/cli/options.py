"""Options that several commands share, in groups, and the objects of the library that each group stands for."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from peft import PeftConfig

from ..tuner import FGGMConfig
from .generated import given_options, options_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..training.base_model import BaseModel
    from ..training.data import TokenizedExamples


@dataclass(frozen=True)
class BaseOptions:
    """Base model."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")]
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the checkpoint has it.")
    ] = "auto"
    quantize: Annotated[
        Optional[Literal["4bit", "8bit"]], typer.Option(help="Quantize the base with bitsandbytes (4bit: nf4, double).")
    ] = None
    device_map: Annotated[Optional[str], typer.Option(help="As in transformers, for instance auto.")] = None
    attention: Annotated[Optional[str], typer.Option(help="attn_implementation, for instance sdpa.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False

    def base(self) -> BaseModel:
        from ..training.base_model import BaseModel

        return BaseModel(
            name=self.model,
            revision=self.revision,
            dtype=self.dtype,
            quantization=self.quantize,
            device_map=self.device_map,
            attention=self.attention,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    split: Annotated[
        Optional[str], typer.Option(help="Which split of a folder or Hub data set: train, but test for eval.")
    ] = None
    subset: Annotated[Optional[str], typer.Option(help="Configuration of a Hub data set.")] = None
    prompt_column: Annotated[Optional[str], typer.Option(help="Column of the prompts, if its name is unusual.")] = None
    answer_column: Annotated[Optional[str], typer.Option(help="Column of the answers, if its name is unusual.")] = None
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Wrap prompt and answer in the tokenizer's chat template.")
    ] = False
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of an example; longer ones lose the left of their prompt.")
    ] = 1024
    limit: Annotated[Optional[int], typer.Option(min=1, help="Use this many rows at most, drawn at random.")] = None

    def examples(self, name: str, split: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> TokenizedExamples:
        """The examples of ``split`` of the data under ``name``."""
        from ..training.data import DataSource, TokenizedExamples, load_examples

        source = DataSource(
            name=name,
            split=split,
            subset=self.subset,
            prompt_column=self.prompt_column,
            answer_column=self.answer_column,
            use_chat_template=self.chat_template,
        )
        return TokenizedExamples(load_examples(source, tokenizer, self.limit, seed), tokenizer, self.max_length)


@dataclass(frozen=True)
class DryRunOptions:
    """Dry run."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what training would cost, and read and write nothing.")
    ] = False
    optimizer: Annotated[str, typer.Option(help="Whose state to count: adamw, adam, sgd, rmsprop, adagrad.")] = "adamw"
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Count a step with gradient checkpointing.")
    ] = False


_NOT_OF_A_SELECTION = {field.name for field in fields(PeftConfig)} | {
    field.name for field in fields(FGGMConfig) if not field.init
}
# check_base belongs to loading and init_weights to tests
NOT_OPTIONS = _NOT_OF_A_SELECTION | {"check_base", "init_weights"}


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
            ValueError: the file cannot be read, or a field is unknown.
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
    settings = {name: value for name, value in settings.items() if name not in _NOT_OF_A_SELECTION}
    names = {field.name for field in fields(FGGMConfig)}
    if unknown := sorted(settings.keys() - names):
        raise ValueError(f"FGGMConfig has no field {unknown[0]!r} (in {path}); it has {', '.join(sorted(names))}")
    return settings
