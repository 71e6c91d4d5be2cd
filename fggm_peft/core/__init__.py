"""Scores, thresholds, supports and sparse products as plain functions over tensors.

This folder imports torch, but neither PEFT nor transformers (``tests/core/test_core_is_pure.py``).

Index convention of every docstring and einsum: ``b`` sample, ``t`` token or position, ``n`` all positions of a batch
(``b`` and ``t`` flattened), ``o`` output feature, ``i`` input feature, ``k`` selected unit. A weight is ``[o, i]``.
"""

from .registry import Registry

__all__ = ["Registry"]
