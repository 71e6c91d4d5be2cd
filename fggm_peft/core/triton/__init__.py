"""The kernels that ``core/kernels.py`` runs; they are imported when the first tensor on a GPU needs one."""
