"""Exceptions that are not defects of the code: a mistake that the user can correct, and work that is not finished."""


class UserError(Exception):
    """Report bad input in one line: the place, what was expected, what was found, what to do.

    Stages print that line alone and exit with status 1 (`firstsight.core.stage.main`); other exceptions keep their
    traceback.
    """


class Unfinished(Exception):  # noqa: N818, it is not an error
    """Report that work was stopped from outside and its progress saved. Stages exit with 75, "temporary failure"."""
