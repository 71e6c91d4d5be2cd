"""Selection from the forward and backward passes that a training loop makes anyway.

The FGGM paper (arXiv 2601.18261) leaves this as future work. The hooks are those of the Fisher pass. What a training
loss lacks is the scale: its gradient is that of a mean over tokens, perhaps of several batches, divided or multiplied
on the way to ``backward``. Every sample's gradient times one number is that of its summed log-likelihood, and this
number is known: the terms of the mean from the labels (or ``num_items_in_batch``), all else from the gradient that
arrives at the model's loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn

from ..core.criteria import CRITERIA, Criterion
from ..core.statistics import STATISTICS, Batch, Count
from ..tuner.config import FGGMConfig
from ..tuner.support import unwrapped
from .data_pass import FisherPass, Totals, batch_size, checkpointed_embeddings, sketch_of
from .hooks import ScoreCollector
from .likelihood import LogLikelihood, answer_count, task_type_of
from .processes import Ranks
from .reference import ReferenceData
from .report import SelectionReport
from .select import active_adapter, prepare, settle

LossScale = float | Callable[[Mapping[str, Any]], float]

_RANK_STRIDE = 2**32  # samples are numbered on each rank by itself


def require_online(config: FGGMConfig) -> None:
    """Raise ``ValueError`` if what the config asks for cannot be had from training's own passes."""
    criterion = CRITERIA[config.criterion]
    if not criterion.needs_data:
        raise ValueError(f"criterion {config.criterion!r} needs no data, so there is nothing to measure online")
    if any(STATISTICS[name].looks_at != "gradient" for name in criterion.task):
        raise ValueError(
            f"criterion {config.criterion!r} looks at inputs or outputs, which forward passes alone give: "
            "select_parameters costs little then, and there is no online selection by it"
        )
    if config.fisher_labels == "model":
        raise ValueError("fisher_labels='model' draws labels, and online selection takes the loss of the data's own")


class online_selection:
    """Measure in the loop's own passes what may move, and fix it when the block ends, or after ``steps``.

    Within it nothing of the adapter trains: the first passes of training only measure. Every forward of ``model`` in
    training mode is followed by its backward before the next; evaluation in between is left alone. Dropout is on, as it
    is in training. An exception leaves the model as it was.

    The values keep their identity when they get their size: an optimizer that was made before trains them
    afterwards. Wrap the model for several devices afterwards.

    Each sample is a row of the batch. Where ``torch.distributed`` is initialised, every rank opens it, feeds its own
    batches, and ends it; all choose the same.

    Args:
        model: what ``get_peft_model`` returned, or a model with injected FGGM layers; the one that the loop calls.
        steps: passes (batches, not steps of an optimizer that adds several up) to measure; the next one in training
            mode fixes the support first. By default all up to the end of the block.
        loss_scale: the number of terms in the mean that ``backward`` is called on, or a function of the model's inputs
            that returns it, for a loss that is not the model's own; by default known from the model's loss.
        reference: as ``select_parameters`` takes it; a dataloader of it is passed over when the support is fixed, as
            many of its samples as were measured.
        adapter_name: by default the active adapter; it has no support yet.
        history: as ``select_parameters`` takes it, as are ``protect`` and ``protection``.

    Attributes:
        report: of the selection, None until the support is fixed; its ``seconds`` are those beside training itself.
        samples: samples measured so far on this process.

    Raises:
        AlreadyTrainedError: the adapter holds trained values.
        NonFiniteScoreError: a score is NaN or infinite, from within ``backward``.
        RuntimeError: a forward without a backward of its own.
        ValueError: what ``select_parameters`` raises; the criterion has no online form; the adapter is selected
            already; the loss is not the model's own, and no ``loss_scale`` is given; the block ends without any pass.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int | None = None,
        *,
        loss_scale: LossScale | None = None,
        reference: ReferenceData = None,
        adapter_name: str | None = None,
        history: Sequence[str] | None = None,
        protect: Sequence[str] | None = None,
        protection: float | None = None,
    ):
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"steps must be an integer > 0 or None, got {steps!r}")
        self.model, self.steps, self.loss_scale = model, steps, loss_scale
        self.adapter_name, self.config = active_adapter(model, adapter_name)
        self.report: SelectionReport | None = None
        self.is_open = False
        self._counts = [Count(0, 0), Count(0, 0)]
        self._options: dict[str, Any] = {
            "reference": reference,
            "history": history,
            "protect": protect,
            "protection": protection,
        }
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def samples(self) -> int:
        return sum(count.samples for count in self._counts)

    def __enter__(self) -> online_selection:
        start = time.perf_counter()
        require_online(self.config)
        self._ranks, self._criterion = Ranks(), CRITERIA[self.config.criterion]
        self._task = _Measured(self.model, self.config, self.adapter_name, self._ranks, self._criterion)
        self._chooser = prepare(self._task, **self._options)
        self._chooser.groups(self._task, self.config.score_memory)  # raises where it would take several passes
        layers = self._chooser.layers
        if any(layer.selected[self.adapter_name] for layer in layers.values()):
            raise ValueError(
                f"adapter {self.adapter_name!r} has its support already; online selection is for a new adapter"
            )
        self._counts = [Count(0, 0), Count(0, 0)]
        self._passes = self._serial = 0
        self._pending: _Pass | None = None
        self._collector = _ScalingCollector(
            layers,
            self.adapter_name,
            self._criterion.task,
            checkpointed_embeddings(self.model),
            sketch_of(self.config),
        )
        self._collector.__enter__()
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
        ]
        for layer in layers.values():
            layer.selected[self.adapter_name] = True  # an empty support, which a training forward takes for one
        self.is_open = True
        self._collector.seconds += time.perf_counter() - start
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if not self.is_open:
            return
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def abandon(self) -> None:
        """End without a selection; the adapter has no support, as before."""
        self._collector.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        for layer in self._chooser.layers.values():
            layer.selected[self.adapter_name] = False
        self.is_open, self._pending = False, None

    @torch.inference_mode(False)  # the values made here must train
    def finish(self) -> SelectionReport:
        """Fix the support by what was measured so far; returns the report."""
        start, pending = time.perf_counter() - self._collector.seconds, self._pending
        self.abandon()
        with self._ranks.together("online selection"):
            if pending is not None and pending.has_begun:
                raise RuntimeError("a backward pass did not reach its end, so what was measured is incomplete")
        self._task.totals = self._summed()
        if not self._task.totals.samples:
            raise ValueError(
                "online selection saw no training step: within it call the model that was given, in training mode, and "
                "backward on its loss"
            )
        # of a reference as many samples as there were of the task
        outcome = self._chooser.from_data(self._task, self._task.totals.samples, self.config.score_memory)
        outcome.sample_passes -= outcome.samples  # those were training's own
        self.report = settle(self._task, self._chooser, outcome, start)
        return self.report

    def _summed(self) -> Totals:
        """What all ranks have measured."""
        sums = {
            (name, key): self._ranks.sum(tensor)
            for name, of_module in self._collector.sums.items()
            for key, tensor in of_module.items()
        }
        of_ranks = self._ranks.gather(self._counts)
        even, odd = (sum((counts[half] for counts in of_ranks), Count(0, 0)) for half in (0, 1))
        return Totals(lambda name, statistic: sums[name, statistic], (even, odd))

    # What the model's hooks do ------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._collector.listens = model.training and torch.is_grad_enabled()
        if not self._collector.listens:
            return
        if self._pending is not None and self._pending.has_begun:
            raise RuntimeError(
                "a backward pass did not reach its end, so what was measured is incomplete; open online_selection anew"
            )
        if self._passes == self.steps:
            self.finish()
            return
        inputs = kwargs or {str(number): value for number, value in enumerate(args)}
        self._serial += 1
        self._pending = self._read(inputs)
        self._collector.begin(self._pending.batch)

    def _read(self, inputs: Mapping[str, Any]) -> _Pass:
        _refuse_packed(inputs)
        labels, base = inputs.get("labels"), unwrapped(self.model)
        samples = batch_size(inputs, self._passes)
        first = self._ranks.rank * _RANK_STRIDE + self.samples
        half = (torch.arange(samples) + first) % 2
        mask = inputs.get("attention_mask")
        padding = mask == 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if self.loss_scale is not None:
            terms = self.loss_scale(inputs) if callable(self.loss_scale) else self.loss_scale
            answers = samples
        elif isinstance(labels, Tensor):
            terms = loss_terms(base, inputs, self.config.task_type)
            answers = answer_count(base, inputs, self.config.task_type)
        else:
            terms, answers = None, samples
        return _Pass(Batch(half, padding, self._passes, answers, first), terms, self.loss_scale is not None)

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._collector.listens and self._pending is not None:
            for name, tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._backward_reaches, self._serial, name))
        self._collector.listens = True  # also where a checkpointed block repeats its forward

    def _backward_reaches(self, serial: int, name: str, gradient: Tensor) -> None:
        if not self.is_open:
            return
        current = self._pending
        if serial != self._serial or current is None:
            raise RuntimeError(
                "online selection needs the backward of each forward before the model's next forward in training mode"
            )
        if current.has_begun:
            return
        self._collector.factor = current.factor(name, gradient)
        current.has_begun = True
        self._collector.backward_begins()
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        start = time.perf_counter()
        assert self._pending is not None
        self._collector.end(self._passes)
        batch = self._pending.batch
        for half in (0, 1):
            self._counts[half] += Count(int((batch.half == half).sum()), int(batch.number % 2 == half))
        self._passes, self._pending = self._passes + 1, None
        self._collector.seconds += time.perf_counter() - start


class _Pass:
    """One forward of the loop, and how its loss is scaled.

    Args:
        batch: what the collector must know.
        terms: of the mean; None where there are no labels.
        is_said: the user has said it, so that nothing is read off the loss.
    """

    def __init__(self, batch: Batch, terms: Any, is_said: bool):
        self.batch, self.terms, self.is_said, self.has_begun = batch, terms, is_said, False

    def factor(self, name: str, gradient: Tensor) -> Any:
        """What makes gradients of the loss those of the summed log-likelihood.

        Args:
            name: of the model's output that the backward has reached first.
            gradient: that has arrived there.
        """
        if self.is_said:
            return -self.terms
        if name == "log_probs":  # TRL's SFTTrainer makes its loss of them
            weights = gradient[gradient != 0]
            if len(weights) and bool(weights.min() == weights.max()):
                return 1 / weights[0]
        elif name == "loss" and self.terms is not None:
            return -self.terms / gradient
        raise ValueError(
            "online selection cannot tell how the loss is scaled, as it is not the model's own mean over its labels. "
            "Give loss_scale=; in a trainer, leave online_selection out"
        )


class _ScalingCollector(ScoreCollector):
    """Takes gradients of a loss times ``factor`` for those of the log-likelihood, and the time that it takes."""

    factor: Any = 1.0
    seconds = 0.0

    def record(self, name, x, g, gram):
        start = time.perf_counter()
        # widened first: the factor would take a gradient that is scaled for float16 out of its range
        wide = torch.promote_types(g.dtype, torch.float32)
        super().record(name, x, g.to(wide) * self.factor, gram)
        self.seconds += time.perf_counter() - start


class _Measured(FisherPass):
    """Stands where a pass over the task's data would: what it would find is there already."""

    totals: Totals

    def __init__(self, model: nn.Module, config: FGGMConfig, adapter_name: str, ranks: Ranks, criterion: Criterion):
        super().__init__(model, config, adapter_name, (), None, False, ranks, criterion.task)

    def over(self, dataloader: Iterable, statistics: Sequence[str], log_likelihood: LogLikelihood | None) -> FisherPass:
        config, ranks = self.config, self.ranks
        return FisherPass(self.model, config, self.adapter_name, dataloader, log_likelihood, False, ranks, statistics)

    def require_repeatable(self, passes: int) -> None:
        raise ValueError(
            f"score_memory={self.config.score_memory!r} would make {passes} passes over the data necessary, and online "
            "selection sees each batch once; raise it"
        )

    def run(self, *args: Any, **kwargs: Any) -> Totals:
        return self.totals


def loss_terms(model: nn.Module, inputs: Mapping[str, Any], task_type: str | None) -> Any:
    """How many times the model's own loss its summed negative log-likelihood is, up to what does not depend on weights.

    Args:
        inputs: of the model, with ``labels``; ``num_items_in_batch`` goes before their number.
    """
    labels = inputs["labels"]
    if (task_type or task_type_of(model)) == TaskType.SEQ_CLS:
        if getattr(getattr(model, "config", None), "num_labels", None) == 1:
            return len(labels) / 2  # of squares, where a normal density has half of them
        if labels.dim() == 2:
            return labels.numel()
    given = inputs.get("num_items_in_batch")
    return answer_count(model, inputs, task_type) if given is None else given


def _tensors(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a model's output, by name where they have one."""
    if isinstance(output, Tensor):
        return [("", output)]
    named = output.items() if isinstance(output, Mapping) else [("", value) for value in output]
    return [(name, value) for name, value in named if isinstance(value, Tensor)]


def _refuse_packed(inputs: Mapping[str, Any]) -> None:
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return
    starts = positions == 0
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        starts = starts & (mask != 0)
    if bool((starts.sum(1) > 1).any()):
        raise ValueError(
            "several sequences are packed into one row of the batch, and online selection cannot tell them apart; "
            "select before training (select_parameters, or the trainer's own selection), or do not pack"
        )
