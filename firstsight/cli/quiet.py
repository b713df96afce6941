"""Silence libraries in commands whose output a person reads."""

from transformers.utils import logging


def quiet_transformers() -> None:
    """Silence transformers' progress bars and its notes on layers in this process."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
