"""Registers FGGM with PEFT, so that ``peft_type="FGGM"`` resolves to this library's config and model.

PEFT's ``register_peft_method`` requires a member of the ``PeftType`` enum. An enum with members cannot be subclassed,
so the member is added to the enum object. Registering twice, or with a PEFT that has FGGM already, is harmless.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

NAME = "FGGM"


def add_peft_type(name: str = NAME) -> PeftType:
    """The member ``name`` of ``PeftType``, added if it is missing.

    Lookup by name and value, ``in``, iteration, pickle, deepcopy and JSON treat it like any other member.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    # unpickling calls this function, so that a process that has not imported the library gets the member as well
    member.__reduce_ex__ = lambda protocol: (add_peft_type, (name,))  # type: ignore[method-assign]
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


def register(config_class: type, model_class: type) -> None:
    """Register the config and the tuner of ``FGGM`` with PEFT, unless PEFT has them already."""
    if add_peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)
