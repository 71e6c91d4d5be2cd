"""``fggm select``: selects the weights that may change, and saves them as an adapter of zero values."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from .options import add_base, add_batch_size, add_data, add_selection, base_model, read_task, selection_config
from .output import ADAPTER_FILE, Result, add_output, require_free

if TYPE_CHECKING:
    from ..tuner import FGGMConfig


def add_options(parser: ArgumentParser) -> None:
    add_base(parser)
    add_selection(parser)
    add_data(parser, required=False)
    add_batch_size(parser)
    add_output(parser, "Folder for the adapter. Required without --dry-run.", required=False)
    group = parser.add_argument_group("dry run")
    text = "Show the cost of training. Reads no data and writes nothing."
    group.add_argument("--dry-run", action="store_true", help=text)
    text = "Count a training step with gradient checkpointing."
    group.add_argument("--gradient-checkpointing", action="store_true", help=text)


def run(args: Namespace) -> Result | None:
    """Select the weights of MODEL that may change for the task in DATA.

    The result is an adapter of zero values; train it with fggm train --adapter. Runs on several devices under
    accelerate launch or torchrun: each device reads a share of the data, and all select the same weights. A model that
    is too large for one device is sharded if accelerate is configured for FSDP (version 2).

    With --dry-run, the command shows the cost of training with --batch-size samples of --max-length tokens.
    """
    config = selection_config(args)
    if args.dry_run:
        return _cost(args, config)
    if args.output is None:
        args.error("--output: name a folder for the adapter")
    require_free(args.output, args.overwrite)

    from peft import get_peft_model
    from rich.console import Group
    from rich.text import Text

    from ..core.criteria import CRITERIA
    from ..deltas import save_adapter
    from ..selection import select_parameters
    from ..training.base_model import shard_as_launched, this_process
    from ..training.texts import with_texts
    from ..tuner.files.input_covariance import covariance_of

    loader = None if args.data is None else _dataloader(args, config)
    if loader is None and CRITERIA[config.criterion].needs_data:
        args.error(f"--data: the criterion {config.criterion!r} needs data")
    tokenizer = base_model(args).load_tokenizer() if config.reference else None
    reference = with_texts(config.reference, tokenizer)
    model = shard_as_launched(get_peft_model(base_model(args).load(), config))
    report = select_parameters(model, loader, reference=reference)
    if not this_process().is_main_process:
        return None
    save_adapter(model, args.output)
    if (covariance := covariance_of(model.active_peft_config)) is not None:
        covariance.save(args.output)  # for fggm train --adapter
    size = (args.output / ADAPTER_FILE).stat().st_size
    data = {"model": args.model, "output": str(args.output), "bytes": size, **report.to_dict()}
    note = f"Saved to {args.output}. Train it with: fggm train {args.model} --adapter {args.output} --data ..."
    return data, Group(report.to_table(), Text(note))


def _cost(args: Namespace, config: FGGMConfig) -> Result | None:
    from ..cost import estimate
    from ..training.base_model import this_process

    cost = estimate(
        base_model(args).load(),
        config,
        batch_size=args.batch_size,
        sequence_length=args.max_length,
        checkpointing=args.gradient_checkpointing,
    )
    return ({"model": args.model, **cost.to_dict()}, str(cost)) if this_process().is_main_process else None


def _dataloader(args: Namespace, config: FGGMConfig) -> Any:
    """Shuffled batches. Each process reads its share, without repeating samples."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    from ..selection.regret import MAX_SAMPLES
    from ..training.base_model import this_process
    from ..training.data import padding_on_the_right

    tokenizer = base_model(args).load_tokenizer()
    limit = MAX_SAMPLES if config.num_samples == "auto" else config.num_samples
    examples: Any = read_task(args, args.data, tokenizer, limit=limit, seed=config.seed)
    loader = DataLoader(examples, batch_size=args.batch_size, collate_fn=padding_on_the_right(tokenizer))
    if this_process().num_processes == 1:
        return loader
    return prepare_data_loader(loader, even_batches=False, put_on_device=False)
