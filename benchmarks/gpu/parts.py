"""The parts of the GPU check, in the order in which their results are needed. A part is one function.

On a CPU the shapes are tiny: the figures show that the part runs, and nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import DEVICE, peak_mib
from suite.cases import Case, Setting
from suite.measurements import Step, base_of, batch_of, measure
from suite.methods import FGGM, METHODS, TARGETS, held_mib, targeted_values

from fggm_peft import FGGMConfig, estimate

from .store import Store

ROOT = Path(__file__).parents[2]
GPU = Setting(hidden=2048, layers=24, vocabulary=32000, base="bfloat16", length=512, batch=8, density=0.1)  # 1.3 G
TINY = Setting(hidden=64, layers=1, vocabulary=50, base="bfloat16", length=8, batch=2, density=0.1)
SIZES = ("length", "batch", "hidden", "layers")
SECONDS = 3.0  # of one timing


def small() -> bool:
    return DEVICE.type == "cpu"


def setting(**changes: Any) -> Setting:
    """The model of the measurements; tiny on a CPU, where sizes cannot change."""
    if small():
        return replace(TINY, **{name: value for name, value in changes.items() if name not in SIZES})
    return replace(GPU, **changes)


def measure_cases(store: Store, cases: list[Case]) -> None:
    for case in cases:
        store.measure(case.key, functools.partial(measure, case, 0 if small() else SECONDS))


# Parts --------------------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin that saves the result of each test."""

    def __init__(self, store: Store):
        self.store = store

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.store.fail(report.nodeid, str(report.longrepr))
        elif report.when == "call" or report.skipped:
            self.store.save(report.nodeid, {"took": report.duration, "outcome": report.outcome})


def tests(store: Store) -> None:
    """The tests marked ``gpu``, in several processes."""
    import pytest

    os.environ.setdefault("FGGM_TEST_DEVICE", DEVICE.type)
    marked = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not small() else []
    done = [f"--deselect={key}" for key in sorted(store.known())]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    status = pytest.main([*options, *workers, *done, *marked], plugins=[Recorder(store)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {status!r}")


def step(store: Store) -> None:
    """Time and peak memory of a training step; then the prediction of the dry run beside the measured peak."""
    long, checkpointing = {"length": 2048, "batch": 2}, {"checkpointing": True}
    changes: list[dict[str, Any]] = [
        {},
        {"hidden": 4096, "layers": 6},  # as wide as models of 7 B
        {"base": "nf4"},
        {"density": 0.01},
        {**long, **checkpointing},
        {"density": 0.3},
    ]
    changes += [{"base": "nf4", **long, **checkpointing}, long, checkpointing]
    measure_cases(store, [Case("training step", setting(**each)) for each in changes])
    for each in ({}, checkpointing):
        where = setting(**each)
        store.measure(f"predicted memory: {where.text()}", functools.partial(predicted_memory, where))


def predicted_memory(where: Setting) -> dict[str, Any]:
    """The peak of a step by ``estimate``, over the measured one, for each granularity."""
    base, batch = base_of(where), batch_of(where)
    rows = {}
    for method, granularity in FGGM.items():
        training = Step(METHODS[method](base, round(targeted_values(base) * where.density)), batch, where.checkpointing)
        training()
        measured = held_mib(training.model, training.optimizer) + peak_mib(training)
        del training
        config = FGGMConfig(target_modules=TARGETS, granularity=granularity, density=where.density, criterion="random")
        figures = estimate(
            base,
            config,
            batch_size=where.batch,
            sequence_length=where.length,
            checkpointing=where.checkpointing,
            make_batch=lambda size, length: batch,
        )
        predicted = figures.peak_bytes / 2**20
        rows[method] = {"peak_mib": measured, "predicted_mib": predicted, "ratio_min": predicted / measured}
    return {f"predicted memory: {where.text()}": {"floor": "the measured peak", "noise": 1.0, "rows": rows}}


def selection(store: Store) -> None:
    """The selection pass against a frozen forward and backward."""
    settings = [setting(), setting(base="nf4"), setting(length=2048, batch=2)]
    measure_cases(store, [Case("selection pass", each) for each in settings])


def decay(store: Store) -> None:
    """Harm decay at different intervals, and its statistics."""
    measure_cases(store, [Case("harm decay", setting()), Case("harm decay", setting(density=0.3))])


def merge(store: Store) -> None:
    """Saving, loading, merging and switching; decoding with merged (frozen) and unmerged adapters."""
    cases = [Case("decoding", setting(length=1, batch=1)), Case("adapter", setting(density=0.01))]
    cases += [Case("decoding", setting(length=1, batch=16)), Case("decoding", setting(base="nf4", length=1, batch=1))]
    measure_cases(store, list({case.key: case for case in cases}.values()))


def stream(store: Store) -> None:
    """The demo's stream with each of its methods."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for method in ("sft", "fggm" if small() else "retain"):
            store.measure(method, functools.partial(run_method, method, folder))


def run_method(method: str, folder: Path) -> dict[str, Any]:
    """Scores and costs of one method of the demo's stream; on a CPU of a stream with a tiny model."""
    from fggm_peft.continual.reading import read_stream
    from fggm_peft.continual.run import run_stream

    if small():
        sys.path.append(str(ROOT / "tests"))
        from streams import settings, write_stream

        data = folder if (folder / "model").exists() else write_stream(folder)
        read = read_stream(settings(data, methods=[method]))
    else:
        data = folder / "data"
        subprocess.run([sys.executable, str(ROOT / "examples" / "demo" / "prepare.py"), str(data)], check=True)
        read = read_stream("demo", data=str(data), model=str(data / "model")).with_methods([method])
    (result,) = run_stream(read, folder / method)
    return {name: result[name] for name in ("op", "diagonal", "bwt", "general")} | result["cost"]


PARTS: dict[str, Callable[[Store], None]] = {
    "tests": tests,
    "step": step,
    "selection": selection,
    "harm-decay": decay,
    "merge": merge,
    "stream": stream,
}
