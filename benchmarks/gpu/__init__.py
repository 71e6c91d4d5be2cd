"""Checks and measurements on a CUDA device: ``python benchmarks/gpu/run.py`` runs all parts and writes a page."""
