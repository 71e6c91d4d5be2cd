"""Several adapters on one model: mixed batches, weighted sums, hot-swapping."""
