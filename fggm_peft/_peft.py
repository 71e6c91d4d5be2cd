"""Imports PEFT without the messages of optional libraries about kernels that they do not find."""

import logging

_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    import peft  # noqa: F401
finally:
    logging.disable(_disabled)
