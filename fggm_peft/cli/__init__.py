"""The program ``fggm``: every module of this folder that has a function ``run`` is one of its commands.

Nothing in this folder imports torch or transformers before a command runs, so that ``fggm --help`` is quick.
"""


def main() -> None:
    """Entry point of the console script."""
    from .app import build

    build()()


__all__ = ["main"]
