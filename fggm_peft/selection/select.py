"""``select_parameters``: Fisher pass -> scores -> threshold policy -> support.

Nothing in the model changes before everything has been chosen; an error leaves it as it was.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.criteria import CRITERIA
from ..core.errors import AlreadyTrainedError
from ..tuner.config import FGGMConfig, require_num_samples, score_bytes
from ..tuner.layer import FGGMLayer
from ..tuner.support import (
    Choice,
    choose_supports,
    criterion_scores,
    fggm_layers,
    forecast_supports,
    write_supports,
)
from ..version import __version__
from .agreement import split_half_agreement
from .fisher_pass import Counts, FisherPass
from .log_likelihood import LogLikelihood
from .ranks import Ranks, digest
from .report import ModuleSelection, SelectionReport

MIN_SAMPLES = 32
MAX_SAMPLES = 1024
SUFFICIENT_AGREEMENT = 0.95


@torch.inference_mode(False)  # the values made here must train
def select_parameters(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    num_samples: int | Literal["auto", "config"] | None = "config",
    *,
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
            1024, doubling, until two halves of the samples would choose the same (agreement 0.95). By
            default what the config says, "auto" if nothing.
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
        AlreadyTrainedError: the adapter holds trained values and ``reset`` is False.
        NonFiniteScoreError: a loss or a score is NaN or infinite.
        RuntimeError: another rank failed, or differs in versions, config or model.
        ValueError: no FGGM adapter, a merged one, no data, no labels, or another bad argument.
    """
    start = time.perf_counter()
    adapter_name, config = active_adapter(model, adapter_name)
    layers = fggm_layers(model, adapter_name)
    num_samples = config.num_samples if num_samples == "config" else num_samples
    score_memory = config.score_memory if score_memory is None else score_memory
    require_num_samples(num_samples)
    ranks = Ranks()
    with ranks.together("select_parameters"):
        _check_selectable(layers, adapter_name, reset)
        forecast_supports(layers, config, adapter_name)  # a budget that cannot be spent is better known at once
    _require_same_setting(ranks, layers, config)
    criterion = CRITERIA[config.criterion]
    if criterion.needs_data:
        if dataloader is None:
            raise ValueError(f"criterion {config.criterion!r} needs data: pass a dataloader to select_parameters")
        fisher_pass = FisherPass(model, config, adapter_name, dataloader, log_likelihood, progress, ranks)
        outcome = _choose_from_data(fisher_pass, layers, config, adapter_name, num_samples, score_memory)
    else:
        outcome = _Outcome(_choose(layers, config, adapter_name, None), ({}, {}), 0)
    if not any(len(choice.indices) for choice in outcome.choices.values()):
        raise ValueError(f"the threshold {config.policy()} chooses nothing in any module, so nothing could train")
    chosen = digest({name: choice.indices for name, choice in outcome.choices.items()})
    ranks.require_same("what they chose", {"support": chosen}, "Please report this; nothing has been changed.")
    write_supports(layers, config, adapter_name, outcome.choices)
    report = _report(layers, config, adapter_name, outcome, time.perf_counter() - start)
    config.selection = report.summary()
    if report.empty_modules:
        names = ", ".join(report.empty_modules[:3]) + (", ..." if len(report.empty_modules) > 3 else "")
        warnings.warn(
            f"nothing was chosen in {len(report.empty_modules)} of {len(layers)} modules ({names}): their scores "
            "are 0 or below the threshold",
            stacklevel=2,
        )
    return report


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
    if configs:  # a method of transformers' models, which raises without adapters; a property of PEFT's
        active = getattr(model, "active_adapters", None) or getattr(model, "active_adapter", None)
        active = active() if callable(active) else active
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
    setting |= {f"the config's {name}": value for name, value in config.to_dict().items()}
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


def _choose(layers, config, adapter_name, fisher: Callable[[str], Tensor] | None) -> dict[str, Choice]:
    def scores(name: str) -> Tensor:
        values = None if fisher is None else fisher(name)
        return criterion_scores(layers[name], name, config, adapter_name, values)

    return choose_supports(layers, config, adapter_name, scores)


@dataclass(frozen=True)
class _Outcome:
    """What the data chose: from all samples, and from each half of them."""

    choices: dict[str, Choice]
    halves: tuple[dict[str, Choice], dict[str, Choice]]
    samples: int


def _choose_from_data(fisher_pass, layers, config, adapter_name, num_samples, score_memory) -> _Outcome:
    groups = _groups(layers, config, adapter_name, score_memory)
    if len(groups) > 1:
        fisher_pass.require_repeatable(len(groups))
    total = _Outcome({}, ({}, {}), 0)
    for number, group in enumerate(groups):
        suffix = f" {number + 1}/{len(groups)}" if len(groups) > 1 else ""
        part = _choose_group(fisher_pass, group, config, adapter_name, num_samples, "Fisher pass" + suffix)
        if isinstance(num_samples, int) and part.samples < num_samples:
            warnings.warn(f"num_samples={num_samples}, but the data has {part.samples}; all were used", stacklevel=3)
        num_samples = part.samples  # every group of modules sees the same samples
        for seen, new in zip((total.choices, *total.halves), (part.choices, *part.halves), strict=True):
            seen.update(new)
        total = replace(total, samples=part.samples)
    return total


def _choose_group(fisher_pass, group, config, adapter_name, num_samples, description) -> _Outcome:
    costs = _costs(group, adapter_name)

    def halves(scores: Callable[[str], Tensor], counts: Counts) -> tuple[dict[str, Choice], dict[str, Choice]]:
        first = _choose(group, config, adapter_name, lambda name: scores(name)[0] / counts[0])
        second = _choose(group, config, adapter_name, lambda name: scores(name)[1] / counts[1])
        return first, second

    def enough(scores: Callable[[str], Tensor], counts: Counts) -> bool:
        agreement, _ = split_half_agreement(*halves(scores, counts), costs)
        return agreement is None or agreement >= SUFFICIENT_AGREEMENT

    automatic = num_samples == "auto"
    scores, counts = fisher_pass.run(
        group,
        limit=MAX_SAMPLES if automatic else num_samples,
        enough=enough if automatic else None,
        first_check=MIN_SAMPLES,
        description=description,
    )
    samples = sum(counts)

    def mean(name: str) -> Tensor:
        return scores[name].sum(0) / samples

    choices = _choose(group, config, adapter_name, mean)
    return _Outcome(choices, halves(scores.__getitem__, counts) if min(counts) else ({}, {}), samples)


def _costs(layers: Mapping[str, FGGMLayer], adapter_name: str) -> dict[str, int]:
    """Module path -> how many weight entries one of its units holds."""
    return {
        name: layer.granularity[adapter_name].parameters_per_unit(layer.weight_shape) for name, layer in layers.items()
    }


def _groups(layers, config: FGGMConfig, adapter_name: str, score_memory) -> list[dict[str, FGGMLayer]]:
    """The modules whose running scores fit into ``score_memory`` together, group by group."""
    if score_memory is None:
        return [dict(layers)]
    bound = score_bytes(score_memory)
    groups: list[dict[str, FGGMLayer]] = []
    filled = bound + 1
    for name, layer in layers.items():
        size = 2 * 4 * layer.granularity[adapter_name].units(layer.weight_shape)
        if size > bound:
            raise ValueError(
                f"score_memory={score_memory!r} is too small: the scores of {name} alone take {size} bytes"
            )
        if filled + size > bound:
            groups.append({})
            filled = 0
        groups[-1][name] = layer
        filled += size
    if len(groups) > 1 and any(config.policy(name).scope == "global" for name in layers):
        raise ValueError(
            f"a threshold of global scope needs the scores of all modules at once, which score_memory={score_memory!r} "
            "does not hold. Raise it, or use scope='layer'."
        )
    return groups


def _report(layers, config, adapter_name, outcome: _Outcome, seconds: float) -> SelectionReport:
    agreement: float | None = None
    module_agreement: dict[str, float | None] = {}
    if outcome.halves[0]:
        agreement, module_agreement = split_half_agreement(*outcome.halves, _costs(layers, adapter_name))
    modules = [
        ModuleSelection(
            name=name,
            shape=tuple(layer.weight_shape),
            units=outcome.choices[name].units,
            chosen=len(outcome.choices[name].indices),
            parameters=sum(parameter.numel() for parameter in layer.trained(adapter_name)),
            score_share=outcome.choices[name].score_share,
            agreement=module_agreement.get(name),
        )
        for name, layer in layers.items()
    ]
    return SelectionReport(
        granularity=config.granularity,
        criterion=config.criterion,
        threshold=config.policy().to_dict(),
        samples=outcome.samples,
        agreement=agreement,
        seconds=seconds,
        modules=modules,
    )
