"""The exceptions that are no defects: the user can mend it, or it is to be gone on with."""


class UserError(Exception):
    """Bad input. Its message is one line: the place, what was expected, what was found, what to do.

    Stages print it alone and exit with status 1 (`firstsight.core.stage.main`); anything else keeps its traceback.
    """


class Unfinished(Exception):  # noqa: N818, it is no error
    """Stopped from outside after saving what was done. Stages then exit with status 75, "temporary failure"."""
