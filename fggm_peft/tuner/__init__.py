"""FGGM as a PEFT method: config, model, layers and merging."""

from .config import FGGMConfig
from .files.input_covariance import InputCovariance
from .layer import FGGMLayer
from .layer_types import LAYER_TYPES, FGGMLinear, LayerType
from .merging.merge import MergeReport, ModuleMerge
from .model import FGGMModel
from .registration import register
from .settings.selection import require_reference
from .several.hotswap import swap_in_place
from .target import Target, find_targets

register(FGGMConfig, FGGMModel, swap_in_place)

__all__ = [
    "LAYER_TYPES",
    "FGGMConfig",
    "FGGMLayer",
    "FGGMLinear",
    "FGGMModel",
    "InputCovariance",
    "LayerType",
    "MergeReport",
    "ModuleMerge",
    "Target",
    "find_targets",
    "require_reference",
]
