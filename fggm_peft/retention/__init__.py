"""Harm decay: training that keeps what the model knew, and measures of how far a model has moved."""

from .drift import kl_divergence, predicted_drift, scale_to_budget_
from .harm_decay import HarmDecay, attach_harm_decay

__all__ = ["HarmDecay", "attach_harm_decay", "kl_divergence", "predicted_drift", "scale_to_budget_"]
