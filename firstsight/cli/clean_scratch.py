"""firstsight clean-scratch: remove what interrupted stages keep."""


def clean_scratch() -> None:
    """Remove what interrupted stages keep.

    They keep it to resume from. What a process is using stays."""
    from firstsight.core.scratch import clean

    clean()
