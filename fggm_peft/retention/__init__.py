"""Harm decay: training that keeps what the model knew."""

from .harm_decay import HarmDecay, attach_harm_decay

__all__ = ["HarmDecay", "attach_harm_decay"]
