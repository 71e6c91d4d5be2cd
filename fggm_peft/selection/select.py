"""``select_parameters``: statistics -> scores -> threshold policy -> support (see docs/score_path.md).

The model changes only after everything has been selected. An error leaves it unchanged.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import nn

from ..core.criteria import CRITERIA
from ..core.errors import AlreadyTrainedError
from ..tuner.config import FGGMConfig
from ..tuner.files.input_covariance import InputCovariance, retain, retained_by, set_covariance, task_of
from ..tuner.files.task_scores import TaskRecord, remember
from ..tuner.hosts.sharding import require_resizable, without_wrappers
from ..tuner.settings.selection import require_num_samples
from ..tuner.support import forecast_supports, unwrapped, write_supports
from ..tuner.target import Targets, find_targets
from ..version import __version__
from .data_pass import DataPass, input_metrics
from .frozen_model import without_delta
from .input_covariance import input_covariance
from .likelihood import LogLikelihood
from .measure import Measurement
from .processes import Processes
from .reference import ReferenceData, covariance_to_retain, find_sources, reference_entries
from .regret import regret_of
from .report import ModuleSelection, SelectionReport


@torch.inference_mode(False)  # the values created here must train
def select_parameters(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    num_samples: int | Literal["auto", "config"] | None = "config",
    *,
    reference: ReferenceData = None,
    adapter_name: str | None = None,
    log_likelihood: LogLikelihood | None = None,
    reset: bool = False,
    remember: bool = True,
    progress: bool = True,
) -> SelectionReport:
    """Select the weights that an FGGM adapter may change (FGGM, arXiv 2601.18261, section 3).

    Only the adapter's supports change; the base stays frozen and, if it is quantized, quantized. Call this before the
    model is wrapped for several devices, because the trainable values get their sizes here. If ``torch.distributed`` is
    initialized, every process calls this with its own share of the data, and all of them select the same support as one
    process would from all the data.

    With ``num_samples="config"`` and ``reference=None``, the values of the adapter's ``FGGMConfig`` apply.

    Args:
        model: the result of ``get_peft_model``, or a model with injected FGGM layers.
        dataloader: an iterable of batches of the task: dicts of model inputs with ``labels`` (-100 where no loss is
            taken). None for a criterion that needs no data.
        num_samples: number of samples over all processes: a number, None for all, or "auto": from 8 to 1024, doubled
            until the selection misses at most the share ``regret`` (2 %) of the best possible score, as two halves of
            the samples estimate it.
        reference: what the model should keep, for a criterion that weighs the task against it: a dataloader of general
            text (batches without labels get their tokens as labels), "self" (text that the model writes itself),
            "history" (the tasks selected on this base model in this process), a file or folder with saved scores, or a
            list of these, which are scaled and added. A criterion reads up to ``num_samples`` samples of each, harm
            decay up to 64. For harm decay, an ``InputCovariance`` or its file, also on the Hub, can take their place.
        adapter_name: by default the active adapter.
        log_likelihood: a function of (model, batch) that returns the log-likelihood of each sample ``[b]``, summed over
            its answer. By default the one that fits the model: a causal or sequence-to-sequence language model, a
            sequence or a token classifier.
        reset: select again although the adapter has trained values, which are lost.
        remember: with "history" in the reference of harm decay, read now what later tasks should retain of this one.
            False if ``remember_task`` is called after training, as the trainers do.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        A report of the selection, which prints as a table.

    Raises:
        AlreadyTrainedError: the adapter has trained values and ``reset`` is False.
        NonFiniteScoreError: a loss or a score is NaN or infinite.
        RuntimeError: another process failed, or has other versions, another config or another model.
        FileNotFoundError: there are no saved scores with this name.
        ScoreFileError: saved scores are damaged or do not fit.
        ValueError: no FGGM adapter, a merged adapter, no data, no labels, no reference for a criterion that needs one,
            or another bad argument.
    """
    start, model = time.perf_counter(), without_wrappers(model)
    adapter_name, config = active_adapter(model, adapter_name)
    num_samples = config.num_samples if num_samples == "config" else num_samples
    require_num_samples(num_samples)
    criterion = CRITERIA[config.criterion]
    if criterion.needs_data and dataloader is None:
        raise ValueError(f"criterion {config.criterion!r} needs data: pass a dataloader to select_parameters")
    data = [] if dataloader is None else dataloader
    task = DataPass(model, config, data, log_likelihood, progress, Processes(), criterion.task)
    with _without_compiling():
        targets = _checked_targets(task, adapter_name, reset)
        with task.processes.together("select_parameters"):
            entries = reference_entries(reference, targets, task)
            retains = config.needs_covariance and "history" in entries
            if retains:
                _require_data_to_retain(dataloader, is_read_again=criterion.needs_data and remember)
            sources = find_sources(entries, targets, task)
        references = {"the number of references": sum(source.data is not None for source in sources)}
        task.processes.require_same("their setting", references, "Give every process a dataloader of each reference.")
        covariance = own = None
        if config.needs_covariance:
            with without_delta(targets):
                widths = {path: target.shape[1] for path, target in targets.items()}
                history = retained_by(unwrapped(model), config)
                covariance = covariance_to_retain(model, entries, widths, history, progress)
                if retains and remember:
                    own = input_covariance(model, data, modules=targets, progress=progress)
                elif retains:  # unknown until the task has been learned
                    own = InputCovariance.zero(widths)
            task = replace(task, metrics=input_metrics(targets, covariance) if criterion.uses_covariance else {})
        measured = Measurement(task, targets, sources, num_samples)
        measured.run()
    report = _write(measured, start)
    if covariance is not None:
        set_covariance(config, covariance)
    if own is not None:
        retain(unwrapped(model), own, config)
    return report


def remember_task(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str | None = None,
    progress: bool = True,
) -> None:
    """Read what later tasks should retain of a task, on the model that has learned it.

    With "history" in the reference, ``select_parameters(remember=True)`` reads it before training. A model that has
    learned the task processes its prompts in other directions, and these are what later tasks must not change.
    Trainers call this at the end of ``train()``; call it in a loop of your own, before the adapter is merged.

    Args:
        model: with the trained adapter.
        dataloader: batches of the task; at most 64 samples are read.
        adapter_name: by default the active adapter.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: the adapter was not selected with "history" in its reference.
    """
    model = without_wrappers(model)
    adapter_name, config = active_adapter(model, adapter_name)
    base = unwrapped(model)
    if task_of(base, config) is None:
        raise ValueError(
            f"adapter {adapter_name!r} was not selected with 'history' in its reference, so later tasks do not retain "
            "its task"
        )
    modules = find_targets(model, adapter_name)
    retain(base, input_covariance(model, dataloader, modules=modules, progress=progress), config)


def _require_data_to_retain(dataloader: Any, is_read_again: bool) -> None:
    """Raise ``ValueError`` if the task cannot be added to the history."""
    if dataloader is None:
        raise ValueError("reference='history' reads what later tasks should retain: pass a dataloader of this task")
    if is_read_again and isinstance(dataloader, Iterator):
        raise ValueError(
            "harm_decay with reference='history' reads the data of the task twice, and this dataloader is an iterator; "
            "pass a DataLoader or a list of batches"
        )


def _without_compiling() -> AbstractContextManager[Any]:
    """Run compiled modules uncompiled.

    Dynamo would compile them again for the hooks of every layer, and after its limit never again, not even to train.
    A torch before 2.6 has no such setting.
    """
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


def _checked_targets(task: DataPass, adapter_name: str, reset: bool) -> Targets:
    """The adapter's targets, if all processes can select on them and have the same setting."""
    targets, config = find_targets(task.model, adapter_name), task.config
    with task.processes.together("select_parameters"):
        require_resizable(task.model)
        if not targets:
            raise ValueError(f"no module of the model has the adapter {adapter_name!r}")
        for path, target in targets.items():
            if target.is_merged:
                raise ValueError(f"adapter {adapter_name!r} is merged ({path}); call unmerge_adapter() first")
            if not reset and target.values.count_nonzero():
                raise AlreadyTrainedError(
                    f"adapter {adapter_name!r} has trained values ({path}), which a new selection would remove. Pass "
                    "reset=True to remove them, or add a new adapter."
                )
        forecast_supports(targets, config)  # raises if the budget cannot be spent
    if task.processes.size == 1:
        return targets
    setting: dict[str, Any] = {f"the version of {name}": version(name) for name in ("peft", "torch", "transformers")}
    setting["the version of fggm_peft"] = __version__
    # base_fingerprint is not the same on all processes if they hold shards of the model
    fields = {name: value for name, value in config.to_dict().items() if name != "base_fingerprint"}
    setting |= {f"the config's {name}": value for name, value in fields.items()}
    setting |= {f"the shape of {path}": tuple(target.shape) for path, target in targets.items()}
    task.processes.require_same("their setting", setting, "Start every process with the same code, model and config.")
    return targets


def _write(measured: Measurement, start: float) -> SelectionReport:
    """Write the supports to the targets, remember the task, and report.

    Raises:
        RuntimeError: the processes selected different supports.
        ValueError: nothing was selected.
    """
    task, config = measured.task, measured.config
    supports = {path: choice.indices for path, choice in measured.choices.items()}
    if not any(map(len, supports.values())):
        raise ValueError(f"the threshold {config.policy()} chooses nothing in any module, so nothing could train")
    task.processes.require_same("what they selected", supports, "Please report this; nothing has been changed.")
    write_supports(measured.targets, config, measured.choices)
    base = config.base_model_name_or_path or ""
    record = TaskRecord(config.granularity.to_dict(), measured.samples, base, measured.scores)
    remember(unwrapped(task.model), config, record)
    report = _report(measured, record, time.perf_counter() - start)
    config.selection = report.summary()
    _warn_of_empty(measured)
    return report


def _report(measured: Measurement, record: TaskRecord, seconds: float) -> SelectionReport:
    config, halves = measured.config, measured.half_scores
    modules = [
        ModuleSelection(
            name=path,
            shape=(measured.targets[path].shape[0], measured.targets[path].shape[1]),
            units=measured.targets[path].units,
            chosen=len(choice.indices),
            parameters=measured.targets[path].values.numel(),
            score_share=choice.score_share,
            regret=regret_of([halves[path]]) if halves else None,
        )
        for path, choice in measured.choices.items()
    ]
    return SelectionReport(
        granularity=str(config.granularity),
        criterion=config.criterion,
        threshold=config.policy().to_dict(),
        regret=regret_of(halves.values()) if halves else None,
        seconds=seconds,
        modules=modules,
        samples=measured.samples,
        reference_samples=measured.reference_samples,
        sample_passes=measured.sample_passes,
        checks=measured.checks,
        record=record,
    )


def _warn_of_empty(measured: Measurement) -> None:
    if empty := [path for path, choice in measured.choices.items() if not len(choice.indices)]:
        listed = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        warnings.warn(
            f"nothing was chosen in {len(empty)} of {len(measured.choices)} modules ({listed}): every score is 0 "
            "or below the threshold; scope='global' spends their share in other modules",
            stacklevel=4,
        )


def active_adapter(model: nn.Module, name: str | None) -> tuple[str, FGGMConfig]:
    """An FGGM adapter of the model and its config; without a name, the first active one.

    Raises:
        ValueError: the model has no such adapter.
    """
    if name is None:
        return active_adapters(model)[0]
    config = (getattr(model, "peft_config", None) or {}).get(name)
    if not isinstance(config, FGGMConfig):
        raise _no_adapter(f"FGGM adapter named {name!r}")
    return name, config


def active_adapters(model: nn.Module) -> list[tuple[str, FGGMConfig]]:
    """The active FGGM adapters of the model and their configs.

    Raises:
        ValueError: the model has none.
    """
    model = without_wrappers(model)
    configs = getattr(model, "peft_config", None) or {}
    active = None
    if configs:  # a property in PEFT; a method in transformers, which raises if transformers did not add the adapter
        active = getattr(model, "active_adapters", None) or getattr(model, "active_adapter", None)
        if callable(active):
            active = active() if getattr(model, "_hf_peft_config_loaded", True) else None
    names = [active] if isinstance(active, str) else list(active or configs)
    adapters = [(name, configs[name]) for name in names if isinstance(configs.get(name), FGGMConfig)]
    if not adapters:
        raise _no_adapter("active FGGM adapter")
    return adapters


def _no_adapter(what: str) -> ValueError:
    return ValueError(f"the model has no {what}; wrap it with get_peft_model(model, FGGMConfig(...)) first")
