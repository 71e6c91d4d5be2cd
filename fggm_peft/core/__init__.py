"""Scores, thresholds, supports and sparse products as plain functions over tensors.

This folder imports torch and nothing of PEFT or transformers (``tests/core/test_core_is_pure.py``).

Index convention, used in every docstring and einsum below: ``b`` sample, ``t`` token or position,
``n`` all positions of a batch (``b`` and ``t`` flattened), ``o`` output feature, ``i`` input feature,
``k`` selected entry. A weight is ``[o, i]`` everywhere in here.
"""

from .registry import Registry

__all__ = ["Registry"]
