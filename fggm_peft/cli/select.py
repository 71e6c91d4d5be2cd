"""``fggm select``: selects the weights that may change, and saves them as an adapter of zero values."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from .options import BaseOptions, BatchSize, DataOptions, Overwrite, SelectionOptions
from .output import ADAPTER_FILE, Result, file_size, require_free

if TYPE_CHECKING:
    from ..selection import SelectionReport
    from ..tuner import FGGMConfig


@dataclass(frozen=True)
class DryRunOptions:
    """Dry run."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cost of training. Reads no data and writes nothing.")
    ] = False
    optimizer: Annotated[
        str, typer.Option(help="Optimizer whose state is counted: adamw, adam, sgd, rmsprop, adagrad.")
    ] = "adamw"
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Count a training step with gradient checkpointing.")
    ] = False


def run(
    base: BaseOptions,
    selection: SelectionOptions,
    data_options: DataOptions,
    dry: DryRunOptions,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder for the adapter. Required without --dry-run.")
    ] = None,
    data: Annotated[
        Optional[str],
        typer.Option("--data", "-d", help="The task: a file, a folder or a Hub id. Some criteria need none."),
    ] = None,
    batch_size: BatchSize = 8,
    plots: Annotated[
        Optional[Path], typer.Option(help="Folder for plots of densities and split-half agreement.")
    ] = None,
    plots_format: Annotated[Literal["svg", "png", "pdf"], typer.Option(help="Format of the plots.")] = "svg",
    overwrite: Overwrite = False,
) -> Result | None:
    """Select the weights of MODEL that may change for the task in DATA.

    The result is an adapter of zero values; train it with fggm train --adapter. Runs on several devices under
    accelerate launch or torchrun: each device reads a share of the data, and all select the same weights. A model that
    is too large for one device is sharded if accelerate is configured for FSDP (version 2).

    With --dry-run, the command shows the cost of training with --batch-size samples of --max-length tokens.
    """
    config = selection.fggm_config()
    if dry.dry_run:
        return _cost(base, config, dry, batch_size, data_options.max_length)
    if output is None:
        raise typer.BadParameter("name a folder for the adapter", param_hint="--output")
    require_free(output, overwrite)
    if plots is not None:
        _require_plots(plots, output, overwrite)

    from peft import get_peft_model

    from ..core.criteria import CRITERIA
    from ..deltas import save_adapter
    from ..selection import select_parameters
    from ..training.base_model import shard_as_launched, this_process
    from ..training.texts import has_texts, with_texts
    from ..tuner.files.saving import UntrainedAdapterWarning

    loader = None
    if CRITERIA[config.criterion].needs_data:
        if data is None:
            raise typer.BadParameter(f"the criterion {config.criterion!r} needs data", param_hint="--data")
        loader = _dataloader(base, data_options, data, config, batch_size)
    tokenizer = base.base().load_tokenizer() if has_texts(config.reference) else None
    reference = with_texts(config.reference, tokenizer)
    model = shard_as_launched(get_peft_model(base.base().load(), config))
    report = select_parameters(model, loader, config.num_samples, score_memory=config.score_memory, reference=reference)
    if not this_process().is_main_process:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedAdapterWarning)
        save_adapter(model, output)
    result: dict[str, Any] = {
        "model": base.model,
        "output": str(output),
        "bytes": (output / ADAPTER_FILE).stat().st_size,
    }
    result |= report.to_dict()
    if plots is not None:
        result["pictures"] = _draw(report, plots, plots_format)
    return Result(result, _shown(report, base.model, output, result.get("pictures", [])))


def _cost(base: BaseOptions, config: FGGMConfig, dry: DryRunOptions, batch_size: int, length: int) -> Result | None:
    from ..cost import estimate
    from ..training.base_model import this_process

    cost = estimate(
        base.base().load(),
        config,
        batch_size=batch_size,
        sequence_length=length,
        optimizer=dry.optimizer,
        checkpointing=dry.gradient_checkpointing,
    )
    if not this_process().is_main_process:
        return None
    return Result({"model": base.model, **cost.to_dict()}, cost.to_table())


def _dataloader(base: BaseOptions, options: DataOptions, data: str, config: FGGMConfig, batch_size: int) -> Any:
    """Shuffled batches. Each process reads its share, without repeating samples."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForSeq2Seq

    from ..selection.agreement import MAX_SAMPLES
    from ..training.base_model import this_process

    tokenizer = base.base().load_tokenizer()
    limit = MAX_SAMPLES if config.num_samples == "auto" else config.num_samples
    examples: Any = options.examples(data, tokenizer, limit=limit, seed=config.seed)
    loader = DataLoader(examples, batch_size=batch_size, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    if this_process().num_processes == 1:
        return loader
    return prepare_data_loader(loader, even_batches=False, put_on_device=False)


def _require_plots(plots: Path, output: Path, overwrite: bool) -> None:
    """Raise before the model is loaded if the plots cannot be drawn, or would be written among the adapter's files."""
    from ..plots import style

    if plots.absolute() == output.absolute():
        raise typer.BadParameter("name another folder than --output", param_hint="--plots")
    require_free(plots, overwrite)
    with style():
        pass


def _draw(report: SelectionReport, folder: Path, format: str) -> list[str]:
    from ..plots import save_all
    from ..tuner.files.atomic import complete_folder

    with complete_folder(folder) as temporary:
        files = save_all(report.plots(), temporary, format)
    return [str(folder / file.name) for file in files]


def _shown(report: SelectionReport, model: str, output: Path, pictures: list[str]) -> Any:
    from rich.console import Group
    from rich.text import Text

    plots = f"Plots: {', '.join(pictures)}. " if pictures else ""
    size = file_size(output / ADAPTER_FILE)
    note = f"{plots}Saved to {output} ({size}). Train it with: fggm train {model} --adapter {output} --data ..."
    return Group(report.to_table(), Text(note))
