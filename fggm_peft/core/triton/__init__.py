"""The kernels that ``core/kernels.py`` sends tensors on a GPU to; nothing here is imported before one is met."""
