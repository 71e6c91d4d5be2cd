#!/usr/bin/env python
"""Writes the demo's model and tasks to a folder, for the built-in stream ``demo``.

    python examples/demo/prepare.py demo-output/data
    fggm sequence demo --data demo-output/data --model demo-output/data/model --output demo-output/runs

Nothing is downloaded: the model comes from a Python package, and the tasks from files of the Python installation.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main() -> None:
    """Write the tasks, and the model if it is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="output folder for model/, one folder per task, general.txt and reference.txt"
    )
    parser.add_argument("--no-model", action="store_true", help="write only the tasks, to use another model")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from base_model import write_model
    from tasks import write_tasks

    write_tasks(arguments.folder)
    model = arguments.folder / "model"
    if not arguments.no_model and not (model / "model.safetensors").exists():
        write_model(model)


if __name__ == "__main__":
    main()
