"""Checks an adapter without loading it: its tensors, the numbers in its config, and its base."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from torch import nn

from ..core.errors import AdapterFileError
from ..core.fingerprint import sketches_from
from ..core.index_codec import entropy_bytes
from ..tuner.files.base_check import require_base
from ..tuner.files.reading import AdapterContents, adapted_layers, find_adapter, read_contents
from ..tuner.settings.file import by_layer_group, from_layer_groups
from .base_model import load_base


@dataclass(frozen=True)
class Verification:
    """The properties of an adapter that has passed all checks.

    Args:
        adapter: folder or Hub id.
        base_model: name of the base in the config.
        base: "not checked", or "matches".
        format: version of the file format.
        dtypes: dtypes of the values.
        modules: number of adapted modules.
        parameters: number of values and bias entries.
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
        """Plain types only, ready for JSON."""
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
        require_base(adapted_layers(model, shapes, str(adapter)), config)
    contents = read_contents(config, file)
    _require_consistent(contents)
    return Verification(
        adapter=str(adapter),
        base_model=config.base_model_name_or_path,
        base="not checked" if model is None else "matches",
        format=config.fggm_format,
        granularity=str(config.granularity),
        criterion=config.criterion,
        made_with=config.made_with or {},
        modules=len(contents.deltas),
        bytes=file.stat().st_size,
        other_keys=list(contents.others),
        **_numbers(contents),
    )


def _require_consistent(contents: AdapterContents) -> None:
    """Raise unless the densities and dtypes are those in the config."""
    config, granularity = contents.config, contents.config.granularity
    stored = {
        path: len(delta["indices"]) / max(1, granularity.units(contents.shapes[path]))
        for path, delta in contents.deltas.items()
    }
    expected = config.density_by_module
    # compared after parsing, because a file and a model have different orders of modules
    if expected is not None and from_layer_groups(expected) != from_layer_groups(by_layer_group(stored)):
        raise AdapterFileError(f"{contents.file}: the densities differ from density_by_module in {CONFIG_NAME}")
    for path, delta in contents.deltas.items():
        dtype = str(delta["values"].dtype)[6:]
        if config.delta_dtype not in (None, dtype):
            raise AdapterFileError(f"{contents.file}: {path}: values are {dtype}, not delta_dtype={config.delta_dtype}")


def _numbers(contents: AdapterContents) -> dict[str, Any]:
    granularity = contents.config.granularity
    deltas, shapes = contents.deltas, contents.shapes
    tensors = [tensor for delta in deltas.values() for part, tensor in delta.items() if part != "indices"]
    entropy = sum(entropy_bytes(len(d["indices"]), granularity.units(shapes[path])) for path, d in deltas.items())
    entries = sum(delta["values"].numel() for delta in deltas.values())
    return {
        "dtypes": sorted({str(delta["values"].dtype)[6:] for delta in deltas.values()}),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "density": entries / max(1, sum(o * i for o, i in shapes.values())),
        "bound_bytes": round(entropy) + sum(tensor.nbytes for tensor in tensors),
        "is_zero": not any(bool(tensor.any()) for tensor in tensors),
    }
