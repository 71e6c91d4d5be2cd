"""Checks a file's tensors against the model, then resizes the adapter to them.

Adapters may come from strangers: every key, shape, dtype, index and value is checked before the model changes.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...core.errors import AdapterFileError
from ...core.index_codec import index_dtype
from ..config import FGGMConfig
from ..hosts.sharding import plain_name, state_prefix
from ..target import Target, find_targets
from .base_check import require_base
from .tensors import MARK, PARTS, PREFIX, checked_delta, split_key


def fit_layers_to_state_dict(
    model: nn.Module, config: FGGMConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Resize an adapter's values and indices to those of a file that is about to be loaded.

    Indices are decoded in ``state_dict``, and tensors that wrappers or DeepSpeed leave out are added to it.

    Raises:
        AdapterFileError: a tensor is missing or does not fit; names its key. Nothing has changed then.
        BaseMismatchError: the model is not the base that the adapter was made on.
    """
    targets, prefix = find_targets(model, adapter_name), state_prefix(model)
    require_base({path: target.layer for path, target in targets.items()}, config)
    checked: dict[str, dict[str, Tensor]] = {}
    for path, target in targets.items():
        tensors = _take(state_dict, prefix + path, target)
        if not tensors:
            continue  # PEFT reports missing keys
        if target.is_merged:
            raise ValueError(
                f"adapter {adapter_name!r} is merged ({path}); call unmerge_adapter() before you load another over it"
            )
        checked[path] = _checked(tensors, target)
    _require_known_keys(model, adapter_name, state_dict)
    is_selected = any(len(tensors["indices"]) for tensors in checked.values())
    for path, tensors in checked.items():
        layer = targets[path].layer
        state_dict |= {f"{prefix}{path}{MARK}{part}.{adapter_name}": tensor for part, tensor in tensors.items()}
        layer.fggm_indices.settle(adapter_name)
        layer.resize_(adapter_name, len(tensors["indices"]), tensors["values"].dtype)
        layer.selected[adapter_name] = is_selected
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


def _checked(tensors: dict[str, Tensor], target: Target) -> dict[str, Tensor]:
    """``indices`` and ``values`` with the dtypes of the layer."""
    checked = checked_delta(tensors, target.granularity, target.shape, f"{target.path}{MARK}")
    values = checked["values"].to(target.values.dtype)
    indices = checked["indices"].to(values.device, index_dtype(target.shape[0] * target.shape[1]))
    return {"indices": indices, "values": values}


def _require_known_keys(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Raise for a tensor that belongs to no layer."""
    unknown = [key for key in state_dict if split_key(key.removesuffix(f".{adapter_name}"))]
    if unknown:
        raise AdapterFileError(
            f"{unknown[0]}: the model has no such layer with this adapter. The file was made for another base model "
            "or for other target modules."
        )
    known = {plain_name(key).removeprefix(PREFIX) for key in model.state_dict()}
    unknown = [key for key in state_dict if plain_name(key).removeprefix(PREFIX) not in known]
    if unknown:
        raise AdapterFileError(f"{unknown[0]}: unknown key. The file was made for another base model or is damaged.")
