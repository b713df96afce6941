"""Push a measured student to the hub, with a model card made from its figures.

    python -m firstsight.publish student-distilled OWNER/NAME            shows what would be pushed
    python -m firstsight.publish student-distilled OWNER/NAME --push     pushes it; a new repository is private

A model is refused that is not the one that was measured: what git tracks must be committed, and every stage up to date.
"""

import argparse
import tempfile
from pathlib import Path

from firstsight.core.files import link_file, link_folder
from firstsight.core.stage import log, main
from firstsight.publishing import checks
from firstsight.publishing.model_card import VARIANTS, model_card
from firstsight.publishing.push import push
from firstsight.quiet import quiet_transformers
from firstsight.reporting.comparison import size

CARD = "README.md"


def run() -> None:
    parser = argparse.ArgumentParser(prog="python -m firstsight.publish", description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("repository", metavar="OWNER/NAME")
    parser.add_argument("--push", action="store_true", help="push it, instead of showing what would be pushed")
    arguments = parser.parse_args()
    quiet_transformers()
    folder = Path("models") / arguments.variant

    checks.check_name(arguments.repository)
    if arguments.push:
        checks.check_token()
    checks.check_folder(folder)
    card = model_card(arguments.variant, arguments.repository)
    checks.check_committed()
    checks.check_measured()

    # Beside the model, not in it: DVC owns that folder.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".publish.", suffix=".partial") as temporary:
        whole = Path(temporary)
        link_folder(folder, whole)
        # Licences such as Apache's want a copy to come with the weights.
        for licence in Path("models/student").glob("LICENSE*"):
            link_file(licence, whole / licence.name)
        (whole / CARD).write_text(card, encoding="utf-8")
        for path in sorted(whole.iterdir()):
            print(f"{size(path.stat().st_size):>9}  {path.name}")
        print(f"\n{CARD}:\n\n{card}", flush=True)
        if arguments.push:
            log.info("pushed: %s", push(whole, arguments.repository))
        else:
            log.info("nothing has been pushed; PUSH=1, or --push, pushes this to %s", arguments.repository)


if __name__ == "__main__":
    main(run)
