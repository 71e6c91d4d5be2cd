"""Merging deltas into base layers, and the report of what was merged."""
