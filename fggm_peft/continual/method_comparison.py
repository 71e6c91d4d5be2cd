"""Results of runs in the layout of PEFT's method comparison, so that its tools read them beside the published ones.

The layout is that of ``method_comparison/MetaMathQA/results`` in PEFT's repository: ``run_info``, ``train_info`` and
``meta_info``. What its tools call accuracy is here the mean score on all tasks at the end (OP). What they call
forgetting, the change of the loss on a text that is not learned, is here that of the stream's general text.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..tuner.files.atomic import digest_of_folder, write_whole
from .memory import ACCELERATOR_MEMORY, accelerator
from .methods import Method, make_method
from .methods.fine_tuning import FineTuning
from .methods.peft_method import PeftMethod
from .run import Run, runs_of
from .stream import Stream, StreamError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "fggm-peft")


def write_method_comparison(report: dict[str, Any], stream: Stream, folder: Path) -> list[Path]:
    """A file for each run of a report, named and laid out as PEFT's are.

    The training loss of the last steps, which PEFT's files have, is null: runs do not record it. Tokens are counted
    over whole epochs; those of a part of an epoch are its examples times the mean length. ``created_at`` is when
    this was written.

    Args:
        report: of ``report_of``.
        stream: whose runs these are.
        folder: such as ``method_comparison/MetaMathQA/results`` in a checkout of PEFT.

    Returns:
        The files.

    Raises:
        StreamError: the report has a run that the stream has not, or one that trained on an accelerator and has no
            memory figures.
    """
    runs = {(run.method.label, run.learning_rate, run.seed, run.order.name): run for run in runs_of(stream)}
    writer = _Writer(stream, datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0).isoformat())
    files = []
    for result in report["runs"]:
        key = (result["label"], result["learning_rate"], result["seed"], result["order"])
        if key not in runs:
            raise StreamError(f"the report has a run {key} that the stream has not")
        written = writer.file(runs[key], result)
        name = written["run_info"]["experiment_name"].replace("/", "--")
        files.append(folder / f"{name}.json")
        write_whole(files[-1], json.dumps(written, indent=2))
    return files


@dataclass(frozen=True)
class _Trained:
    """What a run had trained on when a task ended."""

    steps: int = 0
    samples: int = 0
    tokens: float = 0.0


class _Writer:
    """What all files of a stream have in common is found out once."""

    def __init__(self, stream: Stream, created_at: str):
        self.stream, self.created_at = stream, created_at
        self.base_parameters, self.element_size, self.commit = _base_model(stream)
        self.sizes = _sizes(stream, stream.model.load_tokenizer())
        self.environment = {
            "package_info": _packages(),
            "system_info": _system(),
            "pytorch_info": torch.__config__.show(),
        }

    def file(self, run: Run, result: dict[str, Any]) -> dict[str, Any]:
        method = make_method(run.method.name, **run.method.settings)
        config = _peft_config(method, run, self.stream.model.name)
        cost, trained = result["cost"], self._trained(method, run)
        training_seconds = cost["training_seconds"] + cost["selection_seconds"]
        label, _, rest = run.name.partition("/")
        return {
            "run_info": {
                "created_at": self.created_at,
                "total_time": training_seconds + cost["evaluation_seconds"],
                "experiment_name": f"{label}/{Path(self.stream.model.name).name}-{rest}",
                "peft_branch": f"v{importlib.metadata.version('peft')}",
                "train_config": self._train_config(run, trained[-1].steps),
                "peft_config": config,
                "error_msg": "",
            },
            "train_info": {
                **_memory(run, cost),
                "train_time": training_seconds,
                "file_size": cost["bytes"] or (self.base_parameters * self.element_size if method.trains else 0),
                "num_trainable_params": cost["parameters"],
                "num_total_params": self.base_parameters + (cost["parameters"] if _is_adapter(method) else 0),
                "status": "success",
                "metrics": _metrics(result, trained),
            },
            "meta_info": {
                "model_info": {"sha": self.commit, "created_at": None},
                "dataset_info": {
                    task.name: {"sha": task.fingerprint()["data"], "created_at": None} for task in run.order.tasks
                },
                **self.environment,
            },
        }

    def _trained(self, method: Method, run: Run) -> list[_Trained]:
        """After each task, or after all of them for a method that sees them at once."""
        sizes = [self.sizes[task.name, run.seed] for task in run.order.tasks]
        so_far, points = _Trained(), []
        for number in range(1 if method.sees_all_tasks else len(sizes)):
            examples = method.examples_in(number, [count for count, _ in sizes])
            steps, samples = self._steps_and_samples(number, run, sum(examples))
            tokens = sum(n * mean for n, (_, mean) in zip(examples, sizes, strict=True)) / max(1, sum(examples))
            so_far = _Trained(so_far.steps + steps, so_far.samples + samples, so_far.tokens + samples * tokens)
            points.append(so_far)
        return points

    def _steps_and_samples(self, number: int, run: Run, examples: int) -> tuple[int, int]:
        """As transformers' Trainer counts them: the last step of an epoch takes what is left."""
        if not examples:
            return 0, 0
        training = self.stream.training_of(run.order.tasks[number])
        batches = math.ceil(examples / training.batch_size)
        steps_of_epoch = math.ceil(batches / training.gradient_accumulation)
        steps = training.max_steps or math.ceil(training.epochs * steps_of_epoch)
        epochs, rest = divmod(steps, steps_of_epoch)
        in_rest = min(examples, rest * training.batch_size * training.gradient_accumulation)
        return steps, epochs * examples + in_rest

    def _train_config(self, run: Run, steps: int) -> dict[str, Any]:
        """The fields of PEFT's TrainConfig, null where a sequence has nothing of the kind; and the sequence."""
        stream, training = self.stream, self.stream.training
        lengths = [task.max_prompt_length + task.max_answer_length for task in stream.tasks]
        return {
            "model_id": stream.model.name,
            "dtype": stream.model.dtype,
            "max_seq_length": max(lengths),
            "batch_size": training.batch_size,
            "batch_size_eval": training.batch_size,
            "max_steps": steps,
            "eval_steps": None,
            "compile": False,
            "use_gc": False,
            "query_template": None,
            "seed": run.seed,
            "grad_norm_clip": training.max_grad_norm,
            "optimizer_type": "AdamW",
            "optimizer_kwargs": {"lr": run.learning_rate, "weight_decay": training.weight_decay},
            "lr_scheduler": training.schedule,
            "use_amp": False,
            "autocast_adapter_dtype": True,
            "generation_kwargs": {"do_sample": False},
            "attn_implementation": stream.model.attention,
            "init_kv_cache_prefix": None,
            "sequence": {
                "order": run.order.name,
                "tasks": {task.name: task.metric for task in run.order.tasks},
                "training": asdict(replace(training, learning_rate=run.learning_rate)),
            },
        }


def _metrics(result: dict[str, Any], trained: Sequence[_Trained]) -> list[dict[str, Any]]:
    """An entry after each task, with the mean score on the tasks so far; and the last one, which PEFT's tools read."""
    entries: list[dict[str, Any]] = []
    for number, (row, point) in enumerate(zip(result["R"], trained, strict=True)):
        seen = row[: number + 1] if len(trained) > 1 else row
        valid = sum(seen) / len(seen)
        entries.append({"step": point.steps, "valid accuracy": valid, "train samples": point.samples})
    last: dict[str, Any] = {
        "step": trained[-1].steps,
        "test accuracy": result["op"],
        "train loss": None,
        "train samples": trained[-1].samples,
        "train total tokens": round(trained[-1].tokens),
        "backward transfer": result["bwt"],
        "forward transfer": result["fwt"],
        "forgetting of tasks": result["forgetting"],
    }
    general = result["general"] or {}
    if general.get("change") is not None:  # without the key, PEFT's tools know that it was not measured
        last["forgetting"] = general["change"]
    last |= {f"{name} change": task["change"] for name, task in general.get("tasks", {}).items()}
    return [*entries, last]


def _is_adapter(method: Method) -> bool:
    return isinstance(method, PeftMethod)


def _peft_config(method: Method, run: Run, model: str) -> dict[str, Any] | None:
    """The adapter's config; None for plain full fine-tuning, which PEFT's tools know by that.

    Any other method that trains the model itself is not that: it goes by its own name, with its settings.
    """
    if method.name == FineTuning.name:
        return None
    if not isinstance(method, PeftMethod):
        return {"peft_type": method.name.upper(), **run.method.settings}
    config = method.make_config(0).to_dict() | {"base_model_name_or_path": model}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def _memory(run: Run, cost: dict[str, Any]) -> dict[str, int]:
    if "accelerator_memory" in cost:
        return {name: cost["accelerator_memory"][name] for name in ACCELERATOR_MEMORY}
    if accelerator() is not None:
        raise StreamError(f"{run.name} was computed without a record of its memory")
    return dict.fromkeys(ACCELERATOR_MEMORY, 0)


def _sizes(stream: Stream, tokenizer: PreTrainedTokenizerBase) -> dict[tuple[str, int], tuple[int, float]]:
    """Name of a task and seed -> how many examples it trains on, and their mean number of tokens."""
    sizes = {}
    for task in stream.tasks:
        for seed in stream.seeds:
            examples = task.examples("train", tokenizer, seed)
            tokens = sum(len(examples[number]["input_ids"]) for number in range(len(examples)))
            sizes[task.name, seed] = (len(examples), tokens / len(examples))
    return sizes


def _base_model(stream: Stream) -> tuple[int, int, str | None]:
    """Its parameters, the bytes of one, and its commit (of a Hub id) or the digest of its files (of a folder)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base = stream.model
    trust = {"trust_remote_code": base.trust_remote_code}
    config = AutoConfig.from_pretrained(base.name, revision=base.revision or "main", **trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **trust)
    dtype = getattr(torch, base.dtype, None) or config.dtype or torch.float32
    commit = digest_of_folder(Path(base.name)) if Path(base.name).is_dir() else getattr(config, "_commit_hash", None)
    return sum(parameter.numel() for parameter in model.parameters()), dtype.itemsize, commit


def _packages() -> dict[str, str | None]:
    """Versions; commits are those of checkouts, which installed packages are not."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[f"{name}-version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"{name}-version"] = None
        found[f"{name}-commit-hash"] = None
    return found


def _system() -> dict[str, str]:
    names = ("system", "release", "version", "machine", "processor")
    device = accelerator()
    return {
        **{name: getattr(platform, name)() for name in names},
        "accelerator": "none" if device is None else device.get_device_name(0),
    }
