"""FGGM inside transformers' ``Trainer`` and whatever derives from it, such as TRL's trainers.

``FGGMTrainerMixin`` selects inside ``train()``, on the trainer's own data, before the optimizer is built.
``FGGMCallback`` does it for a trainer whose class is given, in a single process.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..deltas.saving import keep_card
from ..selection import SelectionReport, select_parameters
from ..selection.likelihood import LogLikelihood
from ..selection.reference import ReferenceData
from ..selection.select import active_adapter
from ..tuner.files.atomic import complete_folder
from ..tuner.files.model_card import complete_card
from ..tuner.files.saving import as_trained
from .batches import Prompts, selection_batch
from .checkpoints import last_complete_checkpoint, load_before_sharding_, recall_selection_, unselected_adapters
from .texts import reference_of
from .trl import fill_reference_, keep_values_wide_

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Trainer = Trainer
else:  # the mixin must not be a Trainer itself, or it could not stand before one that derives from it
    _Trainer = object


class FGGMTrainerMixin(_Trainer):
    """Put it in front of a trainer: ``class MyTrainer(FGGMTrainerMixin, SFTTrainer)``.

    ``train()`` then chooses what may move (``select_parameters``) before it builds the optimizer: on the
    trainer's own data and collator, in its precision, over all its processes. An adapter that is
    selected already, because it was loaded or is being resumed, stays as it is. ``TrainingArguments`` needs no
    new field; how many samples to use and all else is on the ``FGGMConfig``.

    Further, checkpoints are whole: one whose writing fails is removed, and ``resume_from_checkpoint=True``
    resumes from the newest that was written to its end; and they hold values as they are trained, whatever the config
    says of published ones.

    Attributes:
        selection_report: what the last ``train()`` selected, None if the adapter was selected already.
        selection_log_likelihood: as ``select_parameters`` takes it, for a loss that is no likelihood of labels, such
            as a reward model's; None is what fits the model's head.
        selection_reference: as ``select_parameters`` takes it, such as a dataloader of general text (on each process
            its own share), or the path of a text (.txt) with paragraphs; None is what the config says.
    """

    selection_report: SelectionReport | None = None
    selection_log_likelihood: LogLikelihood | None = None
    selection_reference: ReferenceData = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.model_init is None:
            keep_values_wide_(self.model)
            fill_reference_(self.model)

    def selection_batch(self, batch: Any) -> Mapping[str, Any]:
        """A batch of the trainer as the Fisher pass takes it: model inputs with ``labels``.

        Override it for a collator of your own. By default batches with labels are taken as they are (sequences
        that are packed into one row apart), TRL's preference batches get the labels of both answers, and
        for prompts alone (GRPO, RLOO) the model writes the answers.
        """
        return selection_batch(batch, Prompts(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the trainer's own; selects first, if that has not been done."""
        self._refuse_ram_efficient_loading()
        self._select()
        return super().create_optimizer(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; ``resume_from_checkpoint=True`` passes by checkpoints that are not whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(Path(self.args.output_dir)))
        if resume_from_checkpoint:
            recall_selection_(self.model, Path(resume_from_checkpoint))
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                load_before_sharding_(self.model, Path(resume_from_checkpoint))
        self.selection_report = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _select(self) -> None:
        if not unselected_adapters(self.model):
            return
        with self._selection_dataloader() as dataloader:
            data = SelectionData(dataloader, self.selection_batch)
            report = select(
                self.model,
                data,
                self.accelerator.autocast(),
                self.selection_reference,
                self.texts_tokenizer,
                log_likelihood=self.selection_log_likelihood,
            )
        self.report_selection(report)

    @property
    def texts_tokenizer(self) -> Any:
        """What a reference that is a text is read with."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def report_selection(self, report: SelectionReport) -> None:
        """Keep and log what was selected."""
        self.selection_report = report
        self.log(logged(report))

    @contextmanager
    def _selection_dataloader(self) -> Iterator[Any]:
        """The trainer's dataloader with each sample once, and forgotten afterwards."""
        settings = self.accelerator.dataloader_config
        before = settings.even_batches, settings.dispatch_batches
        # no sample twice to fill up the last batch; and no rank waits for another that failed to read
        settings.even_batches, settings.dispatch_batches = False, False
        if hasattr(self, "num_generations"):  # TRL repeats each prompt for its group of answers
            self.__dict__["_get_train_sampler"] = partial(Trainer._get_train_sampler, self)
        try:
            dataloader = self.get_train_dataloader()
        finally:
            settings.even_batches, settings.dispatch_batches = before
            self.__dict__.pop("_get_train_sampler", None)
        try:
            yield dataloader
        finally:
            _finish(dataloader)
            if dataloader in self.accelerator._dataloaders:  # or its workers would live as long as the trainer
                self.accelerator._dataloaders.remove(dataloader)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's own, which writes over PEFT's card; says how to load the adapter."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            _, config = active_adapter(self.model, None)
            complete_card(Path(self.args.output_dir), config)

    def _refuse_ram_efficient_loading(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None) if self.is_fsdp_enabled else None
        if getattr(plugin, "cpu_ram_efficient_loading", False):
            raise ValueError(
                "FSDP's cpu_ram_efficient_loading leaves the weights out on all ranks but one, and accelerate cannot "
                "send them the adapter's indices, which are a buffer. Set it to False in fsdp_config."
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        existed = folder.exists()
        if self.args.should_save:  # a folder of an earlier run is not whole while it is written over
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            with as_trained(self.model):
                super()._save_checkpoint(model, trial)
        except BaseException:
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with as_trained(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with as_trained(self.model):
            super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the trainer's own; what is in the folder is replaced when the new files are whole."""
        target = Path(output_dir or self.args.output_dir)
        with complete_folder(target) as folder:
            keep_card(target, folder)
            super()._save(str(folder), state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the main process writes the trainer's state next, which says "whole"


class FGGMTrainer(FGGMTrainerMixin, Trainer):
    """transformers' ``Trainer`` with selection inside ``train()``."""


class FGGMCallback(TrainerCallback):
    """Selects when training begins, for a trainer whose class is given: ``Trainer(..., callbacks=[FGGMCallback()])``.

    For one process: with several, the model is wrapped for them before a callback runs.

    Args:
        convert: makes a batch of the trainer one that the Fisher pass takes: model inputs with ``labels``.
        reference: as ``select_parameters`` takes it; None is what the config says.

    Attributes:
        selection_report: what was selected, None if the adapter was selected already.
    """

    def __init__(self, convert: Callable[[Any], Mapping[str, Any]] = selection_batch, reference: ReferenceData = None):
        self.convert, self.reference = convert, reference
        self.selection_report: SelectionReport | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        keep_values_wide_(model)
        fill_reference_(model)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, processing_class=None, **kwargs):
        if not unselected_adapters(model):
            return
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                "FGGMCallback selects in one process only, since the model is wrapped for several before a callback "
                "runs. Use `class MyTrainer(FGGMTrainerMixin, Trainer)` instead, or call select_parameters before."
            )
        precision = torch.bfloat16 if args.bf16 else torch.float16
        autocast = torch.autocast(args.device.type, precision, enabled=args.bf16 or args.fp16)
        try:
            data = SelectionData(train_dataloader, self.convert)
            self.selection_report = select(model, data, autocast, self.reference, processing_class)
        finally:
            _finish(train_dataloader)
        state.log_history.append({**logged(self.selection_report), "step": state.global_step})


class SelectionData:
    """A dataloader whose batches are converted on the way; it can be read as often as the dataloader.

    Args:
        dataloader: of the trainer.
        convert: makes a batch one that the Fisher pass takes.
    """

    def __init__(self, dataloader: Iterable[Any], convert: Callable[[Any], Mapping[str, Any]]):
        self.dataloader, self.convert = dataloader, convert

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self.convert, iter(self.dataloader))


def select(
    model: nn.Module,
    data: SelectionData,
    autocast: AbstractContextManager,
    reference: ReferenceData,
    tokenizer: Any,
    **arguments: Any,
) -> SelectionReport:
    """Select what the configs of the active adapters ask for; returns the last report.

    Args:
        reference: of ``select_parameters``, or paths of texts; None is what each config says.
        tokenizer: for the texts.
        arguments: of ``select_parameters``.
    """
    with autocast:
        for name in unselected_adapters(model):
            _, config = active_adapter(model, name)
            against = reference_of(reference, config, tokenizer)
            report = select_parameters(model, data, adapter_name=name, reference=against, **arguments)
            logger.info("%s", report)
    return report


def logged(report: SelectionReport) -> dict[str, float]:
    """What goes into the training log."""
    numbers = {name: value for name, value in report.summary().items() if isinstance(value, (int, float))}
    numbers |= {"seconds": round(report.seconds, 2), "sample_passes": report.sample_passes}
    numbers |= {"samples_per_second": round(report.samples_per_second, 2)}
    if report.reference_seconds:
        numbers["reference_share"] = round(report.reference_share, 3)
    return {f"selection/{name}": value for name, value in numbers.items()}


def _finish(dataloader: Any) -> None:
    """Tell accelerate that its dataloader is read no longer, though it was left before its end."""
    state = getattr(dataloader, "gradient_state", None)
    if state is not None and any(dataloader is reference for reference in state.dataloader_references):
        dataloader.end()
