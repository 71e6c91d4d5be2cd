"""``fggm train``: train an adapter, and select it first where that has not been done."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from transformers import TrainingArguments

from ..tuner.files.atomic import complete_folder
from .command import Result
from .generated import given_options, option_name, options_of
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
    from transformers import PreTrainedTokenizerBase

    from ..training import FGGMTrainer
    from ..training.data import TokenizedExamples
    from ..tuner import FGGMConfig


DEFAULTS = {
    "num_train_epochs": 1.0,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "save_steps": 0.2,
    "save_total_limit": 2,
    "report_to": "none",
}
SHOWN = {
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "lr_scheduler_type",
    "warmup_steps",
    "bf16",
    "optim",
    "optim_args",
    "weight_decay",
    "save_steps",
    "eval_strategy",
}
# the command has its own option for these, or they cannot be written on a command line
SKIPPED = {"output_dir", "resume_from_checkpoint", "push_to_hub", "seed", "parallelism_config", "local_rank", "debug"}


@options_of(
    TrainingArguments,
    skip=SKIPPED,
    shown=SHOWN,
    defaults={**DEFAULTS, "bf16": None},
    aliases={"num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size"},
)
class TrainingOptions:
    """Training."""

    def arguments(self, folder: Path, seed: int) -> TrainingArguments:
        """The Trainer's arguments, with checkpoints in ``folder``."""
        import torch

        from ..training.base_model import this_process

        given = given_options(self, TrainingArguments)
        computed = {
            "output_dir": str(folder),
            "seed": seed,
            "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            "use_cpu": this_process().device.type == "cpu",  # else processes on CPUs would not find each other
        }
        if "per_device_train_batch_size" in given:
            computed["per_device_eval_batch_size"] = given["per_device_train_batch_size"]
        return TrainingArguments(**{**DEFAULTS, **computed, **given})


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

    Without --adapter, the weights are selected first, from the same data. Runs on several devices under accelerate
    launch or torchrun. Every field of TrainingArguments is an option, also those not listed, e.g. --max-grad-norm 0.5.
    """
    from ..deltas import save_adapter

    if adapter is not None:
        require_adapter(adapter)
        given = [option_name(name) for name in selection.given() if name not in ("seed", "delta_dtype")]
        if given or selection.config is not None:
            raise typer.BadParameter("is for fggm select, which made it", param_hint=", ".join(given) or "--config")
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
        found["evaluation"] = _evaluate(model, eval_examples, arguments.per_device_eval_batch_size)
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
    # PEFT resolves the target modules, and a checkpoint stores values as they are trained
    for name in selection.settings().keys() - {"seed", "target_modules", "delta_dtype"}:
        requested, selected = getattr(given, name), getattr(config, name)
        if requested != selected:
            raise ValueError(
                f"--resume continues with the checkpoint's selection by {name}={selected!r}, not {requested!r}. "
                "Omit the option, or start again with --overwrite"
            )
    config.inference_mode = False
    config.delta_dtype = given.delta_dtype
    return config


def _adapted(base: BaseOptions, adapter: str | None, config: FGGMConfig) -> Any:
    from peft import PeftModel, get_peft_model

    from ..selection.select import active_adapter

    model = base.base().load()
    if adapter is None:
        return get_peft_model(model, config)
    adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    if config.delta_dtype is not None:
        _, loaded = active_adapter(adapted, None)
        loaded.delta_dtype = config.delta_dtype
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
