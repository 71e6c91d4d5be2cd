"""``fggm train``: train an adapter, and select it first where that has not been done."""

from __future__ import annotations

import ast
import difflib
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..tuner.files.atomic import complete_folder
from .command import Result
from .options import BaseOptions, DataOptions, SelectionOptions
from .output import (
    ADAPTER_FILE,
    CHECKPOINTS,
    MERGED,
    no_empty_folders,
    require_adapter,
    require_checkpoint,
    require_free,
    require_protected,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from ..training import FGGMTrainer
    from ..training.data import TokenizedExamples
    from ..tuner import FGGMConfig


@dataclass(frozen=True)
class TrainingOptions:
    """Training."""

    learning_rate: Annotated[float, typer.Option(min=0.0, help="Highest learning rate of the schedule.")] = 2e-4
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 1.0
    max_steps: Annotated[Optional[int], typer.Option(min=1, help="Stop after this many steps; goes before epochs.")] = (
        None
    )
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in one forward, on each device.")] = 8
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Forwards before one step.")] = 1
    scheduler: Annotated[str, typer.Option(help="As lr_scheduler_type of transformers.")] = "cosine"
    warmup: Annotated[float, typer.Option(min=0.0, help="Steps of warmup; below 1, the share of all steps.")] = 0.03
    bf16: Annotated[
        Optional[bool], typer.Option("--bf16/--no-bf16", help="Compute in bfloat16 (default: where a GPU has it).")
    ] = None
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for activations, more time.")
    ] = False
    set: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME=VALUE", help="Any other field of TrainingArguments; repeat it for more."),
    ] = None

    def arguments(self, folder: Path, seed: int) -> TrainingArguments:
        """The Trainer's arguments, with checkpoints in ``folder``: five in a run, of which two are kept."""
        import torch
        from transformers import TrainingArguments

        from ..training.base import this_process

        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps or -1,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation,
            "lr_scheduler_type": self.scheduler,
            "warmup_steps": self.warmup,
            "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported() if self.bf16 is None else self.bf16,
            "logging_steps": 10,
            "save_steps": 0.2,
            "save_total_limit": 2,
            "report_to": "none",
            "seed": seed,
            "use_cpu": this_process().device.type == "cpu",  # else processes on CPUs would not find each other
        }
        if self.gradient_checkpointing:
            settings["gradient_checkpointing"] = True
        return TrainingArguments(**settings | _assignments(self.set or []))


def _assignments(texts: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as fields of ``TrainingArguments``; a value is JSON or Python, else a text."""
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    result: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint="--set")
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise typer.BadParameter(f"TrainingArguments has no field {name!r}{hint}", param_hint="--set")
        if name == "output_dir":
            raise typer.BadParameter("checkpoints are in OUTPUT/checkpoints, where --resume looks", param_hint="--set")
        result[name] = _value(value)
    return result


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


@dataclass(frozen=True)
class AfterTrainingOptions:
    """After training."""

    eval_data: Annotated[Optional[str], typer.Option(help="Evaluate on these, as fggm eval does.")] = None
    eval_split: Annotated[str, typer.Option(help="Which split of the evaluation data.")] = "eval"
    merge: Annotated[bool, typer.Option("--merge", help="Also save the merged model, in OUTPUT/merged.")] = False
    push_to_hub: Annotated[
        Optional[str], typer.Option(metavar="REPOSITORY", help="Also publish the adapter under this Hub id.")
    ] = None
    private: Annotated[bool, typer.Option("--private", help="Make a new Hub repository private.")] = False


def run(
    base: BaseOptions,
    training: TrainingOptions,
    selection: SelectionOptions,
    data_options: DataOptions,
    after: AfterTrainingOptions,
    data: Annotated[str, typer.Option("--data", "-d", help="The task: a file, a folder or a Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter and its checkpoints.")],
    adapter: Annotated[
        Optional[str], typer.Option("--adapter", "-a", help="Train this one, from fggm select; else select first.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
) -> Result | None:
    """Train an adapter for MODEL on the task in DATA, and save it.

    Without --adapter, what may move is selected first, from the same data. Runs on several devices under accelerate
    launch or torchrun.
    """
    from ..deltas import save_adapter

    if adapter is not None:
        require_adapter(adapter)
        if selection.given():
            raise typer.BadParameter("is for fggm select, which made it", param_hint=", ".join(selection.given()))
    config = selection.fggm_config()
    require_free(output, overwrite or resume)
    if resume:
        require_checkpoint(output)
        config = _resumed_config(output / CHECKPOINTS, selection, config)
    else:
        require_protected(config)
    arguments = training.arguments(output / CHECKPOINTS, config.seed)
    tokenizer = base.base().load_tokenizer()
    train_examples = data_options.examples(data, data_options.split or "train", tokenizer, config.seed)
    eval_examples = None
    if after.eval_data is not None:
        eval_examples = data_options.examples(after.eval_data, after.eval_split, tokenizer, config.seed)
    model = _adapted(base, adapter, config)
    with no_empty_folders(output):
        trainer = _trainer(model, arguments, train_examples, eval_examples)
        if overwrite and not resume and trainer.is_world_process_zero():
            _remove_earlier_run(output)
        trained = trainer.train(resume_from_checkpoint=resume or None)
    if not trainer.is_world_process_zero():
        return None
    save_adapter(model, output)
    found = _figures(base.model, output, trainer, trained)
    if eval_examples is not None:
        found["evaluation"] = _evaluate(model, eval_examples, training.batch_size)
    if after.push_to_hub is not None:
        found["hub"] = _publish(output, after.push_to_hub, after.private)
    if after.merge:  # last, since the adapter is gone from the model then
        found["merged"] = _save_merged(model, tokenizer, output / MERGED)
    return Result(found, _table(found))


def _resumed_config(checkpoints: Path, selection: SelectionOptions, given: FGGMConfig) -> FGGMConfig:
    """The config that the checkpoint was selected by.

    Raises:
        ValueError: an option says otherwise.
    """
    from ..training.checkpoints import last_complete_checkpoint
    from ..tuner.config import FGGMConfig

    config = FGGMConfig.from_pretrained(str(last_complete_checkpoint(checkpoints)))
    for field in fields(selection) if selection.given() else ():
        asked, there = (getattr(one, field.name, None) for one in (given, config))
        # PEFT resolves target modules; what the file has is in no checkpoint
        if asked != there and field.name not in ("config", "seed", "target_modules", "delta_dtype"):
            raise ValueError(
                f"--resume goes on with what the checkpoint has selected by {field.name}={there!r}, not {asked!r}. "
                "Leave the option out, or start anew with --overwrite"
            )
    config.inference_mode = False
    config.values, config.delta_dtype = given.values, given.delta_dtype  # checkpoints hold what is trained
    return config


def _adapted(base: BaseOptions, adapter: str | None, config: FGGMConfig) -> Any:
    from peft import PeftModel, get_peft_model

    from ..selection.select import active_adapter
    from ..tuner.settings.file import require_file_settings

    model = base.base().load()
    if adapter is None:
        return get_peft_model(model, config)
    adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    if config.delta_dtype is not None:
        _, loaded = active_adapter(adapted, None)
        loaded.delta_dtype = config.delta_dtype
        require_file_settings(loaded)
    return adapted


def _trainer(
    model: Any, arguments: TrainingArguments, train: TokenizedExamples, evaluation: TokenizedExamples | None
) -> FGGMTrainer:
    from transformers import DataCollatorForSeq2Seq

    from ..training import FGGMTrainer

    return FGGMTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DataCollatorForSeq2Seq(train.tokenizer),
    )


def _remove_earlier_run(output: Path) -> None:
    """What an earlier run left would otherwise be resumed from, or taken for this run's."""
    for name in (CHECKPOINTS, MERGED):
        shutil.rmtree(output / name, ignore_errors=True)


def _figures(base: str, output: Path, trainer: FGGMTrainer, trained: Any) -> dict[str, Any]:
    model: Any = trainer.model
    selection = getattr(model.active_peft_config, "selection", None) or {}
    report = trainer.selection_report
    return {
        "model": base,
        "output": str(output),
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "seconds": trained.metrics["train_runtime"],
        "parameters": model.get_nb_trainable_parameters()[0],
        "density": selection.get("density"),
        "agreement": selection.get("agreement"),
        "bytes": (output / ADAPTER_FILE).stat().st_size,
        "selection": None if report is None else report.to_dict(),
    }


def _evaluate(model: PeftModel, examples: TokenizedExamples, batch_size: int) -> dict[str, Any]:
    from ..training.evaluation import score_answers

    return score_answers(model, examples, batch_size).to_dict()


def _publish(folder: Path, repository: str, private: bool) -> str:
    """Upload the adapter, without checkpoints and the merged model; returns the address."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repository, private=private, exist_ok=True)
    ignored = [f"{CHECKPOINTS}/*", f"{MERGED}/*"]
    api.upload_folder(repo_id=address.repo_id, folder_path=folder, ignore_patterns=ignored)
    return str(address)


def _save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> str:
    merged = model.merge_and_unload()
    with complete_folder(output) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(output)


def _table(found: dict[str, Any]) -> Table:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(title=f"Saved to {found['output']}", show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    table.add_row("training loss", f"{found['train_loss']:.4f}")
    table.add_row("steps", f"{found['steps']:,}")
    table.add_row("seconds", f"{found['seconds']:.1f}")
    table.add_row("trainable values", f"{found['parameters']:,}")
    for name, form in (("density", ".2%"), ("agreement", ".3f")):
        if found[name] is not None:
            table.add_row(name, format(found[name], form))
    table.add_row("adapter file", decimal(found["bytes"]))
    if "evaluation" in found:
        table.add_row("evaluation loss", f"{found['evaluation']['loss']:.4f}")
        table.add_row("evaluation accuracy", f"{found['evaluation']['accuracy']:.1%}")
    for name in ("merged", "hub"):
        if name in found:
            table.add_row(name, found[name])
    return table
