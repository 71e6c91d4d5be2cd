"""Groups of fields of ``FGGMConfig`` with their help and checks."""
