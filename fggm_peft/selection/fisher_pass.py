"""One pass over the task's data that leaves nothing behind but running scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.errors import NonFiniteScoreError
from ..tuner.config import FGGMConfig
from ..tuner.layer import FGGMLayer
from .collector import ScoreCollector
from .log_likelihood import LogLikelihood, default_log_likelihood
from .untouched import untouched

Scores = dict[str, Tensor]  # module path -> [2, units], one running sum for each half of the samples
Counts = tuple[int, int]  # samples in each half


class FisherPass:
    """The empirical Fisher of a model on a task's data, for any group of its FGGM layers.

    Args:
        model: has the layers; may be wrapped by PEFT.
        config: of the adapter: whose labels, and the seed for drawing them.
        adapter_name: its own delta is switched off meanwhile.
        dataloader: iterable of batches.
        log_likelihood: by default what fits the model's head.
        progress: show a bar on a terminal.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FGGMConfig,
        adapter_name: str,
        dataloader: Iterable[Mapping[str, Any]],
        log_likelihood: LogLikelihood | None,
        progress: bool,
    ):
        if log_likelihood is not None and config.fisher_labels == "model":
            raise ValueError(
                "fisher_labels='model' draws labels in the library's own log-likelihoods and has no meaning with "
                "log_likelihood=; draw the labels in your function and set fisher_labels='data'"
            )
        self.model, self.config, self.adapter_name = model, config, adapter_name
        self.dataloader, self.log_likelihood, self.progress = dataloader, log_likelihood, progress

    def require_repeatable(self, passes: int) -> None:
        """Raise ``ValueError`` if the data can be read only once."""
        if iter(self.dataloader) is self.dataloader:
            raise ValueError(
                f"score_memory makes {passes} passes over the data necessary, and this dataloader is an iterator that "
                "can be read once; pass a DataLoader or a list of batches"
            )

    def run(
        self,
        layers: dict[str, FGGMLayer],
        limit: int | None,
        enough: Callable[[Scores, Counts], bool] | None,
        first_check: int,
        description: str,
    ) -> tuple[Scores, Counts]:
        """Sum squared per-sample gradients until the limit, the end of the data, or ``enough``.

        Args:
            layers: module path -> layer to score.
            limit: samples at most.
            enough: asked at ``first_check`` samples and at every doubling.

        Raises:
            ValueError: no batch, or one without labels.
            NonFiniteScoreError: a log-likelihood or a score is NaN or infinite.
        """
        log_likelihood, model = self._likelihood()
        counts = [0, 0]
        with (
            untouched(self.model),
            self._switched_off(layers),
            ScoreCollector(layers, self.adapter_name, self._checkpointed_embeddings()) as collector,
            tqdm(total=limit, desc=description, unit="sample", disable=None if self.progress else True) as bar,
        ):
            for index, batch in enumerate(self.dataloader):
                batch, size = self._prepared(batch, index, None if limit is None else limit - sum(counts))
                half = (torch.arange(size) + sum(counts)) % 2
                self._score(collector, model, log_likelihood, batch, half, index)
                counts[0], counts[1] = counts[0] + int((half == 0).sum()), counts[1] + int(half.sum())
                bar.update(size)
                if limit is not None and sum(counts) >= limit:
                    break
                if enough is not None and sum(counts) >= first_check and min(counts):
                    first_check *= 2
                    if enough(collector.scores, (counts[0], counts[1])):
                        break
            if not sum(counts):
                raise ValueError("the dataloader is empty; select_parameters needs at least one batch")
        return collector.scores, (counts[0], counts[1])

    def _likelihood(self) -> tuple[LogLikelihood, nn.Module]:
        if self.log_likelihood is not None:
            return self.log_likelihood, self.model
        base = unwrapped(self.model)
        generator = None
        if self.config.fisher_labels == "model":
            generator = torch.Generator().manual_seed(self.config.seed)
        return default_log_likelihood(base, self.config.task_type, generator), base

    def _prepared(self, batch: Mapping[str, Any], index: int, room: int | None) -> tuple[dict[str, Any], int]:
        """The batch on the model's device, cut to the samples that are still wanted, and its size."""
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batch {index} is a {type(batch).__name__}; batches must be dicts as the model takes them"
            )
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
        if not tensors:
            raise ValueError(f"batch {index} has no tensors")
        size = len(batch["labels"]) if isinstance(batch.get("labels"), Tensor) else len(tensors[0])
        if room is not None and room < size:
            batch = {
                key: value[:room] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
                for key, value in batch.items()
            }
            size = room
        device = next(self.model.parameters()).device
        return dict(send_to_device(dict(batch), device)), size

    def _score(self, collector, model, log_likelihood, batch, half: Tensor, index: int) -> None:
        mask = batch.get("attention_mask")
        padding = mask == 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        collector.begin(half, padding)
        value = log_likelihood(model, batch)
        if not isinstance(value, Tensor) or value.shape != half.shape:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"log_likelihood must return one number for each of {len(half)} samples, got {shape}")
        if not torch.isfinite(value).all():
            raise NonFiniteScoreError(f"the log-likelihood of batch {index} is NaN or infinite: {value.tolist()}")
        collector.backward(value)
        collector.end(index)

    @contextmanager
    def _switched_off(self, layers: dict[str, FGGMLayer]):
        """The Fisher information is taken where training starts: without the adapter's own delta."""
        scales = {layer: layer.scaling[self.adapter_name] for layer in layers.values()}
        for layer in layers.values():
            layer.scaling[self.adapter_name] = 0.0
        try:
            yield
        finally:
            for layer, scale in scales.items():
                layer.scaling[self.adapter_name] = scale

    def _checkpointed_embeddings(self) -> nn.Module | None:
        if not any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            return None
        get = getattr(unwrapped(self.model), "get_input_embeddings", None)
        try:
            return get() if callable(get) else None
        except NotImplementedError:  # transformers' own answer for a model without one
            return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of a ``PeftModel``; its FGGM layers stay in it."""
    while callable(get := getattr(model, "get_base_model", None)):
        model = get()
    return model
