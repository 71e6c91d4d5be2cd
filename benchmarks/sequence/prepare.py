"""Writes what ``stream.yaml`` needs: the model, the demo's tasks, and a link to the intents."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))


def main() -> None:
    """Write everything into one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="gets model/, a folder for each task, and general.txt")
    parser.add_argument("--intent", type=Path, required=True, help="CLINC150 intents in TRACE's format")
    arguments = parser.parse_args()
    from base_model import write_model
    from tasks import write_tasks

    write_tasks(arguments.folder)
    write_model(arguments.folder / "model")
    shutil.copytree(arguments.intent, arguments.folder / "intent", copy_function=shutil.copyfile, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
