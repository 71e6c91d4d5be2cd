"""Methods that train a PEFT adapter: the base class, and those that PEFT implements."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, OFTConfig, OSFConfig, PeftConfig, ShiraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ...core.harm_decay import RIDGE
from ...deltas import save_adapter
from ...tuner import InputCovariance
from ...tuner.target import outer_modules
from .method import METHODS, Method

WRITTEN_BY_PEFT = {field.name for field in fields(PeftConfig)}


@dataclass
class PeftMethod(Method):
    """A new adapter for every task; it is saved and merged when the task ends.

    Args:
        config: fields of the adapter's config; ``defaults`` apply to the others. ``make_method`` takes these fields
            as options.
    """

    config_class: ClassVar[type[PeftConfig]]
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_config()  # raises an error for an illegal option now, not after hours

    @classmethod
    def option_names(cls) -> list[str]:
        of_config = [option.name for option in fields(cls.config_class) if option.init]
        names = [*super().option_names(), *(name for name in of_config if name not in WRITTEN_BY_PEFT)]
        return [name for name in dict.fromkeys(names) if name != "config"]

    def defaults(self) -> dict[str, Any]:
        """Fields of the current task's config that ``config`` overrides."""
        return {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}

    def make_config(self) -> Any:
        """A new config for the current task's adapter; PEFT modifies it."""
        return self.config_class(**{**self.defaults(), **copy.deepcopy(self.config)})

    def wrap(self, model: nn.Module, config: PeftConfig | None = None) -> nn.Module:
        """The model with the current task's adapter, or with an adapter of this config."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.task_seed)
            return get_peft_model(model, self.make_config() if config is None else config)

    def begin_task(self, model, examples):
        return self.wrap(model)

    def end_task(self, model, trainer, folder):
        self.save(model, trainer, folder)
        return model.merge_and_unload()

    @staticmethod
    def save(model, trainer, folder, **options):
        """Save the adapter in the folder, if there is one, from the main process, with options of PEFT."""
        if folder is not None:
            is_main = trainer is None or trainer.is_world_process_zero()
            # "auto" would query the Hub for a resized vocabulary
            save_adapter(model, folder, is_main, save_embedding_layers=False, **options)


@METHODS.register("lora")
@dataclass
class LoRA(PeftMethod):
    """LoRA (arXiv 2106.09685): W + BA, where A and B train.

    Args:
        mode: "merged": every task has its own adapter, which is merged when the task ends. "carried": one adapter
            trains on all tasks, and the base model never changes.
        init: of A. "random": as in PEFT. "quiet": the directions that the task uses most and the reference least, so
            that harm decay leaves the adapter room to learn. (LoRA-Null, arXiv 2503.02659, section 3, starts in the
            null space of the reference, too, in the directions that the weight uses most.)
    """

    config_class = LoraConfig
    mode: Literal["merged", "carried"] = "merged"
    init: Literal["random", "quiet"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uses_reference and (self.mode == "carried" or self.config.get("init_lora_weights", True) is not True):
            raise ValueError(
                "harm_decay and init='quiet' need an adapter that is zero when a task begins: mode='merged' and "
                "init_lora_weights=True"
            )

    @property
    def uses_reference(self):
        return super().uses_reference or self.init == "quiet"

    @property
    def supports_quantized(self):
        return self.mode == "carried"

    def trainer(self, **arguments):
        trainer: Any = super().trainer(**arguments)
        if self.init == "quiet":
            start_quietly_(trainer.model, trainer.covariance, self.task_covariance(trainer))
        return trainer

    def prepare(self, base, seed):
        base = super().prepare(base, seed)
        return self.wrap(base) if self.mode == "carried" else base

    def begin_task(self, model, examples):
        return model if self.mode == "carried" else super().begin_task(model, examples)

    def end_task(self, model, trainer, folder):
        if self.mode == "merged":
            return super().end_task(model, trainer, folder)
        self.save(model, trainer, folder)
        return model


@torch.no_grad()
def start_quietly_(model: nn.Module, retained: InputCovariance, task: InputCovariance) -> None:
    """Set each A to the leading left singular vectors of ``M F``, at PEFT's usual scale.

    ``F F^T`` is the covariance of the task's inputs and ``M = (lambda I + C)^-1`` that of gain under decay. Gradients
    of the task are combinations of its inputs, so the best deltas under harm decay are near the span of ``M F``.
    """
    for path, module in outer_modules(model):
        if isinstance(module, LoraLayer):
            for layer in module.lora_A.values():
                a: Any = layer.weight
                factor = task[path].factor.to(a.device, torch.float32)
                mapped = retained[path].to(a.device).spectrum().apply(factor.mT, lambda energy: 1 / (RIDGE + energy))
                directions = torch.linalg.svd(mapped, full_matrices=False)[2][: len(a)]
                a[: len(directions)] = directions / 3**0.5  # the norm of PEFT's rows


@METHODS.register("shira")
@dataclass
class SHiRA(PeftMethod):
    """SHiRA (arXiv 2406.13175): a few entries of each weight train, chosen at random for every task.

    PEFT implements the random mask. Without a seed PEFT chooses the same entries every time, so each task has its own
    seed; within a task, weights of the same shape have the same entries.
    """

    config_class = ShiraConfig

    def defaults(self):
        return {**super().defaults(), "random_seed": self.task_seed}


@METHODS.register("osf")
@dataclass
class OSF(PeftMethod):
    """Orthogonal subspace fine-tuning (arXiv 2504.07097), as implemented in PEFT.

    The largest singular directions of each weight are kept; the others train, with gradients orthogonal to them.
    Between tasks it follows PEFT's documentation ("Sequential Task Learning"): the task is merged, the singular value
    decomposition of the weights is computed again, and a larger part of it is kept. (The page calls ``unload()``,
    which loses the task in peft 0.21, because the delta is not in the weight until it is merged.) PEFT's OSF adapts
    ``nn.Linear`` and skips GPT-2's Conv1D.

    Args:
        effective_rank: the share of a weight's rank that is kept in the first task, in (0, 1).
        growth: increase of this share with every task, up to ``most``.
        most: the largest share.
    """

    config_class = OSFConfig
    harm_decay: float = field(default=0.0, init=False, repr=False)  # it trains factors of the weights
    reference: list[str] = field(default_factory=list, init=False, repr=False)
    effective_rank: float = 0.5
    growth: float = 0.05
    most: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.effective_rank <= self.most < 1 or self.growth < 0:
            raise ValueError(
                "OSF needs 0 < effective_rank <= most < 1 and growth >= 0, got "
                f"effective_rank={self.effective_rank!r}, growth={self.growth!r}, most={self.most!r}"
            )
        super().__post_init__()

    def defaults(self):
        share = min(self.effective_rank + self.growth * self.number, self.most)
        return {**super().defaults(), "effective_rank": share}


@METHODS.register("oft")
@dataclass
class OFT(PeftMethod):
    """Orthogonal fine-tuning (arXiv 2306.07280; OFTv2, arXiv 2506.19847), as implemented in PEFT.

    The input of each weight is rotated by a trained orthogonal matrix of blocks (``oft_block_size``, 32 by default).
    """

    config_class = OFTConfig
    harm_decay: float = field(default=0.0, init=False, repr=False)  # it trains rotations
    reference: list[str] = field(default_factory=list, init=False, repr=False)
