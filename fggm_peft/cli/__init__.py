"""The program ``fggm``: every module in this folder that has a function ``run`` is one of its commands."""


def main() -> None:
    """Entry point of the console script."""
    from .app import build

    build()()


__all__ = ["main"]
