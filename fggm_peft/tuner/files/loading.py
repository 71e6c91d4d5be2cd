"""Checks a file's tensors against the model, then makes room for them.

Adapters come from strangers: every key, shape, dtype, index and value is checked before anything in the
model changes.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...core.errors import AdapterFileError
from ..config import FGGMConfig
from ..hosts.sharding import plain_name
from ..layer import FGGMLayer
from ..several.padding import fill_up_
from ..support import fggm_layers
from .base_check import require_base
from .tensors import MARK, PARTS, PREFIX, StoredModule


def fit_layers_to_state_dict(
    model: nn.Module, config: FGGMConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Resize the adapter's values and indices to those of a file that is about to be loaded.

    Args:
        model: has the adapter's layers.
        config: says how the values are stored, and which base they were made on.
        state_dict: keys as the model has them, adapter name included; changed in place: indices are decoded, and
            tensors that wrappers or DeepSpeed leave out are added.

    Raises:
        AdapterFileError: a tensor is missing, or does not fit; names its key. Nothing has changed then.
        BaseMismatchError: the model is not the base that the adapter was made on.
    """
    require_base(fggm_layers(model, adapter_name), config)
    fitting: dict[FGGMLayer, dict[str, Tensor]] = {}
    names: dict[FGGMLayer, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, FGGMLayer) or adapter_name not in layer.fggm_values:
            continue
        name = plain_name(name)
        stored = _taken(state_dict, name, layer, adapter_name)
        if not stored.tensors:
            continue  # PEFT reports keys that are missing altogether
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} is merged ({name}); call unmerge_adapter() before loading over it"
            )
        fitting[layer], names[layer] = _checked(layer, config, adapter_name, stored), name
    _require_known_keys(model, state_dict)
    selected = any(len(tensors["indices"]) for tensors in fitting.values())
    for layer, tensors in fitting.items():
        state_dict |= {f"{names[layer]}.fggm_{part}.{adapter_name}": tensor for part, tensor in tensors.items()}
        if (room := layer.room.get(adapter_name)) is not None:
            fill_up_(state_dict, names[layer], layer, adapter_name, room)
        layer.resize_(adapter_name, len(tensors["indices"]) if room is None else room, tensors["values"].dtype)
        layer.selected[adapter_name] = selected
        layer.fggm_indices.settle(adapter_name)
        layer.freeze_empty_()


def _taken(state_dict: dict[str, Tensor], name: str, layer: FGGMLayer, adapter_name: str) -> StoredModule:
    """Take the tensors of one layer out of ``state_dict``, with what saving on several devices leaves out."""
    tensors = {}
    for part in PARTS:
        # PEFT adds the adapter's name by the names of modules, and misses parts that are encoded and those within
        # torch's checkpoint_wrapper; a model that is no PeftModel has no prefix
        for key in (f"{name}.fggm_{part}.{adapter_name}", f"{name}.fggm_{part}", f"{PREFIX}{name}.fggm_{part}"):
            if key in state_dict:
                tensors[part] = state_dict.pop(key)
    indices = tensors.get("indices")
    if indices is not None and not indices.numel():  # DeepSpeed saves nothing frozen, and empty values are
        values = layer.fggm_values[adapter_name].detach()
        shape = layer.granularity[adapter_name].values_shape(layer.weight_shape, 0)
        tensors.setdefault("values", values.new_zeros(shape))
        if adapter_name in layer.fggm_bias:
            tensors.setdefault("bias", values.new_zeros(0))
    return StoredModule(tensors, f"{name}.fggm_", f".{adapter_name}")


def _checked(layer: FGGMLayer, config: FGGMConfig, adapter_name: str, stored: StoredModule) -> dict[str, Tensor]:
    """``indices``, ``values`` and perhaps ``bias`` as the layer takes them."""
    granularity = layer.granularity[adapter_name]
    tensors = stored.checked(granularity, layer.weight_shape)
    k = len(tensors["indices"])
    if k > layer.room.get(adapter_name, k):
        raise AdapterFileError(
            f"{stored.where}indices{stored.suffix}: {k} units do not fit the room for {layer.room[adapter_name]} that "
            "prepare_model_for_compiled_hotswap has made; give it a higher density"
        )
    wanted = adapter_name in layer.fggm_bias
    problem = "bias entries are " + ("missing" if wanted else "unexpected")
    stored.require("bias", wanted == ("bias" in tensors), problem)
    dtype = layer.fggm_values[adapter_name].dtype
    index_type = layer.fggm_indices[adapter_name].dtype
    found = {part: tensor.to(dtype) for part, tensor in tensors.items() if part != "indices"}
    return {"indices": tensors["indices"].to(stored.tensors["values"].device, index_type), **found}


def _require_known_keys(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Raise for a tensor that no layer has taken and the model has no place for."""
    strange = [key for key in state_dict if MARK in key and key.rpartition(MARK)[2].partition(".")[0] in PARTS]
    if strange:
        raise AdapterFileError(
            f"{strange[0]}: the model has no such layer with this adapter. The file was made for another base model, "
            "or for other target modules."
        )
    known = {plain_name(key).removeprefix(PREFIX) for key in model.state_dict()}
    strange = [key for key in state_dict if plain_name(key).removeprefix(PREFIX) not in known]
    if strange:
        raise AdapterFileError(f"{strange[0]}: unknown key. The file was made for another base model or is damaged.")
