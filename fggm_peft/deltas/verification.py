"""Checks an adapter without loading it: its tensors, the numbers in its config, and its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import AdapterFileError, BaseMismatchError
from ..core.index_codec import entropy_bytes
from ..tuner.files.base_check import base_difference
from ..tuner.files.reading import adapted_layers, find_adapter
from .base_model import Base, load_base
from .delta import from_file


def verify(adapter: str | Path, base: Base | None = None, **hub: Any) -> dict[str, Any]:
    """Run all checks of loading an adapter without a model to load it into.

    Args:
        adapter: a folder or a Hub id.
        base: the base model, or its folder or Hub id. If given, the adapter must have been made on it.
        hub: ``revision``, ``token``, ``subfolder`` and similar arguments, for a Hub id.

    Returns:
        A description in plain types. ``parameters`` is the number of values, ``density`` their share of the weights'
        entries, ``bytes`` the size of the file, and ``bound_bytes`` its lower bound: the entropy of the indices and the
        bytes of the values. ``is_zero``: the adapter is not trained. ``other_keys``: tensors that belong to no delta.

    Raises:
        AdapterFileError: a file is wrong; names the file and the tensor.
        BaseMismatchError: the adapter was made on another base; names the first module that differs.
        ValueError: the adapter belongs to another method.
    """
    config, file = find_adapter(adapter, **hub)
    delta = from_file(config, file)
    modules = delta.modules
    if base is not None:
        layers = adapted_layers(load_base(base, config), {path: m.shape for path, m in modules.items()}, str(adapter))
        if problem := base_difference(layers, config.base_fingerprint or {}):
            raise BaseMismatchError(f"the adapter was made for another base: {problem}")
    dtypes = sorted({str(module.values.dtype).removeprefix("torch.") for module in modules.values()})
    if config.delta_dtype is not None and dtypes and dtypes != [config.delta_dtype]:
        raise AdapterFileError(f"{file}: values are {', '.join(dtypes)}, not delta_dtype={config.delta_dtype}")
    entropy = sum(entropy_bytes(len(m.indices), m.granularity.units(m.shape)) for m in modules.values())
    return {
        "adapter": str(adapter),
        "base_model": config.base_model_name_or_path,
        "base": "not checked" if base is None else "matches",
        "format": config.fggm_format,
        "granularity": str(delta.granularity),
        "criterion": config.criterion,
        "dtypes": dtypes,
        "modules": len(modules),
        "parameters": delta.parameters,
        "density": delta.density,
        "bytes": file.stat().st_size,
        "bound_bytes": round(entropy) + sum(module.values.nbytes for module in modules.values()),
        "is_zero": not any(bool(module.values.any()) for module in modules.values()),
        "made_with": config.made_with or {},
        "other_keys": list(delta.others),
    }
