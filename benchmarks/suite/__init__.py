"""The benchmark suite. Methods, measurements and goals are registries; ``python -m suite`` runs them."""
