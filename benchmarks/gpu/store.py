"""The result file of a device. Every measurement is written at once, so that an interruption loses only the rest."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Contents = dict[str, Any]


def read(path: Path) -> Contents:
    """The contents of a result file, or an empty dict without a file."""
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def write(path: Path, contents: Contents) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(contents, indent=1) + "\n")
    unfinished.replace(path)  # a killed process leaves the old file or the new one


class Store:
    """The results and failures of one part: key -> figures, and key -> traceback."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def _of(self, contents: Contents) -> Contents:
        return contents["parts"].setdefault(self.part, {"results": {}, "failures": {}})

    def known(self) -> set[str]:
        """The keys that need no measurement. Failures count within a run; the next run repeats them."""
        part = self._of(read(self.path))
        return {*part["results"], *part["failures"]}

    def update(self, **fields: Any) -> None:
        contents = read(self.path)
        self._of(contents).update(fields)
        write(self.path, contents)

    def save(self, key: str, figures: Contents) -> None:
        contents = read(self.path)
        self._of(contents)["results"][key] = figures
        write(self.path, contents)

    def fail(self, key: str, error: str) -> None:
        contents = read(self.path)
        self._of(contents)["failures"][key] = error
        write(self.path, contents)

    def measure(self, key: str, call: Callable[[], Contents]) -> None:
        """Save the result of a call, or the traceback of its error. Known keys are skipped."""
        if key in self.known():
            return
        print(f"{self.part}: {key}", flush=True)
        start = time.perf_counter()
        try:
            figures = call()
        except Exception:
            self.fail(key, traceback.format_exc())
            if "CUDA error" in traceback.format_exc():  # no later call of this process can work
                raise
        else:
            self.save(key, {**figures, "took": time.perf_counter() - start})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
