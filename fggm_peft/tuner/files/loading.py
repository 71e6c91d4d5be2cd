"""Checks a file's tensors against the model, then resizes the adapter to them.

Adapters may come from strangers: every key, shape, dtype, index and value is checked before the model changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...core.index_codec import decode_indices
from ..adapter_state import AdapterState
from ..config import FGGMConfig
from ..hosts.sharding import is_shard, path_in_base, require_resizable, state_prefix
from ..target import Target, Targets, find_targets
from .base_check import require_base
from .indices import entry_within
from .tensors import MARK, PARTS, PREFIX, checked_delta, file_error, split_key

Delta = dict[str, Tensor]


def fit_layers_to_state_dict(
    model: nn.Module, config: FGGMConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Resize an adapter's values and indices to those of a file that is about to be loaded.

    Indices are decoded in ``state_dict``, and tensors that DeepSpeed leaves out are added to it.

    Raises:
        AdapterFileError: a tensor is missing or does not fit; names its key. Nothing has changed then.
        BaseMismatchError: the model is not the base that the adapter was made on.
    """
    targets, prefix = find_targets(model, adapter_name), state_prefix(model)
    require_base({path: target.layer for path, target in targets.items()}, config)
    checked: dict[str, Delta] = {}
    for path, target in targets.items():
        tensors = _take(state_dict, prefix + path, target)
        if not tensors:
            continue
        if target.is_merged:
            raise ValueError(
                f"adapter {adapter_name!r} is merged ({path}); call unmerge_adapter() before you load another over it"
            )
        delta = checked_delta(tensors, target.granularity, target.shape, f"{path}{MARK}")
        values = delta["values"].to(target.values.dtype)
        checked[path] = {"indices": delta["indices"].to(values.device, target.layer.index_dtype), "values": values}
    _require_sizes(config, checked, targets)
    keys = {path_in_base(key): key for key in model.state_dict()}
    for key in state_dict:
        if split_key(key.removesuffix(f".{adapter_name}")) or path_in_base(key) not in keys:
            raise file_error(key, "unknown key: the model has no such layer with this adapter")
    for key in list(state_dict):  # a compiled base has other keys than the file
        state_dict[keys[path_in_base(key)]] = state_dict.pop(key)
    for path, tensors in checked.items():
        state_dict |= {keys[f"{path}{MARK}{part}.{adapter_name}"]: tensor for part, tensor in tensors.items()}
    _resize_(model, targets, checked)
    config.support_sizes = config.index_bytes = None


def fit_layers_to_model_state(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Resize the adapters of a model to those in a state dict of the whole model; a hook of ``load_state_dict``."""
    keys = {path_in_base(key.removeprefix(prefix)): key for key in state_dict if MARK in key}
    names = {name for layer in model.modules() if isinstance(layer, AdapterState) for name in layer.fggm_values}
    for name in names:
        targets = find_targets(model, name)
        arriving = {path: _take_decoded(state_dict, keys, target) for path, target in targets.items()}
        _resize_(model, targets, {path: delta for path, delta in arriving.items() if delta})


def _take_decoded(state_dict: dict[str, Tensor], keys: Mapping[str, str], target: Target) -> Delta:
    """The tensors of a target in the state dict of a model, where its indices become plain; empty if it has none."""
    names = {part: keys.get(f"{target.path}{MARK}{part}.{target.adapter_name}", "") for part in PARTS}
    delta = {part: state_dict[key] for part, key in names.items() if key}
    dim = target.granularity.unit_dim
    if delta.keys() != set(PARTS) or is_shard(delta["values"]) or is_shard(target.values):
        return {}  # the support was loaded before the model was sharded
    if delta["values"].dim() <= dim:
        return {}
    try:
        indices = decode_indices(delta["indices"], delta["values"].shape[dim], target.units)
    except ValueError as error:
        raise file_error(names["indices"], str(error)) from error
    state_dict[names["indices"]] = indices
    return {**delta, "indices": indices}


def _resize_(model: nn.Module, targets: Targets, tensors: Mapping[str, Delta]) -> None:
    """Resize the layers to the tensors that are about to be loaded into them."""
    if any(delta["values"].shape != targets[path].values.shape for path, delta in tensors.items()):
        require_resizable(model)
    is_selected = any(len(delta["indices"]) for delta in tensors.values())
    for path, delta in tensors.items():
        name, layer = targets[path].adapter_name, targets[path].layer
        layer.resize_(name, len(delta["indices"]))
        layer.selected[name] = is_selected
        layer.freeze_empty_()


def _take(state_dict: dict[str, Tensor], name: str, target: Target) -> dict[str, Tensor]:
    """Remove the tensors of one layer from ``state_dict``, and add those that sharded saving leaves out."""
    tensors = {}
    for part in PARTS:
        # PEFT inserts the adapter's name by module names. It misses modules inside torch's checkpoint_wrapper. A model
        # that is not a PeftModel has no prefix.
        for key in (f"{name}{MARK}{part}.{target.adapter_name}", f"{name}{MARK}{part}", f"{PREFIX}{name}{MARK}{part}"):
            if key in state_dict:
                tensors[part] = state_dict.pop(key)
    indices = tensors.get("indices")
    if indices is not None and not indices.numel():  # DeepSpeed does not save frozen parameters, so no empty values
        tensors = {**target.layer.empty_tensors(target.adapter_name), **tensors}
    return tensors


def _require_sizes(config: FGGMConfig, deltas: Mapping[str, Delta], targets: Targets) -> None:
    """Raise unless the tensors have the sizes that the config was saved with."""
    for path in targets:
        expected = entry_within(config.support_sizes or {}, path)
        actual = len(deltas[path]["indices"]) if path in deltas else None
        if expected is not None and actual != expected:
            found = "is missing" if actual is None else f"has {actual} units"
            raise file_error(f"{path}{MARK}indices", f"{found}, but support_sizes in the config has {expected!r:.80}")
