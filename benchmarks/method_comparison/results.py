"""Writes the results of ``fggm sequence`` in the layout of PEFT's method comparison, for use with PEFT's tools.

    python benchmarks/method_comparison/results.py stream.yaml runs results

The layout is that of ``method_comparison/MetaMathQA/results`` in PEFT's repository: ``run_info``, ``train_info`` and
``meta_info``. The test accuracy is the mean score on all tasks after the last one (OP). The forgetting is the change of
the loss on the stream's general text.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fggm_peft.continual.memory import accelerator
from fggm_peft.continual.methods import Method
from fggm_peft.continual.methods.fine_tuning import FineTuning
from fggm_peft.continual.methods.peft_method import PeftMethod
from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import Run, runs_of
from fggm_peft.continual.stream import Stream
from fggm_peft.tuner.files.atomic import digest_of_folder

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "fggm-peft")


def write_results(stream: Stream, output: Path, folder: Path) -> list[Path]:
    """Write a file for each finished run of a stream, named and laid out like PEFT's.

    PEFT's files contain the training loss of the last steps; it is null here because runs do not record it. The maximum
    of the memory is that of the allocated memory, so call this on the machine that computed the runs. The number of
    tokens is the number of samples times the mean length of a task's examples, so it is exact for whole epochs.

    Args:
        output: folder of ``run_stream``.
        folder: such as ``method_comparison/MetaMathQA/results`` in a checkout of PEFT.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = _common(stream)
    files = []
    for run in runs_of(stream):
        run_folder = output / "runs" / run.name
        if not run.is_finished(output):
            continue
        result, entries = (json.loads((run_folder / name).read_text()) for name in ("run.json", "tasks.json"))
        content = _content(stream, run, result, entries, common)
        name = content["run_info"]["experiment_name"].replace("/", "--")
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(content, indent=2))
    return files


def _common(stream: Stream) -> dict[str, Any]:
    """Values that are the same for all runs of a stream."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base = stream.model
    trust = {"trust_remote_code": base.trust_remote_code}
    config = AutoConfig.from_pretrained(base.name, revision=base.revision or "main", **trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **trust)
    dtype = getattr(torch, base.dtype, None) or config.dtype or torch.float32
    is_folder = Path(base.name).is_dir()
    return {
        "created_at": datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0).isoformat(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes_per_parameter": dtype.itemsize,
        "commit": digest_of_folder(Path(base.name)) if is_folder else getattr(config, "_commit_hash", None),
        "tokenizer": base.load_tokenizer(),
        "environment": {
            "package_info": _packages(),
            "system_info": _system(),
            "pytorch_info": torch.__config__.show(),
        },
    }


def _content(
    stream: Stream, run: Run, result: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], common: Mapping[str, Any]
) -> dict[str, Any]:
    method = run.method.method()
    cost, metrics = result["cost"], _metrics(stream, run, result, entries, common["tokenizer"])
    training_seconds = cost["training_seconds"] + cost["selection_seconds"]
    label, _, rest = run.name.partition("/")
    dense_bytes = common["parameters"] * common["bytes_per_parameter"] if method.trains else 0
    return {
        "run_info": {
            "created_at": common["created_at"],
            "total_time": training_seconds + cost["evaluation_seconds"],
            "experiment_name": f"{label}/{Path(stream.model.name).name}-{rest}",
            "peft_branch": f"v{importlib.metadata.version('peft')}",
            "train_config": _train_config(stream, run, metrics[-1]["step"]),
            "peft_config": _peft_config(method, run, stream.model.name),
            "error_msg": "",
        },
        "train_info": {
            **_memory(cost),
            "train_time": training_seconds,
            "file_size": cost["bytes"] or dense_bytes,
            "num_trainable_params": cost["parameters"],
            "num_total_params": common["parameters"] + (cost["parameters"] if isinstance(method, PeftMethod) else 0),
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": {
            "model_info": {"sha": common["commit"], "created_at": None},
            "dataset_info": {
                task.name: {"sha": task.fingerprint()["data"], "created_at": None} for task in run.order.tasks
            },
            **common["environment"],
        },
    }


def _train_config(stream: Stream, run: Run, steps: int) -> dict[str, Any]:
    """The fields of PEFT's TrainConfig, null where a sequence has no such value, and a description of the sequence."""
    training = stream.training
    return {
        "model_id": stream.model.name,
        "dtype": stream.model.dtype,
        "max_seq_length": max(task.max_prompt_length + task.max_answer_length for task in stream.tasks),
        "batch_size": training.batch_size,
        "batch_size_eval": training.evaluation_batch_size or training.batch_size,
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
            "training": {**training.model_dump(), "learning_rate": run.learning_rate},
        },
    }


def _metrics(
    stream: Stream, run: Run, result: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], tokenizer: Any
) -> list[dict[str, Any]]:
    """One entry after each task with the mean score on the tasks so far, and a last entry, which PEFT's tools read."""
    steps, samples, tokens = 0, 0, 0.0
    metrics: list[dict[str, Any]] = []
    for number, entry in enumerate(entries[1:]):
        sees_all = entry["task"] == "all"
        new_samples = _samples(entry, stream, run, number)
        lengths = [
            len(row["input_ids"])
            for task in (run.order.tasks if sees_all else [run.order.tasks[number]])
            for row in task.examples("train", tokenizer, run.seed)
        ]
        steps, samples = steps + entry["steps"], samples + new_samples
        tokens += new_samples * sum(lengths) / len(lengths)
        scores = result["R"][number] if sees_all else result["R"][number][: number + 1]
        metrics.append({"step": steps, "valid accuracy": sum(scores) / len(scores), "train samples": samples})
    last: dict[str, Any] = {
        "step": steps,
        "test accuracy": result["op"],
        "train loss": None,
        "train samples": samples,
        "train total tokens": round(tokens),
        "backward transfer": result["bwt"],
        "forward transfer": result["fwt"],
        "forgetting of tasks": result["forgetting"],
    }
    if result["general"] is not None:  # PEFT's tools treat a missing key as "not measured"
        last["forgetting"] = result["general"]
    return [*metrics, last]


def _samples(entry: Mapping[str, Any], stream: Stream, run: Run, number: int) -> int:
    """Samples in the steps of one task; as in transformers' Trainer, the last step of an epoch may be smaller."""
    if not entry["steps"]:
        return 0
    samples_per_step = stream.training.batch_size * stream.training.gradient_accumulation
    steps_per_epoch = -(-entry["examples"] // samples_per_step)
    epochs, rest = divmod(entry["steps"], steps_per_epoch)
    return epochs * entry["examples"] + min(entry["examples"], rest * samples_per_step)


def _peft_config(method: Method, run: Run, model: str) -> dict[str, Any] | None:
    """The adapter's config. PEFT's tools recognize plain full fine-tuning by None.

    Other methods that train the model itself are described by their name and settings.
    """
    if method.name == FineTuning.name:
        return None
    if not isinstance(method, PeftMethod):
        return {"peft_type": method.name.upper(), **run.method.options}
    config = method.make_config().to_dict() | {"base_model_name_or_path": model}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def _memory(cost: Mapping[str, Any]) -> dict[str, int]:
    """The memory that PEFT's tools read. A sequence records one peak; 0 stands for values that it does not record."""
    return {
        "accelerator_memory_reserved_avg": 0,
        "accelerator_memory_max": 0 if accelerator() is None else cost["peak_memory"],
        "accelerator_memory_reserved_99th": 0,
    }


def _packages() -> dict[str, str | None]:
    """Versions. The commits are null because installed packages have none."""
    info: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            info[f"{name}-version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            info[f"{name}-version"] = None
        info[f"{name}-commit-hash"] = None
    return info


def _system() -> dict[str, str]:
    names = ("system", "release", "version", "machine", "processor")
    device = accelerator()
    return {
        **{name: getattr(platform, name)() for name in names},
        "accelerator": "none" if device is None else device.get_device_name(0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stream", help="the file or name that was given to fggm sequence")
    parser.add_argument("output", type=Path, help="the output folder of fggm sequence")
    parser.add_argument("results", type=Path, help="folder for the result files")
    parser.add_argument("--model", help="replaces the model in the stream file")
    parser.add_argument("--data", help="replaces the data folder in the stream file")
    arguments = parser.parse_args()
    stream = read_stream(arguments.stream, model=arguments.model, data=arguments.data)
    for file in write_results(stream, arguments.output, arguments.results):
        print(file)


if __name__ == "__main__":
    main()
