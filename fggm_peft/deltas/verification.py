"""Checks an adapter without loading it: its tensors, the numbers in its config, and its base."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import AdapterFileError, BaseMismatchError
from ..core.fingerprint import sketches_from
from ..core.index_codec import entropy_bytes
from ..tuner.files.base_check import base_difference
from ..tuner.files.reading import adapted_layers, find_adapter, read_contents
from .base_model import load_base
from .delta import from_contents


@dataclass(frozen=True)
class Verification:
    """The properties of an adapter that has passed all checks.

    Args:
        base_model: name of the base in the config.
        base: "not checked", or "matches".
        format: version of the file format.
        dtypes: of the values.
        parameters: number of values.
        density: share of the adapted weights' entries.
        bytes: size of the file.
        bound_bytes: lower bound of the size: the entropy of the indices and the bytes of the values.
        is_zero: all values are zero, so the adapter is not trained.
        other_keys: tensors in the file that belong to no delta.
    """

    adapter: str
    base_model: str | None
    base: str
    format: int | None
    granularity: str
    criterion: str
    dtypes: list[str]
    modules: int
    parameters: int
    density: float
    bytes: int
    bound_bytes: int
    is_zero: bool
    made_with: dict[str, str]
    other_keys: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(adapter: str | Path, base: nn.Module | str | None = None, **hub: Any) -> Verification:
    """Run all checks of loading an adapter without a model to load it into.

    Args:
        adapter: a folder or a Hub id.
        base: the base model, or its folder or Hub id. If given, the adapter must have been made on it.
        hub: ``revision``, ``token``, ``subfolder`` and similar arguments, for a Hub id.

    Raises:
        AdapterFileError: a file is wrong; names the file and the tensor.
        BaseMismatchError: the adapter was made on another base; names the first module that differs.
        ValueError: the adapter belongs to another method.
    """
    model = load_base(base) if isinstance(base, str) else base
    config, file = find_adapter(adapter, **hub)
    if model is not None:
        shapes = {path: sketch.shape for path, sketch in sketches_from(config.base_fingerprint or {}).items()}
        layers = adapted_layers(model, shapes, str(adapter))
        if problem := base_difference(layers, config.base_fingerprint or {}):
            raise BaseMismatchError(f"the adapter was made for another base: {problem}")
    contents = read_contents(config, file)
    delta = from_contents(contents)
    modules = delta.modules
    dtypes = sorted({str(module.values.dtype)[6:] for module in modules.values()})
    if config.delta_dtype is not None and dtypes and dtypes != [config.delta_dtype]:
        raise AdapterFileError(f"{file}: values are {', '.join(dtypes)}, not delta_dtype={config.delta_dtype}")
    entropy = sum(entropy_bytes(len(m.indices), m.granularity.units(m.shape)) for m in modules.values())
    return Verification(
        adapter=str(adapter),
        base_model=config.base_model_name_or_path,
        base="not checked" if model is None else "matches",
        format=config.fggm_format,
        granularity=str(delta.granularity),
        criterion=config.criterion,
        dtypes=dtypes,
        modules=len(modules),
        parameters=delta.parameters,
        density=delta.density,
        bytes=file.stat().st_size,
        bound_bytes=round(entropy) + sum(module.values.nbytes for module in modules.values()),
        is_zero=not any(bool(module.values.any()) for module in modules.values()),
        made_with=config.made_with or {},
        other_keys=list(contents.others),
    )
