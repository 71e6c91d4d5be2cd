#!/usr/bin/env python
"""FGGM and plain fine-tuning learn the same three tasks in sequence, beside one another.

    python examples/demo/run.py                     a few minutes on two cores, no download
    python examples/demo/run.py --quantize 4bit     FGGM on a quantized base
    python examples/demo/run.py --model HUB_ID      another model

Ends with tables, a picture, ``results.json``, each task's FGGM delta as a PEFT adapter folder, and
a reading of the figures.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or folder (default: the model of a PyPI wheel)")
    parser.add_argument("--quantize", choices=("4bit", "8bit"), help="bitsandbytes; FGGM only")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the data and its order")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=("fggm", "plain", "plain-same-rate"),
        default=("fggm", "plain", "plain-same-rate"),
        help="which methods to run (default: all)",
    )
    return parser.parse_args()


def quiet_libraries(offline: bool) -> None:
    """Set what the libraries read when they are imported."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a missing optional CPU kernel


def main() -> None:
    """Run the demo from the command line."""
    arguments = parse_arguments()
    quiet_libraries(offline=arguments.model is None)
    from demo import run_demo  # not before the settings above

    run_demo(arguments)


if __name__ == "__main__":
    main()
