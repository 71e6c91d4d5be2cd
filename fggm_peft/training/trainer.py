"""Selection inside transformers' ``Trainer`` and the trainers that derive from it, such as TRL's.

``FGGMTrainerMixin`` selects inside ``train()``, on the trainer's own data, before the optimizer is created.
``FGGMCallback`` does the same in a trainer whose class cannot be changed, in a single process.
"""

from __future__ import annotations

import inspect
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType

from ..retention import HarmDecay, attach_harm_decay
from ..selection import SelectionReport, remember_task, select_parameters
from ..selection.likelihood import LogLikelihood
from ..selection.reference import ReferenceData
from ..selection.select import active_adapter, active_adapters
from ..tuner.files.atomic import complete_folder, full_disk_as_oserror
from ..tuner.files.input_covariance import task_of
from ..tuner.files.model_card import complete_card
from ..tuner.files.saving import as_trained, keep_card
from ..tuner.support import unwrapped
from .answer_loss import AnswerLossMixin
from .batches import selection_batch
from .checkpoints import (
    last_complete_checkpoint,
    load_adapters_,
    load_before_sharding_,
    recall_selection_,
    save_retention,
    unselected_adapters,
)
from .texts import with_texts
from .trl import copy_to_reference_, restore_float32_

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Trainer = Trainer
else:  # a mixin that derived from Trainer could not precede a subclass of Trainer
    _Trainer = object


class FGGMTrainerMixin(_Trainer):
    """Adds selection to a trainer: ``class MyTrainer(FGGMTrainerMixin, SFTTrainer)``.

    ``train()`` calls ``select_parameters`` before it creates the optimizer, with the trainer's data, collator and
    precision, over all its processes. An adapter that is already selected (because it was loaded or is resumed) is not
    changed. It applies the config's ``harm_decay``, and warms up at least as long as its ``preset`` needs. All settings
    are on the ``FGGMConfig``; ``TrainingArguments`` needs no new field.

    ``resume_from_checkpoint=True`` skips incomplete checkpoints. Checkpoints ignore ``delta_dtype``.

    Attributes:
        selection_report: the report of the last ``train()``; None if the adapter was already selected.
        harm_decay: attached to the optimizer during ``train()``; None if the config has none.
        selection_log_likelihood: argument ``log_likelihood`` of ``select_parameters``, for a loss that is not the
            likelihood of labels, such as a reward model's. None chooses by the model's head.
        selection_reference: argument ``reference`` of ``select_parameters``, such as a dataloader of general text (on
            each process its share), or the path of a text file (.txt). None uses the config's reference.
    """

    selection_report: SelectionReport | None = None
    harm_decay: HarmDecay | None = None
    selection_log_likelihood: LogLikelihood | None = None
    selection_reference: ReferenceData = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.model_init is None:
            restore_float32_(self.model)
            copy_to_reference_(self.model)
        if self.is_deepspeed_enabled:
            self.add_callback(_AttachHarmDecay(self))

    def selection_batch(self, batch: Any) -> Mapping[str, Any]:
        """Convert a batch of the trainer to model inputs with ``labels``, one sample per row.

        Override it for a custom collator. The default accepts batches with labels (it unpacks packed sequences), TRL's
        preference batches (both answers get labels), and prompts (GRPO, RLOO; the model generates the answers).
        """
        return selection_batch(batch, self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Like the trainer's, but selects first if the adapter has no support."""
        self._reject_unsupported()
        if unselected_adapters(self.model):
            with self._reading() as data:
                report = self.selection_report = _select(
                    self.model,
                    data,
                    self.selection_reference,
                    self.processing_class or getattr(self.data_collator, "tokenizer", None),
                    log_likelihood=self.selection_log_likelihood,
                )
            self.log(log_entry(report))
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self.is_deepspeed_enabled:  # its own optimizer does not exist yet
            self.harm_decay = attach_harm_decay(self.model, optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Like the trainer's, but warms up over at least the share of the steps that the preset needs."""
        least = max((config.recommended_warmup for _, config in active_adapters(self.model)), default=0.0)
        schedule = SchedulerType(self.args.lr_scheduler_type)
        if least and not _warms_up(schedule):
            warnings.warn(
                f"lr_scheduler_type={schedule.value!r} has no warm-up, and the preset needs one over "
                f"{least:.0%} of the steps; use 'linear', 'cosine' or 'constant_with_warmup'",
                stacklevel=2,
            )
        elif self.args.get_warmup_steps(num_training_steps) < least * num_training_steps:
            logger.info("warming up over %g of the steps, as the preset needs", least)
            self.args.warmup_steps = least  # transformers reads a number below 1 as a share
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Like the trainer's; ``resume_from_checkpoint=True`` skips incomplete checkpoints."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(Path(self.args.output_dir)))
        if resume_from_checkpoint:
            recall_selection_(self.model, Path(resume_from_checkpoint))
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                load_before_sharding_(self.model, Path(resume_from_checkpoint))
        self.selection_report = None
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            for name in _adapters_with_history(self.model):
                with self._reading() as data:
                    remember_task(self.model, data, adapter_name=name)
            return result
        finally:
            if self.harm_decay is not None:
                self.harm_decay.remove()

    @contextmanager
    def _reading(self) -> Iterator[_Converted]:
        """The training data, every sample once, converted, under the autocast of the training."""
        settings = self.accelerator.dataloader_config
        before = settings.even_batches, settings.dispatch_batches
        # no repeated samples in the last batch, and no rank that waits for another that failed to read
        settings.even_batches, settings.dispatch_batches = False, False
        if hasattr(self, "num_generations"):  # TRL's sampler repeats each prompt for its group of answers
            self.__dict__["_get_train_sampler"] = partial(Trainer._get_train_sampler, self)
        try:
            dataloader = self.get_train_dataloader()
        finally:
            settings.even_batches, settings.dispatch_batches = before
            self.__dict__.pop("_get_train_sampler", None)
        try:
            with self.accelerator.autocast():
                yield _Converted(dataloader, self.selection_batch)
        finally:
            _end(dataloader)
            if dataloader in self.accelerator._dataloaders:  # otherwise its workers live as long as the trainer
                self.accelerator._dataloaders.remove(dataloader)

    def _reject_unsupported(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None) if self.is_fsdp_enabled else None
        if getattr(plugin, "cpu_ram_efficient_loading", False):
            raise ValueError(
                "FSDP's cpu_ram_efficient_loading loads the weights on one rank only, and accelerate cannot send the "
                "adapter's indices (a buffer) to the others. Set it to False in fsdp_config."
            )
        stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None
        if stage not in (None, 2, 3) and any(config.harm_decay for _, config in active_adapters(self.model)):
            raise ValueError(
                f"harm_decay does not support DeepSpeed's ZeRO stage {stage}, only stages 2 and 3. Set stage=2 in its "
                "zero_optimization, or use DDP or FSDP (version 2)."
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Like the trainer's, which replaces PEFT's card; adds how to load the adapter."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            _, config = active_adapter(self.model, None)
            complete_card(Path(self.args.output_dir), config.of_file())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        existed = folder.exists()
        if self.args.should_save:  # an older checkpoint is incomplete while it is overwritten
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            with as_trained(self.model), full_disk_as_oserror(folder):
                super()._save_checkpoint(model, trial)
        except BaseException:
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with as_trained(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        """Like the trainer's, which would load the adapter ``default`` into the first active one."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif (best := self.state.best_model_checkpoint) is not None:
            logger.info("Loading the best checkpoint %s (score: %s)", best, self.state.best_metric)
            load_adapters_(self.model, Path(best), [name for name, _ in active_adapters(self.model)])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Like the trainer's; replaces the folder's files when the new ones are complete."""
        target = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:  # with FSDP, every process is called; only one may create and remove folders
            super()._save(str(target), state_dict)
            return
        with complete_folder(target) as folder:
            keep_card(target, folder)
            super()._save(str(folder), state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.harm_decay is not None and self.args.should_save:
            save_retention(self.model, self.harm_decay.covariance, Path(output_dir))
        # the main process writes the trainer's state next, which marks the checkpoint as complete
        self.accelerator.wait_for_everyone()


class FGGMTrainer(AnswerLossMixin, FGGMTrainerMixin, Trainer):
    """transformers' ``Trainer`` with selection inside ``train()``.

    Without a loss function of your own, only the positions that predict labels get logits, which saves the time and the
    memory of the prompts' logits (transformers' causal language models).
    """


class _AttachHarmDecay(TrainerCallback):
    """Attaches a trainer's harm decay to the optimizer that DeepSpeed has made."""

    def __init__(self, trainer: FGGMTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.trainer.harm_decay = attach_harm_decay(model, optimizer)


class FGGMCallback(TrainerCallback):
    """Selects at the start of training in a trainer whose class cannot be changed.

    Example: ``Trainer(..., callbacks=[FGGMCallback()])``. It supports one process: with several, the trainer wraps the
    model before it runs callbacks. It cannot extend the warm-up: with a preset, pass ``warmup_steps=0.3``.

    Args:
        convert: converts a batch of the trainer to model inputs with ``labels``.
        reference: as ``FGGMTrainerMixin.selection_reference``.

    Attributes:
        selection_report: the report of the selection; None if the adapter was already selected.
    """

    def __init__(self, convert: Callable[[Any], Mapping[str, Any]] = selection_batch, reference: ReferenceData = None):
        self.convert, self.reference = convert, reference
        self.selection_report: SelectionReport | None = None
        self.harm_decay: HarmDecay | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        restore_float32_(model)
        copy_to_reference_(model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if unselected_adapters(model):
            self._select(args, state, model, **kwargs)
        elif (folder := _checkpoint(args, state)).exists():  # training resumes
            recall_selection_(model, folder)
        self.harm_decay = attach_harm_decay(model, optimizer)

    def on_save(self, args, state, control, model=None, **kwargs):
        if self.harm_decay is not None and args.should_save:
            save_retention(model, self.harm_decay.covariance, _checkpoint(args, state))

    def on_train_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if self.harm_decay is not None:
            self.harm_decay.remove()
        for name in _adapters_with_history(model):
            with self._reading(args, train_dataloader) as data:
                remember_task(model, data, adapter_name=name)

    @contextmanager
    def _reading(self, args: Any, dataloader: Any) -> Iterator[_Converted]:
        """The training data, converted, under the autocast of the training."""
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        try:
            with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
                yield _Converted(dataloader, self.convert)
        finally:
            _end(dataloader)

    def _select(self, args, state, model, train_dataloader=None, processing_class=None, **kwargs) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                "FGGMCallback supports one process only. Use `class MyTrainer(FGGMTrainerMixin, Trainer)`, or call "
                "select_parameters before training."
            )
        with self._reading(args, train_dataloader) as data:
            self.selection_report = _select(model, data, self.reference, processing_class)
        state.log_history.append({**log_entry(self.selection_report), "step": state.global_step})


def _warms_up(schedule: SchedulerType) -> bool:
    """Whether a schedule of transformers has a warm-up."""
    function = TYPE_TO_SCHEDULER_FUNCTION[schedule]
    return "num_warmup_steps" in inspect.signature(function).parameters


def _adapters_with_history(model: nn.Module) -> list[str]:
    """The active adapters whose task later tasks retain."""
    base = unwrapped(model)
    return [name for name, config in active_adapters(model) if task_of(base, config) is not None]


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class _Converted:
    """A dataloader whose batches are converted while it is read."""

    def __init__(self, dataloader: Iterable[Any], convert: Callable[[Any], Mapping[str, Any]]):
        self.dataloader, self.convert = dataloader, convert

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self.convert, iter(self.dataloader))


def _select(
    model: nn.Module,
    data: _Converted,
    reference: ReferenceData,
    tokenizer: Any,
    **arguments: Any,
) -> SelectionReport:
    """Select every active adapter that has no support; returns the last report."""
    for name in unselected_adapters(model):
        _, config = active_adapter(model, name)
        references = with_texts(config.reference if reference is None else reference, tokenizer)
        # train() calls remember_task at its end
        report = select_parameters(model, data, reference=references, adapter_name=name, remember=False, **arguments)
        logger.info("%s", report)
    return report


def log_entry(report: SelectionReport) -> dict[str, float]:
    """The report's numbers for the training log."""
    numbers = {name: value for name, value in report.summary().items() if isinstance(value, (int, float))}
    numbers |= {"seconds": round(report.seconds, 2), "sample_passes": report.sample_passes}
    return {f"selection/{name}": value for name, value in numbers.items()}


def _end(dataloader: Any) -> None:
    """Tell accelerate that the reading of its dataloader has ended, although not all batches were read."""
    state = getattr(dataloader, "gradient_state", None)
    if state is not None and any(dataloader is reference for reference in state.dataloader_references):
        dataloader.end()
