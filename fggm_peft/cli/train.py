"""``fggm train``: trains an adapter, and selects its weights first if necessary."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from transformers import TrainingArguments

from .generated import given_options, option_name, options_of
from .options import BaseOptions, Data, DataOptions, Overwrite, SelectionOptions
from .output import ADAPTER_FILE, Result, facts_table, file_size, require_adapter, require_free

if TYPE_CHECKING:
    from peft import PeftModel

    from ..training import FGGMTrainer
    from ..tuner import FGGMConfig

CHECKPOINTS = "checkpoints"
MERGED = "merged"
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
    help_length=100,
)
class TrainingOptions:
    """Training."""

    def arguments(self, folder: Path, seed: int) -> TrainingArguments:
        """The trainer's arguments, with checkpoints in ``folder``."""
        import torch

        from ..training import this_process

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

    eval_data: Annotated[Optional[str], typer.Option(help="Evaluate on this task, as fggm eval does.")] = None
    eval_split: Annotated[str, typer.Option(help="Split of the evaluation data.")] = "eval"
    merge: Annotated[bool, typer.Option("--merge", help="Also save the merged model, in OUTPUT/merged.")] = False
    push_to_hub: Annotated[
        Optional[str], typer.Option(metavar="REPOSITORY", help="Also publish the adapter under this Hub id.")
    ] = None
    private: Annotated[bool, typer.Option("--private", help="Create a private Hub repository.")] = False


def run(
    base: BaseOptions,
    training: TrainingOptions,
    selection: SelectionOptions,
    data_options: DataOptions,
    after: AfterTrainingOptions,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter and its checkpoints.")],
    adapter: Annotated[
        Optional[str], typer.Option("--adapter", "-a", help="Train this adapter, from fggm select.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest checkpoint in the output.")] = False,
    overwrite: Overwrite = False,
) -> Result | None:
    """Train an adapter for MODEL on the task in DATA, and save it.

    Without --adapter, the weights are selected first, from the same data. Runs on several devices under accelerate
    launch or torchrun. Every field of TrainingArguments is an option, also those not listed, e.g. --max-grad-norm 0.5.
    """
    from transformers import DataCollatorForSeq2Seq

    from ..deltas import save_adapter
    from ..training import FGGMTrainer, score_answers

    if adapter is not None:
        require_adapter(adapter)
        names = [option_name(name) for name in selection.given() if name not in ("seed", "delta_dtype")]
        if names or selection.config is not None:
            raise typer.BadParameter("not with --adapter: it is selected", param_hint=", ".join(names) or "--config")
    config = selection.fggm_config()
    require_free(output, overwrite or resume)
    if resume:
        config = _resumed_config(output / CHECKPOINTS, selection, config)
    arguments = training.arguments(output / CHECKPOINTS, config.seed)
    tokenizer = base.base().load_tokenizer()
    examples: Any = data_options.examples(data, tokenizer, seed=config.seed)
    eval_examples: Any = None
    if after.eval_data is not None:
        eval_examples = data_options.examples(after.eval_data, tokenizer, after.eval_split, seed=config.seed)
    with _no_empty_folders(output):
        trainer = FGGMTrainer(
            model=_adapted(base, adapter, config),
            args=arguments,
            train_dataset=examples,
            eval_dataset=eval_examples,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        if overwrite and not resume and trainer.is_world_process_zero():
            for name in (CHECKPOINTS, MERGED):  # results of an earlier run
                shutil.rmtree(output / name, ignore_errors=True)
        trained = trainer.train(resume_from_checkpoint=resume or None)
    if not trainer.is_world_process_zero():
        return None
    model: Any = trainer.model
    save_adapter(model, output)
    result = _figures(base.model, output, trainer, trained)
    if eval_examples is not None:
        result["evaluation"] = score_answers(model, eval_examples, arguments.per_device_eval_batch_size).to_dict()
    if after.push_to_hub is not None:
        result["hub"] = _publish(output, after.push_to_hub, after.private)
    if after.merge:  # last, since it removes the adapter from the model
        result["merged"] = _save_merged(model, tokenizer, output / MERGED)
    return Result(result, _shown(result))


def _resumed_config(checkpoints: Path, selection: SelectionOptions, given: FGGMConfig) -> FGGMConfig:
    """The config of the newest checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: an option differs from the checkpoint's selection.
    """
    from ..training import last_complete_checkpoint
    from ..tuner import FGGMConfig

    if not any(checkpoints.glob("checkpoint-*")):
        raise FileNotFoundError(f"nothing to resume: no checkpoint in {checkpoints}; omit --resume")
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


@contextmanager
def _no_empty_folders(output: Path) -> Iterator[None]:
    """Remove the folders that a trainer creates, if it fails before its first checkpoint."""
    try:
        yield
    finally:
        for path in (output / CHECKPOINTS, output):
            with suppress(OSError):  # it is not empty, or another process has removed it
                path.rmdir()


def _adapted(base: BaseOptions, adapter: str | None, config: FGGMConfig) -> Any:
    from peft import PeftModel, get_peft_model

    model = base.base().load()
    if adapter is None:
        return get_peft_model(model, config)
    adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    adapted.active_peft_config.delta_dtype = config.delta_dtype or adapted.active_peft_config.delta_dtype
    return adapted


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


def _publish(folder: Path, repository: str, private: bool) -> str:
    """Upload the adapter without checkpoints and merged model; returns the address."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repository, private=private, exist_ok=True)
    ignored = [f"{CHECKPOINTS}/*", f"{MERGED}/*"]
    api.upload_folder(repo_id=address.repo_id, folder_path=folder, ignore_patterns=ignored)
    return str(address)


def _save_merged(model: PeftModel, tokenizer: Any, output: Path) -> str:
    from ..tuner.files.atomic import complete_folder

    merged = model.merge_and_unload()
    with complete_folder(output) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(output)


def _shown(result: dict[str, Any]) -> Any:
    density, agreement, evaluation = result["density"], result["agreement"], result.get("evaluation")
    return facts_table(
        f"Saved to {result['output']}",
        {
            "training loss": f"{result['train_loss']:.4f}",
            "steps": f"{result['steps']:,}",
            "seconds": f"{result['seconds']:.1f}",
            "trainable values": f"{result['parameters']:,}",
            "density": density and f"{density:.2%}",
            "agreement": agreement and f"{agreement:.3f}",
            "adapter file": file_size(Path(result["output"]) / ADAPTER_FILE),
            "evaluation loss": evaluation and f"{evaluation['loss']:.4f}",
            "evaluation accuracy": evaluation and f"{evaluation['accuracy']:.1%}",
            "merged model": result.get("merged"),
            "hub": result.get("hub"),
        },
    )
