"""Names and weights of a model that is wrapped or sharded for several devices."""

from __future__ import annotations

import gc

import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..files.tensors import PREFIX

# parts of module names that are missing in state dicts
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel``, DeepSpeed's engine and ``torch.compile``."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def require_resizable(model: nn.Module) -> None:
    """Raise ``ValueError`` if ``DistributedDataParallel`` wraps the model.

    Its buckets have the sizes that the parameters had, so that a resized parameter would fail in backward.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    model = without_wrappers(model)
    wrappers = [wrapper for wrapper in gc.get_objects() if type(wrapper) is DistributedDataParallel]
    if any(module is model for wrapper in wrappers for module in wrapper.modules()):
        raise ValueError(
            "DistributedDataParallel already wraps the model, and the adapter's values cannot be resized any more. "
            "Select or load the adapter before you wrap the model, for example before accelerator.prepare."
        )


def plain_name(name: str) -> str:
    """A module's path without the wrappers of FSDP, activation checkpointing and ``torch.compile``."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def path_in_base(name: str) -> str:
    """A module's path in the base model, without the names of PEFT's and other wrappers."""
    return plain_name(name).removeprefix(PREFIX)


def state_prefix(model: nn.Module) -> str:
    """The prefix of the keys in a model's state dict: PEFT's for a ``PeftModel``, even if it is wrapped."""
    return PREFIX if any(plain_name(name).startswith(PREFIX) for name, _ in model.named_modules()) else ""


def is_shard(parameter: Tensor) -> bool:
    """Whether a parameter is sharded by FSDP2 or DeepSpeed's ZeRO-3."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def whole(weight: Tensor) -> Tensor:
    """The weight, gathered if FSDP2 has sharded it; every rank must then call this."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def require_unsharded(model: nn.Module) -> None:
    """Raise ``ValueError`` if FSDP2 or ZeRO-3 has already sharded the base of a new adapter.

    The frameworks would not know the adapter's parameters, and each rank would train values of its own.
    """
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            raise ValueError(
                f"{name} is already sharded. Add or load the adapter first, then shard the model (fully_shard, "
                "accelerate's prepare, or the trainer). ZeRO-3 shards a model while it loads if TrainingArguments "
                "exist: load the model before you create them."
            )
