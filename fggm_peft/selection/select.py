"""``select_parameters``: Fisher pass -> scores -> threshold policy -> support.

Nothing in the model changes before everything has been chosen; an error leaves it as it was.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import nn

from ..core.criteria import CRITERIA
from ..core.errors import AlreadyTrainedError
from ..tuner.config import FGGMConfig
from ..tuner.files.task_scores import TaskRecord, remember
from ..tuner.layer import FGGMLayer
from ..tuner.settings.selection import require_num_samples, require_protection
from ..tuner.support import fggm_layers, forecast_supports, unwrapped, write_supports
from ..tuner.target import Target, find_targets
from ..version import __version__
from .agreement import split_half_agreement
from .data_pass import FisherPass
from .likelihood import LogLikelihood
from .processes import Ranks, digest
from .protection import Protection, earlier_supports
from .reference import ReferenceData, find_reference
from .report import ModuleSelection, SelectionReport
from .scoring import MAX_SAMPLES, Chooser, Outcome, costs

__all__ = ["MAX_SAMPLES", "active_adapter", "active_adapters", "select_parameters"]


@torch.inference_mode(False)  # the values made here must train
def select_parameters(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    num_samples: int | Literal["auto", "config"] | None = "config",
    *,
    reference: ReferenceData = None,
    protect: Sequence[str] | None = None,
    protection: float | None = None,
    adapter_name: str | None = None,
    log_likelihood: LogLikelihood | None = None,
    score_memory: int | str | None = None,
    reset: bool = False,
    progress: bool = True,
) -> SelectionReport:
    """Choose which weights of an FGGM adapter may move (FGGM, arXiv 2601.18261, section 3).

    The base stays frozen, and quantized if it is; the model is left as it was but for the adapter's
    supports. What to choose is on the adapter's ``FGGMConfig``. Wrap the model for several devices afterwards:
    the trainable values get their sizes here.

    Where ``torch.distributed`` is initialised, every rank calls this with its own share of the data. Scores are
    summed over ranks, so all ranks choose the same, and the same as one process would from all of it.

    Args:
        model: what ``get_peft_model`` returned, or a model with injected FGGM layers.
        dataloader: an iterable of batches of the task: dicts as the model takes them, with ``labels``
            (-100 where no loss is taken). May be None for a criterion that needs no data.
        num_samples: how many samples to use, over all ranks: a number, None for all, or "auto": from 32 to
            1024, doubling, until two halves of the samples would choose alike (agreement 0.8). By
            default what the config says, "auto" if nothing.
        reference: what the model should keep, for a criterion that weighs the task against it; by default the
            config's. A dataloader of general text (batches without labels get their own tokens for labels), "self"
            (text that the model writes itself), "history" (the tasks selected on this base model in this process), a
            file or folder of saved scores of an earlier task, or a list of these, which are put in proportion and
            added. As many of its samples are used as ``num_samples`` says.
        protect: earlier deltas whose entries should stay: folders, Hub ids, names of adapters on the model, or
            "history"; by default the config's.
        protection: how strongly, in [0, 1]: 1 forbids them, less scales scores by ``1 - protection``; by default
            the config's.
        adapter_name: by default the active adapter.
        log_likelihood: a function of (model, batch) that returns the log-likelihood of each sample ``[b]``,
            summed over its answer; by default what fits a causal or sequence-to-sequence language
            model, a sequence or a token classifier.
        score_memory: bound on the bytes that running scores take (an int or "8GiB"), by default the config's.
            Element scores take 8 bytes an entry (two halves); beyond the bound the data is passed over
            several times.
        reset: choose anew although the adapter holds trained values, which are lost.
        progress: show a progress bar, if standard error is a terminal.

    Returns:
        What was chosen; it prints as a table.

    Raises:
        AdapterFileError: a delta to protect is damaged or was made for another base.
        AlreadyTrainedError: the adapter holds trained values and ``reset`` is False.
        NonFiniteScoreError: a loss or a score is NaN or infinite.
        RuntimeError: another rank failed, or differs in versions, config or model.
        ScoreFileError: saved scores are damaged or do not fit.
        ValueError: no FGGM adapter, a merged one, no data, no labels, no reference where one is needed, less left than
            is to be chosen, or another bad argument.
    """
    start = time.perf_counter()
    adapter_name, config = active_adapter(model, adapter_name)
    num_samples = config.num_samples if num_samples == "config" else num_samples
    score_memory = config.score_memory if score_memory is None else score_memory
    require_num_samples(num_samples)
    criterion = CRITERIA[config.criterion]
    if criterion.needs_data and dataloader is None:
        raise ValueError(f"criterion {config.criterion!r} needs data: pass a dataloader to select_parameters")
    data = [] if dataloader is None else dataloader
    task = FisherPass(model, config, adapter_name, data, log_likelihood, progress, Ranks(), criterion.task)
    with _without_compiling():
        chooser = prepare(task, reference, protect, protection, reset)
        outcome = chooser.from_data(task, num_samples, score_memory) if criterion.needs_data else chooser.without_data()
    return settle(task, chooser, outcome, start)


def _without_compiling() -> AbstractContextManager[Any]:
    """Within it, what is compiled runs as it was written.

    Dynamo would compile it again for every layer's hooks, up to its limit, and then leave it alone for good: also when
    it is trained. A torch before 2.6 cannot be told.
    """
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


def prepare(
    task: FisherPass,
    reference: ReferenceData = None,
    protect: Sequence[str] | None = None,
    protection: float | None = None,
    reset: bool = False,
) -> Chooser:
    """Whatever can be checked before a pass, on all ranks; the arguments and errors are ``select_parameters``'s."""
    config, adapter_name, ranks = task.config, task.adapter_name, task.ranks
    layers = fggm_layers(task.model, adapter_name)
    with ranks.together("select_parameters"):
        _check_selectable(layers, adapter_name, reset)
        forecast_supports(find_targets(task.model, adapter_name), config)  # raises if the budget cannot be spent
    _require_same_setting(ranks, layers, config)
    protect = (config.protect if protect is None else protect) or []
    protection = config.protection if protection is None else protection
    require_protection(protection)
    with ranks.together("select_parameters"):
        earlier = earlier_supports(task.model, config, adapter_name, protect)
        guard = Protection(layers, adapter_name, protection, earlier)
        guard.require_enough(config)
        kept = find_reference(reference, layers, task)
    passes = {"the number of references": 0 if kept is None else len(kept.live)}
    ranks.require_same("their setting", passes, "Give every process a dataloader with its share of each.")
    return Chooser(layers, config, adapter_name, guard, kept)


def settle(task: FisherPass, chooser: Chooser, outcome: Outcome, start: float) -> SelectionReport:
    """Give the adapter what was chosen; nothing in the model has changed before.

    Args:
        start: of the selection, by ``time.perf_counter``.

    Raises:
        RuntimeError: the ranks chose differently.
        ValueError: nothing was chosen.
    """
    config, adapter_name, layers = task.config, task.adapter_name, chooser.layers
    if not any(len(choice.indices) for choice in outcome.choices.values()):
        raise ValueError(f"the threshold {config.policy()} chooses nothing in any module, so nothing could train")
    chosen = digest({name: choice.indices for name, choice in outcome.choices.items()})
    task.ranks.require_same("what they chose", {"support": chosen}, "Please report this; nothing has been changed.")
    write_supports({name: Target(name, layer, adapter_name) for name, layer in layers.items()}, config, outcome.choices)
    supports = {name: choice.indices for name, choice in outcome.choices.items()}
    base = config.base_model_name_or_path or ""
    record = TaskRecord(config.granularity.to_dict(), outcome.samples, base, outcome.scores, supports)
    remember(unwrapped(task.model), config, record)
    report = _report(layers, config, adapter_name, outcome, record, time.perf_counter() - start)
    config.selection = report.summary()
    _warn_of_empty(report, outcome)
    return report


def _warn_of_empty(report: SelectionReport, outcome: Outcome) -> None:
    zero = [name for name, choice in outcome.choices.items() if choice.is_zero]
    low = [name for name in report.empty_modules if name not in zero]
    for names, why in (
        (zero, "every score there is 0, which no threshold chooses; one of scope='global' spends its share elsewhere"),
        (low, "their scores are below the threshold"),
    ):
        if names:
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            warnings.warn(
                f"nothing was chosen in {len(names)} of {len(report.modules)} modules ({listed}): {why}", stacklevel=4
            )


def active_adapter(model: nn.Module, name: str | None) -> tuple[str, FGGMConfig]:
    """An FGGM adapter of the model, the first active one if no name is given, and its config.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        return active_adapters(model)[0]
    config = (getattr(model, "peft_config", None) or {}).get(name)
    if not isinstance(config, FGGMConfig):
        raise _no_adapter(f"FGGM adapter named {name!r}")
    return name, config


def active_adapters(model: nn.Module) -> list[tuple[str, FGGMConfig]]:
    """The active FGGM adapters of the model, at least one, and their configs.

    Raises:
        ValueError: there is none.
    """
    configs = getattr(model, "peft_config", None) or {}
    active = None
    if configs:  # a property of PEFT's; a method of transformers' models, which raises for what it has not put in
        active = getattr(model, "active_adapters", None) or getattr(model, "active_adapter", None)
        if callable(active):
            active = active() if getattr(model, "_hf_peft_config_loaded", True) else None
    names = [active] if isinstance(active, str) else list(active or configs)
    found = [(name, configs[name]) for name in names if isinstance(configs.get(name), FGGMConfig)]
    if not found:
        raise _no_adapter("active FGGM adapter")
    return found


def _no_adapter(what: str) -> ValueError:
    return ValueError(f"the model has no {what}; wrap it with get_peft_model(model, FGGMConfig(...)) first")


def _require_same_setting(ranks: Ranks, layers: Mapping[str, FGGMLayer], config: FGGMConfig) -> None:
    if ranks.size == 1:
        return
    setting: dict[str, Any] = {f"the version of {name}": version(name) for name in ("peft", "torch", "transformers")}
    setting["the version of fggm_peft"] = __version__
    said = {name: value for name, value in config.to_dict().items() if name != "base_fingerprint"}  # some hold shards
    setting |= {f"the config's {name}": value for name, value in said.items()}
    setting |= {f"the shape of {name}": tuple(layer.weight_shape) for name, layer in layers.items()}
    ranks.require_same("their setting", setting, "Start every process with the same code, model and config.")


def _check_selectable(layers: Mapping[str, FGGMLayer], adapter_name: str, reset: bool) -> None:
    if not layers:
        raise ValueError(f"no module of the model has the adapter {adapter_name!r}")
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged ({name}); call unmerge_adapter() first")
        if not reset and layer.fggm_values[adapter_name].count_nonzero():
            raise AlreadyTrainedError(
                f"adapter {adapter_name!r} holds trained values ({name}), which selecting again would throw away. "
                "Pass reset=True if that is meant, or add a new adapter."
            )


def _report(layers, config, adapter_name, outcome: Outcome, record: TaskRecord, seconds: float) -> SelectionReport:
    agreement: float | None = None
    module_agreement: dict[str, float | None] = {}
    if outcome.halves[0]:
        agreement, module_agreement = split_half_agreement(*outcome.halves, costs(layers, adapter_name))
    modules = [
        ModuleSelection(
            name=name,
            shape=tuple(layer.weight_shape),
            units=outcome.choices[name].units,
            chosen=len(outcome.choices[name].indices),
            parameters=sum(parameter.numel() for parameter in layer.trained(adapter_name)),
            score_share=outcome.choices[name].score_share,
            agreement=module_agreement.get(name),
            mean_score=outcome.mean_scores[name],
        )
        for name, layer in layers.items()
    ]
    return SelectionReport(
        granularity=str(config.granularity),
        criterion=config.criterion,
        threshold=config.policy().to_dict(),
        samples=outcome.samples,
        agreement=agreement,
        seconds=seconds,
        modules=modules,
        reference_samples=outcome.reference_samples,
        reference_seconds=outcome.reference_seconds,
        num_samples=outcome.num_samples,
        sample_passes=outcome.sample_passes,
        backward=bool(outcome.sample_passes) and CRITERIA[config.criterion].needs_backward,
        checks=outcome.checks,
        record=record,
    )
