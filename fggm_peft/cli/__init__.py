"""The program ``fggm``: one module for each command, with its options (``add_options``) and its function ``run``."""


def main() -> None:
    """Entry point of the console script."""
    from .app import run_program

    run_program()


__all__ = ["main"]
