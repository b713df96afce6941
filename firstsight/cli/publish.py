"""firstsight publish: a measured student on the Hugging Face hub."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from firstsight.cli.arguments import Student, check_student

CARD = "README.md"


def publish(
    variant: Student,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The hub repository.")],
    push: Annotated[
        bool, typer.Option("--push", help="Push it; without this, only show what would be pushed.")
    ] = False,
) -> None:
    """Push a measured student to the Hugging Face hub.

    A model card made from its figures goes with it.

    A repository that does not exist is created, private. A model other than the one that was measured is refused:
    what git tracks must be committed, and every stage up to date.
    """
    check_student(variant)
    from firstsight.cli.quiet import quiet_transformers
    from firstsight.core.files import link_file, link_folder
    from firstsight.core.stage import log
    from firstsight.publishing import checks
    from firstsight.publishing import push as hub
    from firstsight.publishing.model_card import model_card
    from firstsight.reporting.text_table import size

    quiet_transformers()
    folder = Path("models") / variant

    checks.check_name(repository)
    if push:
        checks.check_token()
    checks.check_folder(folder)
    card = model_card(variant, repository)
    checks.check_committed()
    checks.check_measured()

    # Next to the model's folder, not in it: DVC owns that folder.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".publish.", suffix=".partial") as temporary:
        whole = Path(temporary)
        link_folder(folder, whole)
        # Licences such as Apache's require a copy to come with the weights.
        for licence in Path("models/student").glob("LICENSE*"):
            link_file(licence, whole / licence.name)
        (whole / CARD).write_text(card, encoding="utf-8")
        for path in sorted(path for path in whole.rglob("*") if path.is_file()):
            print(f"{size(path.stat().st_size):>9}  {path.relative_to(whole)}")
        print(f"\n{CARD}:\n\n{card}", flush=True)
        if push:
            log.info("pushed: %s", hub.push(whole, repository))
        else:
            log.info("nothing has been pushed; PUSH=1, or --push, pushes this to %s", repository)
