"""``InputCovariance``: the covariances of the inputs of a model's layers, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn

from ...core.covariance import RANK, Covariance
from ...core.errors import ScoreFileError
from .atomic import read_tensors, write_tensors
from .hub import from_hub, user_path

COVARIANCE_FILE = "fggm_retention.safetensors"
_FORMAT = "fggm_retention 1"

_COMPUTE_AGAIN = (
    "It was computed for another model or for other modules: compute it again with fggm_peft.input_covariance"
)


@dataclass(frozen=True, eq=False)
class InputCovariance:
    """What a model should retain: the covariances ``E[x x^T]`` of the inputs of its linear layers on some data.

    The unit is the mean square of the inputs of the median layer, so that sources of different models and lengths add
    up, while the relation of the layers is preserved. (Attention sinks dominate a mean over layers. On five texts,
    SmolLM2-135M's mean differs by a factor of 2.7, with the length of the texts, and its median by 1.15.)

    Args:
        covariances: one for each distinct input, by the path of the first module that reads it.
        inputs: module path -> key of its input in ``covariances``.
        rank: of the sketches.
        positions: number of tokens that were read.
    """

    covariances: Mapping[str, Covariance]
    inputs: Mapping[str, str]
    rank: int = RANK
    positions: int = 0

    @classmethod
    def zero(cls, widths: Mapping[str, int]) -> InputCovariance:
        """The covariance of no data, for modules of these numbers of input features."""
        zeros = {path: torch.zeros(width, 0, dtype=torch.bfloat16) for path, width in widths.items()}
        return cls({path: Covariance(factor) for path, factor in zeros.items()}, {path: path for path in widths})

    def __getitem__(self, path: str) -> Covariance:
        """The covariance of one module's input; ``ScoreFileError`` if it has none."""
        if path not in self.inputs:
            raise ScoreFileError(f"the input covariance has no module {path}. {_COMPUTE_AGAIN}")
        return self.covariances[self.inputs[path]]

    def __contains__(self, path: str) -> bool:
        return path in self.inputs

    def normalized(self) -> InputCovariance:
        """The covariances of one source in units of its median layer, in bfloat16; unchanged if all inputs are 0."""
        means = {key: float(covariance.diagonal().double().mean()) for key, covariance in self.covariances.items()}
        layers = sorted(means[key] for key in self.inputs.values() if means[key] > 0)
        scale = 1 / layers[len(layers) // 2] if layers else 1.0
        return replace(self, covariances={k: (c * scale).to(torch.bfloat16) for k, c in self.covariances.items()})

    def __add__(self, other: InputCovariance) -> InputCovariance:
        """The sum of two sources, truncated to the smaller rank; ``ScoreFileError`` if their modules differ."""
        other = other.of_modules({path: self[path].width for path in self.inputs})
        rank = min(self.rank, other.rank)
        total = {key: (covariance + other[key]).truncated(rank) for key, covariance in self.covariances.items()}
        return InputCovariance(total, self.inputs, rank, self.positions + other.positions)

    def of_modules(self, widths: Mapping[str, int]) -> InputCovariance:
        """The covariances of some modules only; ``ScoreFileError`` unless each has one of its width."""
        first: dict[str, str] = {}  # key of an input -> the first of these modules that reads it
        inputs: dict[str, str] = {}
        for path, width in widths.items():
            if self[path].width != width:
                raise ScoreFileError(
                    f"the input covariance of {path} has {self[path].width} features, but its input has {width}. "
                    + _COMPUTE_AGAIN
                )
            inputs[path] = first.setdefault(self.inputs[path], path)
        covariances = {path: self.covariances[key] for key, path in first.items()}
        return replace(self, covariances=covariances, inputs=inputs)

    def to(self, *args, **kwargs) -> InputCovariance:
        """The covariances on a device or in a dtype, as ``Tensor.to``."""
        return replace(self, covariances={key: c.to(*args, **kwargs) for key, c in self.covariances.items()})

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain types, which ``from_dict`` reads."""
        return {**vars(self), "covariances": {key: vars(covariance) for key, covariance in self.covariances.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputCovariance:
        covariances = {key: Covariance(**fields) for key, fields in data["covariances"].items()}
        return cls(**{**data, "covariances": covariances})

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes."""
        return sum(covariance.factor.nbytes for covariance in self.covariances.values())

    def save(self, path: str | Path) -> Path:
        """Write a file; a folder gets the name ``fggm_retention.safetensors``."""
        file = user_path(path)
        file = file if file.suffix == ".safetensors" else file / COVARIANCE_FILE
        tensors = {key: covariance.factor for key, covariance in self.covariances.items()}
        floors = {key: covariance.floor for key, covariance in self.covariances.items()}
        metadata = {"rank": self.rank, "positions": self.positions, "inputs": self.inputs, "floors": floors}
        write_tensors(file, tensors, _FORMAT, metadata)
        return file


def load_input_covariance(source: str | Path) -> InputCovariance:
    """Load a file, the file of a folder, or of a repository on the Hub (``OWNER/NAME``).

    Raises:
        ScoreFileError: there is no such file, or it is damaged.
    """
    file = user_path(source)
    file = file / COVARIANCE_FILE if file.is_dir() else file
    if not file.is_file():
        with from_hub(str(source), "input covariance", ScoreFileError):
            file = Path(hf_hub_download(str(source), COVARIANCE_FILE))
    with read_tensors(file, _FORMAT, ScoreFileError) as (metadata, factors):
        covariances = {key: Covariance(factor, _number(metadata["floors"][key])) for key, factor in factors.items()}
        inputs = {str(path): str(key) for path, key in metadata["inputs"].items()}
        for key, factor in factors.items():
            if factor.dim() != 2 or not torch.isfinite(factor).all():
                raise ScoreFileError(f"{file}: the factor of {key} must be a matrix of finite numbers")
        if missing := set(inputs.values()) ^ covariances.keys():
            raise ScoreFileError(f"{file} is damaged: modules and tensors differ in {sorted(missing)[0]!r:.80}")
        rank, positions = int(_number(metadata["rank"])), int(_number(metadata["positions"]))
        return InputCovariance(covariances, inputs, rank, positions)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{value!r:.40} is not a number >= 0")
    return float(value)


# The covariance that an adapter is trained with ------------------------------------------------------

_OWN = "fggm_covariance"


def covariance_of(config: object) -> InputCovariance | None:
    """What the adapter with this config retains; None if it was not selected in this process."""
    return getattr(config, _OWN, None)


def set_covariance(config: object, covariance: InputCovariance) -> None:
    setattr(config, _OWN, covariance)


# The tasks that a base model has learned -----------------------------------------------------------

_TASKS = "fggm_retained"
"""Name of a pair on the base model: the sum of the merged adapters' tasks, and ``(config, task)`` of the others."""


def retained_by(model: nn.Module, besides: object = None) -> InputCovariance | None:
    """The sum over the tasks that were learned on a base model, except that of the adapter with a given config."""
    earlier, own = _tasks_of(model)
    for config, task in own:
        if besides is None or config is not besides:
            earlier = task if earlier is None else earlier + task
    return earlier


def task_of(model: nn.Module, config: object) -> InputCovariance | None:
    """What the adapter with this config has added to the tasks that a base model retains; None if nothing."""
    return next((task for owner, task in _tasks_of(model)[1] if owner is config), None)


def retain(model: nn.Module, task: InputCovariance, config: object) -> None:
    """Add a task to those that the base model retains; it replaces an earlier one of the same adapter."""
    earlier, own = _tasks_of(model)
    adapters, kept = list(getattr(model, "peft_config", {}).values()), [(config, task)]
    for owner, other in own:
        if owner is config:
            continue
        if any(owner is adapter for adapter in adapters):
            kept.insert(-1, (owner, other))
        else:  # the adapter is merged; only the sum is kept, so that the size does not grow
            earlier = other if earlier is None else earlier + other
    setattr(model, _TASKS, (earlier, kept))


def set_retained(model: nn.Module, tasks: InputCovariance | None) -> None:
    """Replace what the base model retains, for example when a run is resumed."""
    setattr(model, _TASKS, (tasks, []))


def _tasks_of(model: nn.Module) -> tuple[InputCovariance | None, list[tuple[object, InputCovariance]]]:
    return getattr(model, _TASKS, (None, []))
