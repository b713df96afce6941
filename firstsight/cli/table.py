"""firstsight table: the comparison of variants."""

from typing import Annotated

import typer

from firstsight.core.variants import VARIANTS


def table(
    variants: Annotated[
        list[str] | None, typer.Argument(metavar="VARIANT", help=f"Any of {', '.join(VARIANTS)}. Default: all.")
    ] = None,
) -> None:
    """Compare variants: quality, size, memory and speed.

    Without VARIANT, print the figures in metrics/, which the report stage writes. With some, print them as the
    evaluate stage left them in evaluations/.
    """
    from firstsight.reporting.comparison import show, show_some

    if variants:
        show_some(variants)
    else:
        show()
