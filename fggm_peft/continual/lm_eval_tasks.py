"""Tasks of EleutherAI's lm-evaluation-harness (the package lm_eval): one score for each task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .settings import StreamError, did_you_mean

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from torch import nn
    from transformers import PreTrainedTokenizerBase

MAIN_METRICS = ("acc_norm", "acc", "exact_match", "em", "f1", "word_perplexity", "perplexity", "bleu", "rougeL")
"""The score of a task is the first of these metrics that it has, or else its first metric."""


def require_tasks(names: Sequence[str], include: str | None) -> None:
    """Raise StreamError if lm_eval is not installed or does not know a task, group or tag.

    Args:
        include: folder with your own task files.
    """
    try:
        known = _task_manager(include).all_tasks
    except ImportError as error:
        raise StreamError(f"lm_eval needs the package lm_eval: pip install fggm-peft[general] ({error})") from error
    for name in names:
        if name not in known:
            where = "lm_eval" if include is None else f"lm_eval or in a readable YAML file in {include}"
            raise StreamError(f"lm_eval: no task {name!r} in {where}{did_you_mean(name, known)}")


@lru_cache
def require_data(names: tuple[str, ...], include: str | None) -> None:
    """Load the tasks' data; this downloads data that is not in the cache.

    Raises:
        StreamError: it cannot be loaded, a task is named twice (by its name and by a group), or a task would run code
            that the model writes.
    """
    try:
        with _quiet():
            tasks = _task_manager(include).load(list(names))["tasks"]
    except Exception as error:  # of lm_eval, of datasets, or of a task's own functions
        reason = " ".join(str(error).split())
        raise StreamError(f"general.lm_eval: cannot load {', '.join(names)}: {reason}") from error
    if unsafe := [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise StreamError(f"general.lm_eval: {unsafe[0]} runs code that the model writes; remove it")


def task_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    include: str | None = None,
    batch_size: int = 8,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """The score of each task: ``{"value", "metric", "higher_is_better"}``.

    A tag, or a group without a score of its own, is replaced by its members. The metric has the name of lm_eval, such
    as "acc_norm", with the filter if there is one, such as "exact_match,strict-match". Training modes and the random
    state of torch, numpy and Python change; the caller restores them.

    Args:
        options: of ``lm_eval.simple_evaluate``: ``limit`` (examples of each task, the first ones) and ``num_fewshot``
            (examples in the prompt, drawn with a fixed seed; None: the task's own number).
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = _task_manager(include)
    with _quiet():
        results: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),  # type: ignore[arg-type]
            tasks=list(names),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
            **options,
        )
    tags = {name: sorted(manager.task_index[name].tags) for name in manager.all_tags}
    members = {**tags, **results["group_subtasks"]}
    return {task: _score(results, task) for name in names for task in _with_scores(name, results, members)}


@lru_cache
def _task_manager(include: str | None) -> TaskManager:
    """The index of all tasks; building it takes seconds."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=include)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress lm_eval's warnings about its own command line."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _with_scores(name: str, results: Mapping[str, Any], members: Mapping[str, Sequence[str]]) -> list[str]:
    """The name itself if it has a score, else its members that have one."""
    if _metrics(results["results"].get(name, {})):
        return [name]
    return [task for member in members.get(name, ()) for task in _with_scores(member, results, members)]


def _score(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    metrics = _metrics(results["results"][name])
    ranks = {metric: rank for rank, metric in enumerate(MAIN_METRICS)}
    key = min(metrics, key=lambda key: ranks.get(key.split(",")[0], len(ranks)))  # the first one of several equals
    is_better = results["higher_is_better"].get(name, {}).get(key.split(",")[0]) is not False
    return {"value": float(metrics[key]), "metric": key.removesuffix(",none"), "higher_is_better": is_better}


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task by "metric,filter", without their standard errors."""
    numbers = {key: value for key, value in row.items() if "," in key and isinstance(value, (int, float))}
    return {key: value for key, value in numbers.items() if not key.split(",")[0].endswith("_stderr")}
