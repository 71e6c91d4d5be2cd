"""``FGGMConfig``: the configuration of an FGGM adapter, saved by PEFT as JSON."""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Optional, TypeVar, Union

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..core.errors import AdapterFileError
from ..core.fingerprint import sketches_from
from ..core.granularity import granularity_from
from ..core.harm_decay import STRENGTH
from ..core.registry import require_one_of
from .files.model_card import complete_card
from .files.task_scores import record_of
from .files.tensors import require_readable
from .registration import add_peft_type
from .settings.budget import BudgetSettings
from .settings.fields import require_patterns, require_types, setting
from .settings.file import FileSettings
from .settings.selection import SelectionSettings

T = TypeVar("T")

PRESETS = {
    "retain": {"granularity": "column", "density": 0.3, "criterion": "gain_under_decay", "harm_decay": STRENGTH},
}
"""The settings of each preset. Arguments of the config override them."""
LEARNING_RATES = {"retain": 1.6e-3}
"""The peak learning rate of Adam for each preset. A model that decays needs a higher rate than one that does not."""
WARMUPS = {"retain": 0.3}
"""The share of the steps in which the rate should rise: at a high rate, the first steps of Adam overshoot."""


def _with_preset(arguments: dict[str, Any]) -> dict[str, Any]:
    preset = arguments.get("preset")
    if preset is None:
        return arguments
    require_one_of("preset", preset, PRESETS)
    settings = dict(PRESETS[preset])
    if any(arguments.get(name) is not None for name in ("budget", "threshold")):
        del settings["density"]
    return {**settings, **arguments}


def _completes_arguments(cls: type[T]) -> type[T]:
    """Let the constructor of a config apply its preset, and restore what the library wrote into a saved config.

    Every way to load a config, in PEFT and in transformers, ends in ``FGGMConfig(**contents_of_the_file)``. Only a
    saved config has the key ``peft_type``. Its unknown keys are ignored with a warning, as in PEFT, whose own fallback
    would drop the written fields.
    """
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "peft_type" in kwargs:
            for field in fields(cls):
                if not field.init and field.name in kwargs:
                    setattr(self, field.name, kwargs.pop(field.name))
            if unknown := sorted(kwargs.keys() - inspect.signature(init).parameters.keys()):
                names = f"Unexpected keyword arguments {unknown} for class {cls.__name__}"  # PEFT's words
                warnings.warn(f"{names}, these are ignored. A newer version may have saved the config.", stacklevel=2)
            kwargs = {name: value for name, value in kwargs.items() if name not in unknown}
        else:  # a saved config contains the settings of its preset
            kwargs = _with_preset(kwargs)
        init(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_completes_arguments
@dataclass
class FGGMConfig(FileSettings, BudgetSettings, SelectionSettings, PeftConfig):
    """
    Configuration of Fisher-Guided Gradient Masking (FGGM, https://arxiv.org/abs/2601.18261) as a PEFT method.

    Example:

    ```py
    >>> from fggm_peft import FGGMConfig, select_parameters
    >>> config = FGGMConfig(target_modules="all-linear", density=0.3, granularity="row")
    >>> model = get_peft_model(base_model, config)
    >>> report = select_parameters(model, dataloader)
    ```

    Raises:
        TypeError: a keyword is unknown, or names a field that the library writes.
        ValueError: a value is out of its range; the message has the value and the range.
    """

    preset: Optional[Literal["retain"]] = setting(
        None,
        "Recommended settings; arguments override them. 'retain' learns a task and keeps what the model knew: "
        "granularity='column', density=0.3, criterion='gain_under_decay', harm_decay=80.0. It needs a `reference`. "
        "Trainers then warm up over at least 30 % of the steps.",
    )
    target_modules: Optional[Union[list[str], str]] = setting(
        None,
        "Modules to adapt: a list of module names, a regex, or 'all-linear' (the default) for every linear layer "
        "except the output head. Linear, Conv1D, Conv1d/2d/3d, Embedding and quantized linear layers are supported.",
    )
    target_parameters: Optional[list[str]] = setting(
        None,
        "Parameters to adapt, as in LoRA: names of matrices, or of stacks of matrices such as the experts of a mixture "
        "(['experts.gate_up_proj', 'experts.down_proj', 'gate.weight']). Then `target_modules` is empty by default.",
    )
    exclude_modules: Optional[Union[list[str], str]] = setting(
        None, "Modules not to adapt: a list of module names, or a regex."
    )
    modules_to_save: Optional[list[str]] = setting(
        None, "Other modules to train fully and save with the adapter, such as a new head."
    )
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = setting(
        None,
        "Tokens whose embeddings train as well: indices, or a dict of embedding name -> indices. As in LoRA.",
    )
    layers_to_transform: Optional[Union[list[int], int]] = setting(None, "Index or indices of the layers to adapt.")
    layers_pattern: Optional[Union[list[str], str]] = setting(
        None, "Name of the nn.ModuleList that `layers_to_transform` indexes, if it has an uncommon name."
    )
    bias: Literal["none", "all"] = setting("none", "'all' trains every bias of the model, as in LoRA.")
    training_dtype: Optional[Literal["float32", "bfloat16"]] = setting(
        None,
        "Dtype of the trainable values: 'float32', or 'bfloat16' for half the memory, with an optimizer that rounds "
        "stochastically. None: PEFT's `autocast_adapter_dtype` decides, which is float32 unless it is False.",
    )
    quantized_merge: Literal["auto", "requantize", "keep"] = setting(
        "auto",
        "How a delta is merged into a quantized layer. 'auto': requantize if at least 95 % of the delta survives, else "
        "an error; 'requantize': always; 'keep': the layer stays, and a frozen, exact sidecar adds the delta.",
    )
    init_weights: bool = setting(
        True,
        "Start the deltas at zero. False draws them from a normal distribution; for tests only.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        self._check_format()  # first, because a newer format may have other fields
        self.granularity = granularity_from(self.granularity)
        require_types(self)
        sketches_from(self.base_fingerprint or {})  # raises if one is damaged
        self._check_budget()
        self._check_selection()
        self._check_targets()

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "density_pattern"):
            require_patterns(name, getattr(self, name))
        if isinstance(self.trainable_token_indices, dict):
            require_patterns("trainable_token_indices", self.trainable_token_indices)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")

    @property
    def recommended_learning_rate(self) -> float | None:
        """Peak learning rate of Adam for the preset; None without a preset."""
        return LEARNING_RATES.get(self.preset or "")

    @property
    def recommended_warmup(self) -> float:
        """Smallest share of the steps for the warm-up with the preset; 0 without a preset."""
        return WARMUPS.get(self.preset or "", 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Like PEFT's, but omits ``check_base``: the loader decides, and a stored value would override it."""
        data = {**super().to_dict(), "granularity": self.granularity.to_dict()}
        del data["check_base"]
        return data

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Like PEFT's, but raises ``AdapterFileError`` if the file is not the config of an adapter."""
        try:
            settings = json.loads(Path(path_json_file).read_text())
        except ValueError as error:
            raise AdapterFileError(f"{path_json_file} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise AdapterFileError(f"{path_json_file} is not the config of an adapter")
        peft_type = settings.get("peft_type", add_peft_type())
        if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise AdapterFileError(f"{path_json_file}: unknown peft_type {peft_type!r:.80}")
        return super().from_json_file(path_json_file, **kwargs)  # which drops what is not of a file

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: Optional[str] = None,
        *,
        check_base: bool = True,
        **kwargs: Any,
    ) -> FGGMConfig:
        """Like PEFT's, but accepts ``check_base``; ``AdapterFileError`` if the file of tensors is damaged."""
        require_readable(Path(pretrained_model_name_or_path) / (subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.check_base = check_base
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Like PEFT's, but completes the model card and, with ``save_scores``, saves the task's scores."""
        saved = self.of_file()
        super(FGGMConfig, saved).save_pretrained(save_directory, **kwargs)
        saved.auto_mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping  # PEFT stores it in the file only
        complete_card(Path(save_directory), saved)
        if self.save_scores and (record := record_of(self)) is not None and record.scores:
            record.save(Path(save_directory))
