"""The program ``fggm``: one module for each command, with its options (``add_options``) and its function ``run``."""


def main() -> None:
    """Entry point of the console script."""
    from .app import run_program

    run_program()
    from ..training.base_model import disconnect  # not to delay the help

    disconnect()


__all__ = ["main"]
