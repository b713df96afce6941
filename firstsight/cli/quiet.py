"""Silence libraries in commands whose output a person reads."""


def quiet_transformers() -> None:
    """Silence transformers' progress bars and its notes on layers in this process."""
    from transformers.utils import logging  # not installed where exported models alone are run

    logging.set_verbosity_error()
    logging.disable_progress_bar()
