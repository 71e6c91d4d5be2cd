"""``fggm select``: choose which weights may move, and save that choice as an adapter of zero values."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from ..tuner.files.atomic import complete_folder
from .command import Result
from .options import BaseOptions, DataOptions, DryRunOptions, SelectionOptions
from .output import ADAPTER_FILE, require_free, require_protected

if TYPE_CHECKING:
    from ..selection import SelectionReport
    from ..tuner import FGGMConfig


def run(
    base: BaseOptions,
    selection: SelectionOptions,
    data_options: DataOptions,
    dry: DryRunOptions,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder for the adapter. Needed unless --dry-run is given.")
    ] = None,
    data: Annotated[
        Optional[str],
        typer.Option(
            "--data", "-d", help="The task: a file, a folder or a Hub id. Criteria that need none do without."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in one forward; on each device.")] = 8,
    plots: Annotated[
        Optional[Path], typer.Option(help="Folder for pictures: density, spectrum of scores, agreement of halves.")
    ] = None,
    plots_format: Annotated[Literal["svg", "png", "pdf"], typer.Option(help="Of these pictures.")] = "svg",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the output folder.")] = False,
) -> Result | None:
    """Choose which weights of MODEL may move for the task in DATA.

    The result is an adapter of zero values that fggm train takes with --adapter. Runs on several devices under
    accelerate launch or torchrun: each reads a share of the data, and all choose the same. A model that fits on
    none of them is sharded, if accelerate is configured for FSDP (version 2).

    With --dry-run no data is read and nothing is written: what training would cost is shown, at --batch-size samples
    of --max-length tokens.
    """
    config = selection.fggm_config()
    if dry.dry_run:
        return _estimate(base, config, dry, batch_size, data_options.max_length)
    if output is None:
        raise typer.BadParameter("name a folder for the adapter", param_hint="--output")
    require_free(output, overwrite)
    require_protected(config)
    if plots is not None:
        _require_drawable(plots, output, overwrite)

    from peft import get_peft_model

    from ..core.criteria import CRITERIA
    from ..deltas import save_adapter
    from ..selection import select_parameters
    from ..training.base_model import shard_as_launched, this_process
    from ..tuner.files.saving import UntrainedAdapterWarning

    if data is None and CRITERIA[config.criterion].needs_data:
        raise typer.BadParameter(f"the criterion {config.criterion!r} needs data", param_hint="--data")
    process = this_process()
    loader = None
    if data is not None and CRITERIA[config.criterion].needs_data:
        loader = _dataloader(base, data_options, data, config, batch_size)
    against = _reference(base, config)
    model = shard_as_launched(get_peft_model(base.base().load(), config))
    report = select_parameters(model, loader, config.num_samples, score_memory=config.score_memory, reference=against)
    if not process.is_main_process:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedAdapterWarning)  # values of zero are what this command is for
        save_adapter(model, output)
    return _result(report, base.model, output, None if plots is None else _drawn(report, plots, plots_format))


def _reference(base: BaseOptions, config: FGGMConfig) -> Any:
    """What the config says; a tokenizer is loaded only if there is a text to read with it."""
    from ..training.texts import has_texts, with_texts

    return with_texts(config.reference, base.base().load_tokenizer() if has_texts(config.reference) else None)


def _require_drawable(plots: Path, output: Path, overwrite: bool) -> None:
    """Raise before the model is loaded if pictures could not be drawn, or would get among the adapter's files."""
    from ..plots import style

    if plots.absolute() == output.absolute():
        raise typer.BadParameter("name another folder than that of the adapter", param_hint="--plots")
    require_free(plots, overwrite)
    with style():
        pass


def _drawn(report: SelectionReport, folder: Path, format: str) -> list[str]:
    """The files of the pictures that were drawn."""
    from ..plots import save_all

    with complete_folder(folder) as temporary:
        files = save_all(report.plots(), temporary, format)
    return [str(folder / file.name) for file in files]


def _estimate(base: BaseOptions, config: FGGMConfig, dry: DryRunOptions, batch_size: int, length: int) -> Result | None:
    """What training would cost, without any data."""
    from ..cost import estimate
    from ..training.base_model import this_process

    found = estimate(
        base.base().load(),
        config,
        batch_size=batch_size,
        sequence_length=length,
        optimizer=dry.optimizer,
        checkpointing=dry.gradient_checkpointing,
    )
    if not this_process().is_main_process:
        return None
    return Result({"model": base.model, **found.to_dict()}, found.to_table())


def _dataloader(base: BaseOptions, options: DataOptions, data: str, config: FGGMConfig, batch_size: int) -> Any:
    """Batches in shuffled order; each process reads its own."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForSeq2Seq

    from ..selection.select import MAX_SAMPLES
    from ..training.base_model import this_process

    tokenizer = base.base().load_tokenizer()
    most = MAX_SAMPLES if config.num_samples == "auto" else config.num_samples
    limits = [limit for limit in (options.limit, most) if limit is not None]
    options = replace(options, limit=min(limits, default=None))  # a large data set need not be read whole
    examples: Any = options.examples(data, options.split or "train", tokenizer, config.seed)
    loader = DataLoader(examples, batch_size=batch_size, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    if this_process().num_processes == 1:
        return loader
    # even batches would repeat samples to fill the last round, and count them twice
    return prepare_data_loader(loader, even_batches=False, put_on_device=False)


def _result(report: SelectionReport, model: str, output: Path, pictures: list[str] | None) -> Result:
    from rich.console import Group
    from rich.filesize import decimal
    from rich.text import Text

    size = (output / ADAPTER_FILE).stat().st_size
    data = {"model": model, "output": str(output), "bytes": size, **report.to_dict()}
    note = "" if pictures is None else f"Drawn: {', '.join(pictures)}. "
    data |= {} if pictures is None else {"pictures": pictures}
    note += f"Saved to {output} ({decimal(size)}). Train it with: fggm train {model} --adapter {output} --data ..."
    return Result(data, Group(report.to_table(), Text(note)))
