"""``fggm train``: trains an adapter, and selects its weights first if necessary."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from .options import (
    SELECTION,
    FieldOptions,
    add_base,
    add_data,
    add_selection,
    base_model,
    option_name,
    read_task,
    selection_config,
    selection_settings,
)
from .output import ADAPTER_FILE, Result, add_output, facts_table, require_adapter, require_free

if TYPE_CHECKING:
    from ..tuner import FGGMConfig

CHECKPOINTS = "checkpoints"
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
TRAINING = FieldOptions(
    TrainingArguments,
    "training",
    # the command has its own option for these, or they cannot be written on a command line
    skip={"output_dir", "resume_from_checkpoint", "push_to_hub", "seed", "parallelism_config", "local_rank", "debug"},
    shown=SHOWN,
    defaults=DEFAULTS,
    aliases={"num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size"},
)


def add_options(parser: ArgumentParser) -> None:
    add_base(parser)
    TRAINING.add_to(parser)
    add_selection(parser)
    add_data(parser)
    text = "Evaluate on this task, also during training with --eval-strategy."
    parser.add_argument("--eval-data", help=text)
    text = "Split of the evaluation data (default: %(default)s)."
    parser.add_argument("--eval-split", default="eval", help=text)
    parser.add_argument("--adapter", "-a", help="Train this adapter, from fggm select.")
    parser.add_argument("--resume", action="store_true", help="Resume from the newest checkpoint in the output.")
    add_output(parser, "Folder for the adapter and its checkpoints.")


def run(args: Namespace) -> Result | None:
    """Train an adapter for MODEL on the task in DATA, and save it.

    Without --adapter, the weights are selected first, from the same data. Runs on several devices under accelerate
    launch or torchrun. Fields of TrainingArguments that are not listed are options, too, e.g. --max-grad-norm 0.5.
    """
    from ..deltas import save_adapter
    from ..retention import kl_divergence, predicted_drift
    from ..training import FGGMTrainer
    from ..training.data import padding_on_the_right
    from ..training.evaluation import score_answers

    config = selection_config(args) if args.adapter is None else _adapter_config(args)
    checkpoints = args.output / CHECKPOINTS
    require_free(args.output, args.overwrite or args.resume)
    if args.resume:
        config = _resumed_config(args, config)
    settings = training_arguments(args, config)
    tokenizer = base_model(args).load_tokenizer()
    examples: Any = read_task(args, args.data, tokenizer, seed=config.seed)
    eval_examples: Any = None
    if args.eval_data is not None:
        eval_examples = read_task(args, args.eval_data, tokenizer, args.eval_split, seed=config.seed)
    with _no_empty_folders(args.output):
        trainer = FGGMTrainer(
            model=_adapted(args, config),
            args=settings,
            train_dataset=examples,
            eval_dataset=eval_examples,
            data_collator=padding_on_the_right(tokenizer),
        )
        if args.overwrite and not args.resume and trainer.is_world_process_zero():
            shutil.rmtree(checkpoints, ignore_errors=True)  # of an earlier run
        trained = trainer.train(resume_from_checkpoint=args.resume or None)
    if not trainer.is_world_process_zero():
        return None
    model: Any = trainer.model
    save_adapter(model, args.output)
    selection, report = model.active_peft_config.selection or {}, trainer.selection_report
    data = {
        "model": args.model,
        "output": str(args.output),
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "seconds": trained.metrics["train_runtime"],
        "parameters": model.get_nb_trainable_parameters()[0],
        "density": selection.get("density"),
        "regret": selection.get("regret"),
        "bytes": (args.output / ADAPTER_FILE).stat().st_size,
        "selection": report and report.to_dict(),
    }
    if settings.world_size == 1:  # a sharded model runs on all processes together
        data["kl"] = kl_divergence(model, trainer.get_train_dataloader(), num_batches=8)
    if trainer.harm_decay is not None:
        data["drift"] = predicted_drift(model, trainer.harm_decay.covariance)[""]
    if eval_examples is not None:
        data["evaluation"] = score_answers(model, eval_examples, settings.per_device_eval_batch_size).to_dict()
    return data, facts_table(f"Saved to {args.output}", {**data, **data.get("evaluation", {})})


def training_arguments(args: Namespace, config: FGGMConfig) -> TrainingArguments:
    """The trainer's arguments, with checkpoints in the output folder."""
    import torch

    from ..training.base_model import this_process

    given = TRAINING.given(args)
    computed = {
        "output_dir": str((args.output / CHECKPOINTS).resolve()),  # a link may lead to a folder that does not exist
        "seed": config.seed,
        "learning_rate": config.recommended_learning_rate or DEFAULTS["learning_rate"],
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "use_cpu": this_process().device.type == "cpu",  # else processes on CPUs would not find each other
        "disable_tqdm": not sys.stderr.isatty(),
    }
    if "per_device_train_batch_size" in given:
        computed["per_device_eval_batch_size"] = given["per_device_train_batch_size"]
    return TrainingArguments(**{**DEFAULTS, **computed, **given})


def _adapter_config(args: Namespace) -> FGGMConfig:
    """The config of ``--adapter``, with the options that do not select."""
    from ..tuner.files.reading import find_adapter

    require_adapter(args.adapter)
    given = SELECTION.given(args)
    names = [option_name(name) for name in given if name not in ("seed", "delta_dtype")]
    if names or args.config is not None:
        args.error(
            f"{', '.join(names) or '--config'} cannot be combined with --adapter: its weights are already selected"
        )
    config, _ = find_adapter(args.adapter)
    for name, value in given.items():
        setattr(config, name, value)
    return config


def _resumed_config(args: Namespace, given: FGGMConfig) -> FGGMConfig:
    """The config of the newest checkpoint. Raises if there is none, or if an option differs from its selection."""
    from ..training.checkpoints import last_complete_checkpoint
    from ..tuner import FGGMConfig

    checkpoints = args.output / CHECKPOINTS
    if not any(checkpoints.glob("checkpoint-*")):
        raise FileNotFoundError(f"nothing to resume: no checkpoint in {checkpoints}; omit --resume")
    config = FGGMConfig.from_pretrained(str(last_complete_checkpoint(checkpoints)))
    # PEFT resolves the target modules, and a checkpoint stores values as they are trained
    for name in selection_settings(args).keys() - {"seed", "target_modules", "delta_dtype"}:
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


def _adapted(args: Namespace, config: FGGMConfig) -> Any:
    from peft import PeftModel, get_peft_model

    from ..tuner.files.input_covariance import COVARIANCE_FILE, load_input_covariance, set_covariance

    model = base_model(args).load()
    if args.adapter is None:
        return get_peft_model(model, config)
    adapted = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    if (Path(args.adapter) / COVARIANCE_FILE).exists():
        set_covariance(adapted.active_peft_config, load_input_covariance(args.adapter))
    adapted.active_peft_config.delta_dtype = config.delta_dtype
    return adapted
