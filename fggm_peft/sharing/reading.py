"""Reads the file of a saved adapter and writes it: the one place that knows how its tensors are named and laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import AdapterFileError
from ..core.granularity import Shape
from ..tuner.config import FGGMConfig
from .skeleton import parse_shapes, write_shapes

PREFIX = "base_model.model."
BASE_PART = ".base_layer."
"""In the names of the base's own weights: PEFT saves an embedding with its adapter, for it may have been resized."""
SHAPES = "fggm_shapes"
_PARTS = {f".fggm_{part}": part for part in ("indices", "values", "bias")}


@dataclass(frozen=True, eq=False)
class AdapterTensors:
    """What is in the file of an adapter.

    Args:
        config: of the adapter.
        modules: module path within the base -> its "indices", "values" and perhaps "bias".
        others: whole tensors (``modules_to_save``, whole biases), by their names in the file.
        shapes: module path -> shape of the weight, where the file says it.
    """

    config: FGGMConfig
    modules: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]
    shapes: dict[str, Shape]


def read_tensors(source: str | Path) -> AdapterTensors:
    """The tensors of a saved adapter, by what they are; not checked against each other.

    Args:
        source: a folder or a Hub id.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: it is an adapter of another method, or has no safetensors file.
        AdapterFileError: the file is damaged.
    """
    folder = Path(source).expanduser()
    name = str(folder) if folder.is_dir() else str(source)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter in {name!r}: it has no adapter_config.json")
    config = PeftConfig.from_pretrained(name)
    if not isinstance(config, FGGMConfig):
        raise ValueError(f"{name!r} is a {config.peft_type} adapter, not FGGM")
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not folder.is_dir():
        file = Path(hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME))
    if not file.is_file():
        raise ValueError(f"{name!r} has no {SAFETENSORS_WEIGHTS_NAME}")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            shapes = parse_shapes((opened.metadata() or {}).get(SHAPES, "{}"))
    except (SafetensorError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{file} is damaged: {error}") from error
    modules, others = sorted_by_part(tensors)
    return AdapterTensors(config, modules, others, shapes)


def sorted_by_part(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of a file by module and part, and those that are of no sparse delta."""
    modules: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        part = next((part for ending, part in _PARTS.items() if key.endswith(ending)), None)
        if part is None:
            others[key] = tensor
        else:
            modules.setdefault(key.removeprefix(PREFIX).removesuffix(f".fggm_{part}"), {})[part] = tensor
    return modules, others


def write_tensors(folder: Path, adapter: AdapterTensors) -> None:
    """Write what ``read_tensors`` reads: the configuration and the tensors."""
    tensors = {
        f"{PREFIX}{module}.fggm_{part}": tensor.detach().contiguous()
        for module, parts in adapter.modules.items()
        for part, tensor in parts.items()
    }
    tensors |= {key: tensor.detach().contiguous() for key, tensor in adapter.others.items()}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", SHAPES: write_shapes(adapter.shapes)}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata)
    adapter.config.save_pretrained(str(folder))
