"""What frameworks for several devices do to a model's weights and names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..files.tensors import PREFIX

# they stand in the names of modules but not in those of state dicts
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A module's path without the wrappers of FSDP, activation checkpointing and ``torch.compile``."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def path_in_base(name: str) -> str:
    """A module's path within the base model, whatever is wrapped around the base."""
    return plain_name(name).removeprefix(PREFIX)


def state_prefix(model: nn.Module) -> str:
    """The prefix of the keys in a model's state dict: PEFT's for a ``PeftModel``, even if it is wrapped."""
    return PREFIX if any(plain_name(name).startswith(PREFIX) for name, _ in model.named_modules()) else ""


def is_shard(parameter: Tensor) -> bool:
    """Whether it is this rank's part of a parameter, of FSDP2 or of DeepSpeed's ZeRO-3."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def whole(weight: Tensor) -> Tensor:
    """The weight itself, gathered if FSDP2 has sharded it; then every rank has to ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def require_unsharded(model: nn.Module) -> None:
    """Raise where an adapter is added to a base that FSDP2 or ZeRO-3 has sharded already.

    They would not know the adapter's parameters: each rank would train values of its own.

    Raises:
        ValueError: names the first sharded weight.
    """
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            raise ValueError(
                f"{name} is sharded already, and the adapter's values would not be trained with it. Add or load the "
                "adapter first, then shard the model (fully_shard, accelerate's prepare, or the trainer). ZeRO-3 "
                "shards while a model loads, if the TrainingArguments exist by then: load it before."
            )
