"""Run the `firstsight` command as `python -m firstsight`, from the clone in the current folder."""

from firstsight.cli.app import firstsight

firstsight()
