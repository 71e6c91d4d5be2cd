"""Does it matter for the trained model that a selection stops early? ``num_samples="auto"`` against all samples.

python benchmarks/samples_trained.py DEMO_DATA STUDY_DATA --output FOLDER

DEMO_DATA is the folder of examples/demo/prepare.py, STUDY_DATA the one of benchmarks/study/prepare.py. Both variants
run the recommended recipe on the demo's stream and on the tuning stream of the study, 80 steps per task, with three
seeds. The command continues where it was stopped, and several processes may share the work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from common import show, write

from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import Run, run_stream, runs_of
from fggm_peft.continual.stream import Stream

RECIPE = {"name": "fggm", "preset": "retain", "reference": ["reference.txt", "history"], "learning_rates": [1.6e-3]}
METHODS = [{**RECIPE, "label": "auto"}, {**RECIPE, "label": "all samples", "num_samples": None}]
SEEDS = [0, 1, 2]
TRAINING = {"batch_size": 4, "evaluation_batch_size": 50, "schedule": "linear", "warmup_ratio": 0.1, "bf16": True}
TUNING = Path(__file__).parent / "study" / "tuning.yaml"


def stream_of(source: str | Path, data: Path) -> Stream:
    overrides = {"methods": METHODS, "seeds": SEEDS, "training": TRAINING}
    return read_stream(source, data=data, model=data / "model", **overrides)


def figures(run: Run, output: Path) -> dict[str, Any]:
    """The result of a run, and what its selections read and cost."""
    result = json.loads((run.folder(output) / "run.json").read_text())
    configs = sorted((run.folder(output) / "tasks").rglob("adapter_config.json"))
    selections = [json.loads(path.read_text())["selection"] for path in configs]
    seconds = result["cost"]["selection_seconds"]
    return {
        **{name: result[name] for name in ("label", "seed", "op", "diagonal", "bwt", "general_worst")},
        "samples": [selection["samples"] for selection in selections],
        "regret": [selection["regret"] for selection in selections],
        "selection_over_training": seconds / result["cost"]["training_seconds"],
    }


def main() -> None:
    """Compute the runs, and write those of the streams that are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo_data", type=Path)
    parser.add_argument("study_data", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    arguments = parser.parse_args()
    streams = {"demo": stream_of("demo", arguments.demo_data), "tuning": stream_of(TUNING, arguments.study_data)}
    results = {}
    for name, stream in streams.items():
        output = arguments.output / name
        for _ in run_stream(stream, output, resume=True):
            pass
        if all(run.is_finished(output) for run in runs_of(stream)):  # or another process computes the others
            results[name] = [figures(run, output) for run in runs_of(stream)]
    for name, rows in results.items():
        show(name, {label: _means([row for row in rows if row["label"] == label]) for label in ("auto", "all samples")})
    print("written to", write("samples_trained", results))


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    means = {name: fmean(row[name] for row in rows) for name in ("op", "diagonal", "bwt", "selection_over_training")}
    return means | {"most samples": max(count for row in rows for count in row["samples"])}


if __name__ == "__main__":
    main()
