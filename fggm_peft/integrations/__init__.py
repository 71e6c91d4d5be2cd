"""FGGM inside other tools; one module for each, imported by nothing else in the package."""
