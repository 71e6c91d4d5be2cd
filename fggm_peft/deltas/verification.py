"""Looks at an adapter without loading it: is every tensor legal and as announced, and is this its base?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ..core.errors import AdapterFileError
from ..core.index_codec import entropy_bytes
from ..tuner.config import FGGMConfig
from ..tuner.files.base_check import require_base
from ..tuner.files.reading import AdapterContents, adapted_layers, contents_of, find_adapter
from ..tuner.settings.file import by_layer_group, from_layer_groups


@dataclass(frozen=True)
class Verification:
    """What an adapter that has passed all checks holds.

    Args:
        adapter: folder or Hub id.
        base_model: as the config names it.
        base: what was looked at of the base: "not asked", "has no fingerprint" or "matches".
        format: version of the file format.
        dtypes: of the values.
        modules: how many are adapted.
        parameters: values and bias entries.
        density: share of the adapted weights' entries.
        bytes: size of the file.
        bound_bytes: the entropy of the indices and the bytes of the values, less than which it could not be.
        is_zero: nothing was trained.
        other_keys: tensors in the file that are no delta.
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
    """Check everything that loading an adapter would check, without a model that it could do harm to.

    Args:
        adapter: a folder, or a Hub id.
        base: the base model, or a folder or Hub id to load it from; whether the adapter was made on it is checked.
        hub: ``revision``, ``token``, ``subfolder`` and the like, for the adapter on the Hub.

    Raises:
        AdapterFileError: something is wrong with the files; names the file and the tensor.
        BaseMismatchError: it was made on another base; names the first module that differs.
        ValueError: it is an adapter of another method.
    """
    model = load_base(base) if isinstance(base, str) else base
    config, file = find_adapter(adapter, **hub)
    checked = "not asked" if model is None else _checked_base(config, model, file)
    contents = contents_of(config, file, model)
    _require_announced(contents)
    return Verification(
        adapter=str(adapter),
        base_model=config.base_model_name_or_path,
        base=checked,
        format=config.fggm_format,
        granularity=str(config.granularity),
        criterion=config.criterion,
        made_with=config.made_with or {},
        modules=len(contents.deltas),
        bytes=contents.file.stat().st_size,
        other_keys=list(contents.others),
        **_figures(contents),
    )


def load_base(name: str, revision: str | None = None) -> nn.Module:
    """A base model in the dtype and the class of its checkpoint.

    Args:
        name: a folder or a Hub id.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: there is no such model, or its checkpoint does not say which class it is of.
    """
    at = {"revision": revision or "main"}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **at)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"there is no base model {name!r} ({reason}). Name its folder or Hub id.") from error
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        raise ValueError(f"the config of {name} names no class of transformers; pass the model itself")
    return model_class.from_pretrained(name, dtype="auto", **at)


def _require_announced(contents: AdapterContents) -> None:
    """Raise unless densities and dtypes are those that the config announces."""
    config = contents.config
    wanted = config.density_by_module
    # parsed, as the order of modules in a file is another one than in a model
    if wanted is not None and from_layer_groups(wanted) != from_layer_groups(by_layer_group(_densities(contents))):
        raise AdapterFileError(f"{contents.file}: the densities are not those that the config announces")
    for name in contents.deltas:
        dtype = str(contents.dtypes[name])[6:]
        if config.delta_dtype is not None and dtype != config.delta_dtype:
            raise AdapterFileError(f"{contents.file}: {name}: values are {dtype}, announced as {config.delta_dtype}")


def _densities(contents: AdapterContents) -> dict[str, float]:
    granularity = contents.config.granularity
    return {
        name: len(delta["indices"]) / max(1, granularity.units(contents.shapes[name]))
        for name, delta in contents.deltas.items()
    }


def _checked_base(config: FGGMConfig, model: nn.Module, file: Path) -> str:
    if not config.base_fingerprint:
        return "has no fingerprint"
    require_base(adapted_layers(model, config.base_fingerprint, str(file)), config)
    return "matches"


def _figures(contents: AdapterContents) -> dict[str, Any]:
    granularity = contents.config.granularity
    deltas, shapes = contents.deltas, contents.shapes
    tensors = [tensor for delta in deltas.values() for part, tensor in delta.items() if part != "indices"]
    entropy = sum(entropy_bytes(len(d["indices"]), granularity.units(shapes[name])) for name, d in deltas.items())
    entries = sum(d["values"].numel() for d in deltas.values())
    size = sum(d["values"].numel() * contents.dtypes[name].itemsize for name, d in deltas.items())
    size += sum(delta["bias"].nbytes for delta in deltas.values() if "bias" in delta)
    return {
        "dtypes": sorted({str(dtype)[6:] for dtype in contents.dtypes.values()}),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "density": entries / max(1, sum(o * i for o, i in shapes.values())),
        "bound_bytes": round(entropy) + size,
        "is_zero": not any(bool(tensor.any()) for tensor in tensors),
    }
