"""One pass over data that collects statistics of a model and leaves the model unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.covariance import Spectrum
from ..core.errors import NonFiniteScoreError
from ..core.harm_decay import InputMetric
from ..tuner.config import FGGMConfig
from ..tuner.files.input_covariance import InputCovariance
from ..tuner.support import unwrapped
from ..tuner.target import Targets
from .frozen_model import frozen_in_eval_mode, without_delta
from .hooks import LayerHooks
from .layout import Layout, Layouts
from .likelihood import LogLikelihood, default_log_likelihood
from .processes import Processes
from .recorder import BatchRecorder
from .rounds import Round, callable_base, rounds
from .running_sums import RunningSums, Totals


@dataclass
class DataPass:
    """Statistics of a model on some data, for any group of targets.

    Args:
        model: the model with the adapter; may be wrapped by PEFT.
        config: the adapter's config.
        log_likelihood: by default the one that fits the model's head.
        processes: the processes that read a share of the data each.
        statistics: names of the statistics to collect.
        metrics: module path -> mapping of the layer's inputs, before gradients are computed from them.
        prepare: completes a batch before it is given to ``log_likelihood``.
    """

    model: nn.Module
    config: FGGMConfig
    dataloader: Iterable[Mapping[str, Any]]
    log_likelihood: LogLikelihood | None = None
    progress: bool = False
    processes: Processes = field(default_factory=Processes)
    statistics: Sequence[str] = ("fisher",)
    metrics: Mapping[str, InputMetric] = field(default_factory=dict)
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None

    def run(
        self,
        targets: Targets,
        limit: int | None = None,
        is_enough: Callable[[Totals], bool] | None = None,
        first_check: int = 1,
        description: str = "",
    ) -> Totals:
        """Collect statistics until the limit, the end of the data, or until ``is_enough``.

        Args:
            targets: the weights to measure.
            limit: largest number of samples.
            is_enough: called after ``first_check`` samples and at every doubling, with the statistics so far.

        Raises:
            ValueError: no batch, or a batch without labels.
            NonFiniteScoreError: a log-likelihood or a score is NaN or infinite.
        """
        sums, seen, has_answer, processes = RunningSums(targets, self.statistics), 0, False, self.processes
        log_likelihood = self._log_likelihood()
        layers = {path: target.layer for path, target in targets.items() if target.layer.reads_inputs}
        # a function of the user's may compare samples with each other
        one_by_one = None if self.log_likelihood else False
        if len(layers) < len(targets):  # the gradient of a parameter is the sum over the batch
            one_by_one = True
        run = None if processes.share(self.model) else log_likelihood
        layouts = Layouts(layers, run, unwrapped(self.model), one_by_one)
        with (
            frozen_in_eval_mode(self.model),
            without_delta(targets),
            LayerHooks(targets, _checkpointed_embeddings(self.model)) as hooks,
        ):
            for round in rounds(self.model, self.dataloader, processes, limit, description, self.progress):
                with processes.together("the selection pass"):
                    if self.prepare is not None and round.batch is not None:
                        round = round._replace(batch=self.prepare(round.batch))
                    for part, layout in layouts.parts(round):
                        has_answer |= self._add_batch(hooks, sums, log_likelihood, part, layout)
                seen = round.end
                if is_enough is not None and first_check <= seen != limit:
                    while first_check <= seen:
                        first_check *= 2
                    if is_enough(sums.totals(processes, seen)):
                        break
            if sums.needs_backward and not any(processes.gather(has_answer)):
                raise ValueError("all labels of all batches are -100, so there is no answer to take a likelihood of")
        return sums.totals(processes, seen)

    def _log_likelihood(self) -> Callable[[Mapping[str, Any]], Tensor]:
        """The log-likelihood of each sample of a batch."""
        if self.log_likelihood is not None:
            return partial(self.log_likelihood, self.model)
        default = default_log_likelihood(unwrapped(self.model), self.config.task_type)
        return partial(default, callable_base(self.model))

    def _add_batch(
        self, hooks: LayerHooks, sums: RunningSums, log_likelihood: Callable, round: Round, layout: Layout
    ) -> bool:
        """Add the statistics of one batch; returns whether a sample of it has an answer."""
        half = (torch.arange(layout.samples) + round.first) % 2
        hooks.recorder = recorder = BatchRecorder(sums, layout, half, self.metrics, counts=round.size > 0)
        with torch.set_grad_enabled(sums.needs_backward):
            value = log_likelihood(round.batch)
        if not isinstance(value, Tensor) or value.shape != half.shape:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"log_likelihood must return one number for each of {len(half)} samples, got {shape}")
        if not torch.isfinite(value).all():
            message = f"the log-likelihood of batch {round.number} is NaN or infinite: {value.tolist()}"
            raise NonFiniteScoreError(message)
        if sums.needs_backward:
            recorder.backward(value if round.size else value * 0)
        recorder.finish(round.number)
        hooks.recorder = None
        return bool(round.size and value.any())


def input_metrics(targets: Targets, covariance: InputCovariance) -> dict[str, InputMetric]:
    """The mapping of each target's inputs for gains under decay; targets with the same input share its spectrum."""
    spectra: dict[str, Spectrum] = {}
    metrics = {}
    for path, target in targets.items():
        key = covariance.inputs[path]
        if key not in spectra:
            spectra[key] = covariance[path].to(target.indices.device).spectrum()
        metrics[path] = InputMetric(spectra[key], of_columns=target.granularity.weight_dim == 1)
    return metrics


def _checkpointed_embeddings(model: nn.Module) -> nn.Module | None:
    """The input embeddings, if the model uses gradient checkpointing."""
    get = getattr(unwrapped(model), "get_input_embeddings", None)
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    try:
        return get() if checkpoints and callable(get) else None
    except NotImplementedError:  # from transformers, for a model without input embeddings
        return None
