"""Makes FGGM a method of the installed PEFT: ``peft_type="FGGM"`` resolves to our config and model.

PEFT's ``register_peft_method`` wants a member of the ``PeftType`` enum, and an enum cannot be
subclassed once it has members, so the member is added to the enum object itself. Doing it twice, or
beside a PEFT that has FGGM already, is harmless.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

NAME = "FGGM"


def add_peft_type(name: str = NAME) -> PeftType:
    """The member ``name`` of ``PeftType``, added if PEFT does not have it.

    Lookup by name and value, ``in``, iteration, pickle, deepcopy and json see it like any other.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    # a process that has not imported us unpickles it through us, and so gets the member too
    member.__reduce_ex__ = lambda protocol: (add_peft_type, (name,))  # type: ignore[method-assign]
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


def register(config_class: type, model_class: type) -> None:
    """Tell PEFT which config and tuner belong to ``FGGM``; does nothing if it already knows."""
    if add_peft_type() in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    # PeftMixedModel goes by a list of PEFT's own types, so there is nothing to be compatible with
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)
