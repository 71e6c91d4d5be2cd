"""Sequences of tasks: what a stream is, what is measured on it, and how runs are compared."""
