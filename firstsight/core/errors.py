"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input. Its message is one line: the place, what was expected, what was found, what to do.

    Stages print it alone and exit with status 1 (`firstsight.core.stage.main`); anything else keeps its traceback.
    """
