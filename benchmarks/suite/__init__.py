"""The benchmark suite: methods, measurements and goals are registries, and ``python -m suite`` runs them."""
