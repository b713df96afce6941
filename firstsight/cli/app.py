"""The `firstsight` command: its subcommands, `--version`, and one line for a wrong argument."""

import signal
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from firstsight import __version__
from firstsight.cli.ask import ask
from firstsight.cli.card import card
from firstsight.cli.clean_scratch import clean_scratch
from firstsight.cli.demo import demo
from firstsight.cli.plan import plan
from firstsight.cli.publish import publish
from firstsight.cli.repro import repro
from firstsight.cli.start import start
from firstsight.cli.table import table
from firstsight.core.errors import UserError
from firstsight.core.stage import main

# Plain text: boxes and colours belong to no log file. A defect's traceback is Python's own.
app = typer.Typer(
    name="firstsight",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order in which they are used.
for command in (start, plan, repro, table, ask, demo, card, publish, clean_scratch):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"firstsight {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Plan, use and publish models that FirstSight's pipeline distils. The pipeline itself runs with dvc repro.

    Paths in params.yaml are relative to the current folder: run these commands in the root of the repository.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command, given its arguments or those of this process.

    Raises:
        UserError: the command is unknown, an argument is missing, unknown or of the wrong type; a package is missing.
        KeyboardInterrupt: it was interrupted.
    """
    try:
        status = app(arguments, prog_name="firstsight", standalone_mode=False)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        place = context.command_path if context else "firstsight"
        message = " ".join(error.format_message().split()).rstrip(".")
        raise UserError(f"{place}: {message[0].lower()}{message[1:]}; see {place} --help") from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "firstsight"):
            raise
        raise UserError(
            f"{package}: expected a package that this command needs, found it missing; pip install -r requirements.txt"
        ) from None
    if status == 128 + signal.SIGINT:  # typer returns it in place of the exception
        raise KeyboardInterrupt


def firstsight() -> None:
    """Run the command that this process was started with; a user's mistake is one line and status 1."""
    main(run)
