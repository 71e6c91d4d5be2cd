"""What a command prints while it works: only what concerns the user."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

_LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "torchao", "transformers")
_LOADING = "transformers.modeling_utils"
"""Its warnings name weights that a checkpoint does not have."""


@contextmanager
def only_relevant() -> Iterator[None]:
    """Show warnings of this package in one line, and errors, but no other warnings and logs of libraries.

    Progress bars of transformers are shown in terminals only, like those of this package.
    """
    loggers = [logging.getLogger(name) for name in (*_LIBRARIES, _LOADING)]
    levels, has_bars = [logger.level for logger in loggers], transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.WARNING if logger.name == _LOADING else logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        # frame 0 is this function, 1 is in the module warnings, and 2 has warned
        text, origin = " ".join(str(message).split()), sys._getframe(2).f_globals.get("__name__", "")
        if origin.partition(".")[0] == __name__.partition(".")[0] and text not in shown:
            shown.add(text)
            print(f"fggm: warning: {text}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if has_bars:
            transformers_logging.enable_progress_bar()
