#!/usr/bin/env python
"""Writes the demo's model and tasks into a folder, for the ready stream ``demo``.

    python examples/demo/prepare.py demo-output/data
    fggm sequence demo --data demo-output/data --model demo-output/data/model --output demo-output/runs

Nothing is downloaded: the model comes as a Python package, the tasks are made of what every Python carries.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main() -> None:
    """Write everything that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="gets model/, a folder for each task, and general.txt")
    parser.add_argument("--no-model", action="store_true", help="only the tasks, for a model of your own")
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
