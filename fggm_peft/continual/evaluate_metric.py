"""The package's metrics with the interface of 🤗 Evaluate; on its own, because importing that takes seconds."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from .metrics import METRICS, sample_scores


class TaskMetric(evaluate.Metric):
    """The mean over samples of one metric of ``METRICS``, under its name: ``{"rouge_l": 0.41}``.

    Args:
        name: of the metric.
    """

    def __init__(self, name: str, **options: Any):
        # in memory: files in the cache are locked against other processes, and a sequence runs beside others
        super().__init__(config_name=name, **{"keep_in_memory": True, **options})

    def _info(self) -> evaluate.MetricInfo:
        metric = METRICS[self.config_name]
        columns = ["predictions", "references", *(["sources"] if metric.needs_source else [])]
        return evaluate.MetricInfo(
            description=metric.score.__doc__ or self.config_name,
            citation="",
            inputs_description="predictions, references: lists of texts; sari also takes sources. In [0, 1].",
            features=datasets.Features({column: datasets.Value("string") for column in columns}),
        )

    def _compute(
        self, predictions: list[str], references: list[str], sources: list[str] | None = None
    ) -> dict[str, float]:
        scores = sample_scores(self.config_name, predictions, references, sources)
        return {self.config_name: sum(scores) / len(scores)}
