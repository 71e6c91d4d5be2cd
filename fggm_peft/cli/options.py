"""Options that several commands share, in groups, and the objects of the library that each group stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..training.base import BaseModel
    from ..training.data import TokenizedExamples
    from ..tuner.config import FGGMConfig


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
        from ..training.base import BaseModel

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


@dataclass(frozen=True)
class SelectionOptions:
    """Selection; the names are those of FGGMConfig, and what is not given is its default."""

    config: Annotated[
        Optional[Path],
        typer.Option(help="JSON or YAML file with fields of FGGMConfig, or an adapter_config.json; options go first."),
    ] = None
    density: Annotated[Optional[float], typer.Option(help="Share of each weight that may move (default: 0.3).")] = None
    threshold: Annotated[
        Optional[str],
        typer.Option(help="""Policy as JSON, instead of a density: '{"policy": "score_mass", "fraction": 0.9}'."""),
    ] = None
    budget: Annotated[
        Optional[str],
        typer.Option(help="Values to train in the whole model, instead of a density: 5000000, 50MiB, 1%, lora:r=16."),
    ] = None
    budget_floor: Annotated[
        Optional[str],
        typer.Option(help="""Least density of each module type within the budget: 0.01, or '{"q_proj": 0.01}'."""),
    ] = None
    max_rows: Annotated[Optional[int], typer.Option(min=1, help="Rows (or columns) of any one module at most.")] = None
    granularity: Annotated[Optional[str], typer.Option(help="row, column or element (default: row).")] = None
    criterion: Annotated[
        Optional[str],
        typer.Option(
            help="fisher, gain_per_harm, fisher_ratio, input_ratio, gradient_low_magnitude, "
            "output_magnitude, random or weight_magnitude (default: fisher)."
        ),
    ] = None
    reference: Annotated[
        Optional[list[str]],
        typer.Option(
            help="For gain_per_harm and the ratios: self, history, saved scores, or a .txt (repeat it for more)."
        ),
    ] = None
    reference_texts: Annotated[
        Optional[int], typer.Option(help="Texts the model writes for --reference self (default: 64).")
    ] = None
    reference_length: Annotated[Optional[int], typer.Option(help="Tokens of each, at most (default: 128).")] = None
    history: Annotated[
        Optional[list[str]], typer.Option(help="Saved scores of an earlier task, for --reference history (repeat it).")
    ] = None
    protect: Annotated[
        Optional[list[str]], typer.Option(help="An earlier delta whose entries should stay (repeat it for more).")
    ] = None
    protection: Annotated[
        Optional[float], typer.Option(help="1 forbids them, less scales their scores down (default: 1).")
    ] = None
    save_scores: Annotated[
        Optional[bool],
        typer.Option("--save-scores", help="Also save the task's scores, a reference for later tasks."),
    ] = None
    fisher_labels: Annotated[
        Optional[Literal["data", "model"]], typer.Option(help="Labels of the Fisher pass (default: data).")
    ] = None
    fisher_estimate: Annotated[
        Optional[Literal["exact", "sketch"]], typer.Option(help="sketch: nearly as good and cheaper (default: exact).")
    ] = None
    sketch_size: Annotated[Optional[int], typer.Option(min=1, help="Random projections of a sketch (default: 16).")] = (
        None
    )
    num_samples: Annotated[
        Optional[str], typer.Option(help="A number, auto (until two halves agree), or all (default: auto).")
    ] = None
    score_memory: Annotated[
        Optional[str], typer.Option(help="Bound on the memory of running scores, for instance 8GiB.")
    ] = None
    target_modules: Annotated[
        Optional[list[str]],
        typer.Option(help="A module's name (repeat it for more), one regex, or all-linear (default: all-linear)."),
    ] = None
    exclude_modules: Annotated[
        Optional[list[str]], typer.Option(help="Modules not to adapt: a name (repeat it for more) or one regex.")
    ] = None
    modules_to_save: Annotated[
        Optional[list[str]], typer.Option(help="A module to train whole, such as a new head (repeat it for more).")
    ] = None
    density_pattern: Annotated[
        Optional[str], typer.Option(help="""Densities of certain modules as JSON: '{"q_proj": 0.1}'.""")
    ] = None
    bias: Annotated[
        Optional[Literal["none", "all", "fggm_only"]], typer.Option(help="Which biases train (default: none).")
    ] = None
    quantized_merge: Annotated[
        Optional[Literal["auto", "requantize", "dequantize", "keep"]],
        typer.Option(help="How a delta goes into a quantized base (default: auto)."),
    ] = None
    training_dtype: Annotated[
        Optional[Literal["float32", "bfloat16"]],
        typer.Option(help="What the values are trained in (default: float32); bfloat16 asks for an optimizer."),
    ] = None
    delta_dtype: Annotated[
        Optional[Literal["float32", "bfloat16", "float16"]],
        typer.Option(help="What the values are rounded to in the file (default: as they are trained)."),
    ] = None
    seed: Annotated[Optional[int], typer.Option(help="Of the order of the data and whatever is drawn.")] = None

    def given(self) -> list[str]:
        """The options that were given, as they are written on the command line, but for those of every training."""
        apart = {"seed", "delta_dtype"}
        names = [field.name for field in fields(self) if field.name not in apart and getattr(self, field.name)]
        return ["--" + name.replace("_", "-") for name in names]

    def fggm_config(self) -> FGGMConfig:
        """The config that the file and the options describe.

        Raises:
            ValueError: the file cannot be read, a field is unknown, or a value is out of its range.
        """
        from ..tuner.config import FGGMConfig
        from ..tuner.settings.selection import require_reference

        settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        settings |= {} if self.config is None else _read_config(self.config)
        given = self._fields()
        exclusive = {"density", "threshold", "budget"}
        if exclusive & given.keys():  # one of them replaces that of the file, with what belongs to it
            for shadowed in exclusive | {"budget_floor"}:
                settings.pop(shadowed, None)
        config = FGGMConfig(**settings | given)
        require_reference(config.criterion, config.reference)  # it cannot come later
        return config

    def _fields(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "config"}
        given = {name: value for name, value in values.items() if value not in (None, [])}
        for name, read in _READERS.items():
            if name in given:
                given[name] = read(given[name], "--" + name.replace("_", "-"))
        return given


def _json_object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}", param_hint=option) from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object", param_hint=option)
    return value


def _number_of_samples(text: str, option: str) -> int | str | None:
    if text in ("auto", "all"):
        return None if text == "all" else text
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a number nor auto nor all", param_hint=option)
    return int(text)


def _density_or_object(text: str, option: str) -> float | dict[str, Any]:
    try:
        return float(text)
    except ValueError:
        return _json_object(text, option)


def _size(text: str, option: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _modules(names: list[str], option: str) -> list[str] | str:
    """A list of names, or the one string that PEFT takes for a regex or "all-linear"."""
    is_one_pattern = len(names) == 1 and (names[0] == "all-linear" or re.search(r"[*+?|()\[\]{}^$\\]", names[0]))
    return names[0] if is_one_pattern else [name for text in names for name in text.split(",")]


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "threshold": _json_object,
    "density_pattern": _json_object,
    "budget": _size,
    "budget_floor": _density_or_object,
    "num_samples": _number_of_samples,
    "score_memory": _size,
    "target_modules": _modules,
    "exclude_modules": _modules,
}
_SET_BY_THE_LIBRARY = {"selection", "peft_type", "peft_version", "auto_mapping", "inference_mode", "revision"}
_SET_BY_THE_LIBRARY |= {"base_model_name_or_path", "resolved_budget"}


def _read_config(path: Path) -> dict[str, Any]:
    """Fields of FGGMConfig from a file, without what describes an adapter that was made with them."""
    import yaml

    from ..tuner.config import FGGMConfig

    try:
        text = path.read_text(encoding="utf-8")
        # YAML 1.1 takes JSON's 1e-5 for a text
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the config {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"the config {path} must be an object with fields of FGGMConfig")
    if settings.get("peft_type", "FGGM") != "FGGM":
        raise ValueError(f"{path} configures a {settings['peft_type']} adapter, not FGGM")
    settings = {name: value for name, value in settings.items() if name not in _SET_BY_THE_LIBRARY}
    known = {field.name for field in fields(FGGMConfig)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"FGGMConfig has no field {unknown[0]!r} (in {path}); it has {', '.join(sorted(known))}")
    return settings
