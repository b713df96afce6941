"""Push a measured student to the hub, with a model card made from its figures.

    python -m firstsight.publish student-distilled OWNER/NAME          shows what would be pushed, and does nothing
    python -m firstsight.publish student-distilled OWNER/NAME --push   does it; the repository is private if it is new

A model is refused that is not the one that was measured: its stages must be up to date, and what git tracks committed.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.files import link_folder, read_json
from firstsight.core.stage import log, main
from firstsight.publishing.card import model_card

VARIANTS = ("student-distilled", "student-quantized")
METRICS = Path("metrics")


def run() -> None:
    parser = argparse.ArgumentParser(prog="python -m firstsight.publish", description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("repository", help="OWNER/NAME on the hub")
    parser.add_argument("--push", action="store_true", help="push, instead of saying what would be pushed")
    arguments = parser.parse_args()
    folder = Path("models") / arguments.variant
    check(arguments.repository, folder)

    params.load()
    card = model_card(
        arguments.variant,
        **{name: read_json(METRICS / f"{name}.json", "report") for name in ("quality", "performance", "models")},
        data=read_json(Path("data/egoqa/card.json"), "build-egoqa-dataset"),
        parameters=params.PARAMS_FILE.read_text(encoding="utf-8").strip(),
    )
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary)
        link_folder(folder, whole)
        (whole / "README.md").unlink(missing_ok=True)
        (whole / "README.md").write_text(card, encoding="utf-8")
        for path in sorted(whole.iterdir()):
            log.info("%10.3f MB  %s", path.stat().st_size / 1e6, path.name)
        if arguments.push:
            log.info("pushed to %s", push(whole, arguments.repository))
        else:
            print(card)
            log.info("nothing has been pushed; add --push to push this to %s", arguments.repository)


def check(repository: str, folder: Path) -> None:
    """Raise UserError unless the name can be one, and the model is what the committed metrics were measured on."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: expected OWNER/NAME, found {error}; correct it") from None
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a model, found none; dvc repro makes it, dvc pull fetches it")
    if changed := _printed("git", "status", "--porcelain", "--untracked-files=no"):
        files = ", ".join(line[3:] for line in changed.splitlines()[:3])
        raise UserError(f"git: expected everything committed, found changes in {files}; commit them")
    if stale := _printed("dvc", "status", "--quiet", "--json").strip().removeprefix("{}"):
        raise UserError(f"dvc: expected stages up to date, found {stale[:120]}; dvc repro, and commit its metrics")


def _printed(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout:
        raise UserError(f"{words[0]}: expected a clone of the repository, found {done.stderr.strip()[:120]}")
    return done.stdout


def push(folder: Path, repository: str) -> str:
    """Upload the folder as one commit; returns its address.

    Raises:
        UserError: the hub refuses it, or does not answer.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Publish").commit_url
    except (HfHubHTTPError, HTTPError, OSError) as error:
        found = str(error).strip().splitlines()[0]
        raise UserError(
            f"{repository}: expected the hub to take it, found {found}; check HF_TOKEN and the network"
        ) from None


if __name__ == "__main__":
    main(run)
