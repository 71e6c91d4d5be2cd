"""Checks this library on a CUDA device in a few minutes: tests, then speed and memory beside PEFT's methods.

Each part runs in its own process with a share of the time. Every result is written at once to
benchmarks/results/gpu/<card>.json, so an interruption loses only the rest: the same command continues. A part or a
measurement that fails is recorded with its traceback, and the next run repeats it. In the end a page is written next to
the results. On a CPU all shapes are tiny, and the file is cpu.json.

python benchmarks/gpu/run.py [--minutes 9] [--parts tests,step] [--output FOLDER] [--again]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # instead of this file's folder, so that gpu is a package
    sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from common import DEVICE, RESULTS, machine  # noqa: E402

from gpu import page, store  # noqa: E402

SCRIPT = Path(__file__)
STARTING = 20  # seconds that a part needs at least; most of them import packages
SHARES = {"tests": 22, "step": 32, "selection": 10, "harm-decay": 12, "merge": 12, "stream": 12}
"""The parts in the order in which their results are needed, and their shares of the time."""


def card() -> str:
    """The name of the result file."""
    return machine()["cuda"].replace(" ", "-") if DEVICE.type == "cuda" else "cpu"


def run_part(name: str, file: Path, seconds: float) -> None:
    """Run a part in its own process, again after a crash while it makes progress, and record how it ended."""
    results, log = store.Store(file, name), file.with_suffix(f".{name}.log")
    start, status, known = time.monotonic(), "failed", None
    command = [sys.executable, str(SCRIPT), "--part", name, "--file", str(file)]
    while status == "failed" and known != results.known():
        known = results.known()
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait(max(1.0, seconds - (time.monotonic() - start)))
                status = "failed" if process.returncode else "finished"
            except subprocess.TimeoutExpired:
                status = f"stopped after {seconds:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.wait()
    error = "" if status == "finished" else log.read_text(errors="replace")[-5000:]
    results.update(status=status, seconds=time.monotonic() - start, error=error)
    log.unlink()


def run(parts: list[str], file: Path, minutes: float) -> None:
    """Run the parts, each with its share of the time that is left."""
    end = time.monotonic() + 60 * minutes
    contents = store.read(file)
    for part in contents["parts"].values():  # failures are repeated
        part["failures"] = {}
    store.write(file, {**contents, "machine": machine()})
    for number, name in enumerate(parts):
        left = end - time.monotonic()
        seconds = left * SHARES[name] / sum(SHARES[other] for other in parts[number:])
        if seconds < STARTING:
            seconds = left  # too little for every part: the first ones are the most important
        if left < STARTING:
            store.Store(file, name).update(status="no time left", seconds=0.0, error="")
        else:
            run_part(name, file, seconds)
        print(page.summary(name, store.read(file)["parts"][name]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="limit for all parts together (default: 9)")
    parser.add_argument("--parts", default=",".join(SHARES), help="parts to run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="folder of the results and the page")
    parser.add_argument("--again", action="store_true", help="repeat all measurements of the parts")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:  # the process of one part
        from gpu.parts import PARTS

        PARTS[arguments.part](store.Store(arguments.file, arguments.part))
        return
    names = arguments.parts.split(",")
    if unknown := set(names) - set(SHARES):
        parser.error(f"unknown parts {sorted(unknown)}; the parts are {', '.join(SHARES)}")
    file = arguments.output / f"{card()}.json"
    if arguments.again:
        contents = store.read(file)
        contents["parts"] = {name: part for name, part in contents["parts"].items() if name not in names}
        store.write(file, contents)
    run([name for name in SHARES if name in names], file, arguments.minutes)
    file.with_suffix(".md").write_text(page.text(store.read(file)))
    print(f"written to {file} and {file.with_suffix('.md')}")


if __name__ == "__main__":
    main()
