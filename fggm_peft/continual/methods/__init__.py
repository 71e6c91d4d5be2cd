"""Methods that learn a stream of tasks. Each can be used on its own: ``make_method("fggm", density=0.3)``."""

from . import corda, ewc, fggm, fine_tuning, hft, migu, mofo, o_lora, replay, sdft  # noqa: F401
from .method import METHODS, Method, make_method
from .peft_method import PeftMethod

__all__ = ["METHODS", "Method", "PeftMethod", "make_method"]
