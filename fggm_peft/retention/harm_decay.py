"""``HarmDecay``: after optimizer steps, deltas decay in the directions that inputs to retain use."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.harm_decay import STRENGTH, Decay
from ..selection.select import active_adapters
from ..tuner.config import FGGMConfig
from ..tuner.files.input_covariance import InputCovariance, covariance_of
from ..tuner.hosts.zero import without_optimizer_wrappers
from .trained import Trained, shrink_, trained_parameters

EVERY = 4
"""Steps between two decays. A shorter interval acts as a greater strength; ``STRENGTH`` was tuned for this one."""

_STEPS, _PENDING = "harm_decay_steps", "harm_decay_pending"


_DECAYING: WeakSet[Optimizer] = WeakSet()
"""The optimizers to which a ``HarmDecay`` is attached."""


class Plan(NamedTuple):
    """What decays after the steps of one optimizer.

    Args:
        tensors: ids of all tensors that the optimizer steps.
        trained: the parameters that decay.
        decays: the same with their decays, by the id of the tensor that the optimizer steps.
    """

    tensors: set[int]
    trained: list[Trained]
    decays: dict[int, list[tuple[Tensor, Decay]]]


class HarmDecay:
    """Decays what training adds to linear layers, in the metric of their inputs on data to retain.

    After every few optimizer steps each delta ``V`` becomes ``V (I + sigma C)^-1``. ``C`` is the covariance of the
    layer's inputs; ``sigma`` is ``strength`` times the learning rates of these steps. This is the proximal step of the
    penalty ``sigma / 2 E |V x|^2``. As with AdamW's ``weight_decay``, the learning rate sets how fast the model learns,
    and the strength how much it retains, whatever the rate is. It applies to the parameters of the optimizers that are
    values of an FGGM adapter, PEFT's LoRA (its A, because ``B A (I + sigma C)^-1`` decays the product) or SHiRA, or
    weights of linear layers that train themselves (``V`` is then their difference from the attached model).

    Example:

    ```py
    >>> from fggm_peft import HarmDecay, input_covariance
    >>> covariance = input_covariance(model, general_text)
    >>> decay = HarmDecay(covariance).attach(model, optimizer)
    >>> train(model, optimizer)
    >>> decay.remove()
    ```

    The number of steps and the pending strength are in the optimizer's parameter groups, so that an optimizer that is
    saved and loaded resumes exactly.

    Args:
        covariance: the result of ``input_covariance``, or a sum of such results.
        strength: in a direction with the energy of the median layer it is the ``weight_decay`` of AdamW. It is meant
            for optimizers whose steps have the size of the learning rate, such as Adam.
        every: steps between two decays.
        offload: keep the start of weights that train themselves on the CPU.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, covariance: InputCovariance, strength: float = STRENGTH, every: int = EVERY, offload: bool = False
    ):
        if not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
            raise ValueError(f"strength must be a number >= 0, got {strength!r}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer > 0, got {every!r}")
        self.covariance, self.strength, self.every, self.offload = covariance, strength, every, offload
        self._model: nn.Module | None = None
        self._optimizers: list[Optimizer] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._partitions: dict[int, Tensor] = {}  # what ZeRO steps instead of a parameter, by the parameter's id
        self._decays: dict[str, tuple[Trained, Decay]] = {}  # by module path and adapter
        self._plans: dict[Optimizer, Plan] = {}
        self._selected_for: FGGMConfig | None = None  # its selection provides the covariance

    def attach(self, model: nn.Module, *optimizers: Optimizer) -> HarmDecay:
        """Decay after the steps of these optimizers of the model's parameters.

        Accelerate or DeepSpeed may have wrapped them (ZeRO-2 and ZeRO-3; attach to the engine's optimizer).

        Raises:
            ScoreFileError: the covariance has no module that an adapter changes, or has it with another width.
            TypeError: an optimizer is not a ``torch.optim.Optimizer``.
            ValueError: the optimizers train nothing that can decay, or an adapter of a layer that is not linear; or
                another ``HarmDecay`` is attached to one of them.
        """
        self.remove()
        self._model = model
        for optimizer in optimizers:
            inner, partitions = without_optimizer_wrappers(optimizer)
            if inner in _DECAYING:
                raise ValueError("the optimizer has harm decay already, which would act twice; call its remove() first")
            self._optimizers.append(inner)
            self._partitions |= partitions
        try:
            # also records where weights start
            trained = [self._trained_by(optimizer) for optimizer in self._optimizers]
            if not any(trained):
                raise ValueError(
                    "harm decay has nothing to decay: the optimizers train no adapter and no weight of a linear layer "
                    "that the input covariance contains. Attach it after select_parameters, to the optimizer of this "
                    "model"
                )
        except ValueError:
            self.remove()
            raise
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in self._optimizers]
        _DECAYING.update(self._optimizers)
        return self

    def remove(self) -> None:
        """Detach from the optimizers. Nothing remains on them."""
        for handle in self._handles:
            handle.remove()
        for group in (group for optimizer in self._optimizers if self._handles for group in optimizer.param_groups):
            group.pop(_STEPS, None)
            group.pop(_PENDING, None)
        _DECAYING.difference_update(self._optimizers if self._handles else ())
        self._handles, self._optimizers, self._model = [], [], None
        self._partitions, self._decays, self._plans = {}, {}, {}

    @torch.compiler.disable
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):  # a fused optimizer skips a step of a loss scaler itself
            return
        groups = [group for group in optimizer.param_groups if group["params"]]  # ZeRO steps one after another
        for group in groups:
            group[_PENDING] = group.get(_PENDING, 0.0) + float(group["lr"])
            group[_STEPS] = group.get(_STEPS, 0) + 1
        due = [group for group in groups if group[_STEPS] % self.every == 0]
        trained = self._trained_by(optimizer) if due else {}
        for group in due:
            sigma, group[_PENDING] = self.strength * group[_PENDING], 0.0
            for tensor in group["params"] if sigma else []:
                for parameter, decay in trained.get(id(tensor), []):
                    shrink_(parameter, decay, sigma)

    def _trained_by(self, optimizer: Optimizer) -> dict[int, list[tuple[Tensor, Decay]]]:
        """The parameters that decay, by the tensor that the optimizer steps.

        The model is searched only if the optimizer has other tensors than before, or an adapter was selected again or
        deleted.
        """
        ours = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        ours |= set(map(id, self._partitions.values()))  # ZeRO-3 empties the groups between its steps
        selected = covariance_of(self._selected_for)
        if selected is not None and selected is not self.covariance:
            self.covariance, self._decays, self._plans = selected, {}, {}
        plan = self._plans.get(optimizer)
        if plan is None or plan.tensors != ours or not all(trained.is_current() for trained in plan.trained):
            plan = self._plans[optimizer] = self._plan(ours)
        return plan.decays

    def _plan(self, tensors: set[int]) -> Plan:
        assert self._model is not None
        plan = Plan(tensors, [], {})
        for trained in trained_parameters(self._model, self.covariance, self.offload):
            tensor = id(self._partitions.get(id(trained.parameter), trained.parameter))
            if tensor not in tensors:
                continue
            if trained.width is None:
                raise ValueError(f"harm decay supports LoRA and SHiRA of linear layers only, not of {trained.path}")
            covariance = self.covariance.of_modules({trained.path: trained.width})[trained.path]
            name = f"{trained.path}/{trained.name}"
            known, decay = self._decays.get(name, (None, None))
            if decay is None or known is None or not known.is_current():
                decay = trained.decay(covariance.to(trained.parameter.device))
            self._decays[name] = trained, decay
            plan.trained.append(trained)
            plan.decays.setdefault(tensor, []).append((trained.parameter, decay))
        return plan


def attach_harm_decay(
    model: nn.Module, *optimizers: Optimizer, covariance: InputCovariance | None = None
) -> HarmDecay | None:
    """Attach the harm decay of the model's FGGM adapters to its optimizers. Trainers do this themselves.

    Call it after ``select_parameters``, which reads the statistics, and after the optimizer was created.

    Args:
        covariance: statistics for an adapter that was loaded from a file; by default those of the selection.

    Returns:
        The attached ``HarmDecay``, whose ``remove`` detaches it; None if no adapter has ``harm_decay``.

    Raises:
        ValueError: an adapter has no statistics, for example because it was loaded from a file; or two adapters retain
            different things.
    """
    decaying = [config for _, config in active_adapters(model) if config.harm_decay]
    if not decaying:
        return None
    _warn_of_a_low_rate(decaying, optimizers)
    if covariance is not None:
        return HarmDecay(covariance, decaying[0].harm_decay).attach(model, *optimizers)
    covariance = covariance_of(decaying[0])
    if covariance is None:
        raise ValueError(
            "harm_decay needs the statistics of what the model should retain, and an adapter file contains only the "
            "setting. Pass covariance=input_covariance(...) to attach_harm_decay, select again with "
            "select_parameters(reset=True), or continue with harm_decay=0"
        )
    for config in decaying[1:]:
        if covariance_of(config) is not covariance or config.harm_decay != decaying[0].harm_decay:
            raise ValueError("the active adapters differ in what they retain; train them one after the other")
    decay = HarmDecay(covariance, decaying[0].harm_decay).attach(model, *optimizers)
    decay._selected_for = decaying[0]
    return decay


def _warn_of_a_low_rate(configs: list[FGGMConfig], optimizers: tuple[Optimizer, ...]) -> None:
    """The default of ``TrainingArguments`` is 30 times lower than a preset's rate."""
    recommended = max((config.recommended_learning_rate or 0.0 for config in configs), default=0.0)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rate = max((float(group.get("initial_lr", group["lr"])) for group in groups), default=0.0)
    if 0 < rate < recommended / 5:
        warnings.warn(
            f"the learning rate is {rate:g}, and the preset is made for about {recommended:g} (Adam). With harm decay, "
            "a much lower rate learns slowly and keeps no more",
            stacklevel=3,
        )
