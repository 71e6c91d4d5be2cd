"""How far an adapter moves the model: predicted from the statistics, and measured on data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..core.covariance import Covariance
from ..selection.frozen_model import frozen_in_eval_mode
from ..selection.likelihood import IGNORED
from ..selection.select import active_adapter
from ..tuner.files.input_covariance import InputCovariance, covariance_of
from ..tuner.target import Target, find_targets


def predicted_drift(
    model: nn.Module, covariance: InputCovariance | None = None, adapter_name: str | None = None
) -> dict[str, float]:
    """``E |V x|^2 / E |W x|^2`` of each layer: the relative change of its output on the data to retain.

    Args:
        model: a model with an FGGM adapter.
        covariance: of the data to retain; by default what the adapter was selected with.
        adapter_name: by default the active adapter.

    Returns:
        Module path -> drift. The key "" has the drift of all layers together.

    Raises:
        ValueError: the adapter has no statistics, for example because it was loaded from a file.
    """
    adapter_name, config = active_adapter(model, adapter_name)
    covariance = covariance_of(config) if covariance is None else covariance
    if covariance is None:
        raise ValueError(
            f"adapter {adapter_name!r} has no statistics of what the model should retain; pass the result of "
            "input_covariance"
        )
    drift, harms, outputs = {}, 0.0, 0.0
    for path, target in find_targets(model, adapter_name).items():
        harm, output = _harm_and_output(target, covariance[path].to(target.indices.device))
        drift[path] = harm / output if output else 0.0
        harms, outputs = harms + harm, outputs + output
    return {**drift, "": harms / outputs if outputs else 0.0}


@torch.no_grad()
def _harm_and_output(target: Target, covariance: Covariance) -> tuple[float, float]:
    """``E |V x|^2`` and ``E |W x|^2``."""
    decay = target.granularity.decay(covariance, target.indices, target.shape)
    weight = target.layer.weight_copy().float()
    output = (weight @ covariance.factor.to(weight)).square().sum() + covariance.floor * weight.square().sum()
    return float(decay.harm(target.values)) * target.scale**2, float(output)


@torch.no_grad()
def scale_to_budget_(
    model: nn.Module, harm_budget: float, covariance: InputCovariance | None = None, adapter_name: str | None = None
) -> float:
    """Scale an adapter's values down until its predicted drift is at most a budget; call it before a merge.

    The drift is quadratic in the scale, so no search is needed. Final checkpoints often overshoot (PEFT-Arena).

    Args:
        model: a model with an FGGM adapter.
        harm_budget: largest drift of all layers together, such as 0.01.
        covariance: of the data to retain; by default what the adapter was selected with.
        adapter_name: by default the active adapter.

    Returns:
        The factor, at most 1.

    Raises:
        ValueError: the budget is not positive, or the adapter has no statistics.
    """
    if not harm_budget > 0:
        raise ValueError(f"harm_budget must be a number > 0, got {harm_budget!r}")
    drift = predicted_drift(model, covariance, adapter_name)[""]
    factor = min(1.0, (harm_budget / drift) ** 0.5) if drift else 1.0
    if factor < 1:
        for target in find_targets(model, active_adapter(model, adapter_name)[0]).values():
            target.values.mul_(factor)
    return factor


def kl_divergence(
    model: Any, dataloader: Iterable[Mapping[str, Any]], num_batches: int | None = None, base: Any = None
) -> float:
    """``KL(base || model)`` in nats, the mean over the answer's tokens of the data.

    On the data of the task itself it predicts how much a model forgets (RL's Razor, arXiv 2509.04259).

    Args:
        model: a causal language model, with an adapter of any PEFT method unless ``base`` is given.
        dataloader: batches with labels; without labels, every token counts that is no padding.
        num_batches: number of batches that are read; None for all.
        base: the base model; by default ``model`` without its adapter.

    Raises:
        ValueError: no token has a label.
    """
    device = next(model.parameters()).device
    total = count = 0.0
    with frozen_in_eval_mode(model), torch.no_grad():
        for batch in islice(dataloader, num_batches):
            inputs = send_to_device(dict(batch), device)
            counted = _counted(inputs)
            inputs.pop("labels", None)
            tuned = model(**inputs).logits[:, :-1][counted].float().log_softmax(-1)
            with model.disable_adapter() if base is None else frozen_in_eval_mode(base):
                before = (base or model)(**inputs).logits[:, :-1][counted].float().log_softmax(-1)
            total += float((before.exp() * (before - tuned)).sum())
            count += int(counted.sum())
    if not count:
        raise ValueError("no token of the data has a label, so there is nothing to compare")
    return total / count


def _counted(batch: Mapping[str, Any]) -> Tensor:
    """``[b, t - 1]``: the positions whose next token counts."""
    if isinstance(batch.get("labels"), Tensor):
        return batch["labels"][:, 1:] != IGNORED
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask)[:, 1:] != 0
