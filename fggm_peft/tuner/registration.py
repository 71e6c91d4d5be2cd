"""Registers FGGM with PEFT, so that ``peft_type="FGGM"`` resolves to this library's config and model.

PEFT's ``register_peft_method`` requires a member of the ``PeftType`` enum. An enum with members cannot be subclassed,
so the member is added to the enum object.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES
from peft.utils import hotswap, register_peft_method

NAME = "FGGM"


def add_peft_type() -> PeftType:
    """The member ``FGGM`` of ``PeftType``, added if it is missing."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    # unpickling calls this function, so that a process that has not imported the library gets the member as well
    member.__reduce_ex__ = lambda protocol: (add_peft_type, ())  # type: ignore[method-assign]
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    type.__setattr__(PeftType, NAME, member)
    return member


def register(config_class: type, model_class: type, swap: Callable[..., None]) -> None:
    """Register ``FGGM`` with PEFT, unless PEFT has it already; ``swap`` replaces the part of hotswapping for LoRA."""
    if add_peft_type() in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    # PEFT 0.21 has a fixed tuple, which no registration changes; docs/upstream proposes a view of what is registered
    mixes = not isinstance(COMPATIBLE_TUNER_TYPES, tuple)
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class, is_mixed_compatible=mixes)
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType[NAME]] = ["granularity", "bias"]
    theirs = hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(theirs)
    def swap_in_place(model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.peft_type == NAME:
            swap(model, state_dict, adapter_name, config)
        else:
            theirs(model, state_dict, adapter_name, config, *args, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = swap_in_place
