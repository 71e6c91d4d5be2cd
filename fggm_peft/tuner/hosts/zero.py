"""Parameters under DeepSpeed's ZeRO, whose optimizer steps one flat float32 partition for each group of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def without_optimizer_wrappers(optimizer: Any) -> tuple[Any, dict[int, Tensor]]:
    """The optimizer inside the wrappers of accelerate and ZeRO, and the partition that contains each parameter's id.

    Raises:
        TypeError: there is no ``torch.optim.Optimizer`` inside.
        ValueError: ZeRO-3 divides a group of parameters and steps its parts one after another.
    """
    partitions: dict[int, Tensor] = {}
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        groups = list(getattr(optimizer, "sub_group_to_group_id", {}).values())
        if len(groups) > len(set(groups)):
            raise ValueError(
                "harm decay needs one sub-group for each parameter group: increase ZeRO-3's sub_group_size"
            )
        for name, flat in (
            ("bit16_groups", "single_partition_of_fp32_groups"),  # stage 2
            ("fp16_groups", "fp32_partitioned_groups_flat"),  # stage 3
        ):
            for group, partition in zip(getattr(optimizer, name, ()), getattr(optimizer, flat, ()), strict=True):
                partitions |= {id(parameter): partition for parameter in group}
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"harm decay needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer, partitions


def whole_values(parameter: Any) -> Tensor | None:
    """The float32 values that ZeRO steps, gathered from all processes; None for parameters without ZeRO."""
    if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def set_whole_values_(parameter: Any, values: Tensor) -> None:
    """Replace these values; each process writes its part. ZeRO copies them to the parameter at the end of its step."""
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, values)
